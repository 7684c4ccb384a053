"""DiT's transformer: it starts as the identity, its condition reaches every block, and it can be recomputed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from framework.engine.acceleration import compiled_blocks, recompute_blocks
from framework.nn.adaptive_transformer import AdaptiveBlock, AdaptiveTransformer, TimeEmbedding
from framework.nn.transformer import BlockOptions
from tests.stir import stirred


def transformer_of(depth: int = 3) -> AdaptiveTransformer:
    torch.manual_seed(0)
    return AdaptiveTransformer(32, depth, 2, BlockOptions(mlp="gelu_tanh", qk_norm=True))


def test_it_starts_as_a_norm() -> None:
    x = torch.randn(2, 7, 32)
    torch.testing.assert_close(transformer_of()(x, torch.randn(2, 32)), F.layer_norm(x, (32,), eps=1e-6))


def test_a_block_is_the_paper_s() -> None:
    """By the equations of adaLN-Zero, with attention written out."""
    block, x, condition = stirred(transformer_of(1)).blocks[0], torch.randn(2, 5, 32), torch.randn(2, 32)
    assert isinstance(block, AdaptiveBlock)
    parts = block.modulation(condition).view(2, 6, 1, 32)
    shift1, scale1, gate1, shift2, scale2, gate2 = parts.unbind(1)
    h = F.layer_norm(x, (32,), eps=1e-6) * (1 + scale1) + shift1
    query, key, value = block.attention.qkv(h).view(2, 5, 3, 2, 16).permute(2, 0, 3, 1, 4)
    query, key = (each / each.square().mean(-1, keepdim=True).sqrt() for each in (query, key))
    mixed = (query @ key.mT / 4).softmax(-1) @ value
    y = x + gate1 * block.attention.out(mixed.transpose(1, 2).flatten(2))
    h = F.layer_norm(y, (32,), eps=1e-6) * (1 + scale2) + shift2
    y = y + gate2 * block.mlp.down(F.gelu(block.mlp.up(h), approximate="tanh"))
    torch.testing.assert_close(block(x, condition), y, rtol=1e-4, atol=1e-5)


def test_times_are_told_apart() -> None:
    embedding = TimeEmbedding(64)
    values = embedding(torch.tensor([0.0, 1.0, 500.0, 501.0, 999.0]))
    assert torch.cdist(values, values)[~torch.eye(5, dtype=torch.bool)].min() > 0.1
    torch.testing.assert_close(embedding(torch.tensor([500])), values[2:3])


def test_recomputed_and_compiled_it_is_the_same() -> None:
    transformer, x, condition = stirred(transformer_of()), torch.randn(2, 7, 32), torch.randn(2, 32)

    def gradients() -> list[Tensor]:
        transformer.zero_grad()
        transformer(x, condition).square().sum().backward()
        return [parameter.grad.clone() for parameter in transformer.parameters() if parameter.grad is not None]

    plain, calls, graphs = gradients(), [], []
    recompute_blocks(transformer)
    hook = transformer.blocks[1].register_forward_pre_hook(lambda module, given: calls.append(1))
    assert all(torch.equal(one, other) for one, other in zip(plain, gradients(), strict=True)) and len(calls) == 2
    hook.remove()
    transformer.recompute = False

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(1)
        return graph.forward

    torch.compiler.reset()
    with compiled_blocks(transformer, backend=count):
        compiled = gradients()
    assert graphs
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-5)
