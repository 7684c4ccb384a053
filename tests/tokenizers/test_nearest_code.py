from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from framework.tokenizers.quantizers import nearest_code
from framework.tokenizers.quantizers.nearest_code import nearest_codes


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def distances(latents: Tensor, codebook: Tensor) -> Tensor:
    """All squared distances, in float64 and without a trick."""
    return (latents.double()[:, None] - codebook.double()).square().sum(-1)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    ("m", "k", "d"),
    [(300, 1, 3), (300, 7, 1), (1, 64, 5), (500, 251, 12), (400, 1024, 12), (90, 4099, 4), (200, 96, 64)],
)
def test_the_plain_form_agrees(monkeypatch: pytest.MonkeyPatch, m: int, k: int, d: int, normalize: bool) -> None:
    monkeypatch.setattr(nearest_code, "SCORES_IN_CACHE", 1 << 13)  # several chunks, the last not full
    latents, codebook = randn(m, d), randn(k, d, seed=1)
    if normalize:
        latents, codebook = F.normalize(latents, dim=1), F.normalize(codebook, dim=1)
    codes = nearest_codes(latents, codebook)
    assert codes.shape == (m,) and codes.dtype == torch.int64
    exact = distances(latents, codebook)
    best, plain = exact.min(1)
    found = exact.gather(1, codes[:, None]).squeeze(1)
    size = latents.double().square().sum(1) + codebook.double().square().sum(1).max()
    assert ((found - best) <= 1e-6 * size).all()  # what float32 cannot tell apart
    second = exact.topk(min(2, k), 1, largest=False).values[:, -1]
    apart = (second - best > 1e-5 * size) | (k == 1)
    assert apart.double().mean() > 0.9 or (normalize and d == 1)  # where codes are equal
    assert torch.equal(codes[apart], plain[apart])


def test_of_equal_codes_the_first() -> None:
    codebook = randn(40, 6)
    assert torch.equal(nearest_codes(codebook, codebook.repeat(5, 1)), torch.arange(40))
    assert nearest_codes(randn(9, 6), torch.zeros(100, 6)).eq(0).all()


def test_no_latents() -> None:
    codes = nearest_codes(torch.zeros(0, 3), randn(50, 3))
    assert codes.shape == (0,) and codes.dtype == torch.int64


def test_latents_that_are_not_finite_get_some_code() -> None:
    latents = randn(8, 4)
    latents[0], latents[1, 2], latents[2, 0], latents[3] = torch.nan, torch.inf, -torch.inf, 3e38
    codebook = randn(37, 4, seed=1)
    codes = nearest_codes(latents, codebook)
    assert codes.min() >= 0 and codes.max() < 37
    assert torch.equal(codes[4:], distances(latents[4:], codebook).argmin(1))


def test_float32_under_autocast_and_for_other_types() -> None:
    latents, codebook = randn(400, 12), randn(512, 12, seed=1)
    codes = nearest_codes(latents, codebook)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest_codes(latents, codebook), codes)
    rounded = latents.bfloat16()
    assert torch.equal(nearest_codes(rounded, codebook), nearest_codes(rounded.float(), codebook))


def test_no_gradient_passes() -> None:
    assert not nearest_codes(randn(4, 3).requires_grad_(), randn(5, 3).requires_grad_()).requires_grad
