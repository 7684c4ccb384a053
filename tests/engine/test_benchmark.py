from __future__ import annotations

import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from framework.config.registry import Factory
from framework.data.data import Data
from framework.data.stream import Stream
from framework.engine import benchmark
from framework.engine.benchmark import PlainLoop, Time, Times
from framework.engine.experiment import Experiment, RunOptions
from framework.engine.optimizers import AdamW, Muon, Optimizer
from framework.engine.trainer import Trainer
from framework.losses.adversarial import AdversarialLoss
from framework.losses.discriminators import BlurPatchDiscriminator
from framework.losses.reconstruction import PixelLoss
from framework.runtime.records import JsonLines
from framework.tasks.train_tokenizer import TrainTokenizer
from framework.tokenizers.decoders.mask_token_vit import MaskTokenViT
from framework.tokenizers.encoders.suffix_token_vit import SuffixTokenViT
from framework.tokenizers.heads import PixelShuffleHead
from framework.tokenizers.masking import NestedTailMasking
from framework.tokenizers.quantizers.identity import Identity
from framework.tokenizers.spaces import PixelSpace
from framework.tokenizers.tokenizer import Tokenizer
from tests.engine.fakes import FakeData, TwoTurnTask, training
from tests.tokenizers.build import small_tokenizer

CPU = torch.device("cpu")


class NoiseImages(FakeData):
    """Seven images of 4x4, whatever ``Data`` asks for."""

    def __init__(self, **given: Any) -> None:
        super().__init__()


def experiment(folder: Path, **changes: Any) -> Experiment:
    """A tokenizer of 4x4 images with 4 patches and 8 tokens, to train on noise."""
    size: dict[str, Any] = {"width": 16, "depth": 1, "num_heads": 2}
    tokenizer = partial(
        Tokenizer,
        PixelSpace(),
        partial(SuffixTokenViT, num_tokens=8, patch_size=2, **size),
        Identity(5),
        NestedTailMasking(),
        partial(MaskTokenViT, head=PixelShuffleHead, **size),
    )
    return Experiment(
        RunOptions(str(folder / "run"), device="cpu"),
        partial(Data, 4, NoiseImages, NoiseImages, NoiseImages),
        partial(TrainTokenizer, {"pixel": PixelLoss()}),
        training(**changes),
        tokenizer,
    )


@pytest.mark.parametrize("optimizer", [partial(AdamW, lr=1e-2), partial(Muon, lr=1e-2)])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("clip_norm", [0.01, None])
def test_the_loops_compute_the_same(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    optimizer: Factory[Optimizer],
    precision: str,
    clip_norm: float | None,
) -> None:
    """On equal batches both loops of ``compare_training`` end at the same weights and averages."""
    ours = experiment(tmp_path, optimizer=optimizer, precision=precision, clip_norm=clip_norm)
    start = deepcopy(ours.task)
    made: dict[str, Any] = {}

    def remembering(kind: type) -> Callable[..., object]:
        def make(*arguments: Any, **options: Any) -> object:
            made[kind.__name__] = kind(*arguments, **options)
            return made[kind.__name__]

        return make

    monkeypatch.setattr(benchmark, "Trainer", remembering(Trainer))
    monkeypatch.setattr(benchmark, "PlainLoop", remembering(PlainLoop))
    monkeypatch.setattr(benchmark, "shuffled", lambda data, size, steps, workers: Stream(data, size, seed=0))
    times = benchmark.compare_training(ours, rounds=2, steps=2)

    assert list(times.rounds) == ["plain loop", "Trainer"] and all(len(laps) == 2 for laps in times.rounds.values())
    trainer, loop = made["Trainer"], made["PlainLoop"]
    trained, plain = dict(trainer.task.named_parameters()), dict(loop.task.named_parameters())
    assert trained.keys() == plain.keys()
    for name, value in start.named_parameters():
        assert not torch.equal(trained[name], value), f"{name} was not trained"
        assert trained[name] is not plain[name]
        torch.testing.assert_close(plain[name], trained[name], rtol=1e-5, atol=1e-6)
    averages = trainer.average.state_dict()
    followed = [name for name, _ in loop.task.model.named_parameters()]
    for name, average in zip(followed, loop.average, strict=True):
        torch.testing.assert_close(average, averages[name], rtol=1e-5, atol=1e-6)


def test_the_trainer_logs_and_the_run_directory_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[int] = []
    monkeypatch.setattr(JsonLines, "write", lambda self, record: logged.append(record.step))
    ours = experiment(tmp_path, log_every=2, max_steps=77)
    benchmark.compare_training(ours, rounds=1, steps=3)
    assert logged == [2, 2, 4, 4, 6, 6]  # values and timings, and no validation
    assert list(tmp_path.iterdir()) == [] and ours.train.max_steps == 77


def test_the_plain_loop_takes_one_update() -> None:
    task = TwoTurnTask()
    task.turns = (*task.turns[:1], replace(task.turns[1], updates=2))
    with pytest.raises(ValueError, match="the plain loop takes one update on a batch, and not those of TwoTurnTask"):
        PlainLoop(task, iter([]), training(), 0, CPU)


def test_both_loops_take_both_turns_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A discriminator that starts late, with an optimizer of its own."""
    adversarial = partial(AdversarialLoss, BlurPatchDiscriminator(32, 1), start=2, lecam=0.1)
    ours = experiment(tmp_path, turn_optimizers={"discriminator": partial(AdamW, lr=1e-2)})
    ours.task = TrainTokenizer({"pixel": PixelLoss()}, adversarial(), tokenizer=ours.task.model)  # type: ignore[arg-type]
    start = deepcopy(ours.task.state_dict())
    loops: list[PlainLoop] = []

    def remember(*arguments: Any) -> PlainLoop:
        loops.append(PlainLoop(*arguments))
        return loops[0]

    monkeypatch.setattr(benchmark, "PlainLoop", remember)
    monkeypatch.setattr(benchmark, "shuffled", lambda data, size, steps, workers: Stream(data, size, seed=0))
    benchmark.compare_training(ours, rounds=1, steps=2)
    plain = dict(loops[0].task.named_parameters())
    for name, value in ours.task.named_parameters():
        assert not torch.equal(value, start[name]), f"{name} was not trained"
        torch.testing.assert_close(plain[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "option", [{"accumulate": 2}, {"recompute": True}, {"compile": True}, {"freeze": ("tokenizer.encoder.*",)}]
)
def test_what_the_plain_loop_does_not_do_is_refused(tmp_path: Path, option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="the plain loop does not accumulate, recompute, compile or freeze"):
        benchmark.compare_training(experiment(tmp_path, batch_size=4, **option), rounds=1, steps=1)


def test_shuffled_gives_every_image_once_an_epoch() -> None:
    batches = list(benchmark.shuffled(FakeData(), batch_size=3, steps=7, num_workers=0))
    assert [len(batch.images) for batch in batches] == [3] * 7
    keys = [key for batch in batches for key in batch.keys]
    epochs = [keys[:7], keys[7:14], keys[14:]]
    assert all(sorted(epoch) == [f"image{i}" for i in range(7)] for epoch in epochs) and epochs[0] != epochs[1]


def test_decoding_is_timed_at_each_length(tmp_path: Path) -> None:
    ours = experiment(tmp_path)
    tokenizer = ours.task.model
    assert isinstance(tokenizer, Tokenizer)
    decoded: list[list[int]] = []
    tokenizer.decoder.register_forward_pre_hook(lambda module, inputs: decoded.append(inputs[0].lengths.tolist()))
    times = benchmark.time_decoding(ours, batch_size=64, rounds=2)
    assert list(times.rounds) == ["length 8", "length 4", "length 2", "length 1", "lengths 1-8"]
    assert all(len(laps) == 2 for laps in times.rounds.values())
    assert [decoded[i] for i in range(4)] == [[n] * 64 for n in (8, 4, 2, 1)]
    assert set(decoded[4]) == set(range(1, 9)) and decoded[5:] == decoded[:5] * 2  # rounds alternate, after one more


def test_lengths_that_coincide_are_timed_once() -> None:
    cases = benchmark.decoding_cases(small_tokenizer(num_tokens=2), batch_size=3)
    assert list(cases) == ["length 2", "length 1", "lengths 1-2"]


@pytest.mark.parametrize("backward", [True, False])
def test_each_form_of_attention_is_timed(monkeypatch: pytest.MonkeyPatch, backward: bool) -> None:
    calls: dict[str, list[torch.Tensor]] = {"fused": [], "softmax": []}

    def spy(name: str, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def called(*arguments: Any, **options: Any) -> torch.Tensor:
            calls[name].append(arguments[0])
            return function(*arguments, **options)

        return called

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy("fused", F.scaled_dot_product_attention))
    monkeypatch.setattr(torch.Tensor, "softmax", spy("softmax", torch.Tensor.softmax))
    times = benchmark.time_attention((2, 3, 8), torch.float32, backward, rounds=2, device=CPU)
    assert list(times.rounds) == ["explicit", "fused"]
    assert len(calls["fused"]) == len(calls["softmax"]) == 3 * benchmark.ATTENTION_CALLS
    assert calls["fused"][0].shape == (2, 3, 8, 64) and calls["fused"][0].requires_grad is backward
    scores = calls["softmax"][0]
    assert scores.shape == (2, 3, 8, 8) and (scores[0, 0, 0] == -torch.inf).sum() == 4  # padded keys
    assert scores.requires_grad is backward


def test_the_attention_table_names_what_is_chosen() -> None:
    lines = list(benchmark.attention_table(rounds=1, device=CPU, shapes=[(1, 1, 4), (1, 1, 300)]))[2:]
    assert [line.split()[-1] for line in lines] == ["explicit", "fused"] * 3 + ["fused"] * 2
    assert [re.split(r" {2,}", line)[:2] for line in lines[::2]] == [
        [size, dtype] for dtype in ("bfloat16", "float32") for size in ("1 x 1 x 4", "1 x 1 x 300")
    ]


def test_ratios_are_medians_of_ratios_within_a_round() -> None:
    base, case = [Time(1, 1), Time(10, 2), Time(4, 4)], [Time(2, 4), Time(10, 2), Time(2, 1)]
    times = Times({"base": base, "case": case})
    assert times.ratio("case") == Time(1, 1) and times.ratio("base") == Time(1, 1)
    assert times.seconds("base") == Time(4, 2) and times.seconds("case") == Time(2, 2)
    head, _, *lines = times.table(images=8).splitlines()
    assert "3 alternating rounds of 8 images" in head
    assert lines[1].split() == ["case", "2000.00", "4.0", "1.000", "2000.00", "4.0", "1.000"]
