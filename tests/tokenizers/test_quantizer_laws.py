"""The laws of quantizers, over every registered one."""

from __future__ import annotations

import pytest
import torch

from framework.tokenizers.interface import QUANTIZERS
from framework.tokenizers.quantizers.identity import Identity

CASES = [(name, QUANTIZERS.get(name)) for name, _ in QUANTIZERS]


@pytest.mark.parametrize(("name", "quantizer_class"), CASES)
def test_shape_gradient_and_codes(name: str, quantizer_class: type) -> None:
    quantizer = quantizer_class()
    latents = torch.randn(4, 6, quantizer.dim, requires_grad=True)
    result = quantizer(latents)
    assert result.latents.shape == latents.shape and result.latents.dtype == torch.float32
    (result.latents * torch.randn_like(latents)).sum().backward()
    assert latents.grad is not None and latents.grad.abs().sum() > 0
    if quantizer.vocabulary is None:
        assert result.codes is None
        with pytest.raises(TypeError, match="has no codes"):
            quantizer.codes_to_latents(torch.zeros(4, 6, dtype=torch.int64))
    else:
        torch.testing.assert_close(quantizer.codes_to_latents(result.codes), result.latents)
        every_code = torch.arange(quantizer.vocabulary)[None]
        assert torch.equal(quantizer(quantizer.codes_to_latents(every_code)).codes, every_code)


def test_identity_normalises_each_token() -> None:
    latents = torch.randn(2, 3, 16) * 5 + 2
    normalised = Identity(16)(latents).latents
    torch.testing.assert_close(normalised.mean(-1), torch.zeros(2, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(normalised.std(-1, correction=0), torch.ones(2, 3), atol=1e-4, rtol=0)
    assert torch.equal(Identity(16, normalize="none")(latents).latents, latents)
    assert Identity(16)(latents.bfloat16()).latents.dtype == torch.float32
