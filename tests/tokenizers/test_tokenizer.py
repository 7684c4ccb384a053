from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from framework.tokenizers.decoders.mask_token_vit import MaskTokenViT
from framework.tokenizers.encoders.suffix_token_vit import SuffixTokenViT
from framework.tokenizers.heads import PixelShuffleHead
from framework.tokenizers.interface import ImageSpace
from framework.tokenizers.masking import NestedTailMasking
from framework.tokenizers.quantizers.identity import Identity
from framework.tokenizers.spaces import PixelSpace
from framework.tokenizers.tokenizer import Tokenizer
from tests.tokenizers.build import small_tokenizer


class HalfSpace(ImageSpace):
    """Pixel-unshuffled pixels: a space with a coarser grid and more channels."""

    channels = 12
    downsampling = 2

    def encode(self, images: Tensor) -> Tensor:
        return torch.nn.functional.pixel_unshuffle(images, 2)

    def decode(self, values: Tensor) -> Tensor:
        return torch.nn.functional.pixel_shuffle(values, 2)


def assemble(input_space: ImageSpace, output_space: ImageSpace | None = None, image_size: int = 16) -> Tokenizer:
    size = {"width": 16, "depth": 1, "num_heads": 2}
    return Tokenizer(
        input_space,
        partial(SuffixTokenViT, num_tokens=4, patch_size=4, **size),
        Identity(3),
        NestedTailMasking(),
        partial(MaskTokenViT, head=PixelShuffleHead, **size),
        output_space,
        image_size=image_size,
    )


def test_encode_takes_one_length_or_one_per_image() -> None:
    tokenizer, images = small_tokenizer(), torch.rand(3, 3, 16, 16)
    assert tokenizer.encode(images).lengths.tolist() == [6, 6, 6]
    assert tokenizer.encode(images, 2).lengths.tolist() == [2, 2, 2]
    assert tokenizer.encode(images, [1, 4, 6]).lengths.tolist() == [1, 4, 6]
    assert tokenizer.encode(images, torch.tensor([1, 4, 6])).latents.shape == (3, 6, 5)


@pytest.mark.parametrize("length", [0, 7, [1, 2], 1.5, [1, 2, 9]])
def test_lengths_that_do_not_fit_are_refused(length: object) -> None:
    with pytest.raises(ValueError, match="length"):
        small_tokenizer().encode(torch.rand(3, 3, 16, 16), length)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(2, 3, 8, 8), r"images must be \(b, 3, 16, 16\), got \(2, 3, 8, 8\)"),
        (torch.zeros(2, 3, 16, 16, dtype=torch.uint8), "got torch.uint8: divide uint8 images by 255"),
        (torch.full((2, 3, 16, 16), 1.5), r"images must lie in \[0, 1\], got values from 1.5 to 1.5"),
        (torch.full((2, 3, 16, 16), float("nan")), r"images must lie in \[0, 1\], got values from nan to nan"),
    ],
)
def test_images_that_do_not_fit_are_refused(images: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small_tokenizer().encode(images)


def test_decode_is_clamped_and_forward_is_not() -> None:
    tokenizer, images = small_tokenizer(), torch.rand(4, 3, 16, 16)
    tokenizer.decoder.head.to_patch.weight.data *= 10
    lengths = torch.tensor([1, 2, 3, 6])
    result = tokenizer(images, lengths)
    decoded = tokenizer.decode(result.tokens)
    assert result.images.amin() < 0 and decoded.amin() == 0 and decoded.amax() == 1
    assert torch.equal(decoded, result.images.clamp(0, 1))


def test_spaces_of_other_grids_and_channels_fit_together() -> None:
    images = torch.rand(2, 3, 32, 32)
    for spaces in [(HalfSpace(),), (PixelSpace(), HalfSpace()), (HalfSpace(), PixelSpace())]:
        tokenizer = assemble(*spaces, image_size=32)
        assert tokenizer.decode(tokenizer.encode(images)).shape == images.shape


def test_sizes_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="image_size 17 is not a multiple of 2.*nearest sizes are 16 and 18"):
        assemble(HalfSpace(), image_size=17)
    with pytest.raises(ValueError, match="patch_size must divide the input grid, got patch_size 4 and 18x18"):
        assemble(PixelSpace(), image_size=18)
    with pytest.raises(ValueError, match="output space's grid of 6 is not a multiple of the encoder's 4 positions"):
        small_patches = partial(SuffixTokenViT, num_tokens=4, patch_size=3, width=16, depth=1, num_heads=2)
        decoder = partial(MaskTokenViT, head=PixelShuffleHead, width=16, depth=1, num_heads=2)
        Tokenizer(PixelSpace(), small_patches, Identity(3), NestedTailMasking(), decoder, HalfSpace(), image_size=12)


def test_continuous_tokens_have_no_codes() -> None:
    with pytest.raises(TypeError, match="Identity has no codes"):
        small_tokenizer().codes_to_tokens(torch.zeros(1, 6, dtype=torch.int64), torch.tensor([6]))


def test_every_parameter_is_trained() -> None:
    tokenizer = small_tokenizer()
    tokenizer(torch.rand(4, 3, 16, 16), torch.tensor([1, 2, 5, 6])).images.square().sum().backward()
    assert [name for name, p in tokenizer.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
