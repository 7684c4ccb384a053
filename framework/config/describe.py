"""What can be written in YAML, for people: every registered component with its arguments."""

from __future__ import annotations

from dataclasses import dataclass

from framework.config.errors import did_you_mean
from framework.config.registry import Registry
from framework.config.schema import Argument, arguments, default_tree
from framework.config.yaml import inline


@dataclass(frozen=True)
class Description:
    """A class as YAML sees it: its name, the first line of its docstring and its arguments."""

    name: str
    module: str
    summary: str
    arguments: tuple[Argument, ...]


def describe(cls: type) -> Description:
    """Describes a component or an unnamed part.

    Raises:
        SchemaError: the constructor is one that YAML cannot call.
    """
    summary = (cls.__doc__ or "").strip().partition("\n")[0]
    return Description(cls.__name__, cls.__module__, summary, tuple(arguments(cls).values()))


def component_list(axis: str | None = None) -> str:
    """The registered components of one axis ("quantizer"), or of all, as text.

    Raises:
        LookupError: there is no such axis.
    """
    registries = sorted(Registry.known, key=lambda registry: (registry.axis, registry.base.__module__))
    axes = list(dict.fromkeys(registry.axis for registry in registries))
    if axis is not None and axis not in axes:
        raise LookupError(f"unknown axis '{axis}'{did_you_mean(axis, axes) or '.'} Valid: {', '.join(axes)}")
    lines: list[str] = []
    for registry in registries:
        if axis not in (None, registry.axis):
            continue
        lines += [f"{registry.axis} ({registry.base.__module__}.{registry.base.__qualname__})"]
        for _, cls in registry:
            description = describe(cls)
            lines += [f"  {description.name}: {description.summary}"]
            lines += [f"      {_argument_line(argument)}" for argument in description.arguments]
        lines += [""]
    return "\n".join(lines).rstrip()


def _argument_line(argument: Argument) -> str:
    text = f"{argument.name}: {argument.text}"
    if argument.from_parent:
        return f"{text}  (from the parent)"
    if argument.required:
        return text
    default = default_tree(argument)
    return f"{text} = {'its own defaults' if default == {} else inline(default)}"
