"""Globs over the names of parameters, with words for those that match nothing."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

from framework.config.errors import did_you_mean


def matches(name: str, globs: Iterable[str]) -> bool:
    """Whether one of the globs matches a name."""
    return any(fnmatchcase(name, glob) for glob in globs)


def unmatched(globs: Iterable[str], names: Collection[str]) -> list[str]:
    """What to say of each glob that matches none of the names; the nearest choice may be a part's, ``encoder.*``."""
    parts = {f"{name[:end]}.*" for name in names for end, letter in enumerate(name) if letter == "."}
    return [
        f"'{glob}' matches nothing{did_you_mean(glob, [*sorted(parts), *names])}"
        for glob in globs
        if not any(fnmatchcase(name, glob) for name in names)
    ]
