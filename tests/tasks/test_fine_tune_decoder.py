from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import framework
from framework import runs
from framework.allocation.adaptive_tokenizer import AdaptiveTokenizer
from framework.allocation.learned_policy import LearnedPolicy
from framework.allocation.rewards import ContinuousReward
from framework.config import ConfigError
from framework.losses.reconstruction import PixelLoss
from framework.tasks.fine_tune_decoder import FineTuneDecoder
from framework.tasks.interface import Context
from framework.tokenizers.tokenizer import Tokenizer
from tests.tasks.test_train_allocation import batch
from tests.tiny_run import run_tool, tiny_config
from tests.tokenizers.build import small_tokenizer


class ByBrightness(LearnedPolicy):
    """Six tokens for the brighter half of a batch, two for the rest."""

    def forward(self, request: Any) -> Any:
        allocation = super().forward(request)
        light = request.images.mean((1, 2, 3))
        return type(allocation)(torch.where(light > light.median(), 6, 2))


def make_task(policy_share: float = 1.0, **tokenizer: Any) -> FineTuneDecoder:
    losses: dict[str, Any] = {"pixel": PixelLoss()}
    return FineTuneDecoder(
        ByBrightness, losses, ContinuousReward(), policy_share, tokenizer=small_tokenizer(**tokenizer)
    )


def context(step: int = 0) -> Context:
    generator = torch.Generator().manual_seed(step)
    return Context(step, 0.5, lambda purpose: generator)


def lengths_seen(task: FineTuneDecoder) -> list[Tensor]:
    seen: list[Tensor] = []
    task.tokenizer.decoder.register_forward_pre_hook(lambda module, given: seen.append(given[0].lengths))
    return seen


def test_the_decoder_sees_the_policys_lengths() -> None:
    task = make_task()
    seen = lengths_seen(task)
    images = batch(0, 1, 2, 3)
    output = task(images, "decoder", context())
    light = images.images.mean((1, 2, 3))
    assert torch.equal(seen[0], torch.where(light > light.median(), 6, 2))
    assert output.metrics["mean_length"] == output.metrics["policy_length"] == seen[0].double().mean()


def test_the_other_share_sees_drawn_lengths() -> None:
    task = make_task(policy_share=0.5)
    seen = lengths_seen(task)
    for step in range(60):
        task(batch(0, 1, 2, 3), "decoder", context(step))
    counts = torch.cat(seen).bincount(minlength=7)[1:] / 240
    # Half at 2 or 6, the other half even over 1 to 6.
    expected = torch.full((6,), 0.5 / 6)
    expected[[1, 5]] += 0.25
    assert (counts - expected).abs().max() < 0.1


def test_only_the_decoder_learns() -> None:
    task = make_task().train()
    assert task.tokenizer.decoder.training
    assert not any(part.training for part in (task.tokenizer.encoder, task.tokenizer.quantizer, task.policy))
    task(batch(0, 1, 2), "decoder", context()).losses["pixel"].backward()
    learned = {name for name, parameter in task.named_parameters() if parameter.grad is not None}
    assert learned and all(name.startswith("adaptive.tokenizer.decoder.") for name in learned)
    trainable = {name for name, parameter in task.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, _ in task.named_parameters() if ".decoder." in name}


def test_what_does_not_fit_is_refused() -> None:
    tokenizer = small_tokenizer()
    tokenizer.is_frozen = True  # type: ignore[assignment]
    arguments: tuple[Any, ...] = (LearnedPolicy, {"pixel": PixelLoss()}, ContinuousReward())
    with pytest.raises(ValueError, match="set tokenizer.frozen=false"):
        FineTuneDecoder(*arguments, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="trains nothing"):
        FineTuneDecoder(LearnedPolicy, {}, ContinuousReward(), tokenizer=small_tokenizer())
    with pytest.raises(ValueError, match="above 0 and at most 1; got 0"):
        FineTuneDecoder(*arguments, policy_share=0, tokenizer=small_tokenizer())


@pytest.mark.usefixtures("quick_report")
def test_a_run_continues_two_others(
    tiny_run: Path, tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "adaptive"
    policy = f"{{name: LearnedPolicy, width: 128, depth: 2, weights: {tiny_policy}, frozen: true}}"
    losses, reward = "{pixel: {name: PixelLoss}}", "{name: ContinuousReward}"
    task = f"task={{name: FineTuneDecoder, policy: {policy}, losses: {losses}, reward: {reward}}}"
    outcome = runs.train(tiny_config(folder, f"tokenizer.weights={tiny_run}", task), print)
    assert outcome.status == "finished"
    before, after = framework.load(tiny_policy), framework.load(folder)
    assert isinstance(before, AdaptiveTokenizer) and isinstance(after, AdaptiveTokenizer)
    moved = {name for name, value in after.state_dict().items() if not torch.equal(value, before.state_dict()[name])}
    assert moved and all(name.startswith("tokenizer.decoder.") for name in moved)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    validated = {key for line in lines for key in line if key.startswith("validation/")}
    assert validated == {"validation/mse", "validation/mse_full", "validation/length"}
    # The stages stand side by side.
    out = tmp_path / "comparison"
    arguments = ("--run", tiny_policy, folder, "--out", out, "--limit", 8)
    assert run_tool(monkeypatch, "evaluate", *arguments) == 0
    assert str(folder) in (out / "comparison.md").read_text()


def test_weights_of_another_kind_of_policy_are_refused(tiny_run: Path, tmp_path: Path) -> None:
    policy = f"{{name: LearnedPolicy, weights: {tiny_run}}}"
    task = f"{{name: FineTuneDecoder, policy: {policy}, losses: {{pixel: {{name: PixelLoss}}}}, "
    config = tiny_config(tmp_path, f"task={task}reward: {{name: ContinuousReward}}}}")
    with pytest.raises((runs.RunError, ConfigError), match="has no such part to take weights from"):
        runs.train(config, print)


def test_only_runs_of_one_kind_are_compared(tiny_run: Path, tiny_policy: Path, tmp_path: Path) -> None:
    with pytest.raises(runs.RunError, match="only runs of one kind"):
        runs.compare([tiny_run, tiny_policy], print, tmp_path)


def test_a_tokenizer_alone_is_what_it_trains() -> None:
    assert isinstance(make_task().tokenizer, Tokenizer) and isinstance(make_task().model, AdaptiveTokenizer)
