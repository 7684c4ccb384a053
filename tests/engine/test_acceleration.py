"""Compiled and recomputed blocks are the same blocks."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from framework import runs
from framework.engine import trainer as trainer_module
from framework.engine.acceleration import compiled_blocks, recompute_blocks
from framework.engine.trainer import Outcome
from framework.nn.transformer import BlockOptions, Transformer
from tests.engine.fakes import differences, tensors
from tests.stir import stirred
from tests.tiny_run import tiny_config


def gradients(transformer: Transformer, x: Tensor, bias: Tensor | None, autocast: bool) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    transformer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = transformer(x, bias)
    out.float().square().sum().backward()
    assert x.grad is not None
    found = {name: parameter.grad for name, parameter in transformer.named_parameters() if parameter.grad is not None}
    return {"out": out.detach(), "x": x.grad} | {name: grad.clone() for name, grad in found.items()}


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
def test_recomputed_gradients_are_the_same_bit_for_bit(autocast: bool) -> None:
    transformer = stirred(Transformer(32, 3, 2, BlockOptions()))
    x = torch.randn(2, 7, 32)
    bias = torch.zeros(7, 7).masked_fill_(torch.ones(7, 7).triu(1).bool(), float("-inf"))
    for given in (None, bias):
        expected = gradients(transformer, x, given, autocast)
        calls: list[int] = []
        hook = transformer.blocks[1].register_forward_pre_hook(lambda module, args, calls=calls: calls.append(1))
        recompute_blocks(transformer)
        found = gradients(transformer, x, given, autocast)
        assert differences(expected, found) == [] and len(calls) == 2
        with torch.no_grad():
            transformer(x, given)
        assert len(calls) == 3
        hook.remove()
        transformer.recompute = False


def test_recomputing_keeps_less_for_the_backward_pass() -> None:
    transformer = Transformer(32, 6, 2, BlockOptions())

    def kept() -> int:
        sizes: list[int] = []

        def keep(value: Tensor) -> Tensor:
            sizes.append(value.numel())
            return value

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            transformer(torch.randn(2, 50, 32, requires_grad=True))
        return sum(sizes)

    before = kept()
    recompute_blocks(transformer)
    assert kept() < before / 4


def fit(folder: Path, *overrides: str) -> tuple[Outcome, dict[str, Tensor]]:
    run = runs.experiment_from(tiny_config(folder, "train.precision=float32", *overrides)).trainer()
    return run.fit(), tensors(run)


def test_a_recomputed_run_is_the_same_run(tmp_path: Path) -> None:
    plain, recomputed = fit(tmp_path / "plain"), fit(tmp_path / "recomputed", "train.recompute=true")
    assert differences(plain[1], recomputed[1]) == []
    metrics = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("plain", "recomputed")]
    assert metrics[0] == metrics[1]


def test_a_compiled_run_loads_in_one_that_is_not_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[int] = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(1)
        return graph.forward  # inductor would make machine code of it, in a minute

    torch.compiler.reset()
    monkeypatch.setattr(trainer_module, "compiled_blocks", partial(compiled_blocks, backend=count))
    for compiled, steps in (("true", 4), ("false", 6), ("true", 12)):
        # The command would refuse to continue with another configuration.
        options = [f"train.compile={compiled}", f"train.max_steps={steps}", "train.schedule.name=Constant"]
        run = runs.experiment_from(tiny_config(tmp_path / "mixed", "train.precision=float32", *options)).trainer()
        assert run.fit() == ("finished", steps)
        # With and without padded keys, whatever the lengths.
        assert len(graphs) == 2
    outcome, expected = fit(tmp_path / "plain", "train.max_steps=12", "train.schedule.name=Constant")
    found = tensors(run)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=2e-3)
    # Neither validations nor what comes after training is compiled.
    batch = run.validation_data.fetch([0, 1, 2], 0)
    run.task.eval()
    with torch.no_grad():
        run.task.validate([batch])
    assert len(graphs) == 2


@pytest.mark.slow
def test_inductor_computes_the_same(tmp_path: Path) -> None:
    torch.compiler.reset()
    _, expected = fit(tmp_path / "plain")
    outcome, found = fit(tmp_path / "compiled", "train.compile=true")
    assert outcome == ("finished", 6)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=2e-3)
    assert differences(expected, found)  # or nothing was compiled
