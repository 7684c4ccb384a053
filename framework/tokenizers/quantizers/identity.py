"""Continuous tokens: no quantization, optionally normalised.

Shapes: b batch, n tokens, d channels.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from framework.tokenizers.interface import QUANTIZERS, Quantized, Quantizer


@QUANTIZERS.register()
class Identity(Quantizer):
    """Passes latents on as they are, so tokens stay continuous (AdaTok's first form, Semanticist).

    Args:
        dim: channels of a token.
        normalize: ``layer`` standardises each token over its channels without learned scales, which fixes the size of
            tokens for the decoder and for generators (Semanticist); ``none`` leaves them.
    """

    def __init__(self, dim: int = 16, normalize: Literal["layer", "none"] = "layer") -> None:
        super().__init__()
        self.dim = dim
        self.normalize = normalize

    def forward(self, latents: Tensor, generator: torch.Generator | None = None) -> Quantized:
        """Latents ``(b, n, d)`` -> the same shape, in float32 where they are normalised."""
        if self.normalize == "layer":
            latents = F.layer_norm(latents.float(), latents.shape[-1:])
        return Quantized(latents)
