"""The table of docs/reliability.md says what the code says."""

from __future__ import annotations

import pytest

from tests.faults.fault_table import DOCUMENT, END, ROWS, START, Row, line_of


def documented() -> list[str]:
    table = DOCUMENT.read_text().partition(START)[2].partition(END)[0]
    return table.strip().splitlines()[2:]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.fault)
def test_a_row_is_what_happens(row: Row, quick_report: None) -> None:
    line = line_of(row)
    assert line in documented(), "python -m tests.faults.fault_table --write"


def test_the_table_has_no_other_rows() -> None:
    assert [line.split(" | ")[0].removeprefix("| ") for line in documented()] == [row.fault for row in ROWS]
