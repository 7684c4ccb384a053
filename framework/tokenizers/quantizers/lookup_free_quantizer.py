"""Discrete tokens of bits: the sign of each channel.

Lookup-free quantization (MAGVIT-2, Yu et al. 2023).

Shapes: b batch, n tokens, d channels of a token, one bit each.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from framework.tokenizers.interface import QUANTIZERS, Quantized, Quantizer
from framework.tokenizers.quantizers.usage import CodeUsage

MAX_BITS = 24


@QUANTIZERS.register()
class LookupFreeQuantizer(Quantizer):
    """Each channel becomes -1 or 1 by its sign; gradients pass as if it did not.

    A bit is 1 with probability sigmoid(4z), the softmax of minus the squared distances from z to 1 and to -1. The
    entropy penalty wants each token sure of its bits and all tokens together to use both values of each. Its mean over
    tokens is E[H(p)] - H(E[p]), where H is in nats and summed over bits. For a single token that sum is exact. For all
    tokens together it is the upper bound of binary spherical quantization (Zhao et al. 2024), so balanced
    bits that depend on each other cost nothing.

    The average probabilities are those of all tokens that this process sees at once, dropped ones too. MAGVIT-2 divides
    distances by a temperature of 0.01, at which latents further than about 0.02 from 0 have no gradient of entropy;
    here it is 1.

    Codes are binary numbers, the first channel the highest bit. Everything is computed in float32, also under autocast.

    Args:
        dim: d, bits of a token; the vocabulary is 2 ** d.
        commitment: weight of the mean squared distance of a latent's channels from their signs.
        entropy: weight of the entropy penalty.

    Raises:
        ValueError: if ``dim`` is not from 1 to 24; the use of each code is counted.
    """

    usage: CodeUsage
    place: Tensor

    def __init__(self, dim: int = 10, commitment: float = 0.25, entropy: float = 0.1) -> None:
        super().__init__()
        if not 1 <= dim <= MAX_BITS:
            raise ValueError(f"dim is the number of bits of a token, from 1 to {MAX_BITS}, got {dim}")
        self.dim = dim
        self.vocabulary: int = 2**dim
        self.commitment = commitment
        self.entropy = entropy
        self.usage = CodeUsage(self.vocabulary)
        self.register_buffer("place", 2 ** torch.arange(dim).flip(0), persistent=False)

    def forward(self, latents: Tensor, generator: torch.Generator | None = None) -> Quantized:
        """Latents ``(b, n, d)`` -> -1 and 1 in float32, codes, and the losses ``commitment`` and ``entropy``."""
        with torch.autocast(latents.device.type, enabled=False):
            latents = latents.float()
            bits = latents.detach() > 0
            signs = bits * 2.0 - 1
            codes = (bits * self.place).sum(-1)
            if self.training and torch.is_grad_enabled():
                self.usage.collect(codes)
            losses = {
                "commitment": self.commitment * (latents - signs).square().mean(-1),
                "entropy": self.entropy * _entropy_penalty(4 * latents),
            }
            return Quantized(signs + (latents - latents.detach()), codes, losses)

    def codes_to_latents(self, codes: Tensor) -> Tensor:
        return (codes[..., None] // self.place % 2) * 2.0 - 1

    def latents_to_codes(self, latents: Tensor) -> Tensor:
        return ((latents > 0) * self.place).sum(-1)


def _entropy_penalty(logits: Tensor) -> Tensor:
    """Logits of bits ``(b, n, d)`` -> nats ``(b, n)``: each token's entropy minus its cross entropy with the average.

    The mean of the cross entropies is the entropy of the average. Since that is its minimum over all averages, the
    average needs no gradient, and a token that carries no loss gets none.
    """
    share = logits.sigmoid()
    average = share.detach().mean((0, 1)).logit(1e-6).expand_as(logits)
    own, others = (F.binary_cross_entropy_with_logits(at, share, reduction="none") for at in (logits, average))
    return (own - others).sum(-1)
