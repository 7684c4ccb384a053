"""Muon is torch's, in another precision where bfloat16 is slow, and with matrices of one shape together."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch.nn import Parameter

from framework.engine import muon
from framework.engine.muon import Muon, orthogonalised

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
SHAPES = ((12, 8), (8, 12), (12, 8), (6, 6))


def parameters(seed: int = 0) -> list[Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


@pytest.mark.parametrize(("fast", "tolerance"), [(True, 2e-4), (False, 2e-2)])
def test_it_moves_as_torchs_does(monkeypatch: pytest.MonkeyPatch, fast: bool, tolerance: float) -> None:
    monkeypatch.setattr(muon, "has_fast_bfloat16", lambda device: fast)
    settings = {"lr": 0.1, "weight_decay": 0.3, "momentum": 0.9, "adjust_lr_fn": "match_rms_adamw"}
    ours, torchs = parameters(), parameters()
    optimizers = Muon(ours, **settings), torch.optim.Muon(torchs, **settings)  # type: ignore[arg-type]
    for step in range(3):
        gradients = parameters(seed=1 + step)
        for each, optimizer in zip((ours, torchs), optimizers, strict=True):
            for parameter, gradient in zip(each, gradients, strict=True):
                parameter.grad = gradient.detach().clone()
            each[3].grad = None if step == 1 else each[3].grad
            optimizer.step()
    for one, other, start in zip(ours, torchs, parameters(), strict=True):
        assert (one - start).abs().amax() > 0.05
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)
    states = [{k: v["momentum_buffer"] for k, v in o.state_dict()["state"].items()} for o in optimizers]
    torch.testing.assert_close(states[0], states[1])
    again = Muon(deepcopy(ours), **settings)  # type: ignore[arg-type]
    again.load_state_dict(deepcopy(optimizers[1].state_dict()))  # one reads the other's state


@pytest.mark.parametrize("shape", [(3, 5, 9), (3, 9, 5), (1, 7, 7)])
def test_singular_values_come_near_one(shape: tuple[int, ...]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = orthogonalised(matrices, COEFFICIENTS, steps=5, eps=1e-7)
    assert found.dtype == torch.float32 and found.shape == shape
    values = torch.linalg.svdvals(found)
    assert values.amin() > 0.6 and values.amax() < 1.3
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    core = left.mT @ found @ right.mT  # diagonal in the singular vectors of the matrix
    assert (core - torch.diag_embed(core.diagonal(dim1=1, dim2=2))).abs().amax() < 0.1


def test_of_zeros_nothing_comes() -> None:
    assert not orthogonalised(torch.zeros(2, 3, 4), COEFFICIENTS, steps=5, eps=1e-7).any()
