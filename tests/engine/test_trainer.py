from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from framework.data.stream import subset
from framework.engine.checkpoint import latest_checkpoint, load_weights
from framework.engine.optimizers import AdamW
from framework.engine.schedules import Constant
from framework.engine.turns import NonFiniteError
from framework.runtime.rng import Generators
from framework.tasks.interface import Context, Turn
from tests.engine.fakes import FakeTask, TwoTurnTask, differences, tensors, trainer, training


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


class BadGradient(torch.autograd.Function):
    """The identity, with a gradient of nan."""

    @staticmethod
    def forward(ctx: object, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad * torch.nan


POISONS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "nan": (lambda loss: loss * torch.nan, "of the losses, pixel is nan"),
    "inf": (lambda loss: loss * torch.inf, "of the losses, pixel is inf"),
    "gradient": (BadGradient.apply, r"the losses are finite, and the gradients of 3 parameters are not, first \['net"),
}


@pytest.mark.parametrize("poison", POISONS)
@pytest.mark.parametrize("at", [0, 5])
def test_what_is_not_finite_stops_the_run_before_anything_moves(tmp_path: Path, poison: str, at: int) -> None:
    change, message = POISONS[poison]
    task = FakeTask()
    run = trainer(tmp_path, task, checkpoint_every=4)
    before: dict[str, Tensor] = {}

    def harm(step: int, loss: Tensor) -> Tensor:
        if step != at:
            return loss
        before.update(tensors(run))
        return change(loss)

    task.poison = harm
    with pytest.raises(NonFiniteError, match=f"step {at}, turn 'tokenizer': {message}") as caught:
        run.fit()
    assert differences(before, tensors(run)) == []
    assert len(caught.value.keys) == 3 and all(key in str(caught.value) for key in caught.value.keys)
    latest = latest_checkpoint(tmp_path / "checkpoints")
    assert (latest.step if latest else 0) == (4 if at == 5 else 0)


def test_metrics_are_means_since_the_last_line(tmp_path: Path) -> None:
    trainer(tmp_path / "each", log_every=1, validate_every=100).fit()
    trainer(tmp_path / "third", log_every=3, validate_every=100).fit()
    each = [line for line in lines(tmp_path / "each") if "tokenizer/loss" in line]
    third = [line for line in lines(tmp_path / "third") if "tokenizer/loss" in line]
    assert [line["step"] for line in third] == [3, 6, 9, 10]
    for name in ("tokenizer/loss", "tokenizer/pixel", "tokenizer/size", "tokenizer/noise", "tokenizer/gradient_norm"):
        assert third[1][name] == pytest.approx(sum(line[name] for line in each[3:6]) / 3)
    assert each[0]["tokenizer/loss"] == pytest.approx(each[0]["tokenizer/pixel"] + each[0]["tokenizer/size"])
    assert [line["tokenizer/lr"] for line in each[:3]] == pytest.approx([0.01 / 3, 0.02 / 3, 0.01])
    timing = lines(tmp_path / "third", "timing.jsonl")
    assert [line["step"] for line in timing] == [3, 6, 9, 10]
    assert set(timing[0]) == {"step", "images_per_second", "data_wait", "eta_seconds", "memory_mib"}
    assert timing[0]["images_per_second"] > 0 and 0 < timing[0]["data_wait"] < 1 and timing[-1]["eta_seconds"] == 0


def test_training_learns(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=120, batch_size=7, validate_every=40).fit()
    errors = [line["validation/mse"] for line in lines(tmp_path) if "validation/mse" in line]
    assert errors == sorted(errors, reverse=True) and errors[2] < errors[0] / 2


def test_validation_uses_averaged_weights_on_so_many_images(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.fit()
    validations = [line for line in lines(tmp_path) if "validation/mse" in line]
    assert [line["step"] for line in validations] == [4, 8, 10] and validations[0]["validation/images"] == 5
    assert run.average is not None and run.task.training
    checkpoint = latest_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None
    task = FakeTask().eval()
    load_weights(task.model, checkpoint.weights("ema"), checkpoint.folder)
    with torch.no_grad():
        batch = run.validation_data.fetch(subset(len(run.validation_data), 5), 0)
        assert task.validate([batch])["mse"] == pytest.approx(validations[-1]["validation/mse"])
        load_weights(task, checkpoint.weights("model"), checkpoint.folder)
        assert task.validate([batch])["mse"] != pytest.approx(validations[-1]["validation/mse"])


def test_one_step_is_the_hand_written_one(tmp_path: Path) -> None:
    task = FakeTask()
    run = trainer(tmp_path, max_steps=1, clip_norm=0.01, schedule=partial(Constant, warmup_steps=2), ema_decay=None)
    run.fit()
    parameters = dict(task.named_parameters())
    decaying = [p for n, p in parameters.items() if n == "net.blocks.0.weight"]
    still = [p for n, p in parameters.items() if n != "net.blocks.0.weight"]
    optimizer = torch.optim.AdamW(
        [{"params": decaying, "weight_decay": 0.05}, {"params": still, "weight_decay": 0.0}],
        lr=0.005,
        betas=(0.9, 0.95),
        fused=True,
    )
    batch = next(trainer(tmp_path / "other").stream)
    task.train()
    generators = Generators(1)
    generators.seed_global()  # for dropout
    output = task(batch, "tokenizer", Context(0, 0.0, generators))
    sum(output.losses.values()).backward()
    torch.nn.utils.clip_grad_norm_(list(parameters.values()), 0.01)
    optimizer.step()
    for name, value in run.task.state_dict().items():
        torch.testing.assert_close(value, task.state_dict()[name], rtol=1e-6, atol=1e-7)


def test_a_turn_may_take_several_updates_on_a_batch(tmp_path: Path) -> None:
    task, seen = FakeTask(), []
    task.turns = (Turn("tokenizer", period=2, updates=3),)
    before = task.net.positions.detach().clone()

    def look(context: Context) -> None:
        moved = not torch.equal(task.net.positions, before)
        before.copy_(task.net.positions.detach())
        seen.append((context.step, context.update, moved))

    task.before = look
    trainer(tmp_path, task, max_steps=4, ema_decay=None).fit()
    wanted = [(step, update) for step in (0, 2) for update in range(3)]
    assert [entry[:2] for entry in seen] == wanted and [entry[2] for entry in seen] == [False] + 5 * [True]


def test_turns_are_taken_when_due_and_move_their_own_parameters_only(tmp_path: Path) -> None:
    task = TwoTurnTask()
    critic_before = task.critic.weight.detach().clone()
    trainer(
        tmp_path,
        task,
        max_steps=6,
        log_every=1,
        turn_optimizers={"critic": partial(AdamW, lr=0.5)},
        schedule=Constant,
    ).fit()
    due = [("generator", "critic") if step in (2, 4) else ("generator",) for step in range(6)]
    assert task.taken == [(step, turn) for step, turns in enumerate(due) for turn in turns] and task.leaks == []
    assert all(parameter.requires_grad for parameter in task.parameters())
    assert not torch.equal(task.critic.weight, critic_before)
    logged = [line for line in lines(tmp_path) if "generator/loss" in line]
    assert [("critic/loss" in line) for line in logged] == [False, False, True, False, True, False]
    assert logged[2]["critic/lr"] == 0.5 and logged[2]["generator/lr"] == 0.01


def test_a_turn_leaves_no_gradient_on_another_turns_parameters(tmp_path: Path) -> None:
    task = TwoTurnTask()
    run = trainer(tmp_path, task, max_steps=2)  # the critic's first turn would come at step 2
    critic_before = task.critic.weight.detach().clone()
    run.fit()
    assert torch.equal(task.critic.weight, critic_before) and task.critic.weight.grad is None
    assert task.net.positions.grad is not None


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ((Turn("a", ("net.*",)), Turn("b", ("net.blocks*",))), r"several turns \(a, b\) would train net.blocks.0.w"),
        ((Turn("a", ("net.blocks*",)),), "no turn of a would train net.positions; exactly one must, or freeze it"),
        ((Turn("a"), Turn("b", ("critc.*",))), r"turn 'b' trains nothing: no parameter matches critc.\*"),
    ],
)
def test_turns_must_share_out_the_parameters(tmp_path: Path, turns: tuple[Turn, ...], message: str) -> None:
    task = FakeTask()
    task.turns = turns
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, task)


def test_an_optimizer_for_a_turn_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="turn_optimizers has critic, and the turns of FakeTask are tokenizer"):
        trainer(tmp_path, turn_optimizers={"critic": partial(AdamW, lr=1.0)})


def test_bfloat16_computes_in_bfloat16_and_keeps_float32_weights(tmp_path: Path) -> None:
    task = FakeTask()
    kinds: set[torch.dtype] = set()
    task.before = lambda context: kinds.add(task.net.blocks[0](torch.ones(1, 48)).dtype)
    trainer(tmp_path, task, precision="bfloat16").fit()
    assert kinds == {torch.bfloat16}
    assert {value.dtype for value in task.state_dict().values()} == {torch.float32, torch.int64}


@pytest.mark.parametrize(("name", "value"), [("max_steps", 0), ("log_every", -1), ("clip_norm", 0.0)])
def test_settings_that_make_no_sense(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"train.{name} must be .*got {value}"):
        training(**{name: value})


def test_constructing_touches_no_file(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step_00000003.partial").mkdir(parents=True)
    trainer(tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["checkpoints", "step_00000003.partial"]


def test_an_alarm_is_told_when_it_begins(tmp_path: Path) -> None:
    class Alarming(FakeTask):
        steps = 0

        def alarms(self) -> dict[str, str]:
            self.steps += 1
            return {"codebook": "it collapses"} if self.steps in (2, 3, 5) else {}

    trainer(tmp_path, Alarming(), log_every=1).fit()
    told = [line for line in (tmp_path / "log.txt").read_text().splitlines() if "collapses" in line]
    assert [line.split("step ")[-1] for line in told] == ["2: it collapses", "5: it collapses"]
