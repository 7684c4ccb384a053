"""The parts of a tokenizer: what each promises, and the registry where its components stand.

Data flows one way: image -> ImageSpace -> Encoder -> Quantizer -> Tokens -> Decoder (with its Head) -> ImageSpace ->
image.

Shapes: b batch, c channels of a space, h and w its grid, n tokens, d channels of a token, f image features, p positions
(patches) of a transformer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from framework.config.registry import Registry
from framework.tokenizers.quantizers.usage import CodeUsage
from framework.tokens import Tokens

Contract = Literal["truncate", "length_conditioned", "growing"]


@dataclass(frozen=True)
class SpaceReconstruction:
    """What training a space's own networks reads.

    Args:
        images: ``(b, 3, height, width)`` in about [0, 1].
        losses: what the bottleneck costs, named and weighted scalars.
        metrics: detached scalars that are only logged.
    """

    images: Tensor
    losses: dict[str, Tensor]
    metrics: dict[str, Tensor] = field(default_factory=dict)


class ImageSpace(nn.Module, ABC):
    """Where a tokenizer reads or writes images: pixels, or a frozen autoencoder's latents.

    Attributes:
        channels: c of the space.
        downsampling: pixels per step of the space's grid, so h = image height / downsampling.
        is_lossless: whether images come back as they were.
    """

    channels: int
    downsampling: int
    is_lossless: bool = False

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Images ``(b, 3, height, width)`` in [0, 1] -> values ``(b, c, h, w)`` of about unit scale."""

    @abstractmethod
    def decode(self, values: Tensor) -> Tensor:
        """Values ``(b, c, h, w)`` -> images in [0, 1], overshoot left in, since clamping would stop gradients."""

    def target(self, images: Tensor) -> Tensor:
        """What losses on predicted values compare them with: the images' own values, unless a space has codes."""
        return self.encode(images)

    def from_target(self, target: Tensor) -> Tensor:
        """The values ``(b, c, h, w)`` of images of which only the ``target`` was kept."""
        return target

    def reconstruct(self, images: Tensor, generator: torch.Generator) -> SpaceReconstruction:
        """Images ``(b, 3, height, width)`` in [0, 1] through the bottleneck and back, with its noise and its losses.

        Raises:
            TypeError: if the space has no networks to train.
        """
        raise TypeError(f"{type(self).__name__} has no networks to train: take AutoencoderKL or a VQGAN")


@dataclass(frozen=True)
class Encoding:
    """What an encoder returns: latents ``(b, n, out_dim)`` for the quantizer, and pooled image features ``(b, f)``."""

    latents: Tensor
    features: Tensor


class Encoder(nn.Module, ABC):
    """Turns a grid of values into an ordered sequence of latent tokens.

    Keyword-only arguments from the tokenizer: ``in_channels``, ``grid_size`` (rows and columns of the input space) and
    ``out_dim`` (channels of a latent, the quantizer's ``input_dim``).

    Attributes:
        contract: ``truncate`` where one encoding serves every length, ``length_conditioned`` where each length
            needs its own pass, ``growing`` where passes add tokens. Only tokens of the first kind may be read at other
            lengths (``Tokens.with_lengths``) than those they were encoded for.
        num_tokens: n, the longest sequence.
        positions: rows and columns of the grid of patches that the decoder rebuilds.
        feature_dim: f.
    """

    contract: Contract
    num_tokens: int
    positions: tuple[int, int]
    feature_dim: int

    @abstractmethod
    def forward(self, values: Tensor, lengths: Tensor | None = None) -> Encoding:
        """Values ``(b, c, h, w)`` -> latents and features; only length-conditioned encoders read ``lengths (b,)``.

        Without lengths, all n tokens are kept.
        """

    def resize(self, grid_size: tuple[int, int]) -> None:
        """Read another grid of the input space from now on, which changes ``positions``; the tokens stay as many.

        Raises:
            ValueError: if the grid does not fit.
            TypeError: if an encoder of this class reads only the grid that it was built for.
        """
        raise TypeError(f"{type(self).__name__} reads only the size it was built for: resize or crop the images")


@dataclass(frozen=True)
class Quantized:
    """What a quantizer makes of latents.

    Args:
        latents: what the decoder reads, ``(b, n, d)``.
        codes: ``(b, n)``; ``None`` where tokens are continuous.
        losses: named and weighted, one number per token, ``(b, n)``; training minimises their means over kept tokens.
        metrics: detached numbers per token, ``(b, n)``, whose means over kept tokens are only logged.
    """

    latents: Tensor
    codes: Tensor | None = None
    losses: dict[str, Tensor] = field(default_factory=dict)
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Quantizer(nn.Module, ABC):
    """The bottleneck of a token.

    Attributes:
        dim: d, channels of a token.
        vocabulary: number of codes, ``None`` where tokens are continuous.
        usage: counts codes in training; ``None`` where tokens are continuous.
    """

    dim: int
    vocabulary: int | None = None

    def __init__(self) -> None:
        super().__init__()
        self.usage: CodeUsage | None = None  # not of the class, where it would hide the module's

    @property
    def input_dim(self) -> int:
        """Channels of the latents that the encoder must give; d unless a quantizer reads more than it passes on."""
        return self.dim

    @abstractmethod
    def forward(self, latents: Tensor, generator: torch.Generator | None = None) -> Quantized:
        """Latents ``(b, n, input_dim)`` -> what the decoder reads; gradients pass (straight-through where discrete).

        ``generator`` is where a quantizer with noise draws it from. Without one, as when a tokenizer is used, there is
        no noise; a quantizer without noise leaves the generator as it is.
        """

    def set_num_tokens(self, num_tokens: int) -> None:  # noqa: B027 - most treat every position alike
        """Told how many tokens the encoder makes, before any image, for what is kept of each position."""

    def codes_to_latents(self, codes: Tensor) -> Tensor:
        """Codes ``(b, n)`` int64 -> latents ``(b, n, d)`` float32.

        Raises:
            TypeError: where tokens are continuous and there are no codes.
        """
        raise TypeError(f"{type(self).__name__} has no codes: its tokens are continuous, pass latents instead")

    def latents_to_codes(self, latents: Tensor) -> Tensor:
        """The way back: latents ``(b, n, d)`` that are codes' own, as ``forward`` gives them -> codes ``(b, n)`` int64.

        Raises:
            TypeError: where tokens are continuous and there are no codes.
        """
        raise TypeError(f"{type(self).__name__} has no codes: its tokens are continuous, pass latents instead")


class MaskingSchedule(ABC):
    """How many tokens of each image survive a training step."""

    def check(self, num_tokens: int) -> None:  # noqa: B027 - most schedules fit any number
        """Told how many tokens the encoder makes, before training.

        Raises:
            ValueError: if the schedule does not fit that.
        """

    @abstractmethod
    def lengths(
        self, batch_size: int, num_tokens: int, progress: float, generator: torch.Generator
    ) -> Tensor:
        """Lengths ``(b,)`` int64 from 1 to ``num_tokens``, on the CPU; ``progress`` of training is in [0, 1].

        The same generator state gives the same lengths.
        """


class Decoder(nn.Module, ABC):
    """Rebuilds the values of a grid from the kept tokens only.

    Keyword-only arguments from the tokenizer: ``token_dim`` (d), ``num_tokens`` (n), ``positions`` (the encoder's),
    ``out_channels`` (c of the output space) and ``patch_size`` (output grid / positions).
    """

    @abstractmethod
    def forward(self, tokens: Tokens) -> Tensor:
        """Tokens -> values ``(b, c, h, w)`` of the output space."""

    def resize(self, positions: tuple[int, int]) -> None:
        """Rebuild another grid of patches from now on.

        Raises:
            TypeError: if a decoder of this class writes only the grid that it was built for.
        """
        raise TypeError(f"{type(self).__name__} writes only the size it was built for: resize or crop the images")

    def merged(self, length: int) -> Decoder:
        """A copy without adapters, for tokens whose lengths fall in the same range as ``length``, and no others.

        Raises:
            ValueError: if no token sequence has that length.
            TypeError: if the decoder has no adapters.
        """
        raise TypeError(f"{type(self).__name__} has no adapters to merge: its weights are the same for every length")


class Head(nn.Module, ABC):
    """The decoder's last step, from states at positions to values.

    Keyword-only arguments from the decoder: ``width``, ``out_channels`` and ``patch_size``.
    """

    @abstractmethod
    def forward(self, states: Tensor, positions: tuple[int, int], route: Tensor | None = None) -> Tensor:
        """States ``(b, p, width)`` at a grid of ``positions`` -> values ``(b, c, h, w)``.

        ``route (b,)`` int64, for the linear layers (``nn.transformer.Linear``), says which head of their adapters each
        sample takes; there is one only where one of the head's layers has an adapter.
        """


@dataclass(frozen=True)
class AllocationRequest:
    """What a rule may know of the images whose lengths it chooses.

    Args:
        features: the encoder's pooled features, ``(b, f)``, from the one encoding that is made anyway.
        images: ``(b, 3, h, w)`` in [0, 1].
        reconstruct: rows ``(r,)`` int64 of the batch and a length for each, ``(r,)`` int64 -> images ``(r, 3, h, w)``
            in [0, 1]. Every row of every call is one trial: a pass of the decoder and, where the tokenizer encodes anew
            for each length, one of the encoder.
        encoder_passes_per_trial: 0 where one encoding serves every length, else 1.
        keys: one name per image where they have names, for rules that read a table.
    """

    features: Tensor
    images: Tensor
    reconstruct: Callable[[Tensor, Tensor], Tensor]
    encoder_passes_per_trial: int = 0
    keys: Sequence[str] | None = None


@dataclass(frozen=True)
class Allocation:
    """How many tokens each image keeps, and what the decision cost.

    Args:
        lengths: ``(b,)`` int64, each one of the rule's budgets.
        encoder_passes: of each image on average, spent on the decision alone: neither the encoding that the features
            come from counts, nor one at the chosen length.
        decoder_passes: likewise; the final decoding does not count.
    """

    lengths: Tensor
    encoder_passes: float = 0.0
    decoder_passes: float = 0.0


class AllocationPolicy(nn.Module, ABC):
    """A rule that chooses how many tokens each image keeps, among candidate budgets.

    Keyword-only arguments from what owns it: ``num_tokens`` (n, the longest sequence) and ``feature_dim`` (f).

    Attributes:
        budgets: the lengths that it may choose, increasing, from 1 to n.
    """

    budgets: tuple[int, ...]

    @abstractmethod
    def forward(self, request: AllocationRequest) -> Allocation:
        """Choose; no gradient passes."""


SPACES = Registry("space", ImageSpace)
ENCODERS = Registry("encoder", Encoder)
QUANTIZERS = Registry("quantizer", Quantizer)
MASKING = Registry("masking", MaskingSchedule)
DECODERS = Registry("decoder", Decoder)
HEADS = Registry("head", Head)
POLICIES = Registry("policy", AllocationPolicy)
