from __future__ import annotations

import pytest
import torch
from einops import rearrange
from torch import Tensor

from framework.evaluation.pca import PrincipalComponents
from tests.evaluation.fakes import orthonormal


def rank_three() -> tuple[Tensor, Tensor]:
    """Images ``(64, 3, 4, 4)`` around grey of exactly three components, and their scores ``(64, 3)``, uncorrelated."""
    scores = orthonormal(64, 4, seed=1)
    scores = scores[:, 1:] - scores[:, 1:].mean(0)
    scores = torch.linalg.qr(scores).Q * torch.tensor([1.2, 0.6, 0.3])
    values = 0.5 + scores @ orthonormal(48, 3, seed=2).T
    return rearrange(values, "b (c h w) -> b c h w", c=3, h=4), scores


def test_errors_are_the_energy_of_the_components_left_out() -> None:
    images, scores = rank_three()
    errors = PrincipalComponents.fit(images.split(10)).errors(images, [1, 2, 3, 48])
    left_out = torch.stack([scores[:, k:].square().sum(1) / 48 for k in (1, 2, 3, 3)], dim=1)
    assert errors.shape == (64, 4)
    torch.testing.assert_close(errors, left_out, atol=1e-7, rtol=1e-4)


def test_basis_is_orthonormal_and_ordered_by_variance() -> None:
    images, _ = rank_three()
    components = PrincipalComponents.fit([images])
    torch.testing.assert_close(components.basis.T @ components.basis, torch.eye(48), atol=1e-5, rtol=0)
    variances = ((rearrange(images, "b c h w -> b (c h w)") - components.mean) @ components.basis).var(0)
    assert variances[:4].tolist() == sorted(variances[:4].tolist(), reverse=True)
    assert components.num_images == 64


def test_reconstructions_are_clamped_like_a_tokenizers() -> None:
    images, _ = rank_three()
    (rebuilt,) = PrincipalComponents.fit([images]).reconstructions(images * 4 - 1.5, [3])
    assert rebuilt.min() == 0 and rebuilt.max() == 1


def test_large_images_and_no_images_are_refused() -> None:
    with pytest.raises(ValueError, match=r"at most 4096 values, got 12288 \(3 x 64 x 64\)"):
        PrincipalComponents.fit([torch.zeros(1, 3, 64, 64)])
    with pytest.raises(ValueError, match="at least one image, got none"):
        PrincipalComponents.fit([])
