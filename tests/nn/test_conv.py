from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from framework.nn.conv import (
    Downsample,
    MaskGITBlock,
    ResidualBlock,
    SpatialAttention,
    Upsample,
    down_stages,
    group_norm,
    up_stages,
)
from tests.stir import stirred


def silence(block: ResidualBlock) -> None:
    torch.nn.init.zeros_(block.conv2.weight)
    if block.conv2.bias is not None:
        torch.nn.init.zeros_(block.conv2.bias)


def test_a_silent_branch_leaves_the_shortcut() -> None:
    x = torch.randn(2, 32, 5, 4)
    same, wider = ResidualBlock(32, 32), ResidualBlock(32, 64)
    silence(same)
    silence(wider)
    assert torch.equal(same(x), x)
    assert wider(x).shape == (2, 64, 5, 4) and torch.equal(wider(x), wider.shortcut(x))


def test_maskgits_shortcut_reads_the_branch() -> None:
    x = torch.randn(2, 32, 5, 4)
    same, wider = MaskGITBlock(32, 32), MaskGITBlock(32, 64)
    silence(same)
    assert torch.equal(same(x), x)
    torch.testing.assert_close(wider(x), wider.branch(x) + wider.shortcut(wider.branch(x)))
    silence(wider)
    assert not wider(x).any()
    assert [name for name, _ in wider.named_parameters() if name.endswith("bias")] == ["norm1.bias", "norm2.bias"]


def test_every_position_attends_to_all_and_to_none_more_for_its_place() -> None:
    attention = stirred(SpatialAttention(32))
    x = torch.randn(1, 32, 3, 4)
    order = torch.randperm(12)
    shuffled = x.flatten(2)[..., order].unflatten(2, (3, 4))
    torch.testing.assert_close(attention(shuffled).flatten(2), attention(x).flatten(2)[..., order])
    changed = x.clone()
    changed[..., 0, 0] += torch.randn(32)
    assert ((attention(changed) - attention(x)).abs().amax(1) > 1e-6).all()


def test_downsampling_pads_below_and_to_the_right() -> None:
    down = Downsample(1)
    torch.nn.init.ones_(down.weight)
    torch.nn.init.zeros_(down.bias)  # type: ignore[arg-type]
    assert down(torch.ones(1, 1, 4, 4)).tolist() == [[[[9.0, 6.0], [6.0, 4.0]]]]


def test_upsampling_repeats_before_it_convolves() -> None:
    up, x = Upsample(3), torch.randn(2, 3, 2, 2)
    repeated = x.repeat_interleave(2, -1).repeat_interleave(2, -2)
    torch.testing.assert_close(up(x), F.conv2d(repeated, up.weight, up.bias, padding=1))


def test_stages_halve_and_double_between_them_and_attend_where_they_should() -> None:
    down = down_stages(ResidualBlock, 32, [32, 64, 64], 2, [False, True, False], Downsample)
    up = up_stages(ResidualBlock, [32, 64, 64], 1, [False, True, False])
    x = torch.randn(1, 32, 8, 8)
    assert down(x).shape == (1, 64, 2, 2) and up(down(x)).shape == (1, 32, 8, 8)
    names = [[name for name, _ in part.named_children()] for part in (*down, *up)]
    assert names == [
        ["block_0", "block_1", "downsample"],
        ["block_0", "attn_0", "block_1", "attn_1", "downsample"],
        ["block_0", "block_1"],
        ["block_0", "upsample"],
        ["block_0", "attn_0", "upsample"],
        ["block_0"],
    ]
    assert [name for name, _ in up.named_children()] == ["2", "1", "0"]


def test_widths_that_cannot_be_grouped_are_told() -> None:
    with pytest.raises(ValueError, match="32 groups, into which 48 cannot be cut"):
        group_norm(48)
