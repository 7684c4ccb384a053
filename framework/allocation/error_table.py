"""The distortion of every image at every budget, with the features a policy reads: all that it is trained from.

Computed once for a frozen tokenizer and kept in one file, it makes an epoch of policy training a matrix product.

Shapes: i images, g budgets, f features, r rows.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import zip_longest
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from framework.allocation.adaptive_tokenizer import allocation_request
from framework.allocation.fidelity import Fidelity
from framework.allocation.search import Trials, candidate_budgets
from framework.config.errors import shorten
from framework.data.interface import Batch, ImageData
from framework.data.stream import Sequential
from framework.runtime.files import write_bytes
from framework.runtime.weights import weights_digest
from framework.tokenizers.tokenizer import Tokenizer

SAMPLE = 16
"""Images that tell data sets apart, and are measured again to see whether a file still agrees with the model."""


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
    """

    features: Tensor
    distortions: Tensor
    budgets: tuple[int, ...]
    keys: tuple[str, ...]
    digest: str
    protocol: Mapping[str, object]

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
            batches: images and their keys; one that comes again is left out, as is a crop that was drawn twice.
            progress: called with the number of images done after each batch.

        Raises:
            ValueError: if the tokenizer is in training mode, budgets do not fit it, there are no images, or a feature
                or distortion is not finite (with the keys of the first such images).
        """
        if tokenizer.training:
            raise ValueError("the tokenizer is in training mode, which is another model: call tokenizer.eval() first")
        budgets = candidate_budgets(budgets, tokenizer.num_tokens)
        device = next(tokenizer.parameters()).device
        measured: list[tuple[Tensor, Tensor]] = []
        rows: dict[str, int] = {}  # of what was measured, by key
        done = 0
        for batch in batches:
            new = [row for row, key in enumerate(batch.keys) if rows.setdefault(key, done + row) == done + row]
            done += len(batch.keys)
            if new:
                keys = [batch.keys[row] for row in new]
                _, request = allocation_request(tokenizer, batch.images[new].to(device), keys)
                table = Trials(request, fidelity).table(torch.tensor(budgets))
                measured.append(_finite(request.features.float().cpu(), table.float().cpu(), keys))
            progress(done)
        if not rows:
            raise ValueError("there are no images to make an error table of")
        features, distortions = map(torch.cat, zip(*measured, strict=True))
        return cls(features, distortions, budgets, tuple(rows), digest, protocol)

    @classmethod
    def cached(
        cls,
        folder: Path,
        tokenizer: Tokenizer,
        data: ImageData,
        budgets: Sequence[int],
        fidelity: Fidelity,
        progress: Callable[[int], None] = lambda done: None,
    ) -> ErrorTable:
        """The table of a data set, from a file in ``folder`` where it has been computed before, else computed and kept.

        Images are measured as they look in epoch 0. The file's name is a digest of the weights, the budgets, the
        protocol and a few images. Code and settings without weights are not in it, so these images are measured again;
        a file that does not agree, or is damaged, is replaced.

        Raises:
            ValueError: as ``compute``.
            TooManyBroken: if more images cannot be read than the data set allows.
        """
        digest = weights_digest(tokenizer.state_dict())
        some = list(Sequential(data, SAMPLE, limit=SAMPLE))
        looks = weights_digest({"images": torch.cat([batch.images for batch in some])})
        protocol = {"data": data.protocol(), "looks": looks, "fidelity": repr(fidelity)}
        name = hashlib.sha256(json.dumps(_header(digest, budgets, protocol), sort_keys=True).encode()).hexdigest()[:16]
        path = folder / f"error_table_{name}.safetensors"
        measure = partial(cls.compute, tokenizer, budgets=budgets, fidelity=fidelity, digest=digest, protocol=protocol)
        if path.is_file():
            sample = measure(some)
            with suppress(ValueError, LookupError):
                table = cls.load(path, digest, budgets, protocol)
                found = table.distortions[table.rows(sample.keys)]
                if torch.allclose(found, sample.distortions, rtol=1e-3, atol=1e-6):
                    return table
        table = measure(Sequential(data, 64), progress=progress)
        table.save(path)
        return table

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


def _finite(features: Tensor, distortions: Tensor, keys: Sequence[str]) -> tuple[Tensor, Tensor]:
    bad = (~torch.cat([features, distortions], dim=1).isfinite().all(dim=1)).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"features or distortions of {len(bad)} of {len(keys)} images are not finite, first "
            f"{', '.join(keys[row] for row in bad[:3])}: the tokenizer's weights have probably diverged"
        )
    return features, distortions


def _header(digest: str, budgets: Sequence[int], protocol: Mapping[str, object]) -> dict[str, object]:
    """As JSON gives it back."""
    return json.loads(json.dumps({"digest": digest, "budgets": list(budgets), "protocol": dict(protocol)}))


def _first_difference(found: object, wanted: object) -> str:
    if isinstance(found, list) and isinstance(wanted, list):
        place, found, wanted = next((i, a, b) for i, (a, b) in enumerate(zip_longest(found, wanted)) if a != b)
        return f"at place {place}, {found!r} instead of {wanted!r}"
    return f"{shorten(str(found), 300)} instead of {shorten(str(wanted), 300)}"
