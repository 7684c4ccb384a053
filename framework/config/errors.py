"""What is wrong with a configuration, in words, with the place and the nearest valid choice."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

Keys = tuple[str | int, ...]
"""The place of a value in the tree: keys of mappings and indices of lists."""


class Source(NamedTuple):
    """Where a value was written: a file and its line from 1, or the command line (line 0)."""

    file: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line else self.file


@dataclass(frozen=True)
class Problem:
    """One error, at one place."""

    source: Source
    keys: Keys
    message: str

    def __str__(self) -> str:
        return shorten(": ".join(part for part in (str(self.source), dotted(self.keys), self.message) if part), 2000)


class ConfigError(Exception):
    """Everything that is wrong with a configuration, one line each as ``file:line: dotted.path: message``."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = sorted(dict.fromkeys(problems), key=lambda problem: problem.source)
        super().__init__(self.problems)

    def __str__(self) -> str:
        count = "1 error" if len(self.problems) == 1 else f"{len(self.problems)} errors"
        return "\n".join([f"{count} in the configuration:", *map(str, self.problems)])


class SchemaError(TypeError):
    """A mistake in the code of a component, such as a signature that YAML cannot express."""


def dotted(keys: Keys) -> str:
    """The place as users write it, such as ``train.optimizer.lr``."""
    return ".".join(map(str, keys))


def nearest(word: str, choices: Iterable[str]) -> str | None:
    """The choice that ``word`` was probably meant to be, upper and lower case alike, or ``None``."""
    lower = {choice.lower(): choice for choice in choices}
    matches = difflib.get_close_matches(word.lower(), lower, n=1)
    return lower[matches[0]] if matches else None


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """``": did you mean 'width'?"``, or nothing where no choice is near."""
    match = nearest(word, choices)
    return f": did you mean '{match}'?" if match else ""


def shorten(text: str, length: int) -> str:
    """The text, or its beginning with dots."""
    return text if len(text) <= length else text[: length - 3] + "..."


def show(value: Any) -> str:
    """A YAML value in words: ``null``, ``the string 'on'``, ``the number 3``, ``a mapping``."""
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = shorten(str(value).replace("\n", " "), 60)
    if isinstance(value, str):
        return f"the string '{text}'"
    return f"the number {text.replace('inf', '.inf').replace('nan', '.nan')}"
