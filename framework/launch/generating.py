"""Images of classes from a run's generator, with all that is needed to make them again.

Shapes: i images, h and w pixels.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from shutil import copyfileobj
from typing import Any, Literal
from zipfile import ZipFile, ZipInfo

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from framework import runs
from framework.config import ConfigError
from framework.engine.checkpoint import CheckpointError
from framework.engine.run_directory import circumstances
from framework.evaluation.image_metrics import UINT8_RULE, to_uint8
from framework.evaluation.plots import count, write_rows
from framework.evaluation.tables import columns_text
from framework.generators.guidance import Guidance
from framework.generators.image_generator import ImageGenerator
from framework.generators.interface import Generator
from framework.models.exported import is_exported
from framework.models.loading import EVALUATION, LOSSES, Which, experiment_from, load, restore, run_config
from framework.runtime.files import PARTIAL, digest, publish_folder, write_text
from framework.runtime.weights import weights_digest

ERRORS = (ConfigError, runs.RunError, CheckpointError, ValueError, TypeError, OSError)
"""Those that are for people."""
CALLS = 4
"""Times as many images are asked for together as are made at a time, so that rows of finished ones are used again."""
ARRAYS = ("arr_0.npy", "arr_1.npy")
UNFINISHED = "unfinished.json"
"""Which images a folder without its name is to have, and the lengths of those that it has."""
PER_CLASS, CLASSES = 8, 20
"""Images in the picture, at most."""
SAMPLING = ("temperature", "top_k", "top_p")
SPEED = ("policy", "batch_size")


def generate_images(
    run: Path,
    out: Path,
    num: int,
    progress: Callable[[str, int, int], None],
    say: Callable[[str], None],
    classes: Sequence[int] | None = None,
    lengths: Sequence[int] | None = None,
    guidance: Guidance | None = None,
    seed: int = 0,
    checkpoint: Which = "latest",
    **settings: Any,
) -> None:
    """Make images, on the run's device, or on the CPU with an exported model, in a new folder.

    Image i is of class i modulo the number of classes, so that classes take turns, as the ADM evaluator's inception
    score needs them; it depends on (seed, i, its class and length, guidance, settings), and not on how many there are.
    The folder has ``images/``, ``samples.csv`` with their classes and lengths, ``grid.png`` of some of each class,
    ``samples.npz`` with ``arr_0 (i, h, w, 3)`` uint8 for the ADM evaluator and labels ``arr_1 (i,)``, and
    ``record.json`` with all that made them. It comes to its name when all of it is there; a command that was stopped
    goes on where it was when the same is asked for again.

    Args:
        run: the directory of a generator's run, or a folder that ``tools/convert.py export`` has made of one.
        out: the folder.
        num: i.
        progress: told how far it is.
        say: told what came of it.
        classes: all unless given.
        lengths: of the generator's budgets, which images of a class take in turn; as it finds right unless given.
        guidance: none unless given.
        seed: of all images.
        checkpoint: the latest, or the best as ``train.best`` says.
        settings: ``temperature``, ``top_k``, ``top_p``, ``policy`` and ``batch_size`` in place of the generator's own,
            where they are not ``None``.

    Raises:
        FileExistsError: if the folder is there, or what a stopped command that asked for something else has left.
        TypeError: if this is no run of a generator.
        ValueError: if the generator has no such classes, lengths or settings.
        RunError, CheckpointError, ConfigError: as ``runs.load``.
    """
    if out.exists():
        raise FileExistsError(f"{out} is there already: choose another folder, or remove it")
    images, record = _loaded(run, checkpoint)
    generator, guidance = images.generator, guidance or Guidance()
    _set(generator, {name: value for name, value in settings.items() if value is not None})
    chosen = torch.tensor(range(images.num_classes) if classes is None else list(classes))
    generator.space.check_labels(chosen)
    numbers = torch.arange(num)
    labels, asked = chosen[numbers % len(chosen)], None
    if lengths is not None:
        generator.space.check_lengths(torch.tensor(lengths))
        asked = torch.tensor(lengths)[numbers // len(chosen) % len(lengths)]
    made = {
        "run": record,
        "generator": {"name": type(generator).__name__, **_settings(generator)},
        "seed": seed,
        "images": num,
        "classes": chosen.tolist(),
        "guidance": asdict(guidance),
        "asked_lengths": lengths,
        "samples.npz": f"arr_0 uint8 (i, h, w, 3), {UINT8_RULE}; arr_1 int64 labels; classes take turns",
    }
    partial = out.with_name(out.name + PARTIAL)
    kept = _begun(partial, made)
    if kept:
        say(f"going on behind the first {len(kept)} images in {partial}")
    progress("images", len(kept), num)
    with _pixels(partial, num, images.tokenizer.size, labels) as pixels:
        left = numbers[len(kept) :]
        for rows in left.split(CALLS * getattr(generator, "batch_size", PER_CLASS)) if len(left) else ():
            given = None if asked is None else asked[rows]
            tokens = images.generate(labels[rows], seed=seed, sample_ids=rows, guidance=guidance, lengths=given)
            pixels[rows] = rearrange(to_uint8(images.decode(tokens)).cpu(), "i c h w -> i h w c").numpy()
            for row in rows.tolist():
                Image.fromarray(pixels[row]).save(partial / "images" / f"{row:08}.png")
            kept += tokens.lengths.tolist()
            pixels.flush()
            write_text(partial / UNFINISHED, json.dumps({"made": made, "lengths": kept}, default=str))
            progress("images", len(kept), num)
        _write_grid(pixels, labels, kept, partial / "grid.png")
    names = [f"{number:08}.png" for number in range(num)]
    write_text(partial / "samples.csv", columns_text({"image": names, "label": labels.tolist(), "tokens": kept}))
    made |= {
        "lengths": {str(budget): count for budget, count in sorted(Counter(kept).items())},
        "made": circumstances() | {"device": str(next(images.parameters()).device)},
    }
    write_text(partial / "record.json", json.dumps(made, indent=1, default=str) + "\n")
    for file in (UNFINISHED, *ARRAYS):
        (partial / file).unlink()
    publish_folder(partial, out)
    say(f"images: {num}, classes: {len(labels.unique())}, tokens on average: {sum(kept) / num:.2f}")
    say("results: " + " ".join(sorted(str(path) for path in out.iterdir())))


def _loaded(run: Path, checkpoint: Which) -> tuple[ImageGenerator, dict[str, object]]:
    if is_exported(run):
        model = load(run, checkpoint=checkpoint)
        if not isinstance(model, ImageGenerator):
            raise TypeError(f"{run} is no exported generator: its model is {type(model).__name__}")
        return model, {"exported": str(run), "weights_sha256": weights_digest(model.state_dict())}
    experiment = experiment_from(run_config(run), unread=[LOSSES, EVALUATION])
    images = experiment.task.model
    if not isinstance(images, ImageGenerator):
        raise TypeError(f"{run} is no run of a generator: its model is {type(images).__name__}")
    record = restore(experiment, run, None, checkpoint)
    if experiment.run.threads is not None:
        torch.set_num_threads(experiment.run.threads)
    record |= {"config_sha256": digest(run / "config.yaml"), "weights_sha256": weights_digest(images.state_dict())}
    return images.to(experiment.run.torch_device()).eval(), record


def _settings(generator: Generator) -> dict[str, Any]:
    """What changes samples or their speed and is no weight, as it is now."""
    found = {name: getattr(generator, name) for name in ("policy", "batch_size", "steps") if hasattr(generator, name)}
    if (sampling := getattr(generator, "sampling", None)) is not None:
        found["sampling"] = asdict(sampling)
    if (sampler := getattr(generator, "sampler", None)) is not None:
        found["sampler"] = {"name": type(sampler).__name__, **vars(sampler)}
    return found


def _set(generator: Generator, settings: Mapping[str, Any]) -> None:
    for name, value in settings.items():
        owner = "sampling" if name in SAMPLING else name
        if not hasattr(generator, owner):
            raise ValueError(
                f"{name} is no setting of this run's generator, a {type(generator).__name__}; it has "
                f"{', '.join(_settings(generator)) or 'none'}"
            )
        before: Any = getattr(generator, owner)
        setattr(generator, owner, replace(before, **{name: value}) if name in SAMPLING else value)


def _begun(partial: Path, made: Mapping[str, Any]) -> list[int]:
    """Lengths of the images that a command which was stopped has left in a folder.

    Raises:
        FileExistsError: if that was to make others, or the folder is of something else.
    """
    if not partial.exists():
        (partial / "images").mkdir(parents=True)
        write_text(partial / UNFINISHED, json.dumps({"made": made, "lengths": []}, default=str))
        return []
    try:
        found = json.loads((partial / UNFINISHED).read_bytes())
        before, lengths = found["made"], [int(length) for length in found["lengths"]]
        if lengths and not (partial / ARRAYS[0]).is_file():
            raise LookupError(ARRAYS[0])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise FileExistsError(
            f"{partial} is in the way, and is not what a command that was stopped leaves ({error}): move it, or choose "
            "another folder"
        ) from error
    now = json.loads(json.dumps(made, default=str))
    if different := [name for name in now if _slow(now, name) != _slow(before, name)]:
        raise FileExistsError(
            f"{partial} has {len(lengths)} images of a command that was stopped and differs in {', '.join(different)}: "
            "give the same again to go on, remove the folder, or choose another"
        )
    return lengths


def _slow(made: Mapping[str, Any], name: str) -> Any:
    """What was asked for by a name, without what only changes the speed."""
    value = made.get(name)
    return {key: of for key, of in value.items() if key not in SPEED} if isinstance(value, dict) else value


@contextmanager
def _pixels(folder: Path, num: int, size: tuple[int, int], labels: Tensor) -> Iterator[Any]:
    """An array on disk, which becomes ``samples.npz`` when it is full: there may be more images than memory."""
    files = [folder / name for name in ARRAYS]
    mode: Literal["r+", "w+"] = "r+" if files[0].exists() else "w+"
    pixels = np.lib.format.open_memmap(files[0], mode=mode, dtype=np.uint8, shape=(num, *size, 3))
    yield pixels
    pixels.flush()
    np.save(files[1], labels.numpy())
    with ZipFile(folder / "samples.npz", "w") as archive:
        for file in files:
            entry = ZipInfo.from_file(file, file.name)
            entry.date_time = (1980, 1, 1, 0, 0, 0)  # so that equal samples are equal files
            with open(file, "rb") as source, archive.open(entry, "w", force_zip64=True) as to:
                copyfileobj(source, to, 1 << 20)


def _write_grid(pixels: NDArray[np.uint8], labels: Tensor, lengths: Sequence[int], path: Path) -> None:
    """Some of each class, a class a row, each with its class and length."""
    classes = labels.unique()[:CLASSES]
    rows = [(labels == label).nonzero().flatten()[:PER_CLASS] for label in classes]
    per_row = min(len(row) for row in rows)
    shown = torch.cat([row[:per_row] for row in rows]).tolist()
    captions = [f"{labels[row]}, {count(lengths[row], 'token')}" for row in shown]
    cells = [rearrange(torch.from_numpy(pixels[row] / np.float32(255)), "h w c -> c h w") for row in shown]
    write_rows(cells, captions, per_row if per_row > 1 else PER_CLASS, path)
