from __future__ import annotations

from pathlib import Path

from framework.runtime.json_lines import read_lines


def test_whole_lines_are_read_and_torn_ones_are_not(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(b'{"step": 1, "loss": 2.5}\n\xff\x00{\n[1]\n{"epoch": 2}\n{"step": 3}\n{"step": 4, "lo')
    assert read_lines(file, "step") == [{"step": 1, "loss": 2.5}, {"step": 3}]
    assert read_lines(tmp_path / "none", "step") == read_lines(tmp_path, "step") == []
