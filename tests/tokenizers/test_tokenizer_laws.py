"""The laws that every decoder, encoder and space keeps, over every registered component."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from einops import reduce

from framework.nn.transformer import BlockOptions
from framework.tokenizers.decoders.dropping import DROP_MODES
from framework.tokenizers.decoders.multi_head_lora import MultiHeadLoRA
from framework.tokenizers.interface import DECODERS, ENCODERS, HEADS, SPACES, Head
from framework.tokenizers.tokenizer import Tokenizer
from framework.tokens import Tokens
from tests.stir import stirred
from tests.tokenizers.build import small_tokenizer

LENGTHS = torch.tensor([1, 2, 3, 6, 6])
IMAGES = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))

# What each registered part needs beside its defaults to be built small; a newcomer without an entry takes its defaults.
ROTARY = BlockOptions(norm="rms", mlp="swiglu", bias=False, rope_base=1e4)
ENCODER_ARGUMENTS: dict[str, list[dict[str, object]]] = {
    "SuffixTokenViT": [
        {},
        {"attention": "latents_causal"},
        {"readout": "interleaved"},
        {"attention": "latents_causal", "blocks": BlockOptions(input_norm=True, registers=2)},
    ],
    "PatchEncoder": [{}, {"blocks": ROTARY}],
}
HEAD_ARGUMENTS: dict[str, list[dict[str, Any]]] = {
    "PixelShuffleHead": [{}, {"refine_channels": 4}, {"smooth": True}]
}
CONVOLUTIONAL = {"width": 32, "multipliers": (1, 2), "num_res_blocks": 1}
SPACE_ARGUMENTS: dict[str, dict[str, Any]] = {
    "AutoencoderKL": CONVOLUTIONAL | {"attention_resolutions": (), "latent_channels": 4},
    "TamingVQGAN": CONVOLUTIONAL | {"attention_resolutions": (), "num_codes": 20, "dim": 8},
    "MaskGITVQGAN": CONVOLUTIONAL | {"num_codes": 20, "dim": 8},
}
LORA: dict[str, object] = {"lora": MultiHeadLoRA(ranges=[2, 5, 6], rank=2)}
DECODER_ARGUMENTS: dict[str, list[dict[str, object]]] = {
    "MaskTokenViT": [{"drop_mode": mode} | lora for mode in DROP_MODES for lora in ({}, LORA)]
    + [{"drop_mode": "key_padding", "blocks": BlockOptions(input_norm=True, registers=2)}]
}


def variants() -> list[tuple[str, dict[str, object]]]:
    cases: list[tuple[str, dict[str, object]]] = []
    for name, _ in ENCODERS:
        for number, a in enumerate(ENCODER_ARGUMENTS.get(name, [{}])):
            cases.append((f"{name}-{number}", {"encoder_name": name, "encoder": a}))
    for name, _ in DECODERS:
        for a in DECODER_ARGUMENTS.get(name, [{}]):
            words = "-".join(value if isinstance(value, str) else key for key, value in a.items())
            cases.append((f"{name}-{words}", {"decoder": a}))
    for name, head in HEADS:
        cases += [(f"{name}-{a}", {"decoder": {"head": partial(head, **a)}}) for a in HEAD_ARGUMENTS.get(name, [{}])]
    return cases


@pytest.fixture(params=variants(), ids=lambda case: case[0])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return small_tokenizer(**request.param[1]).eval()


@torch.no_grad()
def test_prefix_law_dropped_tokens_change_nothing_exactly(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode(IMAGES, LENGTHS)
    before = tokenizer.decode(tokens)
    for filling in (1e4, float("nan"), float("inf")):
        changed = tokens.latents.masked_fill(~tokens.mask[..., None], filling)
        assert torch.equal(before, tokenizer.decode(Tokens(changed, tokens.lengths)))


def test_prefix_law_dropped_tokens_have_no_gradient(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode(IMAGES, LENGTHS)
    latents = tokens.latents.detach().requires_grad_()
    tokenizer.decoder(Tokens(latents, LENGTHS)).square().sum().backward()
    assert latents.grad is not None
    assert (latents.grad[~tokens.mask] == 0).all()
    assert (latents.grad[tokens.mask].abs().sum(dim=1) > 0).all()


@torch.no_grad()
def test_kept_tokens_do_matter(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode(IMAGES, LENGTHS)
    before = tokenizer.decoder(tokens)
    for position in range(6):
        changed = tokens.latents.clone()
        changed[:, position] += 1.0
        moved = (tokenizer.decoder(Tokens(changed, LENGTHS)) - before).flatten(1).abs().amax(dim=1) > 1e-4
        assert moved.tolist() == (LENGTHS > position).tolist()


@torch.no_grad()
def test_a_sample_does_not_depend_on_its_batch(tokenizer: Tokenizer) -> None:
    together = tokenizer.decode(tokenizer.encode(IMAGES, LENGTHS))
    for row, length in enumerate(LENGTHS.tolist()):
        alone = tokenizer.decode(tokenizer.encode(IMAGES[row : row + 1], length))
        torch.testing.assert_close(together[row : row + 1], alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_one_encoding_serves_every_length_just_where_the_contract_says_so(tokenizer: Tokenizer) -> None:
    whole = tokenizer.encode(IMAGES)
    assert torch.equal(whole.latents, tokenizer.encode(IMAGES, 6).latents)
    for length in (1, 4):
        same = torch.equal(whole.latents[:, :length], tokenizer.encode(IMAGES, length).latents[:, :length])
        assert same == (tokenizer.contract == "truncate")


@torch.no_grad()
def test_another_size_keeps_the_laws_and_leaves_the_tokenizer_as_it_was(tokenizer: Tokenizer) -> None:
    before = tokenizer.decode(tokenizer.encode(IMAGES, LENGTHS))
    own = tokenizer.resized(16, 16)
    assert torch.equal(before, own.decode(own.encode(IMAGES, LENGTHS)))
    high = torch.rand(5, 3, 24, 16, generator=torch.Generator().manual_seed(2))
    other = tokenizer.resized(24, 16)
    tokens = other.encode(high, LENGTHS)
    rebuilt = other.decode(tokens)
    assert tokens.latents.shape == (5, 6, 5) and rebuilt.shape == high.shape and rebuilt.isfinite().all()
    changed = tokens.latents.masked_fill(~tokens.mask[..., None], float("nan"))
    assert torch.equal(rebuilt, other.decode(Tokens(changed, LENGTHS)))
    assert torch.equal(before, tokenizer.decode(tokenizer.encode(IMAGES, LENGTHS)))


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_constant_images_are_finite_with_their_features_and_gradients(tokenizer: Tokenizer, level: float) -> None:
    images = torch.full((2, 3, 16, 16), level)
    encoding = tokenizer.encoder(tokenizer.input_space.encode(images))
    assert encoding.latents.shape == (2, tokenizer.num_tokens, tokenizer.quantizer.input_dim)
    assert encoding.features.shape == (2, tokenizer.encoder.feature_dim)
    rebuilt = tokenizer(images, torch.tensor([1, 6])).images
    (encoding.features.square().sum() + encoding.latents.square().sum() + rebuilt.square().sum()).backward()
    assert all(tensor.isfinite().all() for tensor in (encoding.latents, encoding.features, rebuilt))
    assert all(p.grad is None or p.grad.isfinite().all() for p in tokenizer.parameters())


@torch.no_grad()
def test_features_tell_images_apart(tokenizer: Tokenizer) -> None:
    features = tokenizer.encoder(tokenizer.input_space.encode(IMAGES)).features
    assert torch.pdist(features).amin() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name, _ in HEADS])
def test_heads_put_each_state_at_its_place(name: str) -> None:
    for arguments in HEAD_ARGUMENTS.get(name, [{}]):
        check_places(stirred(HEADS.get(name)(**arguments, width=8, out_channels=3, patch_size=4)))


def check_places(made: Head) -> None:
    states = torch.randn(1, 6, 8)
    before = made(states, (2, 3))
    assert before.shape == (1, 3, 8, 12)
    for position in range(6):
        changed = states.clone()
        changed[:, position] += 1
        moved = (made(changed, (2, 3)) - before).square()
        by_patch = reduce(moved, "1 c (rows p) (columns q) -> (rows columns)", "mean", rows=2, columns=3)
        assert by_patch.argmax() == position


@torch.no_grad()
@pytest.mark.parametrize("lora", [{}, LORA], ids=["plain", "lora"])
@pytest.mark.parametrize("seed", [0, 1])
def test_removing_equals_key_padding(seed: int, lora: dict[str, object]) -> None:
    results = []
    for mode in ("key_padding", "remove"):
        tokenizer = small_tokenizer(seed=seed, decoder={"drop_mode": mode, "depth": 2} | lora).eval()
        results.append(tokenizer.decode(tokenizer.encode(IMAGES, LENGTHS)))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name, _ in SPACES])
def test_spaces_come_back(name: str) -> None:
    space = stirred(SPACES.get(name)(**SPACE_ARGUMENTS.get(name, {}))).eval()
    with torch.no_grad():
        values = space.encode(IMAGES)
    assert values.shape == (5, space.channels, 16 // space.downsampling, 16 // space.downsampling)
    assert values.dtype == torch.float32
    values.requires_grad_()
    rebuilt = space.decode(values)
    assert rebuilt.shape == IMAGES.shape
    rebuilt.square().sum().backward()
    assert values.grad is not None and (values.grad.abs().amax(1) > 0).all()
    if name not in SPACE_ARGUMENTS:  # with random weights, autoencoders lose the image
        torch.testing.assert_close(rebuilt, IMAGES, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name, _ in SPACES])
def test_an_image_in_a_space_does_not_depend_on_its_batch(name: str) -> None:
    space = stirred(SPACES.get(name)(**SPACE_ARGUMENTS.get(name, {}))).eval()
    values = space.encode(IMAGES)
    rebuilt = space.decode(values)
    for alone, together in ((space.encode(IMAGES[2:3]), values[2:3]), (space.decode(values[2:3]), rebuilt[2:3])):
        torch.testing.assert_close(alone, together, rtol=0, atol=1e-5 * float(together.abs().max()))


@torch.no_grad()
@pytest.mark.parametrize("blocks", [BlockOptions(), BlockOptions(registers=2)], ids=["plain", "registers"])
def test_latents_causal_tokens_ignore_later_queries(blocks: BlockOptions) -> None:
    tokenizer = small_tokenizer(encoder={"attention": "latents_causal", "depth": 2, "blocks": blocks}).eval()
    before = tokenizer.encode(IMAGES).latents
    tokenizer.encoder.latent_tokens[3] = torch.randn(32)  # a constant would vanish in the layer norm
    after = tokenizer.encode(IMAGES).latents
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.allclose(before[:, 4], after[:, 4], atol=1e-3)
