"""What each drop mode hands to the decoder."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from framework.tokenizers.decoders.dropping import DROP_MODES, DropMode, DropStrategy
from framework.tokens import Tokens
from tests.tokenizers.build import small_tokenizer

POSITIONS = torch.arange(4.0)[:, None] * 10
LENGTHS = torch.tensor([2, 1, 3])
LATENTS = torch.rand(3, 4, 2, generator=torch.Generator().manual_seed(0))
IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def embed(latents: Tensor) -> Tensor:
    """Width 2: the latents times 3, and a position."""
    return latents * 3 + POSITIONS[: latents.shape[1]]


def handed_over(mode: DropMode, lengths: Tensor = LENGTHS) -> tuple[DropStrategy, list[Tensor], list[Tensor | None]]:
    """The strategy, and what it has its decoder decode, call by call."""
    embedded: list[Tensor] = []
    masks: list[Tensor | None] = []
    kept: list[Tensor] = []

    def decode(tokens: Tensor, mask: Tensor | None, lengths: Tensor) -> Tensor:
        embedded.append(tokens)
        masks.append(mask)
        kept.append(lengths)
        assert len(lengths) == len(tokens)
        return tokens[:, 0]

    strategy = DROP_MODES[mode](token_dim=2, num_tokens=4, width=2)
    values = strategy(Tokens(LATENTS, lengths), embed, decode)
    assert torch.equal(values, embed(LATENTS)[:, 0])  # whatever the calls, rows come back in their order
    assert torch.equal(torch.cat(kept), lengths if len(kept) == 1 else lengths.sort().values)
    return strategy, embedded, masks


def test_key_padding_cuts_to_the_longest_and_masks_only_where_it_must() -> None:
    _, [embedded], [mask] = handed_over("key_padding")
    assert embedded.shape == (3, 3, 2) and mask is not None
    assert mask.tolist() == [[True, True, False], [True, False, False], [True, True, True]]
    _, [embedded], [mask] = handed_over("key_padding", torch.tensor([2, 2, 2]))
    assert torch.equal(embedded, embed(LATENTS[:, :2])) and mask is None


def test_remove_decodes_each_length_apart() -> None:
    _, embedded, masks = handed_over("remove", torch.tensor([2, 1, 2]))
    assert [tuple(part.shape) for part in embedded] == [(1, 1, 2), (2, 2, 2)] and masks == [None, None]


def test_mask_token_overwrites_embedding_and_position() -> None:
    strategy, [embedded], [mask] = handed_over("mask_token")
    [(name, dropped)] = strategy.named_parameters()
    assert mask is None and name == "dropped_token" and dropped.shape == (2,)
    for row, length in enumerate(LENGTHS):
        assert torch.equal(embedded[row, :length], embed(LATENTS)[row, :length])
        assert torch.equal(embedded[row, length:], dropped.expand(4 - length, 2))


def test_null_tokens_are_embedded_and_positioned() -> None:
    strategy, [embedded], [mask] = handed_over("null_token")
    [(name, null)] = strategy.named_parameters()
    assert mask is None and name == "null_tokens" and null.shape == (4, 2) and len(null.unique()) == 8
    for row, length in enumerate(LENGTHS):
        assert torch.equal(embedded[row, :length], embed(LATENTS)[row, :length])
        assert torch.equal(embedded[row, length:], embed(null[None])[0, length:])


def test_zeros_are_embedded_and_positioned() -> None:
    _, [embedded], [mask] = handed_over("zero")
    assert mask is None
    for row, length in enumerate(LENGTHS):
        assert torch.equal(embedded[row, :length], embed(LATENTS)[row, :length])
        assert torch.equal(embedded[row, length:], POSITIONS[length:].expand(4 - length, 2))


@pytest.mark.parametrize("mode", DROP_MODES)
def test_parameters(mode: DropMode) -> None:
    names = {name for name in small_tokenizer(decoder={"drop_mode": mode}).state_dict() if ".drop." in name}
    expected = {"mask_token": {"decoder.drop.dropped_token"}, "null_token": {"decoder.drop.null_tokens"}}
    assert names == expected.get(mode, set())  # the others keep the keys that checkpoints already have


def test_other_weights_start_alike_in_every_mode() -> None:
    states = [small_tokenizer(decoder={"drop_mode": mode}).state_dict() for mode in DROP_MODES]
    for state in states[1:]:
        assert all(torch.equal(state[name], value) for name, value in states[0].items())


@torch.no_grad()
@pytest.mark.parametrize("mode", DROP_MODES)
def test_a_sequence_that_was_cut_decodes_the_same(mode: DropMode) -> None:
    tokenizer = small_tokenizer(decoder={"drop_mode": mode}).eval()
    tokens = tokenizer.encode(IMAGES, [2, 1, 3])
    assert torch.equal(tokenizer.decode(tokens), tokenizer.decode(tokens.truncate(3)))


@pytest.mark.parametrize("mode", DROP_MODES)
def test_weights_get_the_same_gradient_whatever_was_dropped(mode: DropMode) -> None:
    gradients = []
    for filling in (1.0, float("nan"), float("inf")):
        tokenizer = small_tokenizer(decoder={"drop_mode": mode})
        latents = torch.ones(3, 6, 5)
        latents = latents.masked_fill(~Tokens(latents, LENGTHS).mask[..., None], filling)
        tokenizer.decoder(Tokens(latents, LENGTHS)).square().sum().backward()
        found = {name: parameter.grad for name, parameter in tokenizer.decoder.named_parameters()}
        gradients.append({name: gradient for name, gradient in found.items() if gradient is not None})
        assert gradients[-1].keys() == found.keys()
    for name, gradient in gradients[0].items():
        assert gradient.isfinite().all() and gradient.abs().sum() > 0, name
        assert all(torch.equal(gradient, other[name]) for other in gradients[1:]), name


def test_a_null_token_is_trained_where_it_was_used() -> None:
    tokenizer = small_tokenizer(decoder={"drop_mode": "null_token"})
    tokenizer(IMAGES, torch.tensor([3, 4, 6])).images.square().sum().backward()
    gradient = tokenizer.get_parameter("decoder.drop.null_tokens").grad
    assert gradient is not None
    assert (gradient.abs().sum(dim=1) > 0).tolist() == [False, False, False, True, True, True]


@torch.no_grad()
def test_the_modes_are_different_functions_of_short_sequences_only() -> None:
    whole, short = [], []
    for mode in DROP_MODES:
        tokenizer = small_tokenizer(decoder={"drop_mode": mode}).eval()
        whole.append(tokenizer.decode(tokenizer.encode(IMAGES)))
        short.append(tokenizer.decode(tokenizer.encode(IMAGES, 2)))
    for images in whole[1:]:
        torch.testing.assert_close(images, whole[0], rtol=0, atol=1e-5)
    for first in range(1, len(short)):  # the first two, key_padding and remove, are one function
        assert all((short[first] - short[second]).abs().amax() > 1e-3 for second in range(first + 1, len(short)))
