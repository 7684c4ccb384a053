from __future__ import annotations

import pytest
import torch
from torch import nn

from framework.tokenizers.decoders.dropping import DROP_MODES, DropMode
from framework.tokenizers.decoders.mask_token_vit import MaskTokenViT
from framework.tokenizers.heads import PixelShuffleHead
from framework.tokens import Tokens
from tests.stir import stirred

TOKENS = Tokens(torch.rand(2, 6, 5, generator=torch.Generator().manual_seed(0)), torch.tensor([2, 6]))


def decoder(drop_mode: DropMode = "key_padding") -> MaskTokenViT:
    torch.manual_seed(0)
    size = {"token_dim": 5, "num_tokens": 6, "positions": (4, 4), "out_channels": 3, "patch_size": 2}
    return stirred(MaskTokenViT(PixelShuffleHead, 32, 1, 2, drop_mode, **size))  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", DROP_MODES)
def test_resizing_decodes_the_same_tokens_to_another_grid(mode: DropMode) -> None:
    model = decoder(mode)
    before = model(TOKENS)
    model.resize((4, 4))
    assert torch.equal(model(TOKENS), before)
    model.resize((3, 8))
    assert model(TOKENS).shape == (2, 3, 6, 16) and model.positions == (3, 8)
    assert isinstance(model.patch_positions, nn.Parameter) and model.patch_positions.requires_grad
    model(TOKENS).square().sum().backward()
    assert model.patch_positions.grad is not None and model.patch_positions.grad.shape == (24, 32)


@torch.no_grad()
def test_a_finer_grid_shows_the_same_picture() -> None:
    """Patches at positions that were there before change little: averaging two by two gives the picture back."""
    model = decoder()
    model.patch_positions.copy_(model.patch_positions.mean(dim=0) + torch.linspace(0, 1, 16)[:, None])
    before = model(TOKENS).unflatten(2, (4, 2)).unflatten(4, (4, 2)).mean(dim=(3, 5))
    model.resize((8, 8))
    after = model(TOKENS).unflatten(2, (4, 4)).unflatten(4, (4, 4)).mean(dim=(3, 5))
    assert (after - before).abs().mean() < 0.2 * before.std()


def test_frozen_positions_stay_frozen() -> None:
    model = decoder().requires_grad_(False)
    model.resize((2, 2))
    assert not model.patch_positions.requires_grad
