"""Modules of other people's repositories, imported from a checkout that the user names.

Nothing of those repositories is in this one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType


@dataclass(frozen=True)
class Repository:
    """What is imported of a repository on GitHub.

    Args:
        name: ``owner/name``.
        files: the modules, relative to a checkout.
        packages: top-level names that a checkout brings; other packages may be called the same.
    """

    name: str
    files: Sequence[str]
    packages: Sequence[str]

    def missing(self, checkout: Path) -> str | None:
        """The first of the files that a folder has not."""
        return next((name for name in self.files if not (checkout / name).is_file()), None)

    def modules(self, checkout: Path) -> list[ModuleType]:
        """Its modules; others of these names stay as they are.

        Raises:
            FileNotFoundError: if this is no checkout.
        """
        if missing := self.missing(checkout):
            raise FileNotFoundError(f"{checkout} has no {missing}: name a checkout of https://github.com/{self.name}")
        names = [name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in self.files]
        with self._only(checkout):
            return [import_module(name) for name in names]

    @contextmanager
    def _only(self, checkout: Path) -> Iterator[None]:
        before = self._taken()
        sys.path.insert(0, str(checkout.resolve()))
        try:
            yield
        finally:
            sys.path.remove(str(checkout.resolve()))
            self._taken()
            sys.modules.update(before)

    def _taken(self) -> dict[str, ModuleType]:
        names = [name for name in sys.modules if name.partition(".")[0] in self.packages]
        return {name: sys.modules.pop(name) for name in names}
