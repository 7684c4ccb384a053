"""The distortion of every image at every budget, with the features a policy reads: all that it is trained from.

Computed once for a frozen tokenizer and kept in one file, it makes an epoch of policy training a matrix product.

Shapes: i images, g budgets, f features, r rows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from framework.allocation.adaptive_tokenizer import allocation_request
from framework.allocation.fidelity import Fidelity
from framework.allocation.search import Trials, candidate_budgets
from framework.config.errors import shorten
from framework.data.interface import Batch
from framework.runtime.files import write_bytes
from framework.tokenizers.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class ErrorTable:
    """Features and distortions of images, in the order of their keys.

    Args:
        features: ``(i, f)`` float32.
        distortions: ``(i, g)`` float32; lower is better.
        budgets: g lengths, increasing.
        keys: one name per image, each different.
        digest: of the tokenizer's weights.
        protocol: what else decides the numbers, as plain JSON: the data's protocol and the fidelity's settings.

    Raises:
        ValueError: if a key comes twice.
    """

    features: Tensor
    distortions: Tensor
    budgets: tuple[int, ...]
    keys: tuple[str, ...]
    digest: str
    protocol: Mapping[str, object]

    def __post_init__(self) -> None:
        if twice := len(self.keys) - len(self._row_of):
            raise ValueError(f"{twice} of {len(self.keys)} keys come twice: an image is measured once, not augmented")

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {key: row for row, key in enumerate(self.keys)}

    def rows(self, keys: Sequence[str]) -> Tensor:
        """The rows ``(r,)`` int64 of images by name.

        Raises:
            LookupError: naming images that the table lacks.
        """
        if missing := [key for key in keys if key not in self._row_of]:
            raise LookupError(f"the error table lacks {len(missing)} of {len(keys)} images, first {missing[:3]}")
        return torch.tensor([self._row_of[key] for key in keys], dtype=torch.int64)

    @classmethod
    @torch.no_grad()
    def compute(
        cls,
        tokenizer: Tokenizer,
        batches: Iterable[Batch],
        budgets: Sequence[int],
        fidelity: Fidelity,
        digest: str,
        protocol: Mapping[str, object],
        progress: Callable[[int], None] = lambda done: None,
    ) -> ErrorTable:
        """Measure images at every budget: one encoding of each where the contract is to truncate, else one a budget.

        Args:
            tokenizer: in eval mode.
            batches: images and their keys, each image once.
            progress: called with the number of images done after each batch.

        Raises:
            ValueError: if the tokenizer is in training mode, budgets do not fit it, there are no images or a key
                comes twice, or a feature or distortion is not finite (with the keys of the first such images).
        """
        if tokenizer.training:
            raise ValueError("the tokenizer is in training mode, which is another model: call tokenizer.eval() first")
        budgets = candidate_budgets(budgets, tokenizer.num_tokens)
        device = next(tokenizer.parameters()).device
        measured: list[tuple[Tensor, Tensor]] = []
        keys: list[str] = []
        for batch in batches:
            _, request = allocation_request(tokenizer, batch.images.to(device), batch.keys)
            numbers = request.features.float().cpu(), Trials(request, fidelity).table(budgets).float().cpu()
            if len(bad := (~torch.cat(numbers, dim=1).isfinite().all(dim=1)).nonzero().flatten().tolist()):
                raise ValueError(
                    f"features or distortions of {len(bad)} of {len(batch.keys)} images are not finite, first "
                    f"{', '.join(batch.keys[row] for row in bad[:3])}: the tokenizer's weights have probably diverged"
                )
            measured.append(numbers)
            keys += batch.keys
            progress(len(keys))
        if not keys:
            raise ValueError("there are no images to make an error table of")
        features, distortions = map(torch.cat, zip(*measured, strict=True))
        return cls(features, distortions, budgets, tuple(keys), digest, protocol)

    def save(self, path: Path) -> None:
        """Write one ``.safetensors`` file, atomically; everything but the tensors is JSON in its header."""
        header = _header(self.digest, self.budgets, self.protocol) | {"keys": self.keys}
        tensors = {"features": self.features, "distortions": self.distortions}
        write_bytes(path, safetensors.torch.save(tensors, {"error_table": json.dumps(header)}))

    @classmethod
    def load(
        cls,
        path: Path,
        digest: str,
        budgets: Sequence[int],
        protocol: Mapping[str, object],
        keys: Sequence[str] | None = None,
    ) -> ErrorTable:
        """Read a table that must have been computed of this; without ``keys``, of whichever images.

        Raises:
            OSError: if there is no such file.
            ValueError: if it is damaged, no error table, or computed of something else, with the first difference.
        """
        try:
            with safetensors.safe_open(path, "pt") as file:
                found = json.loads(file.metadata()["error_table"])
                features, distortions = file.get_tensor("features"), file.get_tensor("distortions")
        except (safetensors.SafetensorError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is damaged or no error table ({error}): remove it to compute it anew") from error
        wanted = _header(digest, budgets, protocol) | {"keys": found["keys"] if keys is None else list(keys)}
        for name in wanted:
            if found[name] != wanted[name]:
                raise ValueError(
                    f"{path} was computed with other {name}: {_first_difference(found[name], wanted[name])}. Ask for "
                    "what it holds, or remove it to compute it anew"
                )
        return cls(features, distortions, tuple(found["budgets"]), tuple(found["keys"]), digest, found["protocol"])


def _header(digest: str, budgets: Sequence[int], protocol: Mapping[str, object]) -> dict[str, object]:
    """As JSON gives it back."""
    return json.loads(json.dumps({"digest": digest, "budgets": list(budgets), "protocol": dict(protocol)}))


def _first_difference(found: object, wanted: object) -> str:
    if isinstance(found, list) and isinstance(wanted, list):
        place, found, wanted = next((i, a, b) for i, (a, b) in enumerate(zip_longest(found, wanted)) if a != b)
        return f"at place {place}, {found!r} instead of {wanted!r}"
    return f"{shorten(str(found), 300)} instead of {shorten(str(wanted), 300)}"
