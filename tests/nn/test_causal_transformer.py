"""The causal transformer's parts against what they say they compute, written out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from framework.nn.attention import causal_attention
from framework.nn.causal_transformer import CausalTransformer, FloatRMSNorm
from framework.nn.packed_linear import MIN_WEIGHTS, PackedLinear, can_pack, packed
from framework.nn.positions import rotary_1d, rotary_2d, rotate_pairs
from tests.stir import stirred


@pytest.mark.parametrize("needs_grad", [True, False])
def test_causal_attention_is_attention_to_the_past(needs_grad: bool) -> None:
    query, key, value = (torch.randn(2, 3, 7, 4, requires_grad=needs_grad) for _ in range(3))
    mixed = causal_attention(query, key, value)
    for place in range(7):
        scores = (query[:, :, place, None] * key[:, :, : place + 1]).sum(-1) / 2
        expected = (scores.softmax(-1)[..., None] * value[:, :, : place + 1]).sum(2)
        torch.testing.assert_close(mixed[:, :, place], expected)


def test_rotary_positions_tell_distances() -> None:
    """A product of turned vectors depends on how far apart they stand: along a line, and in rows and columns."""
    first, second = torch.randn(2, 8)
    line = rotary_1d(12, 8, 100.0)
    near = [(rotate_pairs(first, line[at]) * rotate_pairs(second, line[at + 3])).sum() for at in range(9)]
    torch.testing.assert_close(torch.stack(near), near[0].expand(9))
    assert torch.equal(rotate_pairs(first, line[0]), first)
    assert not torch.allclose(rotate_pairs(first, line[1]), first)
    grid = rotary_2d(4, 8, 100.0)
    pairs = [(0, 5), (1, 6), (4, 9), (10, 15)]  # one row and one column on
    near = [(rotate_pairs(first, grid[a]) * rotate_pairs(second, grid[b])).sum() for a, b in pairs]
    torch.testing.assert_close(torch.stack(near), near[0].expand(4))
    with pytest.raises(ValueError, match="multiple of 4"):
        rotary_2d(4, 6, 100.0)


def test_rotation_is_a_product_of_complex_numbers() -> None:
    x, table = torch.randn(5, 8), rotary_1d(5, 8, 100.0)
    product = torch.view_as_complex(x.view(5, 4, 2)) * torch.view_as_complex(table)
    torch.testing.assert_close(rotate_pairs(x, table), torch.view_as_real(product).flatten(1))


def test_norms_are_computed_in_float32() -> None:
    norm = FloatRMSNorm(64)
    x = (torch.randn(3, 64) * 200).bfloat16()
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt()
    assert norm(x).dtype == torch.bfloat16
    assert torch.equal(norm(x), exact.bfloat16())


def test_recomputing_changes_nothing() -> None:
    model = stirred(CausalTransformer(16, 2, 2, 24, qk_norm=True))
    x, rotation = torch.randn(2, 5, 16), rotary_1d(5, 8, 100.0)
    gradients = []
    for recompute in (False, True):
        model.recompute = recompute
        model.zero_grad()
        model(x, rotation).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.skipif(not can_pack(torch.device("cpu"), torch.float32), reason="torch has no oneDNN here")
@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 5, 16])
def test_packed_layers_give_the_layers_results(rows: int) -> None:
    large, small = nn.Linear(256, MIN_WEIGHTS // 256), nn.Linear(8, 256)
    module = nn.Sequential(small, large)
    copy, x = packed(module, 4), torch.randn(rows, 1, 8)
    assert isinstance(copy[1], PackedLinear) and copy[0] is not small and copy[0].weight is small.weight
    torch.testing.assert_close(copy(x), module(x))
    assert isinstance(module[1], nn.Linear) and isinstance(packed(large, 4), PackedLinear)
