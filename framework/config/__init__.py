"""Configuration: YAML files over typed constructors."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from framework.config.errors import ConfigError, Problem, SchemaError, Source
from framework.config.load import load_config
from framework.config.yaml import Config, dump_yaml

if TYPE_CHECKING:
    from framework.config.build import LoadWeights, build, check, resolve
    from framework.config.describe import Description, component_list, describe
    from framework.config.registry import Factory, Registry

__all__ = [
    "Config",
    "ConfigError",
    "Description",
    "Factory",
    "LoadWeights",
    "Problem",
    "Registry",
    "SchemaError",
    "Source",
    "build",
    "check",
    "component_list",
    "describe",
    "dump_yaml",
    "load_config",
    "resolve",
]


def __getattr__(name: str) -> Any:
    # Late, since these import torch, which those who only load or submit a configuration do without.
    if name not in __all__:
        raise AttributeError(f"module 'framework.config' has no attribute {name!r}")
    for module in ("build", "describe", "registry"):
        # All names of a module at once: importing it has bound 'build' to the module instead of the function.
        own = vars(importlib.import_module(f"framework.config.{module}"))
        globals().update({key: own[key] for key in __all__ if key in own})
    return globals()[name]
