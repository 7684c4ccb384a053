"""The evaluation that a trained autoencoder leaves behind: its errors, its latents, and pictures.

Shapes: b images, c channels of a space, h and w its grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from framework.data.interface import ImageData
from framework.data.stream import Sequential, subset
from framework.evaluation.image_metrics import THRESHOLDS, psnr, rqpr
from framework.evaluation.plots import by_tiles, fit_tiles, plot_reconstructions, psnr_of, write_rows
from framework.evaluation.rate_distortion import Progress, space_floor
from framework.evaluation.report import choose_photograph, spread_images
from framework.evaluation.tables import markdown
from framework.losses.perceptual import PerceptualLoss
from framework.runtime.files import write_text
from framework.tokenizers.interface import ImageSpace

LATENTS = "mean and std of each channel over images and positions, normalised, so that 0 and 1 are aimed at"


@torch.no_grad()
def evaluate_autoencoder(
    space: ImageSpace,
    data: ImageData,
    folder: Path,
    record: Mapping[str, object],
    limit: int | None = None,
    progress: Progress | None = None,
    distances: Mapping[str, PerceptualLoss] | None = None,
) -> dict[str, object]:
    """Measure a space on held-out images; leave ``metrics.json``, ``per_image.csv``, ``table.md`` and pictures.

    Args:
        space: in eval mode.
        data: images that were not trained on.
        folder: created if needed.
        record: which weights these are; goes into the protocol.
        limit: measure a fixed random subset of so many images.
        progress: told how far the measuring is.
        distances: measured beside the squared error, by name.

    Returns:
        The contents of ``metrics.json``.

    Raises:
        ValueError: see ``measure_all``.
    """
    curve = space_floor(space, data, limit, record=record, progress=progress, distances=distances)
    device = next(space.parameters()).device
    latents = _latent_numbers(space, data, limit)
    metrics = curve.save(folder, {"latents": latents, "latents_are": LATENTS})
    errors, (positions,) = curve.errors[:, 0], curve.lengths
    low, high = (1000 * curve.intervals[:, 0]).tolist()
    titles = [distance.extractor.title for distance in (distances or {}).values()]
    header = ["positions", "MSE x 1000", "95% interval", "PSNR, dB", *(f"rQPR {limit}" for limit in THRESHOLDS)]
    row = [str(positions), f"{1000 * errors.mean().item():.3g}", f"{low:.3g} to {high:.3g}"]
    row += [f"{psnr(errors).mean().item():.2f}", *(f"{rqpr(errors, limit).item():.0%}" for limit in THRESHOLDS)]
    row += [f"{values.mean().item():.3g}" for values in curve.distances.values()]
    counted = f"{len(curve.keys)} images of {len(set(curve.groups))} groups"
    scope = f"{counted}; pixels in [0, 1]; definitions in metrics.json."
    spread = (
        f"Latents of {positions} positions with {space.channels} channels: means from {min(latents['mean']):.2g} to "
        f"{max(latents['mean']):.2g}, deviations from {min(latents['std']):.2g} to {max(latents['std']):.2g}.\n"
    )
    write_text(folder / "table.md", f"{markdown([[*header, *titles], row], num_words=0)}\n{scope}\n\n{spread}")

    indices = {data.key(index): index for index in subset(len(data), limit)}
    images = data.fetch([indices[curve.keys[row]] for row in spread_images(curve)], epoch=0).images
    rebuilt = _through(space, images.to(device)).float().cpu()
    plot_reconstructions(images, {positions: rebuilt}, folder / "reconstructions.png")
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
