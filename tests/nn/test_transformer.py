from __future__ import annotations

import math
from itertools import product

import pytest
import torch
from torch import nn

from framework.nn.positions import rotate, sincos_2d
from framework.nn.transformer import BlockOptions, Linear, SelfAttention, Transformer
from tests.stir import stirred

SWITCHES = [
    BlockOptions(norm=norm, mlp=mlp, bias=bias)
    for norm, mlp, bias in product(("layer", "layer_noaffine", "rms"), ("gelu", "relu2", "swiglu"), (True, False))
] + [BlockOptions(qk_norm=True), BlockOptions(rope_base=100.0), BlockOptions(mlp_ratio=2.0)]
SWITCHES += [BlockOptions(input_norm=True), BlockOptions(registers=2)]


@pytest.mark.parametrize("options", SWITCHES, ids=lambda options: "-".join(map(str, vars(options).values())))
def test_every_switch_trains_and_changes_the_function(options: BlockOptions) -> None:
    torch.manual_seed(0)
    model = stirred(Transformer(16, 2, 2, options))
    x = torch.randn(2, 5, 16)
    y = model(x)
    assert y.shape == x.shape
    y.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    torch.manual_seed(0)
    plain = stirred(Transformer(16, 2, 2, BlockOptions(norm="layer", mlp="gelu", mlp_ratio=4.0, bias=options.bias)))
    is_plain = (options.norm, options.mlp, options.mlp_ratio) == ("layer", "gelu", 4.0)
    is_plain = is_plain and not (options.qk_norm or options.rope_base or options.input_norm or options.registers)
    names = [name for name, _ in model.named_parameters()]
    differs = names != [n for n, _ in plain.named_parameters()] or not torch.allclose(plain(x), y, atol=1e-4)
    assert differs != is_plain
    assert any("bias" in name and "norm" not in name for name in names) == options.bias


def test_a_stack_starts_as_its_last_norm() -> None:
    x = torch.randn(2, 5, 16)
    model = Transformer(16, 3, 2, BlockOptions())
    assert torch.equal(model(x), model.norm(x))


def test_swiglu_has_the_parameters_of_the_plain_mlp() -> None:
    sizes = [
        sum(p.numel() for p in Transformer(96, 1, 2, BlockOptions(mlp=mlp, bias=False)).blocks[0].mlp.parameters())
        for mlp in ("gelu", "swiglu")
    ]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.01)


def test_rotary_scores_depend_on_distance_only() -> None:
    vector = torch.randn(1, 1, 1, 8).expand(1, 1, 9, 8)
    turned = rotate(vector, base=100.0)
    scores = (turned @ turned.transpose(-1, -2))[0, 0]
    for distance in range(1, 8):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)
    assert torch.equal(turned[:, :, 0], vector[:, :, 0])


def test_sincos_table_tells_all_positions_of_a_grid_apart() -> None:
    table = sincos_2d((4, 6), 32)
    assert table.shape == (24, 32)
    assert torch.cdist(table, table).fill_diagonal_(math.inf).min() > 0.5
    # Row-major: the next column differs in the second half only, the next row in the first.
    assert torch.equal(table[0, :16], table[1, :16]) and torch.equal(table[0, 16:], table[6, 16:])
    with pytest.raises(ValueError, match="multiple of 4, got 30"):
        sincos_2d((2, 2), 30)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="width 16 and 3 heads"):
        SelfAttention(16, 3, BlockOptions())


class OneHotAdapter(nn.Module):
    """Adds the route's number to every output."""

    def forward(self, x: torch.Tensor, route: torch.Tensor) -> torch.Tensor:
        return route[:, None, None].to(x.dtype)


def test_a_route_reaches_the_adapters_of_each_sample() -> None:
    model = stirred(Transformer(8, 2, 2, BlockOptions()))
    x = torch.randn(3, 4, 8)
    route = torch.tensor([0, 1, 2])
    plain = model(x)
    assert torch.equal(model(x, route=route), plain)
    last = model.blocks[-1].mlp.down
    assert isinstance(last, Linear)
    last.adapter = OneHotAdapter()
    assert torch.equal(model(x), plain)
    routed = model(x, route=route)
    assert torch.equal(routed[0], plain[0])
    # A constant added to all channels vanishes in the layer norm at the end, so look before it.
    model.norm = nn.Identity()
    difference = model(x, route=route) - model(x)
    torch.testing.assert_close(difference, route[:, None, None].expand(3, 4, 8).float(), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("given", ["none", "keys", "square"])
def test_registers_are_more_positions_that_carry_nothing_hidden(given: str) -> None:
    model = stirred(Transformer(16, 3, 2, BlockOptions(input_norm=True, registers=2)))
    x = torch.randn(2, 5, 16)
    hidden = torch.zeros(2, 1, 1, 5, dtype=torch.bool) if given == "keys" else torch.zeros(5, 5, dtype=torch.bool)
    hidden[..., 3:] = True
    hidden[..., 3:, 3:] = given == "keys"  # in the square, the last two see each other
    bias = None if given == "none" else torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf)
    y = model(x, bias)
    assert model.registers is not None
    plain = Transformer(16, 3, 2, BlockOptions(input_norm=True))
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if name != "registers"})
    longer = torch.cat([x, model.registers.expand(2, 2, 16)], dim=1)
    if given == "none":
        torch.testing.assert_close(y, plain(longer)[:, :5])
    assert not torch.allclose(y, plain(x, bias), atol=1e-3)
    changed = x.clone()
    changed[:, 3:] = torch.randn(2, 2, 16)
    assert torch.equal(model(changed, bias)[:, :3], y[:, :3]) == (given != "none")
