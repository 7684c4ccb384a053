from __future__ import annotations

import pytest
import torch
from einops import rearrange

from framework.nn.positions import resize_positions, sincos_2d


def test_the_same_grid_keeps_its_values() -> None:
    table = sincos_2d((3, 5), 8)
    assert torch.equal(resize_positions(table, (3, 5), (3, 5)), table)


def test_rows_stay_rows_and_columns_columns() -> None:
    table = sincos_2d((4, 6), 8)  # the first half of the channels tells rows, the second columns
    resized = rearrange(resize_positions(table, (4, 6), (7, 9)), "(rows columns) w -> rows columns w", rows=7)
    torch.testing.assert_close(resized[..., :4], resized[:, :1, :4].expand(7, 9, 4))
    torch.testing.assert_close(resized[..., 4:], resized[:1, :, 4:].expand(7, 9, 4))
    # The corner cells lie nearest to the old corners; the sine of the first frequency tells them apart.
    torch.testing.assert_close(resized[-1, -1, [0, 4]], table[-1, [0, 4]], rtol=0, atol=0.2)
    assert (resized[0, 0, [0, 4]] - table[0, [0, 4]]).abs().amax() < 0.2


def test_a_slope_keeps_its_shape_inside_the_borders() -> None:
    slope = torch.linspace(0, 1, 17)[:-1] + 1 / 32  # the centres of 16 cells of [0, 1]
    table = slope.repeat_interleave(2)[:, None]
    for rows in (8, 32):
        resized = resize_positions(table, (16, 2), (rows, 2))[::2, 0]
        centres = (torch.arange(rows) + 0.5) / rows
        torch.testing.assert_close(resized[rows // 4 : -rows // 4], centres[rows // 4 : -rows // 4])


def test_shrinking_averages_what_the_smaller_grid_cannot_hold() -> None:
    stripes = torch.tensor([1.0, -1.0]).repeat(8).repeat_interleave(4)[:, None]
    assert resize_positions(stripes, (16, 4), (4, 4)).abs().amax() < 0.1


def test_type_is_kept_and_a_wrong_grid_is_named() -> None:
    table = sincos_2d((4, 4), 8).bfloat16()
    assert resize_positions(table, (4, 4), (2, 3)).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="a grid of 4x5 does not fit a table of 16 positions"):
        resize_positions(table, (4, 5), (2, 2))
