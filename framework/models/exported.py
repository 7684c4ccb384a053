"""Exported models: folders that hold one model whole, and load without the runs, data and losses it was made with.

``config.yaml`` has what building the model needs and nothing else, ``model.safetensors`` every weight, frozen parts
included, and ``manifest.json`` the size and SHA-256 of both. ``README.md`` is for people, who may edit it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from framework.allocation.adaptive_tokenizer import AdaptiveTokenizer
from framework.config import Config, ConfigError, Factory, Problem, SchemaError, Source, build, dump_yaml
from framework.config.yaml import parse
from framework.engine.checkpoint import read_weights
from framework.engine.manifest import MANIFEST, CheckpointError, describe_file, read_manifest, write_manifest
from framework.engine.run_directory import RunError
from framework.generators.image_generator import ImageGenerator, token_space
from framework.generators.interface import Generator
from framework.runtime.files import write_bytes, write_text
from framework.runtime.versions import installed_version
from framework.runtime.weights import weights_digest
from framework.tokenizers.interface import AllocationPolicy, ImageSpace
from framework.tokenizers.tokenizer import Tokenizer

FORMAT = "framework model"
VERSION = 1
CONFIG, WEIGHTS, CARD = "config.yaml", "model.safetensors", "README.md"
MAX_CONFIG_BYTES = 1 << 18


class Exported(nn.Module):
    """The root of an exported configuration: the parts of one model, under the names that runs give them.

    Args:
        tokenizer: the tokenizer, alone or with its policy.
        image_size: side of the tokenizer's images in pixels.
        policy: what chooses lengths for the tokenizer.
        generator: of the tokenizer's tokens, in place of a policy.
        num_classes: of the generator.
        budgets: lengths that the generator makes.
        space: an autoencoder, where that is the model.

    Attributes:
        model: what ``framework.load`` returns.

    Raises:
        ValueError: if these are not the parts of one model.
    """

    def __init__(
        self,
        tokenizer: Factory[Tokenizer] | None = None,
        image_size: int | None = None,
        policy: Factory[AllocationPolicy] | None = None,
        generator: Factory[Generator] | None = None,
        num_classes: int | None = None,
        budgets: tuple[int, ...] | None = None,
        space: ImageSpace | None = None,
    ) -> None:
        super().__init__()
        self.space = space
        own = [generator is None, num_classes is None, budgets is None]
        if len(set(own)) > 1 or (generator is not None and policy is not None):
            raise ValueError("a generator comes with its num_classes and budgets, and without a policy")
        if tokenizer is not None and image_size is not None and space is None:
            self.tokenizer = tokenizer(image_size=image_size)
            self.model: nn.Module = self.tokenizer
            if generator is not None and num_classes is not None and budgets is not None:
                made = generator(space=token_space(self.tokenizer, budgets, num_classes))
                self.model = ImageGenerator(made, self.tokenizer)
            if policy is not None:
                sizes = {"num_tokens": self.tokenizer.num_tokens, "feature_dim": self.tokenizer.encoder.feature_dim}
                self.policy = policy(**sizes)
                self.model = AdaptiveTokenizer(self.tokenizer, self.policy)
        elif space is not None and all(part is None for part in (tokenizer, image_size, policy, generator)):
            self.model = space
        else:
            raise ValueError(
                "a model is a tokenizer with image_size, perhaps with a policy or a generator; or a space alone"
            )


def is_exported(folder: Path) -> bool:
    """Whether a folder is meant to be an exported model, sound or not."""
    return any((folder / name).is_file() for name in (MANIFEST, WEIGHTS))


def stored_names(model: nn.Module) -> dict[str, str]:
    """For each name of a model's state the one it is stored by: a part that stands at two places is stored once."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(value), name) for name, value in model.state_dict(keep_vars=True).items()}


def write_exported(
    folder: Path, tree: Mapping[str, Any], model: nn.Module, made: Mapping[str, object], card: str
) -> None:
    """Write a model to a folder, the manifest last.

    Args:
        folder: made if there is none.
        tree: the configuration that ``Exported`` is built from.
        model: on the CPU.
        made: what is worth knowing of its making; plain JSON values.
        card: Markdown.

    Raises:
        OSError: if it cannot be written.
    """
    state = model.state_dict()
    # Clones, since safetensors refuses views.
    stored = {name: state[name].clone(memory_format=torch.contiguous_format) for name in stored_names(model).values()}
    contents = {CONFIG: dump_yaml(tree).encode(), WEIGHTS: safetensors.torch.save(stored)}
    for name, content in contents.items():
        write_bytes(folder / name, content)
    write_text(folder / CARD, card)
    body = {
        "version": VERSION,
        "files": {name: describe_file(content) for name, content in contents.items()},
        "weights_sha256": weights_digest(state),
        "made": {**made, **{name: installed_version(name) for name in ("adatok", "torch")}},
    }
    write_manifest(folder, FORMAT, body)


def read_exported(folder: Path, trust: Callable[[str], bool]) -> Exported:
    """The model of an exported folder, in eval mode on the CPU, with all that is in the folder verified.

    Args:
        folder: which.
        trust: whether a module may be imported, which runs its code.

    Raises:
        RunError: if the configuration asks for the import of other modules.
        CheckpointError: if files are missing or damaged, do not belong together, or have a newer format.
        ConfigError: if the configuration does not describe a model of this framework.
    """
    digest = read_manifest(folder, FORMAT, VERSION, _weights_sha256)
    config = _read_config(folder / CONFIG)
    asked = config.tree.get("imports") or []
    if refused := [str(name) for name in (asked if isinstance(asked, list) else [asked]) if not trust(str(name))]:
        raise RunError(
            f"{folder} asks for code: importing {', '.join(refused)} runs whatever these modules hold. If you trust "
            "them and they are installed, pass trust_code=True (for weights: nodes, list them under imports)"
        )
    weights = read_weights(folder / WEIGHTS)
    # First without memory: a wrong configuration may describe a model of any size.
    with _no_larger_than(weights, folder):
        planned = _build(config, folder, "meta").model
    state = planned.state_dict()
    expected = {name: _form(state[name]) for name in stored_names(planned).values()}
    held = {name: _form(value) for name, value in weights.items()}
    if differing := sorted(name for name in expected.keys() | held.keys() if expected.get(name) != held.get(name)):
        name = differing[0]
        raise CheckpointError(
            f"{folder}: {WEIGHTS} and {CONFIG} do not belong together: {len(differing)} weights differ, "
            f"first {name}: {held.get(name, 'none')} stored, {expected.get(name, 'none')} in the model"
        )
    exported = _build(config, folder, "cpu")
    exported.model.load_state_dict({name: weights[first] for name, first in stored_names(exported.model).items()})
    if weights_digest(exported.model.state_dict()) != digest:
        raise CheckpointError(f"{folder}: the weights do not have the SHA-256 that {MANIFEST} states: not this model's")
    return exported.eval()


def _weights_sha256(body: dict[str, Any]) -> str:
    if body["version"] != VERSION or sorted(body["files"]) != sorted((CONFIG, WEIGHTS)):
        raise ValueError(f"version {body['version']} should describe {CONFIG} and {WEIGHTS}, not {list(body['files'])}")
    return str(body["weights_sha256"])


def _read_config(path: Path) -> Config:
    """Without inheritance and references, which would read other files and the environment."""
    content = path.read_bytes()
    if len(content) > MAX_CONFIG_BYTES:
        raise CheckpointError(f"{path} has {len(content)} bytes, more than any model's configuration")
    try:
        config = parse(content.decode(), lambda line: Source(str(path), line))
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(config.tree, dict):
        raise ConfigError([Problem(config.source(()), (), "the top level must be a mapping of a model's parts")])
    return config


def _build(config: Config, folder: Path, device: str) -> Exported:
    def refuse(module: nn.Module, source: str, path: str) -> None:
        raise CheckpointError(f"{folder / CONFIG}: {path} asks for the weights {source}, and should have its own")

    try:
        with torch.random.fork_rng(devices=[]), torch.device(device):
            return build(config, Exported, refuse)
    except (ConfigError, CheckpointError, SchemaError):
        raise
    except Exception as error:  # such as torch's for a negative width
        raise CheckpointError(f"{folder / CONFIG} describes no model: {type(error).__name__}: {error}") from error


@contextmanager
def _no_larger_than(weights: Mapping[str, Tensor], folder: Path) -> Iterator[None]:
    """Stop building a model that the weights cannot be those of, before it takes hours or all memory."""
    largest = max((value.numel() for value in weights.values()), default=0)
    left = count(10 * len(weights) + 100, -1)

    def check(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if next(left) < 0 or (parameter is not None and parameter.numel() > largest):
            raise CheckpointError(f"{folder}: {CONFIG} describes a larger model than {WEIGHTS} holds")

    with register_module_parameter_registration_hook(check):
        yield


def _form(value: Tensor) -> str:
    return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
