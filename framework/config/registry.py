"""Registries: a name in YAML becomes a class, and an annotation says which registry to look in.

One registry per interface stands beside its base class::

    class Quantizer(nn.Module): ...
    QUANTIZERS = Registry("quantizer", Quantizer)

    @QUANTIZERS.register()
    class Identity(Quantizer): ...
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from inspect import Parameter
from typing import Any, ClassVar, Protocol, TypeVar
from weakref import WeakSet

from fvcore.common.registry import Registry as FvcoreRegistry
from torch import nn

from framework.config.errors import SchemaError, did_you_mean

T_co = TypeVar("T_co", covariant=True)


class Factory(Protocol[T_co]):
    """A component whose YAML arguments are fixed; the parent calls it with the keyword-only ones.

    In practice a ``functools.partial``. A parent that annotates a child ``Factory[Encoder]`` writes
    ``encoder(in_channels=space.channels)``; plain Python may pass any callable of that form.
    """

    def __call__(self, *_: Any, **given: Any) -> T_co: ...


class Registry(FvcoreRegistry):
    """Maps the names of one axis ("quantizer") to its classes (subclasses of ``base``).

    The base carries its registry as the attribute ``registry``, so that an annotation is enough to find it.
    """

    known: ClassVar[WeakSet[Registry]] = WeakSet()

    def __init__(self, axis: str, base: type) -> None:
        super().__init__(axis)
        self.axis = axis
        self.base = base
        base.registry = self  # type: ignore[attr-defined]
        Registry.known.add(self)

    @staticmethod
    def of(base: Any) -> Registry | None:
        """The registry that stands beside ``base`` itself (a subclass has none), or ``None``."""
        found = vars(base).get("registry") if isinstance(base, type) else None
        return found if isinstance(found, Registry) else None

    def get(self, name: str) -> Any:
        """The class of that name.

        Raises:
            LookupError: the name is not registered; says the nearest and all that are.
        """
        if name not in self:
            raise LookupError(self.unknown(name))
        return self._obj_map[name]

    def unknown(self, name: str) -> str:
        """What to say of a name that is not registered."""
        names = [known for known, _ in self]
        choices = f"Valid: {', '.join(names)}" if names else "None is registered: list its module under imports"
        return f"unknown {self.axis} '{name}'{did_you_mean(name, names) or '.'} {choices}"

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return iter(sorted(self._obj_map.items()))

    def _do_register(self, name: str, obj: Any) -> None:
        """Refuses what YAML could not build, and a name that another class has taken."""
        if not (isinstance(obj, type) and issubclass(obj, self.base)):
            raise SchemaError(f"'{name}' cannot be a {self.axis}: it is not a subclass of {self.base.__name__}")
        constructor_parameters(obj)
        old = self._obj_map.get(name)
        if old and (old.__module__, old.__qualname__) != (obj.__module__, obj.__qualname__):
            raise SchemaError(
                f"two projects register the {self.axis} '{name}': {old.__module__} and {obj.__module__}; rename one"
            )
        self._obj_map[name] = obj


def constructor_parameters(cls: type) -> list[Parameter]:
    """The parameters of a class whose constructor YAML can call, without ``self``.

    Raises:
        SchemaError: one cannot be written as a typed key of a YAML mapping.
    """
    init = inspect.getattr_static(cls, "__init__")
    if init in (object.__init__, nn.Module.__init__):
        return []
    parameters = list(inspect.signature(init).parameters.values())[1:]
    for parameter in parameters:
        where = f"argument '{parameter}' of {cls.__qualname__}"
        if parameter.kind in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD, Parameter.POSITIONAL_ONLY):
            raise SchemaError(f"{where}: YAML passes each argument by its own name, so list them in the signature")
        if parameter.annotation is Parameter.empty:
            raise SchemaError(f"{where}: without an annotation YAML values cannot be checked; add its type")
        if parameter.name == "name":
            raise SchemaError(f"{where}: 'name' picks the class in YAML; call the argument something else")
    return parameters
