"""From a configuration to objects: check everything first, then construct."""

from __future__ import annotations

import functools
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import torch
from torch import nn

from framework.config.errors import ConfigError, Keys, Problem, SchemaError, dotted
from framework.config.schema import Entries, Items, Part, Plan, Reader, Value, arguments
from framework.config.yaml import Config

T = TypeVar("T")
LoadWeights = Callable[[nn.Module, str, str], None]
"""Loads ``(module, source, path)``: what ``weights:`` names into the module, which stands at the dotted path."""


def check(config: Config, root: type) -> None:
    """Imports what ``imports`` lists, then holds the whole tree against the signatures; builds nothing.

    Args:
        root: a plain class; the signature of its constructor is the schema of the top level.

    Raises:
        ConfigError: with everything that is wrong.
        SchemaError: a signature is one that YAML cannot fill.
    """
    _plan(config, root)


def resolve(config: Config, root: type) -> dict[str, Any]:
    """The tree with every default written, in the order of the signatures; loading its dump gives it back.

    Raises:
        ConfigError, SchemaError: as ``check``.
    """
    modules = config.tree.get("imports")
    tree = _plan(config, root).tree()
    return {"imports": modules} | tree if modules else tree


def build(config: Config, root: type[T], load_weights: LoadWeights, unread: Sequence[Keys] = ()) -> T:
    """Checks, then constructs ``root`` and everything in it.

    Args:
        load_weights: called for each component that has ``weights:``, after its construction.
        unread: places whose modules are made on the meta device, read nothing, and are marked ``is_unread``.

    Raises:
        ConfigError: the check failed, or a constructor refused its arguments with a ValueError.
        SchemaError: as ``check``.
    """
    return _Builder(config, load_weights, unread).construct(_plan(config, root))


def _plan(config: Config, root: type) -> Part:
    _import(config)
    reader = Reader(config)
    plan = reader.part({key: value for key, value in config.tree.items() if key != "imports"}, root, (), "")
    if config.problems or reader.problems:
        raise ConfigError([*config.problems, *reader.problems])
    return plan


def _import(config: Config) -> None:
    modules = config.tree.get("imports") or []
    problems = []
    if not isinstance(modules, list) or not all(isinstance(module, str) for module in modules):
        message = "expected a list of module names, such as [projects.adatok]"
        raise ConfigError([*config.problems, Problem(config.source(("imports",)), ("imports",), message)])
    # A module of one's own may lie where the command runs; last on the path, so that it hides nothing installed.
    if modules and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    for index, module in enumerate(modules):
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever a user's module raises is the reason to show
            keys = ("imports", index)
            reason = str(error) if isinstance(error, SchemaError) else f"{type(error).__name__}: {error}"
            if isinstance(error, ModuleNotFoundError):
                reason += "; it must be installed, on PYTHONPATH, or in the current folder"
            problems.append(Problem(config.source(keys), keys, f"cannot import '{module}': {reason}"))
    if problems:
        raise ConfigError([*config.problems, *problems])


class _Builder:
    def __init__(self, config: Config, load_weights: LoadWeights, unread: Sequence[Keys]) -> None:
        self.config = config
        self.load_weights = load_weights
        self.unread = unread

    def make(self, plan: Plan) -> Any:
        match plan:
            case Value(value):
                return value
            case Items(items, kind):
                return kind(self.make(item) for item in items)
            case Entries(entries):
                return {key: self.make(entry) for key, entry in entries.items()}
            case Part(is_factory=True):
                return functools.partial(self.construct, plan)
            case Part():
                return self.construct(plan)

    def construct(self, part: Part, **given: Any) -> Any:
        """Constructs a part with what its parent gives, then loads and freezes it as its node says."""
        from_parent = {key: argument for key, argument in arguments(part.cls).items() if argument.from_parent}
        missing = [key for key, argument in from_parent.items() if argument.required and key not in given]
        if unknown := [key for key in given if key not in from_parent]:
            self._refuse(part, f"does not take '{unknown[0]}' from {part.owner}: add it to its signature after `*`")
        if missing:
            where = f"set '{missing[0]}' there if {part.owner} takes it, or give it a default"
            self._refuse(part, f"needs '{missing[0]}' from {part.owner}, which gives none: {where}")
        made_arguments = {key: self.make(plan) for key, plan in part.arguments.items()}
        is_unread = any(part.keys[: len(place)] == place for place in self.unread)
        try:
            with torch.device("meta") if is_unread else nullcontext():
                made = part.cls(**made_arguments, **given)
        except (ValueError, OSError) as error:
            self._refuse(part, f"refuses its arguments: {error}", error)
        if is_unread:
            made.is_unread = True
        elif source := part.builder.get("weights"):
            self.load_weights(made, source, dotted(part.keys))
            made.has_weights = True
        if part.builder.get("frozen"):
            made.requires_grad_(False).eval().is_frozen = True
            made.is_untrained = not any(getattr(each, "has_weights", False) for each in made.modules())
        return made

    def _refuse(self, part: Part, message: str, cause: Exception | None = None) -> None:
        problem = Problem(self.config.source(part.keys), part.keys, f"{part.cls.__name__} {message}")
        raise ConfigError([problem]) from cause
