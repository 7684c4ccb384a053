"""Discrete tokens without a codebook to learn: each channel is bounded and rounded to a few levels.

Finite scalar quantization (Mentzer et al. 2023).

Shapes: b batch, n tokens, d channels of a token, each with its own number of levels L.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from framework.tokenizers.interface import QUANTIZERS, Quantized, Quantizer
from framework.tokenizers.quantizers.running_standardisation import RunningStandardisation
from framework.tokenizers.quantizers.usage import CodeUsage


class Bound(NamedTuple):
    """How a channel z of a latent becomes a level, and a level a value.

    The level is the whole number nearest to (L - 1) / 2 + half * squash(z + shift), its value (level - zero) / extent.
    """

    squash: Callable[[Tensor], Tensor]
    shift: Tensor
    half: Tensor
    zero: Tensor
    extent: Tensor


def _whole_zero(inverse: Callable[[Tensor], Tensor], stretch: float, levels: Tensor) -> Bound:
    """Zero is a level, so with an even number one level more lies below it than above."""
    half = (levels - 1) * stretch / 2
    zero = levels // 2
    return Bound(torch.tanh, inverse((zero - (levels - 1) / 2) / half), half, zero, zero)


def _symmetric(levels: Tensor) -> Bound:
    """Levels from -1 to 1; the outermost have half the room of the others."""
    half = (levels - 1) / 2
    return Bound(torch.tanh, torch.zeros_like(half), half, half, half)


def _equal_shares(levels: Tensor) -> Bound:
    """The unit Gaussian's distribution function, cut into bins of equal width; values are the bins' middles."""
    return Bound(_erf, torch.zeros_like(levels), levels / 2, (levels - 1) / 2, levels / 2)


def _erf(standard: Tensor) -> Tensor:
    return torch.erf(standard / math.sqrt(2))


BOUNDS: dict[str, Callable[[Tensor], Bound]] = {
    "erf": _equal_shares,
    "atanh": partial(_whole_zero, torch.atanh, 1 + 1e-3),
    "tan": partial(_whole_zero, torch.tan, 1 - 1e-3),
    "symmetric": _symmetric,
}


@QUANTIZERS.register()
class FiniteScalarQuantizer(Quantizer):
    """Each channel is squashed into a range and rounded to one of its levels; gradients pass as if it were not rounded.

    What squashes a channel differs among published forms:

    - ``erf`` first standardises it with running statistics, so that a Gaussian channel of whatever mean and deviation
      uses all its levels equally often and no loss has to see to that. Values are (i + 1/2) / L * 2 - 1.
    - ``atanh`` is FlexTok's and the default of vector-quantize-pytorch: tanh, shifted so that a latent of 0 gives 0.
    - ``tan`` is the listing in the paper (appendix A.1) and ElasticTok: a latent of 0 gives a little less than 0.
    - ``symmetric`` has equally many levels on both sides of 0 (``preserve_symmetry`` of vector-quantize-pytorch; Parker
      et al. 2024, section 3.2).

    Codes are the levels' numbers in mixed radix, the first channel the fastest, as in all of these. With ``atanh`` and
    ``tan`` two levels are lopsided: their border is far below 0, at -3.8 and -1.6.

    Everything is computed in float32, also under autocast. ``erf`` trains with the batch's own statistics: give each
    process a few dozen images at once.

    Args:
        levels: L of each channel; their number is d and their product the vocabulary. The paper advises at least 5.
        bound: what squashes a channel.

    Raises:
        ValueError: if there are no levels, or fewer than two for a channel.
    """

    usage: CodeUsage
    levels: Tensor
    basis: Tensor
    scale: Tensor

    def __init__(
        self, levels: tuple[int, ...] = (8, 5, 5, 5), bound: Literal["erf", "atanh", "tan", "symmetric"] = "erf"
    ) -> None:
        super().__init__()
        if not levels or min(levels) < 2:
            raise ValueError(
                f"levels are whole numbers of at least 2, one for each channel of a token, got {list(levels)}: "
                "[8, 6, 5] has 240 codes, [8, 5, 5, 5] has 1000"
            )
        self.dim = len(levels)
        self.vocabulary: int = math.prod(levels)
        self.usage = CodeUsage(self.vocabulary)
        self.standardise = RunningStandardisation(self.dim) if bound == "erf" else nn.Identity()
        per_channel = torch.tensor(levels)
        self.squash, *numbers = BOUNDS[bound](per_channel)
        self.register_buffer("levels", per_channel, persistent=False)
        self.register_buffer("basis", torch.tensor([1, *levels[:-1]]).cumprod(0), persistent=False)
        self.register_buffer("scale", torch.stack([number.float() for number in numbers]), persistent=False)

    def set_num_tokens(self, num_tokens: int) -> None:
        """``erf`` keeps statistics of each position."""
        if isinstance(self.standardise, RunningStandardisation):
            self.standardise.set_num_tokens(num_tokens)

    def forward(self, latents: Tensor, generator: torch.Generator | None = None) -> Quantized:
        """Latents ``(b, n, d)`` -> values about [-1, 1] float32 and codes.

        Raises:
            ValueError: with ``erf``, if there are more tokens than ``set_num_tokens`` was told.
        """
        shift, half, zero, extent = self.scale
        with torch.autocast(latents.device.type, enabled=False):
            bounded = (self.levels - 1) / 2 + half * self.squash(self.standardise(latents.float()) + shift)
            # What is not a number would be a code out of range; as a latent it goes on, and the trainer tells.
            level = (bounded.detach() + 0.5).floor().nan_to_num().clamp(min=0).minimum(self.levels - 1)
            straight_through = (bounded - bounded.detach()) / extent
            codes = (level.long() * self.basis).sum(-1)
            if self.training and torch.is_grad_enabled():
                self.usage.collect(codes)
            return Quantized((level - zero) / extent + straight_through, codes)

    def codes_to_latents(self, codes: Tensor) -> Tensor:
        _, _, zero, extent = self.scale
        return (codes[..., None] // self.basis % self.levels - zero) / extent

    def latents_to_codes(self, latents: Tensor) -> Tensor:
        _, _, zero, extent = self.scale
        return ((latents * extent + zero).round().long() * self.basis).sum(-1)
