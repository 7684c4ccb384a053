"""Exporting what a run has trained as a folder of its own, which needs neither the run nor those it was built on."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from framework.allocation.adaptive_tokenizer import AdaptiveTokenizer
from framework.config import Config, Source, resolve
from framework.config.errors import dotted
from framework.config.schema import Entries, Items, Part, Plan, Reader, Value
from framework.engine.experiment import Experiment
from framework.engine.run_directory import RunError
from framework.generators.image_generator import ImageGenerator
from framework.models.card import model_card
from framework.models.exported import Exported, read_exported, write_exported
from framework.models.loading import EVALUATION, LOSSES, Which, experiment_from, restore, run_config
from framework.runtime import files
from framework.runtime.weights import weights_digest
from framework.tasks.interface import Task
from framework.tokenizers.interface import ImageSpace
from framework.tokenizers.tokenizer import Tokenizer


def export(run: Path, out: Path, checkpoint: Which = "latest", license: str | None = None) -> str:
    """Write a run's model to a new folder, which ``framework.load`` then takes; returns the SHA-256 of its weights.

    Weights are the averaged ones where there are some. The folder is read back before it gets its name.

    Args:
        run: the run directory.
        out: the folder; must not exist yet.
        checkpoint: the latest, or the best as ``train.best`` says.
        license: of the weights, such as ``Apache-2.0``, for the model card.

    Raises:
        RunError: if ``out`` exists, the run has no such checkpoint, or its model cannot stand alone.
        CheckpointError: if the run's weights do not fit its configuration.
        OSError: if the folder cannot be written; nothing is then left.
    """
    if os.path.lexists(out):
        raise RunError(f"{out} exists: an export goes into a new folder; choose another name, or remove it")
    config = run_config(run)
    experiment = experiment_from(config, unread=[LOSSES, EVALUATION])
    record = restore(experiment, run, None, checkpoint)
    tree, model = resolve(config, Experiment), experiment.task.model.eval()
    reader = Reader(Config({}, {(): Source(str(run / "config.yaml"))}))
    plan = reader.part(_nodes(tree, experiment.task), Exported, (), "")
    origins, needs_code = _separate(plan)
    imports = {"imports": tree["imports"]} if needs_code and "imports" in tree else {}
    digest = weights_digest(model.state_dict())
    facts = {"started from": ", ".join(origins)} if origins else {}
    facts |= {"weights, SHA-256": f"`{digest}`"}
    card = model_card(out.name, run, experiment, record, license, facts)
    partial = out.with_name(out.name + files.PARTIAL)
    try:
        if partial.exists():
            files.remove_folder(partial)  # what a kill has left
        write_exported(partial, imports | plan.tree(), model, record | {"run": run.absolute().name}, card)
        read_exported(partial, lambda module: True)
        files.publish_folder(partial, out)
    except BaseException:
        with suppress(OSError):
            files.remove_folder(partial)
        raise
    return digest


def _nodes(tree: dict[str, Any], task: Task) -> dict[str, Any]:
    """The nodes of a run's configuration that its model is built from, by the names of ``Exported``."""
    model = task.model
    try:
        if isinstance(model, ImageSpace):
            return {"space": tree["task"][next(name for name, part in task.named_children() if part is model)]}
        if isinstance(model, Tokenizer):
            return {"tokenizer": tree["tokenizer"], "image_size": model.image_size}
        if isinstance(model, AdaptiveTokenizer):
            whole = {"tokenizer": tree["tokenizer"], "image_size": model.image_size}
            return whole | {"policy": tree["task"]["policy"]}
        if isinstance(model, ImageGenerator):
            whole = {"tokenizer": tree["tokenizer"], "image_size": model.tokenizer.image_size}
            own = {name: tree["task"][name] for name in ("generator", "num_classes")}
            return whole | own | {"budgets": list(model.budgets)}
    except (KeyError, StopIteration) as error:
        raise RunError(f"{type(task).__name__} does not say which node its model is built from: {error!r}") from error
    kinds = "tokenizers, policies, generators and autoencoders"
    raise RunError(f"{kinds} are exported, and this run trains {type(model).__name__}")


def _separate(plan: Plan) -> tuple[list[str], bool]:
    """Take ``weights`` and ``frozen`` out of a plan; returns where weights came from, and whether it needs own code.

    Raises:
        RunError: if a part reads a file, which would have to come along.
    """
    origins, needs_code = [], False
    for part in _walk(plan):
        if isinstance(part, Value) and isinstance(part.value, Path):
            raise RunError(f"the model reads the file {part.value}: an exported model has no files but its weights")
        if isinstance(part, Part):
            if source := part.builder.get("weights"):
                origins.append(f"{dotted(part.keys)}: {Path(source).name if Path(source).exists() else source}")
            part.builder.clear()
            needs_code |= not part.cls.__module__.startswith("framework.")
    return origins, needs_code


def _walk(plan: Plan) -> Iterator[Plan]:
    yield plan
    inner: Iterable[Plan] = ()
    match plan:
        case Part():
            inner = plan.arguments.values()
        case Items():
            inner = plan.items
        case Entries():
            inner = plan.entries.values()
    for item in inner:
        yield from _walk(item)
