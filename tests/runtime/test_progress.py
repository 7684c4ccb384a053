from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from framework.runtime import progress
from framework.runtime.progress import Stages


def test_a_terminal_sees_a_bar_for_each_stage() -> None:
    console = Console(file=StringIO(), force_terminal=True, width=100)
    with Stages(console) as stages:
        stages("tokenizer", 32, 64)
        stages("baseline", 1, 2)
        stages("tokenizer", 64, 64)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "tokenizer" in shown and "32/64" in shown and "64/64" in shown and "baseline" in shown


def test_elsewhere_lines_come_now_and_then(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = 100.0
    monkeypatch.setattr(progress, "perf_counter", lambda: now)
    with Stages(Console(file=StringIO(), force_terminal=False)) as stages:
        for done in range(1, 41):
            stages("tokenizer", done, 40)
            now += 1.0
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["tokenizer: 17/40, 22 s left", "tokenizer: 33/40, 7 s left"]


def test_a_stage_may_begin_at_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    now = 100.0
    monkeypatch.setattr(progress, "perf_counter", lambda: now)
    with Stages(Console(file=StringIO(), force_terminal=False)) as stages:
        for stage, done in (("samples", 0), ("images", 0), ("images", 10)):
            stages(stage, done, 40)
            now += 20.0
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["images: 0/40", "images: 10/40, 60 s left"]
