"""Rate and distortion: the error of every image at every number of kept tokens, and what is read off that table.

Shapes: b images of a batch, i images of the data set, l lengths.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from framework.data.interface import Batch, ImageData
from framework.data.stream import Sequential
from framework.evaluation.image_metrics import SSIM_PROTOCOL, SSIM_WINDOW, THRESHOLDS, psnr, rqpr, squared_error, ssim
from framework.evaluation.tables import columns_text
from framework.losses.perceptual import PerceptualLoss
from framework.runtime.files import write_text
from framework.tokenizers.interface import ImageSpace
from framework.tokenizers.tokenizer import Tokenizer

Errors = Callable[[Tensor, Sequence[int]], Tensor]
"""Images ``(b, 3, h, w)`` and lengths -> squared errors ``(b, l)``."""

Numbers = Callable[[Tensor, Sequence[int]], Mapping[str, Tensor]]
"""The same, with other distances of the same reconstructions beside the squared errors, which are ``mse``."""

Progress = Callable[[str, int, int], None]
"""Called with what is being measured, the images done and the images in all."""

DEFINITIONS = {
    "mse": "mean over images of the squared error, itself a mean over pixels and channels in [0, 1]",
    "rmse": "the AdaTok paper's rMSE, 'reconstruction MSE' (section 5.3): the same number as mse, without a root",
    "root_mse": "mean over images of the square root of each image's squared error",
    "psnr": "dB, mean over images of each image's PSNR",
    "rqpr": "share of images with a squared error at or below the threshold",
    "share_falling": "share of images with a lower error than at the previous length of the list",
    "mse_interval": "95% bootstrap interval of mse: 1000 resamples of groups, then of images within each, seed 0",
    "idle_tail": "length: the shortest measured one whose mse is at most a share, tolerance, above that of all tokens; "
    "tokens: those behind it, which together lower the mean error by no more. Where the lengths just below were not "
    "measured, more may be idle; null where the length of all tokens was not measured",
    "kinds": "count: images of this kind; per_length: mse over these alone",
    "ssim": "structural similarity, mean over images; the protocol says which; of images of 11 pixels or more",
    "distances": "other distances, if any were asked for, are means over images, as ssim is, with intervals as of mse; "
    "the protocol says of each what it is",
    "floor": "of a tokenizer that works in an autoencoder's space: images that only go through that and back",
}
IDLE_TOLERANCE = 0.01


def default_lengths(num_tokens: int) -> tuple[int, ...]:
    """Powers of two, three quarters of the maximum, and the maximum: 1 2 4 8 12 16 for 16 tokens."""
    powers = {2**exponent for exponent in range(num_tokens.bit_length())}
    return tuple(sorted(powers | {max(1, 3 * num_tokens // 4), num_tokens}))


def few_lengths(num_tokens: int) -> tuple[int, ...]:
    """One token, a quarter and all of them, where three lengths must do."""
    return tuple(sorted({1, max(1, num_tokens // 4), num_tokens}))


@dataclass(frozen=True, eq=False)
class RateDistortion:
    """The errors of a set of images at several lengths.

    Args:
        errors: squared errors in [0, 1] pixels, ``(i, l)`` float64.
        lengths: kept tokens, increasing.
        keys: one name per image.
        groups: the photograph that each image was cut from.
        protocol: how the errors were measured.
        kinds: what sort of image each one is, where the data set tells.
        distances: other numbers of the same images ``(i, l)`` float64, by name; the protocol says what each is.
        thresholds: squared errors at which the quality pass rate is reported.
    """

    errors: Tensor
    lengths: tuple[int, ...]
    keys: tuple[str, ...]
    groups: tuple[str, ...]
    protocol: Mapping[str, object]
    kinds: tuple[str, ...] | None = None
    distances: Mapping[str, Tensor] = field(default_factory=dict)
    thresholds: tuple[float, ...] = THRESHOLDS

    @cached_property
    def intervals(self) -> Tensor:
        """95% intervals of the mean error at each length: ``(2, l)``."""
        return mean_intervals(self.errors, self.groups)

    def summary(self) -> dict[str, object]:
        """The protocol and, for each length, every number that ``DEFINITIONS`` explains; plain JSON types only."""
        falling = (self.errors[:, 1:] < self.errors[:, :-1]).double()
        every_step = self.lengths == tuple(range(1, len(self.lengths) + 1)) and len(self.lengths) > 1
        shares = [None, *falling.mean(0).tolist()]
        columns = zip(self.lengths, self.errors.T, self.intervals.T, shares, self._distances_at(), strict=True)
        return {
            "protocol": dict(self.protocol),
            "per_length": [
                {
                    "length": length,
                    "mse": errors.mean().item(),
                    "mse_interval": interval.tolist(),
                    "rmse": errors.mean().item(),
                    "root_mse": errors.sqrt().mean().item(),
                    "psnr": psnr(errors).mean().item(),
                    "rqpr": {str(threshold): rqpr(errors, threshold).item() for threshold in self.thresholds},
                    "share_falling": share,
                    **others,
                }
                for length, errors, interval, share, others in columns
            ],
            "share_falling_over_single_steps": falling.mean().item() if every_step else None,
        }

    def _distances_at(self) -> list[dict[str, object]]:
        """For each length, the mean of each distance and its interval."""
        found: list[dict[str, object]] = [{} for _ in self.lengths]
        for name, values in self.distances.items():
            for at, mean, interval in zip(
                found, values.mean(0).tolist(), mean_intervals(values, self.groups).T.tolist(), strict=True
            ):
                at |= {name: mean, f"{name}_interval": interval}
        return found

    def by_kind(self) -> dict[str, dict[str, Any]]:
        """``count`` and, for each length, ``mse`` of each kind of image; empty without kinds."""
        found = {}
        for kind, rows in rows_by_kind(self.kinds).items():
            means = zip(self.lengths, self.errors[rows].mean(0).tolist(), strict=True)
            found[kind] = {"count": len(rows), "per_length": [{"length": length, "mse": mse} for length, mse in means]}
        return found

    def idle_tail(self, num_tokens: int) -> dict[str, Any] | None:
        """How many of a tokenizer's n tokens do nearly nothing for the mean error; see ``DEFINITIONS``."""
        if self.lengths[-1] != num_tokens:
            return None
        means = self.errors.mean(0)
        length = self.lengths[int((means <= (1 + IDLE_TOLERANCE) * means[-1]).nonzero()[0])]
        measured = list(self.lengths)
        return {"length": length, "tokens": num_tokens - length, "tolerance": IDLE_TOLERANCE, "measured": measured}

    def save(self, folder: Path, sections: Mapping[str, object] | None = None) -> dict[str, object]:
        """Write ``metrics.json`` (this summary and other ``sections``) and ``per_image.csv`` (one row per image).

        Returns:
            The contents of ``metrics.json``.
        """
        metrics = {"definitions": DEFINITIONS, "rate_distortion": self.summary(), **(sections or {})}
        columns: dict[str, Sequence[object]] = {"key": self.keys, "group": self.groups}
        columns |= {} if self.kinds is None else {"kind": self.kinds}
        for name, values in {"mse": self.errors, **self.distances}.items():
            columns |= dict(zip((f"{name}@{length}" for length in self.lengths), values.T.tolist(), strict=True))
        write_text(folder / "metrics.json", json.dumps(metrics, indent=2, allow_nan=False) + "\n")
        write_text(folder / "per_image.csv", columns_text(columns))
        return metrics


def rows_by_kind(kinds: Sequence[str] | None) -> dict[str, list[int]]:
    """The rows of each kind, ``2 digits`` before ``10 digits``; empty without kinds."""
    names = sorted(set(kinds or ()), key=lambda kind: re.sub(r"\d+", lambda number: number[0].zfill(9), kind))
    return {name: [row for row, kind in enumerate(kinds or ()) if kind == name] for name in names}


def mean_intervals(errors: Tensor, groups: Sequence[str], resamples: int = 1000, seed: int = 0) -> Tensor:
    """95% bootstrap intervals of mean errors when images of a group resemble each other: ``(i, l)`` -> ``(2, l)``.

    Each resample draws groups with replacement, then images within every drawn group. Resampling images alone would
    treat hundreds of crops of three photographs as hundreds of photographs. With few groups the intervals are wide.
    """
    members: dict[str, list[int]] = {}
    for image, group in enumerate(groups):
        members.setdefault(group, []).append(image)
    by_group = errors[torch.tensor([image for images in members.values() for image in images])]
    sizes = torch.tensor([len(images) for images in members.values()])
    starts = sizes.cumsum(0) - sizes
    generator = torch.Generator().manual_seed(seed)
    means = []
    for _ in range(resamples):
        drawn = torch.randint(len(sizes), (len(sizes),), generator=generator)
        size = sizes[drawn].repeat_interleave(sizes[drawn])
        start = starts[drawn].repeat_interleave(sizes[drawn])
        offset = (torch.rand(len(size), generator=generator, dtype=torch.float64) * size).long()
        means.append(by_group[start + offset].mean(0))
    return torch.stack(means).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64), dim=0)


@torch.no_grad()
def reconstructions(tokenizer: Tokenizer, images: Tensor, lengths: Sequence[int]) -> Iterator[Tensor]:
    """Images ``(b, 3, h, w)`` in [0, 1] rebuilt at each length, from one encoding where the contract is to truncate.

    Raises:
        ValueError: if the tokenizer is in training mode, or a length is not one of its own.
    """
    if tokenizer.training:
        raise ValueError("the tokenizer is in training mode, which is another model: call tokenizer.eval() first")
    for length in lengths:
        if not 1 <= length <= tokenizer.num_tokens:
            raise ValueError(
                f"cannot keep {length} of the tokenizer's {tokenizer.num_tokens} tokens: lengths go from 1 to "
                f"{tokenizer.num_tokens}, the nearest is {min(max(length, 1), tokenizer.num_tokens)}"
            )
    if tokenizer.contract == "truncate":
        tokens = tokenizer.encode(images)
        for length in lengths:
            yield tokenizer.decode(tokens.with_lengths(torch.full_like(tokens.lengths, length)))
    else:
        for length in lengths:
            yield tokenizer.decode(tokenizer.encode(images, length))


def tokenizer_errors(tokenizer: Tokenizer, images: Tensor, lengths: Sequence[int]) -> Tensor:
    """Squared errors of images ``(b, 3, h, w)`` at each length: ``(b, l)``, computed on the tokenizer's device."""
    images = images.to(next(tokenizer.parameters()).device)
    rebuilt = reconstructions(tokenizer, images, lengths)
    return torch.stack([squared_error(images, reconstruction) for reconstruction in rebuilt], dim=1)


def measure(
    name: str,
    errors: Errors,
    data: ImageData,
    lengths: Sequence[int],
    limit: int | None = None,
    batch_size: int = 64,
    record: Mapping[str, object] | None = None,
    progress: Progress | None = None,
) -> RateDistortion:
    """``measure_all`` of squared errors alone."""

    def numbers(images: Tensor, lengths: Sequence[int]) -> Mapping[str, Tensor]:
        return {"mse": errors(images, lengths)}

    return measure_all(name, numbers, data, lengths, limit, batch_size, record, progress)


def measure_all(
    name: str,
    numbers: Numbers,
    data: ImageData,
    lengths: Sequence[int],
    limit: int | None = None,
    batch_size: int = 64,
    record: Mapping[str, object] | None = None,
    progress: Progress | None = None,
) -> RateDistortion:
    """Errors of a data set's images, or of a fixed random subset of ``limit``, at each length.

    Args:
        name: what is measured, for messages and progress.
        numbers: measures a batch.
        data: images that were not trained on.
        lengths: kept tokens, increasing.
        record: which weights these are; goes into the protocol.

    Raises:
        ValueError: if lengths do not increase, there are no images, or an error is not finite (with the keys of the
            first such images).
        TooManyBroken: if more images cannot be read than ``data.max_broken`` allows; fewer are left out and recorded.
    """
    if list(lengths) != sorted(set(lengths)) or not lengths:
        raise ValueError(f"lengths must increase, got {list(lengths)}; try {sorted(set(lengths)) or [1]}")
    total = len(data) if limit is None else min(limit, len(data))
    measured: list[dict[str, Tensor]] = []
    keys: list[str] = []
    groups: list[str] = []
    kinds: list[str] = []
    batches = Sequential(data, batch_size, limit)
    for batch in batches:
        measured.append({metric: values.cpu().double() for metric, values in numbers(batch.images, lengths).items()})
        for values in measured[-1].values():
            _refuse_non_finite(name, values, batch.keys, lengths)
        keys += batch.keys
        groups += batch.groups
        kinds += batch.kinds or []
        if progress is not None:
            progress(name, len(keys) + len(batches.broken), total)
    if not keys:
        raise ValueError(f"there are no images to measure: the data set holds {len(data)} and the limit is {limit}")
    protocol = {
        "data": data.protocol(),
        "images": len(keys),
        "of": len(data),
        **batches.record(),
        "groups": len(set(groups)),
        "image_size": data.image_size,
        "value_range": [0, 1],
        "clamped": True,
        "dtype": "float32 per image, float64 over images",
        "lengths": list(lengths),
        "weights": dict(record or {}),
    }
    table = {metric: torch.cat([values[metric] for values in measured]) for metric in measured[0]}
    errors, named = table.pop("mse"), tuple(kinds) or None
    return RateDistortion(errors, tuple(lengths), tuple(keys), tuple(groups), protocol, named, table)


def _refuse_non_finite(name: str, errors: Tensor, keys: Sequence[str], lengths: Sequence[int]) -> None:
    bad = ~errors.isfinite()
    if bad.any():
        rows = bad.any(1).nonzero().flatten().tolist()
        length = lengths[int(bad.any(0).nonzero()[0])]
        raise ValueError(
            f"{name}: reconstructions at length {length} are not finite for {len(rows)} of {len(keys)} images, first "
            f"{', '.join(keys[row] for row in rows[:3])}: the weights have probably diverged, use an earlier checkpoint"
        )


def rate_distortion(
    tokenizer: Tokenizer,
    data: ImageData,
    lengths: Sequence[int] | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    record: Mapping[str, object] | None = None,
    progress: Progress | None = None,
    distances: Mapping[str, PerceptualLoss] | None = None,
) -> RateDistortion:
    """Errors of a tokenizer in eval mode, and other ``distances`` by name; see ``measure_all``.

    Lengths are ``default_lengths`` unless given.
    """
    device = next(tokenizer.parameters()).device

    def numbers(images: Tensor, lengths: Sequence[int]) -> Mapping[str, Tensor]:
        return _numbers(images.to(device), reconstructions(tokenizer, images.to(device), lengths), distances or {})

    lengths = default_lengths(tokenizer.num_tokens) if lengths is None else lengths
    curve = measure_all("tokenizer", numbers, data, lengths, limit, batch_size, record, progress)
    return _told(curve, distances or {})


def space_floor(
    space: ImageSpace,
    data: ImageData,
    limit: int | None = None,
    batch_size: int = 64,
    record: Mapping[str, object] | None = None,
    progress: Progress | None = None,
    distances: Mapping[str, PerceptualLoss] | None = None,
) -> RateDistortion:
    """Errors of images that only go through a space and back, which nothing that predicts its values falls below.

    Its one length is the number of the space's positions.
    """
    device = next(space.parameters()).device

    def numbers(images: Tensor, lengths: Sequence[int]) -> Mapping[str, Tensor]:
        images = images.to(device)
        return _numbers(images, [space.decode(space.encode(images)).clamp(0, 1)], distances or {})

    positions = (data.image_size // space.downsampling) ** 2
    floor = measure_all("autoencoder", numbers, data, [positions], limit, batch_size, record, progress)
    return _told(floor, distances or {})


def _numbers(
    images: Tensor, rebuilt: Iterable[Tensor], distances: Mapping[str, PerceptualLoss]
) -> dict[str, Tensor]:
    """By metric, the numbers of each image and reconstruction: ``(b, l)``."""
    measured: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"mse": squared_error}
    measured |= {"ssim": ssim} if min(images.shape[2:]) >= SSIM_WINDOW else {}
    measured |= {name: distance.distances for name, distance in distances.items()}
    columns: dict[str, list[Tensor]] = {name: [] for name in measured}
    for reconstruction in rebuilt:
        for name, number in measured.items():
            columns[name].append(number(reconstruction.float(), images))
    return {name: torch.stack(column, dim=1) for name, column in columns.items()}


def _told(curve: RateDistortion, distances: Mapping[str, PerceptualLoss]) -> RateDistortion:
    """With a protocol that says what the numbers beside the squared error are."""
    told: dict[str, object] = {"ssim": SSIM_PROTOCOL} if "ssim" in curve.distances else {}
    told |= {"distances": {name: distance.protocol() for name, distance in distances.items()}} if distances else {}
    return replace(curve, protocol={**curve.protocol, **told})


def validation_errors(
    tokenizer: Tokenizer, batches: Iterable[Batch], lengths: Sequence[int] | None = None
) -> dict[str, float]:
    """Mean squared errors for watching a run, at ``few_lengths`` unless given: ``{"mse@1": ..., "mse@4": ...}``."""
    lengths = few_lengths(tokenizer.num_tokens) if lengths is None else lengths
    errors = torch.cat([tokenizer_errors(tokenizer, batch.images, lengths).cpu().double() for batch in batches])
    return {f"mse@{length}": error for length, error in zip(lengths, errors.mean(0).tolist(), strict=True)}
