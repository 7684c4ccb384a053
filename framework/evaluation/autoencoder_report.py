"""The evaluation that a trained autoencoder leaves behind: its errors, its latents, and pictures.

Shapes: b images, c channels of a space, h and w its grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from framework.data.interface import ImageData
from framework.data.stream import Sequential, subset
from framework.evaluation.evaluation import Evaluation
from framework.evaluation.image_metrics import psnr, rqpr
from framework.evaluation.plots import by_tiles, fit_tiles, psnr_of, write_rows
from framework.evaluation.rate_distortion import Progress, space_floor
from framework.evaluation.reconstruction_distances import distances_text, heading, space_distances
from framework.evaluation.report import choose_photograph, spread_images
from framework.evaluation.systems import system_facts
from framework.evaluation.tables import markdown
from framework.runtime.files import write_text
from framework.tokenizers.interface import ImageSpace

LATENTS = "mean and std of each channel over images and positions, normalised, so that 0 and 1 are aimed at"


@torch.no_grad()
def evaluate_autoencoder(
    space: ImageSpace,
    data: ImageData,
    folder: Path,
    record: Mapping[str, object],
    measures: Evaluation | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
) -> dict[str, object]:
    """Measure a space on held-out images; leave ``metrics.json``, ``per_image.csv``, ``table.md`` and pictures.

    Args:
        space: in eval mode.
        data: images that were not trained on.
        folder: created if needed.
        record: which weights these are; goes into the protocol.
        measures: what to measure beside the squared error.
        limit: measure a fixed random subset of so many images.
        progress: told how far the measuring is.

    Returns:
        The contents of ``metrics.json``.

    Raises:
        ValueError: see ``measure_all``.
    """
    measures = measures or Evaluation()
    told: dict[str, Any] = {"limit": limit, "record": record, "progress": progress}
    curve = replace(space_floor(space, data, distances=measures.distances, **told), thresholds=measures.thresholds)
    device = next(space.parameters()).device
    latents = _latent_numbers(space, data, limit)
    sets = {
        metric: space_distances(space, data, network, measures.reference(network), **told)
        for metric, network in measures.features.items()
    }
    system = system_facts(space, data.image_size)
    sections = {"system": system, "latents": latents, "latents_are": LATENTS, "distributions": sets}
    metrics = curve.save(folder, sections)
    errors, (positions,) = curve.errors[:, 0], curve.lengths
    low, high = (1000 * curve.intervals[:, 0]).tolist()
    titles = {"ssim": "SSIM"} | {name: judge.extractor.title for name, judge in measures.distances.items()}
    header = ["positions", "MSE x 1000", "95% interval", "PSNR, dB", *(f"rQPR {most}" for most in curve.thresholds)]
    header += [*(titles[name] for name in curve.distances), *map(heading, sets)]
    row = [str(positions), f"{1000 * errors.mean().item():.3g}", f"{low:.3g} to {high:.3g}"]
    row += [f"{psnr(errors).mean().item():.2f}", *(f"{rqpr(errors, most).item():.0%}" for most in curve.thresholds)]
    row += [f"{values.mean().item():.3g}" for values in curve.distances.values()]
    row += [f"{found['per_length'][0][metric]:.4g}" for metric, found in sets.items()]
    counted = f"{len(curve.keys)} images of {len(set(curve.groups))} groups"
    scope = f"{counted}; pixels in [0, 1]; definitions in metrics.json."
    spread = (
        f"Latents of {positions} positions with {space.channels} channels: means from {min(latents['mean']):.2g} to "
        f"{max(latents['mean']):.2g}, deviations from {min(latents['std']):.2g} to {max(latents['std']):.2g}.\n"
    )
    texts = [scope, *(distances_text(metric, found).strip() for metric, found in sets.items()), spread]
    write_text(folder / "table.md", "\n\n".join([markdown([header, row], num_words=0).strip(), *texts]))

    indices = {data.key(index): index for index in subset(len(data), limit)}
    images = data.fetch([indices[curve.keys[row]] for row in spread_images(curve)], epoch=0).images
    rebuilt = _through(space, images.to(device)).float().cpu()
    pairs = list(zip(images, rebuilt, strict=True))
    captions = [f"{psnr_of(image, made):.1f} dB" for image, made in pairs]
    write_rows([torch.cat(pair, dim=2) for pair in pairs], captions, 3, folder / "reconstructions.png")
    photograph = fit_tiles(choose_photograph(data, curve.groups), data.image_size)
    (whole,) = by_tiles(photograph, data.image_size, lambda tiles: [_through(space, tiles.to(device))])
    captions = ["original", f"{positions} positions a tile, {psnr_of(photograph, whole):.1f} dB"]
    write_rows([photograph, whole], captions, 2, folder / "photograph.png")
    return metrics


def _through(space: ImageSpace, images: Tensor) -> Tensor:
    return space.decode(space.encode(images)).clamp(0, 1)


def _latent_numbers(space: ImageSpace, data: ImageData, limit: int | None) -> dict[str, list[float]]:
    device = next(space.parameters()).device
    values = [space.encode(batch.images.to(device)).cpu().double() for batch in Sequential(data, 64, limit)]
    channels = rearrange(torch.cat(values), "b c h w -> c (b h w)")
    return {"mean": channels.mean(1).tolist(), "std": channels.std(1).tolist()}
