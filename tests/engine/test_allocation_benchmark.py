from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from framework.allocation.adaptive_tokenizer import AdaptiveTokenizer
from framework.allocation.rules import FixedLength
from framework.engine import allocation_benchmark
from framework.engine.allocation_benchmark import Costs, allocation_lines, time_allocation
from framework.engine.benchmark import Time, Times
from framework.engine.experiment import Experiment
from framework.tokenizers.tokenizer import Tokenizer
from tests.engine.fakes import FakeTask
from tests.engine.test_benchmark import experiment
from tests.tiny_run import ROOT, TINY, run_tool
from tests.tokenizers.build import small_tokenizer

CPU = torch.device("cpu")
STAGES = ["decide", "encode and decide", "encode, decide and decode"]


class Passes(NamedTuple):
    """How many images a side of a stage encoded, and the lengths at which it decoded, call by call."""

    encoded: int
    decoded: list[list[int]]


def counted(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer, **given: int
) -> tuple[Costs, list[Passes]]:
    """What ``time_allocation`` returns, and what each timed function does: policy and search of the first stage, ..."""
    encoded: list[int] = []
    decoded: list[list[int]] = []
    passes: list[Passes] = []
    tokenizer.encoder.register_forward_pre_hook(lambda module, inputs: encoded.append(len(inputs[0])))
    tokenizer.decoder.register_forward_pre_hook(lambda module, inputs: decoded.append(inputs[0].lengths.tolist()))

    def instead(cases: dict[str, Any], rounds: int, device: torch.device) -> Times:
        assert list(cases) == ["policy", "search"] and rounds == 2
        for run in cases.values():
            encoded.clear()
            decoded.clear()
            run()
            passes.append(Passes(sum(encoded), [*decoded]))
        return Times({"policy": [Time(0.004, 0.002)] * rounds, "search": [Time(0.04, 0.01)] * rounds})

    monkeypatch.setattr(allocation_benchmark, "take_turns", instead)
    return time_allocation(tokenizer, rounds=2, device=CPU, **given), passes


@pytest.mark.parametrize("batch_size", [1, 3, 12])
def test_the_stages_do_what_they_say(monkeypatch: pytest.MonkeyPatch, batch_size: int) -> None:
    """Five candidates, 2 to 6, take two or three trials; the first is at the middle one."""
    times, passes = counted(monkeypatch, small_tokenizer(num_tokens=6), batch_size=batch_size, shortest=2)
    batches = {1: 8, 3: 2, 12: 1}[batch_size]
    images = batches * batch_size
    assert times.images == images and list(times.stages) == STAGES and len(passes) == 6

    assert [side.encoded for side in passes] == [0, 0] + [images] * 4
    policy, search = passes[::2], passes[1::2]
    assert [side.decoded for side in policy[:2]] == [[], []]
    trials = search[0].decoded
    assert search[1].decoded == trials and trials.count([4] * batch_size) == batches
    assert times.trials == pytest.approx(sum(map(len, trials)) / images) and 2 <= times.trials <= 3
    assert {3, 5} & {length for call in trials for length in call}

    final = policy[2].decoded
    assert [len(lengths) for lengths in final] == [batch_size] * batches
    assert sorted(search[2].decoded) == sorted(trials + final)  # both sides end with the same decoding


def test_the_search_takes_different_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    _, passes = counted(monkeypatch, small_tokenizer(num_tokens=6), batch_size=1, shortest=1)
    found = [lengths[0] for lengths in passes[4].decoded]
    assert len(found) == 8 and sum(length <= 3 for length in found) == 4  # half of them meet it at the first trial


def test_the_table_is_of_one_image(monkeypatch: pytest.MonkeyPatch) -> None:
    times, _ = counted(monkeypatch, small_tokenizer(num_tokens=4), batch_size=2, shortest=1)
    title, head, *lines = times.table(batch_size=2).splitlines()
    assert "batch 2: medians of 2 alternating rounds of 8 images" in title and title.endswith("an image 2.00 times")
    assert head.split() == ["ms", "an", "image", "policy", "search", "search", "/", "policy", "in", "CPU", "time"]
    assert [line[:26].strip() for line in lines] == STAGES
    assert [line[26:].split() for line in lines] == [["0.500", "5.000", "10.0", "5.0"]] * 3


def test_a_shortest_length_that_the_tokenizer_does_not_have() -> None:
    with pytest.raises(ValueError, match="at most the tokenizer's 6 tokens, got .9.; try .6."):
        time_allocation(small_tokenizer(num_tokens=6), 1, 9, rounds=1, device=CPU)


def test_the_tokenizer_of_an_adaptive_model_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, task = experiment(tmp_path), FakeTask()
    tokenizer = ours.task.model
    assert isinstance(tokenizer, Tokenizer)
    task.net = AdaptiveTokenizer(tokenizer, FixedLength(3, num_tokens=8, feature_dim=48))  # type: ignore[assignment]
    ours.task = task
    given: list[object] = []

    def instead(*arguments: object) -> Costs:
        given.append(arguments)
        return Costs({"decide": Times({"policy": [Time(1, 1)], "search": [Time(2, 2)]})}, 8, 3)

    monkeypatch.setattr(allocation_benchmark, "time_allocation", instead)
    head, *tables = allocation_lines(ours, rounds=3, batch_sizes=[1, 64], shortest=2)
    assert head.endswith("candidate lengths: 2 to 8")
    assert given == [(tokenizer, 1, 2, 3, CPU), (tokenizer, 64, 2, 3, CPU)]
    assert [table.split(":")[0] for table in tables] == ["batch 1", "batch 64"]


def test_a_model_that_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    ours: Experiment = experiment(tmp_path)
    ours.task = FakeTask()
    with pytest.raises(TypeError, match="only a tokenizer has lengths to choose, and this model is FakeModel"):
        next(allocation_lines(ours, 1, [1], 1))


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    config = ["--config", ROOT / "projects/adatok/ntm.yaml", *TINY, "run.device=cpu"]
    options = ["--rounds", "1", "--batch", "1", "4", "--shortest", "13"]
    assert run_tool(monkeypatch, "benchmark", "allocation", *config, *options) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.endswith("candidate lengths: 13 to 16") and len(lines) == 10
    for batch, table in (("batch 1", lines[:5]), ("batch 4", lines[5:])):
        assert table[0].startswith(f"{batch}: ") and table[0].endswith("an image 2.00 times")
        assert [line[:26].strip() for line in table[2:]] == STAGES
        assert all(float(number) > 0 for line in table[2:] for number in line[26:].split())
