"""Linear probes of what a run has trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from framework import runs
from framework.allocation.adaptive_tokenizer import AdaptiveTokenizer
from framework.engine.experiment import Experiment
from framework.evaluation.linear_probe import Readout, linear_probe
from framework.models.loading import EVALUATION, LOSSES, Which, experiment_from, run_config
from framework.runtime.progress import Stages
from framework.runtime.weights import weights_digest
from framework.tokenizers.tokenizer import Tokenizer


def trained_model(folder: Path, which: Which) -> tuple[Tokenizer | AdaptiveTokenizer, Experiment, dict[str, object]]:
    """A tokenizer that a run has trained or used, on the run's device; its settings and data; and which weights it has.

    Raises:
        RunError: if there is no such run or checkpoint, or what it has trained has no tokens.
    """
    model = runs.load(folder, checkpoint=which)
    tokenizer = getattr(model, "tokenizer", model)
    if not isinstance(tokenizer, Tokenizer):
        raise runs.RunError(f"{folder} has trained {type(model).__name__}, which makes no tokens")
    # Only its settings and data are needed: nothing is made, or loaded, twice.
    experiment = experiment_from(run_config(folder), "meta", [LOSSES, EVALUATION])
    if experiment.run.threads is not None:
        torch.set_num_threads(experiment.run.threads)
    record: dict[str, object] = {
        "run": str(folder),
        "checkpoint": which,
        "seed": experiment.run.seed,
        "sha256": weights_digest(tokenizer.state_dict()),
    }
    found = model if isinstance(model, AdaptiveTokenizer) else tokenizer
    return found.to(experiment.run.torch_device()), experiment, record


def probe(
    folder: Path,
    say: Callable[[str], None],
    readout: Readout = "concatenated",
    split: runs.Split = "validation",
    out: Path | None = None,
    lengths: Sequence[int] | None = None,
    limit: int | None = None,
    checkpoint: Which = "latest",
) -> Path:
    """Probe the tokenizer of a run, trained or used, on its own data and device; returns the folder of the results.

    Args:
        folder: the run directory.
        say: told where things are.
        readout: what probes read of the kept tokens; see ``linear_probe``.
        split: which images are measured on; probes are trained on those of training.
        out: where results go; ``probe_SPLIT`` of the run unless given.
        lengths: kept tokens to measure; a spread of them unless given.
        limit: measure on a fixed random subset of so many images.
        checkpoint: the latest, or the best as ``train.best`` says.

    Raises:
        RunError: as ``trained_model``.
        ValueError: as ``linear_probe``, such as of images without labels.
    """
    model, experiment, record = trained_model(folder, checkpoint)
    tokenizer = model.tokenizer if isinstance(model, AdaptiveTokenizer) else model
    out = out or folder / f"probe_{split}"
    train, test = experiment.data.train, getattr(experiment.data, split)
    with Stages() as progress:
        linear_probe(tokenizer, train, test, out, record, lengths, readout, limit, progress=progress)
    say((out / "table.md").read_text().strip())
    say("results: " + " ".join(sorted(str(path) for path in out.iterdir())))
    return out
