"""Configuration: YAML files over typed constructors."""

from framework.config.build import LoadWeights, build, check, resolve
from framework.config.describe import Description, component_list, describe
from framework.config.errors import ConfigError, Problem, SchemaError, Source
from framework.config.load import load_config
from framework.config.registry import Factory, Registry
from framework.config.yaml import Config, dump_yaml

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
