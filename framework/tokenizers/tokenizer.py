"""The tokenizer: an input space, an encoder, a quantizer, a decoder and an output space, put together.

Shapes: b batch, h and w pixels, n tokens, d channels of a token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from framework.config.registry import Factory, Registry
from framework.tokenizers.interface import (
    Contract,
    Decoder,
    Encoder,
    ImageSpace,
    MaskingSchedule,
    Quantized,
    Quantizer,
)
from framework.tokens import Tokens


@dataclass(frozen=True)
class Reconstruction:
    """What a training pass returns.

    Args:
        values: what the decoder predicts, ``(b, c, h, w)`` of the output space.
        tokens: what it was predicted from.
        space: the output space.
        quantizer_losses: scalars by name: the mean over each image's kept tokens, then over images. Dropped tokens
            carry nothing and pay nothing; TiTok has none, and One-D-Piece charges all N whatever it drops.
        quantizer_metrics: the same means of what the quantizer only reports.
    """

    values: Tensor
    tokens: Tokens
    space: ImageSpace
    quantizer_losses: dict[str, Tensor]
    quantizer_metrics: dict[str, Tensor]

    @cached_property
    def images(self) -> Tensor:
        """``(b, 3, h, w)`` in about [0, 1]; decoded when first asked for, which losses on values need not."""
        return self.space.decode(self.values)


class Tokenizer(nn.Module):
    """Images to short, ordered token sequences and back.

    Args:
        input_space: where images are read.
        encoder: makes n tokens of an image.
        quantizer: the bottleneck of a token; its ``dim`` is d.
        masking: how many tokens of each image training keeps.
        decoder: rebuilds an image from the kept tokens.
        output_space: where images are written; ``null`` for the input space.
        image_size: side of the images in pixels.

    Attributes:
        size: height and width of the images; other than ``image_size`` only in what ``resized`` returns.

    Raises:
        ValueError: if spaces and patches do not fit the image, or the masking schedule not the encoder's tokens.
    """

    def __init__(
        self,
        input_space: ImageSpace,
        encoder: Factory[Encoder],
        quantizer: Quantizer,
        masking: MaskingSchedule,
        decoder: Factory[Decoder],
        output_space: ImageSpace | None = None,
        *,
        image_size: int,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.size = (image_size, image_size)
        self.input_space = input_space
        self.output_space = input_space if output_space is None else output_space
        grid = _grid_side(self.input_space, image_size)
        self.encoder = encoder(in_channels=input_space.channels, grid_size=(grid, grid), out_dim=quantizer.input_dim)
        self.quantizer = quantizer
        self.masking = masking
        masking.check(self.encoder.num_tokens)
        quantizer.set_num_tokens(self.encoder.num_tokens)
        rows = self.encoder.positions[0]
        patch_size, rest = divmod(_grid_side(self.output_space, image_size), rows)
        if rest:
            raise ValueError(
                f"the output space's grid of {_grid_side(self.output_space, image_size)} is not a multiple of the "
                f"encoder's {rows} positions: change encoder.patch_size or the output space"
            )
        self.decoder = decoder(
            token_dim=quantizer.dim,
            num_tokens=self.encoder.num_tokens,
            positions=self.encoder.positions,
            out_channels=self.output_space.channels,
            patch_size=patch_size,
        )

    @property
    def num_tokens(self) -> int:
        """n, the longest token sequence."""
        return self.encoder.num_tokens

    @property
    def token_dim(self) -> int:
        """d, channels of a token."""
        return self.quantizer.dim

    @property
    def contract(self) -> Contract:
        """What serves another length: the same encoding truncated, or another pass; see ``Encoder.contract``."""
        return self.encoder.contract

    def draw_lengths(self, batch_size: int, progress: float, generator: torch.Generator) -> Tensor:
        """The masking schedule's lengths ``(b,)`` int64 for a training step at ``progress`` in [0, 1]."""
        return self.masking.lengths(batch_size, self.num_tokens, progress, generator)

    def forward(self, images: Tensor, lengths: Tensor, generator: torch.Generator | None = None) -> Reconstruction:
        """Encode, keep ``lengths (b,)`` tokens, decode; gradients pass and nothing is clamped.

        The quantizer's noise, if it has any, is drawn from ``generator``; without one there is none.
        """
        return self.reconstruct(self.input_space.encode(images), lengths, generator)

    def reconstruct(self, values: Tensor, lengths: Tensor, generator: torch.Generator | None = None) -> Reconstruction:
        """``forward`` of images whose values ``(b, c, h, w)`` in the input space are known."""
        tokens, quantized, _ = self._encode(values, lengths, generator)
        losses, metrics = (_means_over_kept(numbers, tokens) for numbers in (quantized.losses, quantized.metrics))
        return Reconstruction(self.decoder(tokens), tokens, self.output_space, losses, metrics)

    def encode(self, images: Tensor, length: int | Sequence[int] | Tensor | None = None) -> Tokens:
        """Images to tokens.

        Args:
            images: ``(b, 3, h, w)`` float in [0, 1].
            length: tokens kept: one number, one per image, or ``None`` for all n.

        Raises:
            ValueError: if the images' shape or range or a length does not fit.
        """
        return self.encode_with_features(images, length)[0]

    def encode_with_features(
        self, images: Tensor, length: int | Sequence[int] | Tensor | None = None
    ) -> tuple[Tokens, Tensor]:
        """``encode``, and the encoder's pooled image features ``(b, f)`` of the same pass, which policies read."""
        self._check_images(images)
        values = self.input_space.encode(images)
        tokens, _, features = self._encode(values, self._lengths(len(images), length, images.device))
        return tokens, features

    def decode(self, tokens: Tokens) -> Tensor:
        """Tokens to images ``(b, 3, h, w)`` in [0, 1], from each sample's kept tokens only."""
        return self.output_space.decode(self.decoder(tokens)).clamp(0, 1)

    def codes_to_tokens(self, codes: Tensor, lengths: Tensor) -> Tokens:
        """Codes ``(b, n)`` of a discrete tokenizer, with lengths ``(b,)``, as tokens ready to decode."""
        return Tokens(self.quantizer.codes_to_latents(codes), lengths, codes)

    def resized(self, height: int, width: int) -> Tokenizer:
        """A copy in eval mode that reads and writes images of another size, from as many tokens.

        Tables of positions are resized bicubically; every other weight is copied, so that the two tokenizers have
        nothing in common. Nothing is trained, and a model that has seen one size only does badly at others: AdaTok's
        small one makes three times the error at 48x32 that it makes at its own 32x32. Unless the copy is trained
        further, tiles, or images scaled to the trained size and back, are better.

        Args:
            height: in pixels, a multiple of the pixels that a position of the encoder covers.
            width: likewise.

        Raises:
            ValueError: if the encoder's positions cannot cover the size; names the nearest that fits.
            TypeError: if the encoder or the decoder is bound to the size it was built for.
        """
        if (height, width) != (nearest := self._nearest_size(height, width)):
            raise ValueError(
                f"a size must be a multiple of {self.size[0] // self.encoder.positions[0]} pixels each way, got "
                f"{height}x{width}: the nearest is {nearest[0]}x{nearest[1]}"
            )
        copy = deepcopy(self).eval()
        if copy.size != (height, width):
            copy.size = (height, width)
            scale = self.input_space.downsampling
            copy.encoder.resize((height // scale, width // scale))
            copy.decoder.resize(copy.encoder.positions)
        return copy

    def merged(self, length: int) -> Tokenizer:
        """A copy in eval mode whose decoder has the adapters of one range of lengths folded into its weights.

        It decodes tokens of the lengths in the range of ``length`` as this tokenizer does, at the speed of one without
        adapters, and refuses others.

        Raises:
            ValueError: if ``length`` is not from 1 to n.
            TypeError: if the decoder has no adapters.
        """
        copy = deepcopy(self).eval()
        copy.decoder = copy.decoder.merged(length)
        return copy

    def _encode(
        self, values: Tensor, lengths: Tensor, generator: torch.Generator | None = None
    ) -> tuple[Tokens, Quantized, Tensor]:
        encoding = self.encoder(values, lengths)
        quantized = self.quantizer(encoding.latents, generator)
        return Tokens(quantized.latents, lengths, quantized.codes), quantized, encoding.features

    def _nearest_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width that whole positions of the encoder cover."""
        pixels = self.size[0] // self.encoder.positions[0]
        rows, columns = (max(1, round(side / pixels)) for side in (height, width))
        return rows * pixels, columns * pixels

    def _check_images(self, images: Tensor) -> None:
        if images.ndim != 4 or images.shape[1:] != (3, *self.size):
            height, width = self.size
            message = f"images must be (b, 3, {height}, {width}), got {tuple(images.shape)}"
            if images.ndim == 4 and images.shape[1] == 3:
                near = self._nearest_size(*images.shape[2:])
                message += f"; tokenizer.resized{near} reads {near[0]}x{near[1]}, the size nearest to theirs that fits"
            raise ValueError(message)
        if not images.is_floating_point():
            raise ValueError(f"images must be float in [0, 1], got {images.dtype}: divide uint8 images by 255")
        low, high = images.detach().aminmax()
        if not (low >= 0 and high <= 1):
            raise ValueError(f"images must lie in [0, 1], got values from {low:.4g} to {high:.4g}")

    def _lengths(self, batch_size: int, length: int | Sequence[int] | Tensor | None, device: torch.device) -> Tensor:
        if isinstance(length, str):
            raise ValueError(
                f"length must be integers, got '{length}'. Only AdaptiveTokenizer(tokenizer, policy) of "
                "framework.allocation takes 'auto', where an allocation policy chooses each image's length"
            )
        wanted = torch.as_tensor(self.num_tokens if length is None else length)
        if wanted.ndim > 1 or wanted.is_floating_point() or (wanted.ndim == 1 and len(wanted) != batch_size):
            raise ValueError(f"length must be one integer or {batch_size}, one per image; got {length}")
        if wanted.amin() < 1 or wanted.amax() > self.num_tokens:
            raise ValueError(f"a length is from 1 to {self.num_tokens} tokens, got {wanted.tolist()}")
        return wanted.long().expand(batch_size).to(device)


def _means_over_kept(values: Mapping[str, Tensor], tokens: Tokens) -> dict[str, Tensor]:
    """Values ``(b, n)`` by name -> means. Each image counts the same, so micro-batches add up to the whole batch."""
    dropped = ~tokens.mask
    return {name: (value.masked_fill(dropped, 0).sum(1) / tokens.lengths).mean() for name, value in values.items()}


def _grid_side(space: ImageSpace, image_size: int) -> int:
    side, rest = divmod(image_size, space.downsampling)
    if rest:
        raise ValueError(
            f"image_size {image_size} is not a multiple of {space.downsampling}, by which {type(space).__name__} "
            f"downsamples: the nearest sizes are {side * space.downsampling} and {(side + 1) * space.downsampling}"
        )
    return side


TOKENIZERS = Registry("tokenizer", Tokenizer)
TOKENIZERS.register(Tokenizer)
