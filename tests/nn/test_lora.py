"""Low-rank heads as adapters of linear layers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from framework.engine.acceleration import compiled_blocks, recompute_blocks
from framework.nn.lora import LowRankHeads
from framework.nn.transformer import BlockOptions, Linear, Transformer
from tests.stir import stirred

ROUTE = torch.tensor([2, 0, 2])
X = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))


def test_heads_start_by_correcting_nothing_and_learn_by_b_first() -> None:
    heads = LowRankHeads(8, 6, num_heads=3, rank=2, alpha=4.0)
    assert torch.equal(heads(X, ROUTE), torch.zeros(3, 4, 6))
    assert 0.5 < heads.A.std().item() * 8**0.5 < 1.5
    heads(X, ROUTE).sum().backward()
    assert heads.B.grad is not None and heads.B.grad[0].abs().sum() > 0


def test_each_sample_takes_its_heads_product() -> None:
    heads = stirred(LowRankHeads(8, 6, num_heads=3, rank=2, alpha=4.0))
    corrections = heads(X, ROUTE)
    for row, head in enumerate(ROUTE.tolist()):
        expected = 2 * X[row] @ heads.A[head] @ heads.B[head]
        torch.testing.assert_close(corrections[row], expected)
        torch.testing.assert_close(X[row] @ heads.weight(head).T, expected)


def test_gradients_reach_the_heads_that_were_taken_and_are_zero_elsewhere() -> None:
    heads = stirred(LowRankHeads(8, 6, num_heads=3, rank=2, alpha=4.0))
    heads(X, ROUTE).square().sum().backward()
    for parameter in heads.parameters():
        assert parameter.grad is not None
        assert (parameter.grad.flatten(1).abs().sum(1) > 0).tolist() == [True, False, True]


def adapted() -> Transformer:
    model = Transformer(8, 2, 2, BlockOptions())
    for layer in [module for module in model.modules() if isinstance(module, Linear)]:
        layer.adapter = LowRankHeads(layer.in_features, layer.out_features, num_heads=3, rank=2, alpha=4.0)
    return stirred(model)


def gradients(model: nn.Module, autocast: bool) -> list[Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = model(X, None, ROUTE)
    out.float().square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_recomputed_blocks_take_the_same_heads(autocast: bool) -> None:
    model = adapted()
    expected = gradients(model, autocast)
    recompute_blocks(model)
    found = gradients(model, autocast)
    assert len(expected) == len(found) == 1 + len(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_compiled_blocks_take_the_same_heads_in_one_graph_whatever_the_route() -> None:
    graphs: list[int] = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(1)
        return graph.forward

    model = adapted()
    torch.compiler.reset()
    with torch.no_grad():
        routes = [ROUTE, torch.tensor([0, 1, 1])]
        expected = [model(X, None, route) for route in routes]
        with compiled_blocks(model, count):
            for route, out in zip(routes, expected, strict=True):
                torch.testing.assert_close(model(X, None, route), out)
    assert len(graphs) == 1
