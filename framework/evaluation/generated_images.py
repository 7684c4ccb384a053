"""Generated images beside real ones and their reconstructions: a judge of digits, and Frechet distances.

What held-out images score is the floor: they are real, and were not trained on either. All sets have as many images,
since Frechet distances fall as sets grow.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from framework.data.interface import Batch, ImageData
from framework.data.stream import Sequential
from framework.evaluation.digit_judge import DigitJudge, judge_columns, judge_images
from framework.evaluation.distribution_metrics import DEFINITIONS, FeatureCollector, distances
from framework.evaluation.evaluation import Evaluation
from framework.evaluation.image_metrics import UINT8_RULE, to_uint8
from framework.evaluation.rate_distortion import Progress
from framework.evaluation.reconstruction_distances import against_text, data_reference
from framework.evaluation.tables import markdown

HELD_OUT, RECONSTRUCTIONS = "held-out images", "their reconstructions"
ImageSet = Callable[[], Iterable[Batch]]
"""Batches of a set, from the start at each call."""


@dataclass(frozen=True)
class RealImages:
    """What generated images are compared with, and how.

    Args:
        data: held-out images, with labels.
        train_data: the training images.
        rebuild: what the tokenizer, at the policy's lengths, makes of a batch's images: ``(b, 3, h, w)`` in [0, 1].
        measures: ``judge_images`` and ``features`` of it, and its ``references``; without one of these, training images
            are the reference, a fixed random subset as large as the other sets.
        cache: folder for the judge; ``None`` leaves it out.
    """

    data: ImageData
    train_data: ImageData
    rebuild: Callable[[Batch], Tensor]
    measures: Evaluation
    cache: Path | None = None

    def sets(self, count: int) -> dict[str, ImageSet]:
        """So many held-out images, and their reconstructions."""

        def rebuilt() -> Iterator[Batch]:
            for batch in Sequential(self.data, 64, count):
                yield replace(batch, images=self.rebuild(batch).cpu())

        return {HELD_OUT: partial(Sequential, self.data, 64, count), RECONSTRUCTIONS: rebuilt}


def compare_with_real(
    generated: Mapping[str, ImageSet], real: RealImages, count: int, progress: Progress = lambda *told: None
) -> dict[str, Any]:
    """Judge sets of generated images, by name, beside real ones, ``count`` images each.

    Returns:
        ``judge``, as ``judge_images`` has it, where there is one, and ``distributions``: by metric ``definitions``,
        ``protocol`` and, by name, ``sets``; plain JSON types only.

    Raises:
        ValueError: as ``judge_images``; or if features are not finite, or a reference cannot be used.
    """
    sets, measures = {**real.sets(count), **generated}, real.measures
    found: dict[str, Any] = {}
    if measures.judge_images and real.cache is not None:
        judge = DigitJudge.trained(real.train_data, real.cache, progress=progress)
        batches = {name: each() for name, each in sets.items()}
        found["judge"] = judge_images(judge, batches, real.train_data, measures.judge_images, progress)
    found["distributions"] = {}
    for metric, network in measures.features.items():
        reference = measures.reference(network)
        reference = reference or data_reference(real.train_data, network, count, progress=progress)
        numbers = {}
        for done, (name, each) in enumerate(sets.items(), 1):
            collector = FeatureCollector(network)
            for batch in each():
                collector.add(to_uint8(batch.images))
            numbers[name] = distances(network, reference.images, collector.collected())
            progress(metric, done, len(sets))
        protocol = {"reference": dict(reference.protocol), "features": network.protocol(), "uint8": UINT8_RULE}
        found["distributions"][metric] = {"definitions": DEFINITIONS, "protocol": protocol, "sets": numbers}
    return found


def comparison_texts(found: Mapping[str, Any]) -> list[str]:
    """What ``compare_with_real`` has found, as a table and what it is of; nothing if that is nothing."""
    columns: dict[str, dict[str, str]] = defaultdict(dict)
    notes = []
    if judge := found.get("judge"):
        for name, numbers in judge["sets"].items():
            columns[name] |= judge_columns(numbers)
        against = judge["protocol"]["compared_with"]["images"]
        notes.append(f"fd_digit_judge: against {against:,} training images, as is the judge's diversity.")
    for metric, of in found.get("distributions", {}).items():
        for name, numbers in of["sets"].items():
            columns[name]["FID" if metric == "fid" else metric] = f"{numbers[metric]:.4g}"
            notes += [f"Note: {note}." for note in numbers["notes"]]
        notes.append(f"{metric}: {against_text(of['protocol'])}")
    if not columns:
        return []
    count = max(numbers["images"] for of in _measured(found) for numbers in of["sets"].values())
    notes.insert(0, f"Of {count:,} images each; real images that were not trained on, the first line, are the floor.")
    rows = [["", *columns[HELD_OUT]], *([name, *values.values()] for name, values in columns.items())]
    return [markdown(rows, 1), " ".join(dict.fromkeys(notes)) + "\n"]


def _measured(found: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [*([found["judge"]] if "judge" in found else []), *found.get("distributions", {}).values()]


def generated_heading(metric: str) -> str:
    """What a table calls a Frechet distance of generated images: the field's gFID where it is one."""
    return "gFID" if metric == "fid" else f"{metric}, generated"
