"""The signatures of classes as a schema: reads a tree by the annotations and reports everything that does not fit.

``Reader.read`` turns a value and an annotation into a plan, with every default filled in. A plan has two uses:
``tree()`` writes it back as YAML values (resolve), and build.py makes the objects.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from inspect import Parameter
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from torch import nn

from framework.config.errors import Keys, Problem, SchemaError, did_you_mean, nearest, show
from framework.config.registry import Factory, Registry, constructor_parameters
from framework.config.yaml import Config, inline, parse_scalar

_SCALARS = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    Path: "a path",
    type(None): "null",
}
_BUILDER_KEYS: dict[str, Any] = {"weights": str | None, "frozen": bool}


@dataclass(frozen=True)
class Argument:
    """One argument of a constructor; ``text`` is the annotation as written, ``from_parent`` means keyword-only."""

    name: str
    annotation: Any
    text: str
    default: Any
    from_parent: bool

    @property
    def required(self) -> bool:
        return self.default is Parameter.empty


def arguments(cls: type) -> dict[str, Argument]:
    """The constructor's arguments by name, in order.

    Raises:
        SchemaError: YAML cannot call the constructor, or an annotation cannot be resolved.
    """
    parameters = constructor_parameters(cls)
    try:
        hints = typing.get_type_hints(inspect.getattr_static(cls, "__init__")) if parameters else {}
    except NameError as error:
        message = f"annotations of {cls.__qualname__}: {error}; import it at run time, at module level"
        raise SchemaError(message) from error
    return {
        parameter.name: Argument(
            name=parameter.name,
            annotation=hints[parameter.name],
            text=_text(hint if get_origin(hint := hints[parameter.name]) is Literal else parameter.annotation),
            default=parameter.default,
            from_parent=parameter.kind is Parameter.KEYWORD_ONLY,
        )
        for parameter in parameters
    }


def _text(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


@dataclass(frozen=True)
class Value:
    """A scalar in the annotation's type."""

    value: Any

    def tree(self) -> Any:
        return str(self.value) if isinstance(self.value, Path) else self.value


@dataclass(frozen=True)
class Items:
    """A list, or a tuple."""

    items: list[Plan]
    kind: type

    def tree(self) -> Any:
        return [item.tree() for item in self.items]


@dataclass(frozen=True)
class Entries:
    """A ``dict[str, T]``."""

    entries: dict[str, Plan]

    def tree(self) -> Any:
        return {key: entry.tree() for key, entry in self.entries.items()}


@dataclass(frozen=True)
class Part:
    """A class and its arguments: a component, which has a name, or an unnamed part."""

    cls: type
    keys: Keys
    is_named: bool = False
    is_factory: bool = False
    owner: str = ""
    arguments: dict[str, Plan] = field(default_factory=dict)
    builder: dict[str, Any] = field(default_factory=dict)

    def tree(self) -> Any:
        name = {"name": self.cls.__name__} if self.is_named else {}
        return name | {key: plan.tree() for key, plan in self.arguments.items()} | self.builder


Plan = Value | Items | Entries | Part


class Reader:
    """Reads values of a configuration by annotations and collects what is wrong in ``problems``.

    The plan that ``read`` returns is complete only where it found no problem.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.problems: list[Problem] = []

    def read(self, value: Any, expected: Any, keys: Keys, owner: str) -> Plan:
        """Reads one value; ``owner`` says in messages which class the value is an argument of."""
        if keys in self.config.unresolved:
            return Value(None)
        alternatives = _alternatives(expected)
        shape = type(value) if isinstance(value, dict | list) else None
        fitting = [alternative for alternative in alternatives if _shape(alternative) is shape]
        if shape is None:
            for scalar in fitting:
                if (leaf := _scalar(value, scalar)) is not None:
                    return leaf
        elif fitting:
            trials = []
            for alternative in fitting:
                trial = Reader(self.config)
                plan = trial._structure(value, alternative, keys, owner)
                trials.append((plan, trial.problems))
            plan, problems = min(trials, key=lambda trial: len(trial[1]))
            self.problems += problems
            return plan
        self._report(keys, _mismatch(value, alternatives, keys))
        return Value(None)

    def part(self, value: dict[str, Any], base: Any, keys: Keys, owner: str, is_factory: bool = False) -> Part:
        """Reads the mapping of a component (``base`` has a registry) or of an unnamed part."""
        registry = Registry.of(base)
        cls = self._component(value, registry, keys) if registry else base
        if cls is None:
            return Part(base, keys)
        known = arguments(cls)
        builder: dict[str, Any] = {}
        if registry:
            builder = {key: value[key] for key in _BUILDER_KEYS if key in value and key not in known}
            value = {key: item for key, item in value.items() if key != "name" and key not in builder}
            self._builder_keys(builder, cls, keys)
        part = Part(cls, keys, registry is not None, is_factory, owner, builder=builder)
        label = f"the {registry.axis}" if registry else cls.__name__
        from_yaml = {key: argument for key, argument in known.items() if not argument.from_parent}
        for key, argument in known.items():
            at = (*keys, key)
            if argument.from_parent:
                if key in value:
                    giver = f"given by {owner}, not by YAML" if owner else "not for YAML"
                    self._report(at, f"{key} of {cls.__name__} is {giver}: remove it")
                elif argument.required and not is_factory:
                    self._report(keys, _not_a_factory(cls, key, base, owner), (*keys, "name"))
            elif key in value:
                part.arguments[key] = self.read(value[key], argument.annotation, at, label)
            elif argument.required:
                kind = " or ".join(map(_words, _alternatives(argument.annotation)))
                self._report(keys, f"missing argument '{key}' of {cls.__name__}: {kind}", (*keys, "name"))
            else:
                part.arguments[key] = self._default(argument, cls, at, label)
        for key in [key for key in value if key not in known]:
            near = did_you_mean(key, [*from_yaml, *(("name", *_BUILDER_KEYS) if registry else ())]) or "."
            valid = f"Valid for {cls.__name__}: {', '.join(from_yaml)}" if from_yaml else f"{cls.__name__} takes none"
            self._report((*keys, key), f"unknown key '{key}'{near} {valid}")
        return part

    def _report(self, keys: Keys, message: str, cause: Keys | None = None) -> None:
        """Adds a problem of the value at ``keys``; ``cause`` is the value that led to it, if another one."""
        self.problems.append(Problem(self.config.source(keys if cause is None else cause), keys, message))

    def _structure(self, value: Any, expected: Any, keys: Keys, owner: str) -> Plan:
        """Reads a mapping or a list by one annotation of that shape."""
        origin, of = get_origin(expected), get_args(expected)
        if origin is dict:
            if type(None) not in _alternatives(of[1]):  # so that null removes an inherited entry
                value = {key: item for key, item in value.items() if item is not None}
            return Entries({key: self.read(item, of[1], (*keys, key), owner) for key, item in value.items()})
        if origin in (list, tuple):
            kinds: Sequence[Any] = of
            if origin is list or of[-1] is ...:
                kinds = [of[0]] * len(value)
            elif len(value) != len(of):
                self._report(keys, f"expected {_words(expected)}, got {len(value)}")
            pairs = enumerate(zip(value, kinds, strict=False))
            return Items([self.read(item, kind, (*keys, index), owner) for index, (item, kind) in pairs], origin)
        is_factory = origin is Factory
        return self.part(value, of[0] if is_factory else expected, keys, owner, is_factory)

    def _component(self, value: dict[str, Any], registry: Registry, keys: Keys) -> type | None:
        name, at = value.get("name"), (*keys, "name")
        if "name" not in value:
            names = ", ".join(name for name, _ in registry)
            self._report(keys, f"missing name: say which {registry.axis}. Valid: {names}")
        elif at in self.config.unresolved:
            return None
        elif not isinstance(name, str):
            self._report(at, f"expected the name of {_an(registry.axis)}, got {show(name)}")
        elif name not in registry:
            self._report(at, registry.unknown(name))
        else:
            return registry.get(name)
        return None

    def _builder_keys(self, builder: dict[str, Any], cls: type, keys: Keys) -> None:
        for key, value in builder.items():
            if issubclass(cls, nn.Module):
                self.read(value, _BUILDER_KEYS[key], (*keys, key), "")
            else:
                self._report((*keys, key), f"{cls.__name__} is not a torch module and cannot have '{key}': remove it")

    def _default(self, argument: Argument, cls: type, keys: Keys, label: str) -> Plan:
        value = default_tree(argument)
        trial = Reader(Config({}, self.config.sources))
        plan = trial.read(value, argument.annotation, keys, label)
        if trial.problems:
            subject = f"the default of '{argument.name}' of {cls.__name__} does not fit its annotation"
            raise SchemaError(f"{subject}: {trial.problems[0].message}")
        return plan


def default_tree(argument: Argument) -> Any:
    """An argument's default as YAML values; ``{}``, all its own defaults, where it is an unnamed part.

    Raises:
        SchemaError: YAML has no such value, or the unnamed part differs from what YAML would build for it.
    """
    kind = type(argument.default)
    if _is_unnamed_part(argument):
        if any(inner.required for inner in arguments(kind).values()) or vars(argument.default) != vars(kind()):
            raise SchemaError(f"the default of '{argument.name}: {argument.text}' must be plain {kind.__name__}()")
        return {}

    def convert(value: Any) -> Any:
        if value is None or type(value) in (bool, int, float, str):
            return value
        if isinstance(value, Path):
            return str(value)
        if type(value) in (list, tuple):
            return [convert(item) for item in value]
        if type(value) is dict:
            return {key: convert(item) for key, item in value.items()}
        text = f"{type(value).__name__} as default of '{argument.name}: {argument.text}'"
        raise SchemaError(f"{text}: YAML cannot write it; use None, a number, a string, a list or an unnamed part")

    return convert(argument.default)


def _is_unnamed_part(argument: Argument) -> bool:
    """Whether the default is an object of the unnamed part that the annotation asks for."""
    kind = type(argument.default)
    return kind in _alternatives(argument.annotation) and kind not in _SCALARS and not Registry.of(kind)


# Annotations


def _alternatives(expected: Any) -> list[Any]:
    """The members of a union, or the annotation alone."""
    if get_origin(expected) in (typing.Union, types.UnionType):
        return [inner for member in get_args(expected) for inner in _alternatives(member)]
    return [expected]


def _shape(expected: Any) -> type | None:
    """The type of tree an annotation takes: ``dict``, ``list``, or ``None`` for scalars.

    Raises:
        SchemaError: the annotation is none that YAML can fill.
    """
    origin = get_origin(expected)
    if expected in _SCALARS or origin is Literal:
        return None
    if origin in (list, tuple):
        return list
    if (origin is dict and get_args(expected)[0] is str) or origin is Factory:
        return dict
    if isinstance(expected, type) and not origin and expected is not Any and expected.__module__ != "builtins":
        if not inspect.isabstract(expected) or Registry.of(expected):
            return dict
    raise SchemaError(
        f"YAML cannot fill the annotation {_text(expected)}: use int, float, bool, str, Path, "
        "Literal, list[T], tuple[T, ...], dict[str, T], a base with a registry, Factory[Base], a plain class or a union"
    )


def _scalar(value: Any, expected: Any) -> Value | None:
    if get_origin(expected) is Literal:
        fits = any(type(value) is type(choice) and value == choice for choice in get_args(expected))
        return Value(value) if fits else None
    if expected is float and type(value) is int:
        try:
            return Value(float(value))
        except OverflowError:
            return None
    if expected is Path and type(value) is str:
        return Value(Path(value))
    return Value(value) if type(value) is expected else None


def _words(expected: Any) -> str:
    """What an annotation asks for, in words."""
    origin, of = get_origin(expected), get_args(expected)
    if origin is Literal:
        return " or ".join(f"'{choice}'" if isinstance(choice, str) else inline(choice) for choice in of)
    if origin is list or origin is tuple and of[-1] is ...:
        return "a list"
    if origin is tuple:
        return f"a list of {len(of)} values"
    if origin is dict:
        return "a mapping"
    if registry := _registry(expected):
        return _an(registry.axis)
    return _SCALARS.get(expected) or f"a mapping of arguments of {(of or [expected])[0].__name__}"


def _registry(expected: Any) -> Registry | None:
    return Registry.of(get_args(expected)[0] if get_origin(expected) is Factory else expected)


def _an(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _mismatch(value: Any, alternatives: list[Any], keys: Keys) -> str:
    """Why no alternative takes the value, and what to write instead."""
    message = f"expected {' or '.join(map(_words, alternatives))}, got {show(value)}"
    place = f"{keys[-1]}: " if keys and isinstance(keys[-1], str) else ""
    for expected in alternatives:
        choices = [choice for choice in get_args(expected) if isinstance(choice, str)]
        registry = _registry(expected)
        if isinstance(value, str):
            if get_origin(expected) is Literal and nearest(value, choices):
                return message + did_you_mean(value, choices)
            if registry:
                names = [name for name, _ in registry]
                name = nearest(value, names)
                choice = "" if name else f" with {' or '.join(names)}"
                return f"{message}: write {place}{{name: {name or '...'}}}{choice}"
            plain = parse_scalar(value)
            if plain is not None and plain != value and _shape(expected) is None and _scalar(plain, expected):
                return f"{message}: remove the quotes"
        if get_origin(expected) in (list, tuple) and not isinstance(value, dict) and value is not None:
            return f"{message}: write {place}{inline([value])}"
    return message


def _not_a_factory(cls: type, key: str, base: Any, owner: str) -> str:
    return (
        f"{cls.__name__} needs '{key}' from {owner or 'its parent'}, which does not give it: a mistake in the code. "
        f"Annotate the argument Factory[{base.__name__}], or give '{key}' a default"
    )

