from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from framework.nn.transformer import BlockOptions
from framework.tokenizers.decoders.mask_token_vit import MaskTokenViT
from framework.tokenizers.encoders.patch_encoder import PatchEncoder
from framework.tokenizers.encoders.suffix_token_vit import SuffixTokenViT
from framework.tokenizers.heads import PixelShuffleHead
from framework.tokenizers.interface import Decoder, Encoder, ImageSpace, Quantized, Quantizer
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
        (torch.rand(2, 3, 8, 8), r"images must be \(b, 3, 16, 16\), got \(2, 3, 8, 8\); .*resized\(8, 8\) reads 8x8"),
        (torch.rand(2, 3, 25, 1), r"tokenizer.resized\(24, 4\) reads 24x4, the size nearest to theirs that fits"),
        (torch.rand(2, 1, 16, 16), r"images must be \(b, 3, 16, 16\), got \(2, 1, 16, 16\)$"),
        (torch.rand(3, 16, 16), r"images must be \(b, 3, 16, 16\), got \(3, 16, 16\)$"),
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


class Priced(Quantizer):
    """Passes latents on; token i of any image costs i, and 100 i is only reported."""

    dim = 5

    def forward(self, latents: Tensor, generator: torch.Generator | None = None) -> Quantized:
        cost = torch.arange(latents.shape[1]).expand(latents.shape[:2]) + 0 * latents.sum(-1)
        return Quantized(latents, None, {"cost": cost}, {"cents": 100 * cost.detach()})


def test_kept_tokens_alone_pay_and_micro_batches_add_up() -> None:
    tokenizer, images = small_tokenizer(quantizer=Priced()), torch.rand(4, 3, 16, 16)
    lengths = torch.tensor([1, 2, 3, 6])
    result = tokenizer(images, lengths)
    assert result.quantizer_losses["cost"] == (0 + 0.5 + 1 + 2.5) / 4
    assert result.quantizer_metrics["cents"] == 100
    parts = [tokenizer(images[rows], lengths[rows]).quantizer_losses["cost"] for rows in ([0, 1], [2, 3])]
    torch.testing.assert_close(torch.stack(parts).mean(), result.quantizer_losses["cost"])


def test_a_resized_tokenizer_is_another_one() -> None:
    tokenizer = small_tokenizer(encoder={"attention": "latents_causal"})
    tokenizer.encoder.requires_grad_(False)
    other = tokenizer.resized(24, 8)
    assert (other.size, other.image_size, other.training) == ((24, 8), 16, False)
    assert (tokenizer.size, tokenizer.encoder.positions, tokenizer.training) == ((16, 16), (4, 4), True)
    assert other.encoder.positions == (6, 2) and not any(p.requires_grad for p in other.encoder.parameters())
    assert {id(p) for p in tokenizer.parameters()}.isdisjoint(id(p) for p in other.parameters())
    assert other.state_dict().keys() == tokenizer.state_dict().keys()
    back = other.resized(16, 16)
    assert back.decode(back.encode(torch.rand(1, 3, 16, 16))).shape == (1, 3, 16, 16)


@torch.no_grad()
def test_latents_stay_causal_at_another_size() -> None:
    tokenizer = small_tokenizer(encoder={"attention": "latents_causal", "depth": 2}).resized(24, 16)
    images = torch.rand(2, 3, 24, 16)
    before = tokenizer.encode(images).latents
    tokenizer.encoder.latent_tokens[3] = torch.randn(32)
    after = tokenizer.encode(images).latents
    assert torch.equal(before[:, :3], after[:, :3]) and not torch.allclose(before[:, 4], after[:, 4], atol=1e-3)


@torch.no_grad()
def test_spaces_keep_their_grids_at_another_size() -> None:
    images = torch.rand(2, 3, 24, 40)
    for spaces in [(HalfSpace(),), (PixelSpace(), HalfSpace()), (HalfSpace(), PixelSpace())]:
        tokenizer = assemble(*spaces, image_size=32).resized(24, 40)
        assert tokenizer.decode(tokenizer.encode(images)).shape == images.shape


def test_sizes_that_cannot_be_had_are_named() -> None:
    with pytest.raises(ValueError, match="multiple of 4 pixels each way, got 18x3: the nearest is 16x4"):
        small_tokenizer().resized(18, 3)
    with pytest.raises(ValueError, match="2x2 patches are fewer than num_tokens, 6: take larger images"):
        small_tokenizer(encoder_name="PatchEncoder").resized(8, 8)
    rotary = small_tokenizer(encoder_name="PatchEncoder", encoder={"blocks": BlockOptions(rope_base=1e4)})
    with pytest.raises(ValueError, match="rotary positions know rows of 4 patches, got rows of 6: keep the images'"):
        rotary.resized(16, 24)
    with pytest.raises(ValueError, match="4x4 patches are fewer than num_tokens, 17: .* num_tokens of at most 16"):
        PatchEncoder(17, patch_size=4, width=8, in_channels=3, grid_size=(16, 16), out_dim=4)


def test_parts_bound_to_their_size_say_so() -> None:
    class Bound(SuffixTokenViT):
        resize = Encoder.resize

    class Fixed(MaskTokenViT):
        resize = Decoder.resize

    tokenizer = small_tokenizer()
    tokenizer.decoder.__class__ = Fixed
    with pytest.raises(TypeError, match="Fixed writes only the size it was built for: resize or crop the images"):
        tokenizer.resized(8, 8)
    tokenizer.encoder.__class__ = Bound
    with pytest.raises(TypeError, match="Bound reads only the size it was built for: resize or crop the images"):
        tokenizer.resized(8, 8)


@torch.no_grad()
def test_a_patch_encoder_is_told_which_positions_are_kept() -> None:
    values, lengths = torch.rand(3, 3, 16, 16), torch.tensor([1, 4, 6])
    marked = small_tokenizer(encoder_name="PatchEncoder", encoder={"depth": 0}).encoder  # states stay where they are
    same = (marked(values, lengths).latents == marked(values).latents).all(-1)
    assert torch.equal(same, torch.arange(6) < lengths[:, None])
    mixed = small_tokenizer(encoder_name="PatchEncoder").encoder
    assert (mixed(values, lengths).latents[:2, 0] != mixed(values).latents[:2, 0]).all()


@torch.no_grad()
def test_a_patch_encoder_knows_where_patches_are() -> None:
    for blocks in (BlockOptions(), BlockOptions(rope_base=100.0)):
        encoder = small_tokenizer(encoder_name="PatchEncoder", num_tokens=16, encoder={"blocks": blocks}).encoder
        assert (encoder.patch_positions is None) == (blocks.rope_base is not None)
        values = torch.rand(1, 3, 16, 16)
        moved = encoder(values.roll(4, dims=3)).latents
        assert not torch.allclose(moved.sum(1), encoder(values).latents.sum(1), atol=1e-3)
