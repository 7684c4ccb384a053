"""Official checkpoints: reading them, renaming what they hold, and proving that nothing is missing or left over."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

import framework.components  # noqa: F401 - registers every part
from framework.config.build import build, resolve
from framework.config.errors import Source
from framework.config.registry import Factory
from framework.config.yaml import Config
from framework.generators.interface import Generator, TokenSpace
from framework.runtime.files import write_bytes
from framework.tokenizers.interface import ImageSpace
from framework.tokenizers.tokenizer import Tokenizer

WRAPPERS = ("state_dict", "model", "module")
"""Where training scripts put a model's tensors, beside optimizers and counters."""


class OfficialError(ValueError):
    """A file is no checkpoint, or not of the family that it is said to be."""


def read_official(paths: Iterable[Path], preferred: Sequence[str] = ()) -> dict[str, Tensor]:
    """The tensors of checkpoints, on the CPU: of all files together, without what training has put around them.

    Pickled files are read with ``weights_only=True``: nothing in them is run.

    Args:
        paths: of the files.
        preferred: where a family has the tensors that it samples with, before ``WRAPPERS``.

    Raises:
        OfficialError: if a file holds something else, or two hold a tensor of the same name.
    """
    state: dict[str, Tensor] = {}
    for path in paths:
        held = _load(path)
        held = held if isinstance(held, Mapping) else {f"a {type(held).__name__}": held}
        held = next((held[name] for name in (*preferred, *WRAPPERS) if isinstance(held.get(name), Mapping)), held)
        others = [str(name) for name, value in held.items() if not isinstance(value, Tensor)]
        if others or not held:
            raise OfficialError(
                f"{path} holds no tensors, or other things beside them{': ' if others else ''}{_some(others)}. Save "
                "only the model's state dict, flat or under 'state_dict', 'model' or 'module'"
            )
        if twice := sorted(state.keys() & held.keys()):
            raise OfficialError(f"{path} and a file before it both hold {_some(twice)}")
        state |= held
    return state


def _load(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise OfficialError(f"there is no file {path}") from error
    except Exception as error:  # pickle and torch raise many kinds
        raise OfficialError(
            f"{path} cannot be read as tensors alone, and what else it may hold could run code: if you trust it, load "
            "it where it was made and save its state dict. The reason: " + str(error).partition("\n")[0]
        ) from error


@dataclass(frozen=True)
class Imported:
    """What a checkpoint is, in this framework.

    Args:
        part: where its node stands in a configuration: ``tokenizer``, a space such as ``tokenizer.input_space``, or
            ``task.generator``.
        node: the node, without ``weights`` and without what is as by default.
        weights: under this framework's names.
        dropped: official names of what is not used, such as a discriminator.
        image_size: of a tokenizer.
        token_space: of a generator; in a run the tokenizer says it.
    """

    part: str
    node: dict[str, Any]
    weights: dict[str, Tensor]
    dropped: list[str]
    image_size: int = 0
    token_space: TokenSpace | None = None

    def build(self) -> nn.Module:
        """The part that the node describes, with these weights.

        Raises:
            OfficialError: if weights are missing, left over or of another shape, listing them.
        """
        made = build(self._config(), _Parts, lambda module, source, path: None)
        if made.tokenizer is not None:
            part: nn.Module | None = made.tokenizer(image_size=self.image_size)
        else:
            part = made.space if made.generator is None else made.generator(space=self.token_space)
        assert part is not None
        buffers = {name: value for name, value in part.named_buffers() if name in part.state_dict()}
        try:
            part.load_state_dict(buffers | self.weights)
        except RuntimeError as error:  # torch tells all that is missing, unexpected or of another shape
            raise OfficialError(f"not all tensors have their place: {error}") from error
        return part

    def full_node(self) -> dict[str, Any]:
        """The node with every default written, so that it inherits nothing where it is put."""
        tree = resolve(self._config(), _Parts)
        node: dict[str, Any] = tree[self._key]
        return node

    def save(self, path: Path) -> None:
        """Write the state of the part, with this framework's own beside the weights, for ``weights:`` to load.

        Raises:
            OfficialError: as ``build``; nothing is then written.
            OSError: if the file cannot be written.
        """
        write_bytes(path, safetensors.torch.save(self.build().state_dict()))

    def _config(self) -> Config:
        return Config({self._key: self.node}, {(): Source("the checkpoint")})

    @property
    def _key(self) -> str:
        return {"tokenizer": "tokenizer", "task.generator": "generator"}.get(self.part, "space")


class _Parts:
    def __init__(
        self,
        tokenizer: Factory[Tokenizer] | None = None,
        space: ImageSpace | None = None,
        generator: Factory[Generator] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.space = space
        self.generator = generator


def renamed(
    state: Mapping[str, Tensor], rules: Sequence[tuple[str, str]], dropped: Sequence[str] = ()
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors under this framework's names, and the official names of those that are dropped.

    Args:
        state: by official names.
        rules: regular expressions and replacements, all applied to each name in this order.
        dropped: beginnings of official names.

    Raises:
        OfficialError: if two tensors come to the same name.
    """
    left_out = [name for name in state if name.startswith(tuple(dropped))]
    weights: dict[str, Tensor] = {}
    for name in sorted(state.keys() - set(left_out)):
        new = name
        for pattern, replacement in rules:
            new = re.sub(pattern, replacement, new)
        if new in weights:
            raise OfficialError(f"{name} and another tensor would both be {new}")
        weights[new] = state[name]
    return weights, left_out


def count(state: Mapping[str, Tensor], pattern: str) -> int:
    """How many numbers the group of a regular expression takes in the names."""
    return len({match[1] for name in state if (match := re.match(pattern, name))})


def _some(names: Sequence[str], number: int = 5) -> str:
    return ", ".join(names[:number]) + (f" and {len(names) - number} more" if len(names) > number else "")
