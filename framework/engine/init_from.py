"""Starting from another run's weights: what goes where is listed, and nothing is left over in silence."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from framework.config.errors import did_you_mean
from framework.engine.checkpoint import Checkpoint, CheckpointError, latest_checkpoint
from framework.engine.frozen import live_state
from framework.engine.globs import matches, unmatched
from framework.runtime.files import digest
from framework.tasks.interface import Task

SHOWN = 10  # problems of one kind that an error lists


class Inheritance(NamedTuple):
    """What a task took over: in words for the log, and the donor's checkpoint and its digests for ``run.json``."""

    text: str
    record: dict[str, object]


class InitFrom:
    """Start from the weights of another run's latest checkpoint, averaged ones where it has some.

    Every weight of the task comes from the donor or is ``fresh``; every weight of the donor is used or dropped. Only
    the donor's checkpoint is read. Frozen parts are in no checkpoint and have a source of their own. Once a run has a
    checkpoint it goes on from that, and no longer needs its donor.

    Args:
        run: the donor's run directory.
        rename: the donor's part to this task's part, as ``{tokenizer.encoder: tokenizer.backbone}``; of several that
            fit, the longest counts.
        fresh: globs over this task's weights that keep their initial values.
        drop: globs over the donor's weights, by the donor's names, that are not used.
    """

    def __init__(
        self, run: Path, rename: dict[str, str] | None = None, fresh: tuple[str, ...] = (), drop: tuple[str, ...] = ()
    ) -> None:
        self.run = run
        self.rename = rename or {}
        self.fresh = fresh
        self.drop = drop

    def apply(self, task: Task) -> Inheritance:
        """Load the donor's weights into ``task``; if ``match`` raises, nothing is loaded."""
        weights, inheritance = self.match(task)
        task.load_state_dict(weights, strict=False)
        return inheritance

    def match(self, task: Task) -> tuple[dict[str, Tensor], Inheritance]:
        """The weights for ``task``, which may be on the meta device, by its own names.

        Raises:
            CheckpointError: if the donor has no sound checkpoint; or with everything that does not fit.
        """
        checkpoint = latest_checkpoint(self.run / "checkpoints")
        if checkpoint is None:
            raise CheckpointError(f"train.init_from.run: {self.run} has no checkpoint to start from")
        donor, own = _weights(checkpoint), live_state(task)
        fresh = [name for name in own if matches(name, self.fresh)]
        dropped = [old for old in donor if matches(old, self.drop)]
        offers: dict[str, list[str]] = {}
        for old in donor:
            if old not in dropped:
                offers.setdefault(self._renamed(old), []).append(old)
        sources = {new: offers[new][0] for new in own if new in offers and new not in fresh}

        missing = [name for name in own if name not in sources and name not in fresh]
        unused = sorted(old for new, olds in offers.items() for old in olds if new not in sources)
        other = [new for new, old in sources.items() if own[new].shape != donor[old].shape]
        doubles = sorted(new for new, olds in offers.items() if len(olds) > 1)
        idle = [part for part in self.rename if not any(self._renaming(old) == part for old in donor)]
        parts = {old[:end] for old in donor for end, letter in enumerate(old) if letter == "."}
        problems = [
            *(f"fresh: {words} among the task's weights" for words in unmatched(self.fresh, own)),
            *(f"drop: {words} among the donor's weights" for words in unmatched(self.drop, donor)),
            *(f"rename: the donor has no part '{part}'{did_you_mean(part, sorted(parts))}" for part in idle),
            *(f"rename: {' and '.join(sorted(offers[new]))} would all become {new}" for new in doubles),
            *_first(missing, lambda name: f"the donor has no {name}{did_you_mean(name, unused)}"),
            *_first(unused, lambda old: f"the donor's {old} is not used{did_you_mean(old, missing)}"),
            *_first(
                other, lambda new: f"{new} is {tuple(own[new].shape)}, the donor's {tuple(donor[sources[new]].shape)}"
            ),
        ]
        if problems:
            advice = "list under train.init_from what to rename, what stays fresh and what to drop"
            title = f"{checkpoint.folder} does not fit {type(task).__name__}; {advice}:"
            raise CheckpointError("\n  ".join([title, *problems]))
        counts = Counter(f"{_part(old)} -> {_part(new)}" for new, old in sources.items())
        lines = [f"starting from the weights of {checkpoint.folder}"]
        lines += [f"{parts}: {count} weights" for parts, count in counts.items()]
        lines += [f"{kind}: {', '.join(names)}" for kind, names in (("fresh", fresh), ("dropped", dropped)) if names]
        files = sorted(name for name in checkpoint.files if name.endswith(".safetensors"))
        sha256 = {name: digest(checkpoint.folder / name) for name in files}
        record = {"checkpoint": str(checkpoint.folder), "step": checkpoint.step, "sha256": sha256}
        weights = {new: donor[old] for new, old in sources.items()}
        return weights, Inheritance("\n  ".join(lines), record)

    def _renaming(self, name: str) -> str | None:
        """The entry of ``rename`` that counts for a weight of the donor."""
        return max((part for part in self.rename if f"{name}.".startswith(f"{part}.")), key=len, default=None)

    def _renamed(self, name: str) -> str:
        part = self._renaming(name)
        return name if part is None else self.rename[part] + name[len(part) :]


def _weights(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """All weights under the task's names; averages, which have the model's names, in place of what they average."""
    weights = checkpoint.weights("model")
    average = checkpoint.weights("ema") if "ema.safetensors" in checkpoint.files else {}
    if not average:
        return weights
    first = next(iter(average))
    prefixes = [name.removesuffix(first) for name in weights if f".{name}".endswith(f".{first}")]
    fitting = [prefix for prefix in prefixes if all(f"{prefix}{name}" in weights for name in average)]
    if len(fitting) != 1:
        raise CheckpointError(
            f"{checkpoint.folder}: the averaged weights fit {len(fitting)} of the model's parts, {fitting}, and not one"
        )
    return weights | {f"{fitting[0]}{name}": value for name, value in average.items()}


def _first(names: Sequence[str], words: Callable[[str], str]) -> list[str]:
    rest = len(names) - SHOWN
    return [words(name) for name in names[:SHOWN]] + [f"and {rest} more such weights"] * (rest > 0)


def _part(name: str) -> str:
    return ".".join(name.split(".")[:2])
