"""YAML text to a plain tree and back, strictly, with the line that each value was written on.

Scalars are those of the YAML 1.2 core schema (``1e-4`` is a float, ``on`` a string), a key that comes twice is an
error, and there are no aliases: references do their work.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.composer import ComposerError

from framework.config.errors import ConfigError, Keys, Problem, Source

_INT = r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+"
_FLOAT = r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
_TAG = "tag:yaml.org,2002:"

# Scalars of the core schema (YAML 1.2.2, section 10.3.2), in the order in which they are tried.
_CORE: dict[str, tuple[re.Pattern[str], Callable[[str], Any]]] = {
    _TAG + "null": (re.compile(r"(?:null|Null|NULL|~|)\Z"), lambda text: None),
    _TAG + "bool": (re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"), lambda text: text.lower() == "true"),
    _TAG + "int": (re.compile(rf"(?:{_INT})\Z"), lambda text: int(text, 0 if text[:2] in ("0o", "0x") else 10)),
    _TAG + "float": (re.compile(rf"(?:{_FLOAT})\Z"), lambda text: float(re.sub(r"\.(?=[iInN])", "", text))),
    _TAG + "str": (re.compile(""), str),
}


class _CoreScalars:
    yaml_implicit_resolvers = {None: [(tag, pattern) for tag, (pattern, _) in _CORE.items()]}


class _Loader(_CoreScalars, yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark
            raise ComposerError(None, None, "aliases are not supported: write a reference such as $a.b", mark)
        return super().compose_node(parent, index)


class _Dumper(_CoreScalars, yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


@dataclass
class Config:
    """A tree of plain mappings, lists and scalars, and where each value came from.

    Attributes:
        sources: for the keys of a value; what is not listed was written where its nearest listed parent was.
        problems: what was wrong in the files and overrides; ``check`` reports it with everything else.
        unresolved: places whose value is one of the problems, so that nothing more can be said about it.
    """

    tree: Any
    sources: dict[Keys, Source]
    problems: list[Problem] = field(default_factory=list)
    unresolved: set[Keys] = field(default_factory=set)

    def source(self, keys: Keys) -> Source:
        """Where the value at ``keys``, or the nearest parent that is there, was written."""
        while keys not in self.sources:
            keys = keys[:-1]
        return self.sources[keys]

    def report(self, keys: Keys, message: str) -> None:
        self.problems.append(Problem(self.source(keys), keys, message))


def dump_yaml(tree: Any) -> str:
    """YAML text that ``load_config`` reads back as the same tree."""
    text = yaml.dump(
        _escape(tree), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120, default_flow_style=None
    )
    return str(text)


def inline(tree: Any) -> str:
    """A value as YAML on one line."""
    return yaml.dump([tree], Dumper=_Dumper, allow_unicode=True, width=1 << 30, default_flow_style=True).strip()[1:-1]


def parse_scalar(text: str) -> Any:
    """The value of an unquoted YAML scalar."""
    return next(convert(text) for pattern, convert in _CORE.values() if pattern.match(text))


def _escape(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _escape(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_escape(value) for value in tree]
    return f"${tree}" if isinstance(tree, str) and tree.startswith("$") else tree


def parse(text: str, where: Callable[[int], Source]) -> Config:
    """Reads one text, with ``where(line)`` as the source of each value; the tree may be any YAML value.

    Raises:
        ConfigError: the text is not YAML.
    """
    try:
        node = yaml.compose(text, Loader=_Loader)
        config = Config(None, {(): where(1)})
        config.tree = _convert(node, (), config, where) if node else None
        return config
    except yaml.MarkedYAMLError as error:
        message = f"not valid YAML: {error.problem}" + (f", {error.context}" if error.context else "")
        line = error.problem_mark.line + 1 if error.problem_mark else 1
    except yaml.reader.ReaderError as error:
        message = f"not valid YAML: the character {chr(error.character)!r} is not allowed"
        line = text[: error.position].count("\n") + 1
    except (RecursionError, ValueError) as error:  # a character's number may be too large for PyYAML itself
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        message, line = f"not valid YAML: {reason}", 1
    raise ConfigError([Problem(where(line), (), message)])


def _convert(node: yaml.Node, keys: Keys, config: Config, where: Callable[[int], Source]) -> Any:
    if isinstance(node, yaml.ScalarNode):
        try:
            return _CORE[node.tag][1](node.value)
        except (KeyError, ValueError):
            config.report(keys, f"'{node.value[:60]}' cannot be read as {node.tag.replace(_TAG, '!!')}")
            config.unresolved.add(keys)
            return None
    if isinstance(node, yaml.SequenceNode):
        places = [(*keys, index) for index in range(len(node.value))]
        config.sources |= {at: where(item.start_mark.line + 1) for at, item in zip(places, node.value, strict=True)}
        return [_convert(item, at, config, where) for at, item in zip(places, node.value, strict=True)]
    tree: dict[str, Any] = {}
    for key_node, item in node.value:
        key, source = key_node.value, where(key_node.start_mark.line + 1)
        at = (*keys, key)
        if key_node.tag != _TAG + "str":
            text = f" {key}" if isinstance(key, str) else ""
            config.problems.append(Problem(source, keys, f"the key{text} is not a string: put it in quotes"))
        elif key in tree:
            message = f"duplicate key '{key}', first at {config.sources[at]}: remove one"
            config.problems.append(Problem(source, at, message))
        else:
            config.sources[at] = source
            tree[key] = _convert(item, at, config, where)
    return tree
