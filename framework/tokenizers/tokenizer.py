"""The tokenizer: an input space, an encoder, a quantizer, a decoder and an output space, put together.

Shapes: b batch, h and w pixels, n tokens, d channels of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from framework.config.registry import Factory, Registry
from framework.tokenizers.interface import Contract, Decoder, Encoder, ImageSpace, MaskingSchedule, Quantizer
from framework.tokens import Tokens


@dataclass(frozen=True)
class Reconstruction:
    """What a training pass returns: images ``(b, 3, h, w)`` in about [0, 1], the tokens, the quantizer's losses."""

    images: Tensor
    tokens: Tokens
    quantizer_losses: dict[str, Tensor]


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
        self.input_space = input_space
        self.output_space = input_space if output_space is None else output_space
        grid = _grid_side(self.input_space, image_size)
        self.encoder = encoder(in_channels=input_space.channels, grid_size=(grid, grid), out_dim=quantizer.dim)
        self.quantizer = quantizer
        self.masking = masking
        masking.check(self.encoder.num_tokens)
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

    def forward(self, images: Tensor, lengths: Tensor) -> Reconstruction:
        """Encode, keep ``lengths (b,)`` tokens, decode; gradients pass and nothing is clamped."""
        tokens, losses = self._encode(images, lengths)
        return Reconstruction(self.output_space.decode(self.decoder(tokens)), tokens, losses)

    def encode(self, images: Tensor, length: int | Sequence[int] | Tensor | None = None) -> Tokens:
        """Images to tokens.

        Args:
            images: ``(b, 3, h, w)`` float in [0, 1].
            length: tokens kept: one number, one per image, or ``None`` for all n.

        Raises:
            ValueError: if the images' shape or range or a length does not fit.
        """
        self._check_images(images)
        return self._encode(images, self._lengths(len(images), length, images.device))[0]

    def decode(self, tokens: Tokens) -> Tensor:
        """Tokens to images ``(b, 3, h, w)`` in [0, 1], from each sample's kept tokens only."""
        return self.output_space.decode(self.decoder(tokens)).clamp(0, 1)

    def codes_to_tokens(self, codes: Tensor, lengths: Tensor) -> Tokens:
        """Codes ``(b, n)`` of a discrete tokenizer, with lengths ``(b,)``, as tokens ready to decode."""
        return Tokens(self.quantizer.codes_to_latents(codes), lengths, codes)

    def _encode(self, images: Tensor, lengths: Tensor) -> tuple[Tokens, dict[str, Tensor]]:
        encoding = self.encoder(self.input_space.encode(images), lengths)
        quantized = self.quantizer(encoding.latents)
        return Tokens(quantized.latents, lengths, quantized.codes), quantized.losses

    def _check_images(self, images: Tensor) -> None:
        expected = (3, self.image_size, self.image_size)
        if images.ndim != 4 or images.shape[1:] != expected:
            raise ValueError(f"images must be (b, 3, {self.image_size}, {self.image_size}), got {tuple(images.shape)}")
        if not images.is_floating_point():
            raise ValueError(f"images must be float in [0, 1], got {images.dtype}: divide uint8 images by 255")
        low, high = images.detach().aminmax()
        if not (low >= 0 and high <= 1):
            raise ValueError(f"images must lie in [0, 1], got values from {low:.4g} to {high:.4g}")

    def _lengths(self, batch_size: int, length: int | Sequence[int] | Tensor | None, device: torch.device) -> Tensor:
        wanted = torch.as_tensor(self.num_tokens if length is None else length)
        if wanted.ndim > 1 or wanted.is_floating_point() or (wanted.ndim == 1 and len(wanted) != batch_size):
            raise ValueError(f"length must be one integer or {batch_size}, one per image; got {length}")
        if wanted.amin() < 1 or wanted.amax() > self.num_tokens:
            raise ValueError(f"a length is from 1 to {self.num_tokens} tokens, got {wanted.tolist()}")
        return wanted.long().expand(batch_size).to(device)


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
