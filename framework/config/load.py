"""From files and the command line to one tree: inheritance through ``_base_``, then overrides, then references.

Loading runs no code: what ``imports`` lists is imported by ``check``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from framework.config.errors import ConfigError, Keys, Problem, Source, nearest, shorten
from framework.config.references import References
from framework.config.yaml import Config, parse


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Reads a file, what it inherits and the overrides of the command line, and resolves references.

    Args:
        path: a YAML file whose top level is a mapping.
        overrides: ``dotted.path=value`` each, values in YAML; an element of a list goes by its index. Later ones win,
            but those that change a ``name`` come first, since a new name drops the arguments of the old one.

    Raises:
        ConfigError: a file is missing, is not YAML, or inherits itself. What leaves a tree is in ``Config.problems``.
    """
    config = _load_file(os.path.normpath(path), ())
    parsed: list[_Override] = []
    for text in overrides:
        with _collecting(config.problems):
            parsed.append(_parse_override(text))
    for override in sorted(parsed, key=lambda override: override.rename_depth):
        with _collecting(config.problems):
            _apply_override(config, override)
    config.tree = References(config).value((), config.tree, ())
    return config


@contextmanager
def _collecting(problems: list[Problem]) -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        problems += error.problems


def _load_file(file: str, chain: tuple[str, ...]) -> Config:
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError([Problem(Source(file), (), _unreadable(file, error))]) from error
    own = parse(text, lambda line: Source(file, line))
    if not isinstance(own.tree, dict):
        raise ConfigError([Problem(own.source(()), (), "the top level must be a mapping, such as `train: {lr: 3e-4}`")])

    chain = (*chain, file)
    written = own.tree.pop("_base_", [])
    bases = [written] if isinstance(written, str) else written
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        own.report(("_base_",), "expected a path or a list of paths, relative to this file")
        bases = []
    merged = Config({}, {(): own.source(())})
    problems: list[Problem] = []
    for base in bases:
        path = os.path.normpath(os.path.join(os.path.dirname(file), base))
        message = ""
        if not os.path.isfile(path):
            message = f"{path}: {_unreadable(path, FileNotFoundError())}"
        elif any(os.path.samefile(path, seen) for seen in chain):
            message = f"the files inherit in a circle: {' -> '.join((*chain, path))}"
        if message:
            problems.append(Problem(own.source(("_base_",)), ("_base_",), message))
            continue
        with _collecting(problems):
            _merge(merged, _load_file(path, chain))
    if problems:
        raise ConfigError(problems + own.problems)
    _merge(merged, own)
    return merged


def _unreadable(file: str, error: Exception) -> str:
    if not isinstance(error, FileNotFoundError):
        return f"cannot be read: {error}"
    folder = Path(file).parent
    names = [path.name for path in folder.iterdir() if path.is_file()] if os.path.isdir(folder) else []
    match = nearest(Path(file).name, names)
    return "no such file" + (f", did you mean '{folder / match}'?" if match else "")


def _merge(config: Config, layer: Config) -> None:
    config.problems += layer.problems
    _merge_mapping(config, config.tree, layer.tree, (), layer)
    config.sources[()] = layer.source(())


def _merge_mapping(config: Config, into: dict[str, Any], new: dict[str, Any], keys: Keys, layer: Config) -> None:
    old_name, new_name = into.get("name"), new.get("name")
    if isinstance(old_name, str) and isinstance(new_name, str) and old_name != new_name:
        into.clear()
        _forget(config, keys)
    for key, value in new.items():
        _put(config, into, key, value, keys, layer)


def _put(config: Config, into: Any, key: Any, value: Any, parent: Keys, layer: Config) -> None:
    """Writes a value of a layer over ``into[key]``: mappings merge, everything else replaces."""
    keys = (*parent, key)
    old = into[key] if isinstance(into, list) or key in into else None
    if isinstance(old, dict) and isinstance(value, dict):
        config.sources[keys] = layer.source(keys)
        _merge_mapping(config, old, value, keys, layer)
    elif keys == ("imports",) and isinstance(old, list) and isinstance(value, list):
        new = [module for module in value if module not in old]
        for module in new:
            config.sources[("imports", len(old))] = layer.source(("imports", value.index(module)))
            old.append(module)
    else:
        _forget(config, keys)
        config.sources |= {at: source for at, source in layer.sources.items() if at[: len(keys)] == keys}
        config.unresolved |= {at for at in layer.unresolved if at[: len(keys)] == keys}
        config.sources[keys] = layer.source(keys)
        into[key] = value


def _forget(config: Config, keys: Keys) -> None:
    """Drops what is known of the values below ``keys``, which are being replaced."""
    depth = len(keys)
    for at in [at for at in config.sources if at[:depth] == keys and len(at) > depth]:
        del config.sources[at]
    config.unresolved = {at for at in config.unresolved if at[:depth] != keys}


@dataclass(frozen=True)
class _Override:
    source: Source
    words: list[str]
    value: Any

    @property
    def rename_depth(self) -> float:
        """How deep the node is whose name this changes; infinite where none is."""
        if self.words[-1] == "name":
            return len(self.words) - 1
        return len(self.words) if isinstance(self.value, dict) and "name" in self.value else float("inf")


def _parse_override(text: str) -> _Override:
    source = Source(f"command line: {shorten(text, 200)}")
    path, equals, value = text.partition("=")
    words = path.strip().split(".")
    if not equals or not all(words):
        raise ConfigError([Problem(source, (), "an override is dotted.path=value, such as train.max_steps=20")])
    layer = parse(value, lambda line: source)
    if layer.problems:
        raise ConfigError(Problem(source, (*words, *problem.keys), problem.message) for problem in layer.problems)
    return _Override(source, words, layer.tree)


def _apply_override(config: Config, override: _Override) -> None:
    """Merges the value in at its place, making the mappings that lead there."""
    node: Any = config.tree
    keys: Keys = ()
    for word in override.words[:-1]:
        key = _step(node, word, keys, override)
        inner = node[key] if isinstance(node, list) else node.get(key)
        keys = (*keys, key)
        if not isinstance(inner, dict | list):
            inner = node[key] = {}
            _forget(config, keys)
            config.sources[keys] = override.source
        node = inner
    last = _step(node, override.words[-1], keys, override)
    layer = Config({}, {(): override.source})
    if isinstance(node, list):
        _put(config, node, last, override.value, keys, layer)
    else:
        _merge_mapping(config, node, {str(last): override.value}, keys, layer)


def _step(node: Any, word: str, keys: Keys, override: _Override) -> Any:
    if not isinstance(node, list):
        return word
    if word.isdecimal() and int(word) < len(node):
        return int(word)
    valid = f"write an index from 0 to {len(node) - 1}" if node else "it is empty"
    raise ConfigError([Problem(override.source, keys, f"'{word}' is not an element of this list: {valid}")])
