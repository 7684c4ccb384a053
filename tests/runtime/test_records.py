from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from rich.console import Console

from framework.runtime.records import (
    Destination,
    JsonLines,
    LogFile,
    PlainLines,
    ProgressBar,
    Record,
    Records,
    peak_memory_mib,
    run_records,
)

TIMINGS = {"images_per_second": 265.2, "data_wait": 0.013, "eta_seconds": 185.4, "memory_mib": 512.3}


def record(step: int = 20, values: Mapping[str, float] | None = None) -> Record:
    return Record(step, 1200, values or {"tokenizer/loss": 0.01234, "tokenizer/lr": 3e-3}, TIMINGS)


def test_values_and_timings_are_kept_apart(tmp_path: Path) -> None:
    records = Records([JsonLines(tmp_path / "m", "values"), JsonLines(tmp_path / "t", "timings")])
    records.write(record())
    records.write(Record(250, 1200, {"validation/mse": 0.1}))
    assert [json.loads(line) for line in (tmp_path / "m").read_text().splitlines()] == [
        {"step": 20, "tokenizer/loss": 0.01234, "tokenizer/lr": 3e-3},
        {"step": 250, "validation/mse": 0.1},
    ]
    assert [json.loads(line) for line in (tmp_path / "t").read_text().splitlines()] == [{"step": 20, **TIMINGS}]


def test_what_is_not_finite_is_null_and_named(tmp_path: Path) -> None:
    JsonLines(tmp_path / "m", "values").write(record(values={"a": math.nan, "b": 1.0, "c": -math.inf}))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads((tmp_path / "m").read_text(), parse_constant=refuse)
    assert line == {"step": 20, "a": None, "b": 1.0, "c": None, "not_finite": ["a", "c"]}


def test_rewinding_cuts_later_and_torn_lines(tmp_path: Path) -> None:
    lines = JsonLines(tmp_path / "m", "values")
    lines.rewind(3)
    assert not (tmp_path / "m").exists()
    for step in (1, 2, 2, 3):
        lines.write(record(step))
    whole = (tmp_path / "m").read_text()
    lines.rewind(3)
    assert (tmp_path / "m").read_text() == whole
    with open(tmp_path / "m", "a") as file:
        file.write('{"step": 3, "tokenizer/lo')
    lines.rewind(7)
    assert (tmp_path / "m").read_text() == whole
    lines.rewind(2)
    assert (tmp_path / "m").read_text() == "".join(whole.splitlines(keepends=True)[:3])
    lines.rewind(0)
    assert (tmp_path / "m").read_text() == ""


def test_a_line_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = "step 20/1200, tokenizer/loss 0.01234, tokenizer/lr 0.003, "
    expected += "265 images/s, 1% waiting for data, 0:03:05 left, 512 MiB\n"
    Records([LogFile(tmp_path / "log"), PlainLines()]).write(record())
    assert (tmp_path / "log").read_text() == expected
    assert capsys.readouterr().err == expected


def test_the_bar_shows_progress_and_puts_other_lines_above() -> None:
    screen = io.StringIO()
    bar = ProgressBar(Console(file=screen, force_terminal=True, width=200))
    bar.write(record(values={"tokenizer/loss": 0.5, "tokenizer/pixel": 0.25, "tokenizer/lr": 0.1}))
    bar.write(Record(250, 1200, {"validation/mse": 0.125}))
    bar.say("[continuing]")
    bar.close()
    text = screen.getvalue()
    for part in ("20/1200", "tokenizer/loss 0.5", "tokenizer/lr 0.1", "265 images/s", "512 MiB", "0:03:05 left"):
        assert part in text
    assert "step 250/1200, validation/mse 0.125" in text and "[continuing]" in text and "tokenizer/pixel" not in text


@pytest.mark.parametrize(("is_terminal", "expected"), [(True, ProgressBar), (False, PlainLines)])
def test_a_bar_only_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_terminal: bool, expected: type[Destination]
) -> None:
    monkeypatch.setattr("sys.stderr", io.StringIO())
    monkeypatch.setattr("sys.stderr.isatty", lambda: is_terminal)
    records = run_records(tmp_path)
    assert [type(d) for d in records.destinations] == [JsonLines, JsonLines, LogFile, expected]
    assert list(tmp_path.iterdir()) == []


def test_memory_is_in_mib() -> None:
    before = peak_memory_mib(torch.device("cpu"))
    held = torch.ones(40 * 2**18)  # 40 MiB
    assert before < 100_000 and peak_memory_mib(torch.device("cpu")) >= before > 50
    del held
