"""Tables of means over seeds: texts with aligned decimals, as Markdown, LaTeX and CSV."""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

_LATEX = {character: "\\" + character for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", "±": r"$\pm$", "−": "$-$", "×": r"$\times$",
}  # fmt: skip

Rows = Sequence[Sequence[str]]
"""The first row is the header."""
Places = Collection[tuple[int, int]]
"""Rows and columns of what is printed in bold."""


class Estimate(NamedTuple):
    """A mean and its spread, which a single value does not have."""

    mean: float
    spread: float | None
    num_values: int


def estimate(values: Sequence[float], of_the_mean: bool = False) -> Estimate | None:
    """The mean and the standard deviation (over ``n - 1``) of values, or ``None`` of none.

    Args:
        values: one for each seed.
        of_the_mean: give the standard error of the mean instead.
    """
    if len(values) < 2:
        return Estimate(values[0], None, 1) if values else None
    spread = statistics.stdev(values) / math.sqrt(len(values) if of_the_mean else 1)
    return Estimate(statistics.fmean(values), spread, len(values))


def column_texts(column: Sequence[Estimate | None]) -> list[str]:
    """``4.58 ± 0.14`` for each, with equal decimals: two digits of the median spread, or three of the largest mean."""
    spreads = [entry.spread for entry in column if entry and entry.spread]
    means = [abs(entry.mean) for entry in column if entry]
    size, digits = (statistics.median(spreads), 2) if spreads else (max(means, default=0), 3)
    decimals = max(0, digits - 1 - math.floor(math.log10(size))) if size else 0
    texts = [[f"{part:.{decimals}f}" for part in entry[:2] if part is not None] if entry else [] for entry in column]
    return [" ± ".join(parts).replace("-", "−") for parts in texts]


def markdown(rows: Rows, num_words: int, bold: Places = ()) -> str:
    """A Markdown table; the first ``num_words`` columns are words, the others numbers."""
    escaped = _marked([[text.replace("|", r"\|") for text in row] for row in rows], "**{}**", bold)
    ruler = ["---"] * num_words + ["---:"] * (len(rows[0]) - num_words)
    return "".join(f"| {' | '.join(row)} |\n" for row in [escaped[0], ruler, *escaped[1:]])


def latex(rows: Rows, num_words: int, bold: Places = ()) -> str:
    """A ``tabular`` for the package booktabs; the first ``num_words`` columns are words, the others numbers."""
    escaped = _marked([[escape_latex(text) for text in row] for row in rows], r"\textbf{{{}}}", bold)
    header, *lines = (" & ".join(row) + r" \\" for row in escaped)
    columns = "l" * num_words + "r" * (len(rows[0]) - num_words)
    top = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", header, r"\midrule"]
    return "\n".join([*top, *lines, r"\bottomrule", r"\end{tabular}", ""])


def escape_latex(text: str) -> str:
    """Plain text as the LaTeX source that prints it."""
    return "".join(_LATEX.get(character, character) for character in text)


def _marked(rows: Rows, mark: str, places: Places) -> list[list[str]]:
    return [
        [mark.format(text) if (at, column) in places else text for column, text in enumerate(row)]
        for at, row in enumerate(rows)
    ]


def columns_text(columns: Mapping[str, Sequence[object]]) -> str:
    """``csv_text`` of columns of one height."""
    return csv_text(dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))


def csv_text(records: Iterable[Mapping[str, object]]) -> str:
    """One line for each record, under every key that any of them has; numbers at full precision."""
    records = list(records)
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(key for record in records for key in record)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return file.getvalue()


def protocol_text(protocol: Mapping[str, object]) -> str:
    """Where images are from, in a line below a table."""
    return "; ".join(f"{key} {value}" for key, value in protocol.items())
