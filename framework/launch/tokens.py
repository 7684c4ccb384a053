"""Token files of runs, and of images that are named on a command line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from PIL import Image
from torch import nn

from framework import runs
from framework.config import ConfigError
from framework.data.folder import ImageFolder
from framework.data.interface import ImageData
from framework.data.token_file import TokenFile
from framework.data.transforms import TRANSFORMS
from framework.engine.checkpoint import CheckpointError
from framework.engine.experiment import Experiment
from framework.evaluation.tables import columns_text
from framework.evaluation.token_coding import decode_tokens, encode_images, tokenizer_of
from framework.evaluation.token_comparison import compare_tokens
from framework.models.exported import is_exported
from framework.models.hub import find_model
from framework.models.loading import EVALUATION, LOSSES, experiment_from, run_config
from framework.runtime.files import PARTIAL, publish_folder, write_text

Progress = Callable[[str, int, int], None]
ERRORS = (ConfigError, runs.RunError, CheckpointError, LookupError, TypeError, ValueError, OSError)
"""Those that are for people."""
OWN = "dataset"
"""Stands for the data that a run was trained with."""


def encode(
    run: Path,
    images: str,
    out: Path,
    progress: Progress,
    say: Callable[[str], None],
    split: str | None = None,
    crop: str | None = None,
    crops: int = 1,
    max_broken: float | None = None,
    **options: Any,
) -> TokenFile:
    """Encode images with the tokenizer of a run, on its device.

    Args:
        run: its directory, or an exported model, by folder or id in the hub.
        images: a folder, or ``dataset`` for the run's own data.
        out, progress, say: as of ``encode_images``.
        split: of the run's own data, ``validation`` unless given.
        crop: of a folder, the name of a transform; ``CenterCrop`` unless given, or ``RandomCrop`` of several crops.
        crops: of each image; several of a folder's are flipped at random, too.
        max_broken: share of a folder's images that may be unreadable and left out, 0.01 unless given.
        options: as of ``encode_images``.

    Raises:
        RunError, CheckpointError: as ``runs.load``.
        LookupError: if there is no such transform.
        ValueError: if an argument is not of this kind of images; and as ``encode_images``, like the rest.
    """
    model, experiment = _used(run)
    data = _images(model, experiment, images, split, crop, crops, max_broken)
    source = {"run": str(run)} | ({} if experiment is None else {"seed": experiment.run.seed})
    return encode_images(model, data, out, crops=crops, source=source, progress=progress, say=say, **options)


def _images(
    model: nn.Module,
    experiment: Experiment | None,
    images: str,
    split: str | None = None,
    crop: str | None = None,
    crops: int = 1,
    max_broken: float | None = None,
) -> ImageData:
    if images == OWN and (crop is not None or max_broken is not None):
        raise ValueError("a crop and a share of broken images are for a folder: the run's own data has its own")
    if images != OWN and split is not None:
        raise ValueError(f"only the run's own data has a split: encode {OWN!r}, or leave it out")
    if images != OWN:
        return ImageFolder(
            images,
            None if crop is None else TRANSFORMS.get(crop),
            max_broken=0.01 if max_broken is None else max_broken,
            image_size=tokenizer_of(model).image_size,
            training=crops > 1,
            seed=0 if experiment is None else experiment.run.seed,
        )
    if experiment is None:
        raise ValueError(f"an exported model comes without data: name a folder of images in place of {OWN!r}")
    data: ImageData = getattr(experiment.data, split or "validation")
    return data


def compare(
    run: Path,
    file: TokenFile,
    images: str,
    progress: Progress,
    split: str | None = None,
    crop: str | None = None,
    **options: Any,
) -> str:
    """A table of tokens beside JPEG and WebP at equal bytes, of the images that were encoded.

    Args:
        run, images, split, crop: as they were encoded.
        file, progress, options: as of ``compare_tokens``.

    Raises:
        RunError, CheckpointError, LookupError, TypeError, ValueError: as ``encode`` and ``compare_tokens``.
    """
    model, experiment = _used(run)
    data = _images(model, experiment, images, split, crop)
    return compare_tokens(model, file, data, progress=progress, **options)


def decode(
    run: Path,
    file: TokenFile,
    out: Path,
    progress: Progress,
    rows: Sequence[int] | None = None,
    length: int | None = None,
) -> int:
    """Write images of rows ``FROM, TO``, or of all, as PNG into a new folder; returns how many they are.

    They are named by row, since keys may hold anything; ``rows.csv`` has their keys, labels, crops and lengths.

    Raises:
        RunError, CheckpointError: as ``runs.load``.
        FileExistsError: if ``out`` is there.
        IndexError: if there are no such rows.
        ValueError: if the run's tokenizer has not made the tokens; and as ``decode_tokens``, like the rest.
    """
    if out.exists():
        raise FileExistsError(f"{out} is there already: choose another folder, or remove it")
    chosen = list(range(*rows or (0, len(file))))
    file.tokens([*chosen[:1], *chosen[-1:]])  # or an error, if there are no such rows
    names = [f"{row:08}.png" for row in chosen]
    batches = decode_tokens(_used(run)[0], file, chosen, length)
    partial = out.with_name(out.name + PARTIAL)
    partial.mkdir(parents=True, exist_ok=True)
    pictures = (picture for batch in batches for picture in rearrange(batch, "b c h w -> b h w c"))
    for done, (name, picture) in enumerate(zip(names, pictures, strict=True), 1):
        Image.fromarray((picture * 255).round().byte().numpy()).save(partial / name)
        progress("images", done, len(names))
    columns: dict[str, Sequence[object]] = {"image": names, "key": [file.keys[row] for row in chosen]}
    columns |= {} if file.labels is None else {"label": file.labels[chosen].tolist()}
    lengths = file.lengths[chosen].clamp(max=length or file.header.num_tokens)
    columns |= {"crop": file.crops[chosen].tolist(), "tokens": lengths.tolist()}
    write_text(partial / "rows.csv", columns_text(columns))
    publish_folder(partial, out)
    return len(chosen)


def _used(run: Path) -> tuple[nn.Module, Experiment | None]:
    """A run's model on the run's device, with its settings and data; an exported model has neither."""
    model = runs.load(run)
    if is_exported(find_model(run)):
        return model.to("cuda" if torch.cuda.is_available() else "cpu"), None
    experiment = experiment_from(run_config(run), "meta", [LOSSES, EVALUATION])  # nothing is made twice
    if experiment.run.threads is not None:
        torch.set_num_threads(experiment.run.threads)
    return model.to(experiment.run.torch_device()), experiment


def run_command(command: str, progress: Progress, say: Callable[[str], None], **options: Any) -> None:
    """Do what a command line says, and say what came of it.

    Args:
        command: ``encode``, ``decode``, ``compare``, ``info`` or ``verify``.
        progress: told how far it is.
        say: told results.
        options: of the function of that name, or only ``file``, a path.
    """
    if command == "encode":
        lines = encode(progress=progress, say=say, **options).lines()
    else:
        file = TokenFile(options.pop("file"))
        lines = file.lines()
        if command == "compare":
            lines = [compare(file=file, progress=progress, **options)]
        elif command == "decode":
            lines = [f"{decode(file=file, progress=progress, **options)} images in {options['out']}"]
        elif command == "verify":
            file.verify(progress)
            lines = [f"{file.path}: {len(file):,} rows, undamaged"]
    for line in lines:
        say(line)
