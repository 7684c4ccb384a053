"""What a small classifier makes of the reconstructions of a run."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from framework import runs
from framework.allocation.adaptive_tokenizer import AdaptiveTokenizer
from framework.data.interface import Batch, ImageData
from framework.data.stream import Sequential
from framework.evaluation.digit_judge import DigitJudge, judge_columns, judge_images
from framework.evaluation.rate_distortion import default_lengths
from framework.evaluation.tables import markdown, protocol_text
from framework.launch.probing import trained_model
from framework.models.loading import Which
from framework.runtime.files import write_text
from framework.runtime.progress import Stages
from framework.tokenizers.tokenizer import Tokenizer

HELD_OUT = "held-out images"


def judge(
    folder: Path,
    say: Callable[[str], None],
    split: runs.Split = "validation",
    out: Path | None = None,
    lengths: Sequence[int] | None = None,
    limit: int | None = None,
    checkpoint: Which = "latest",
) -> Path:
    """Judge reconstructions of labelled images beside the images themselves; returns the folder of the results.

    Args:
        folder: the run directory, of a tokenizer or of a policy, whose own lengths are then judged too.
        say: told where things are.
        split: which images; the judge is trained on those of training, once for all runs.
        out: where ``judge.json`` and ``table.md`` go; ``judge_SPLIT`` of the run unless given.
        lengths: kept tokens; a spread of them unless given.
        limit: judge a fixed random subset of so many images.
        checkpoint: the latest, or the best as ``train.best`` says.

    Raises:
        RunError: as ``trained_model``.
        ValueError: if images have no labels.
    """
    model, experiment, record = trained_model(folder, checkpoint)
    data, train = getattr(experiment.data, split), experiment.data.train
    lengths = default_lengths(model.num_tokens) if lengths is None else lengths
    sets: dict[str, Iterator[Batch]] = {HELD_OUT: Sequential(data, 64, limit)}
    sets |= {f"{length} tokens": _rebuilt(model, data, length, limit) for length in lengths}
    if isinstance(model, AdaptiveTokenizer):
        sets["own lengths"] = _rebuilt(model, data, "auto", limit)
    with Stages() as progress:
        trained = DigitJudge.trained(train, experiment.run.cache, progress=progress)
        found = judge_images(trained, sets, train, progress=progress)
    found["protocol"] |= {"data": data.protocol(), "weights": record}
    out = out or folder / f"judge_{split}"
    write_text(out / "judge.json", json.dumps(found, indent=2, allow_nan=False) + "\n")
    write_text(out / "table.md", _table(found))
    say((out / "table.md").read_text().strip())
    say("results: " + " ".join(sorted(str(path) for path in out.iterdir())))
    return out


def _rebuilt(
    model: Tokenizer | AdaptiveTokenizer, data: ImageData, length: Any, limit: int | None
) -> Iterator[Batch]:
    device = next(model.parameters()).device
    for batch in Sequential(data, 64, limit):
        with torch.no_grad():
            yield replace(batch, images=model.decode(model.encode(batch.images.to(device), length)).cpu())


def _table(found: Mapping[str, Any]) -> str:
    columns = {name: judge_columns(numbers) for name, numbers in found["sets"].items()}
    rows = [["", *columns[HELD_OUT]], *([name, *values.values()] for name, values in columns.items())]
    images, data = found["sets"][HELD_OUT]["images"], protocol_text(found["protocol"]["data"])
    return (
        f"{markdown(rows, num_words=1)}\n{images} images, {data}; the judge has seen only training images. "
        "Definitions in judge.json.\n"
    )
