"""Pictures of a tokenizer at several lengths: curves, grids of reconstructions, and a photograph rebuilt tile by tile.

Shapes: images (3, h, w) in [0, 1], on the CPU.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path

import torch
from einops import rearrange
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, PercentFormatter
from torch import Tensor
from torch.nn.functional import interpolate

from framework.evaluation.codebook import CodebookStatistics
from framework.evaluation.image_metrics import psnr, rqpr, squared_error
from framework.evaluation.rate_distortion import RateDistortion, reconstructions
from framework.runtime.files import write_bytes
from framework.tokenizers.tokenizer import Tokenizer

COLOURS = ("#1f5a92", "#c4572e", "#4d8a57", "#7d5a9e", "#d19a1e", "#2a9d9d", "#c75a93", "#4a4a4a")
"""One for each curve, in order."""

MARKERS = "osD^vPXh"
"""One for each curve where there are many, so that colours alone need not tell them apart."""

STYLES = (":", "--", "-")
"""One for each threshold, the strictest first."""

GREY = "#6b6b6b"
Curves = Mapping[str, Mapping[int, Sequence[float]]]
"""By the name in the legend, then by length: one value for each seed."""

DOTS_PER_INCH = 100
SHEET_WIDTH = 1600
"""Pixels at most: wide enough for a README."""


def plot_rate_distortion(
    curves: Mapping[str, RateDistortion],
    baseline: RateDistortion | None,
    path: Path,
    floor: RateDistortion | None = None,
) -> None:
    """Error and quality pass rate against kept tokens, as a PNG.

    Args:
        curves: by the name in the legend; the first also shows its interval and some of its images.
        baseline: principal components at equal floats, if they were fitted.
        path: where to write.
        floor: of the space that the first curve's tokenizer works in, if there is one.
    """
    figure = Figure(figsize=(16, 7), dpi=DOTS_PER_INCH, layout="constrained")
    error_axes, rate_axes = figure.subplots(1, 2)
    first = next(iter(curves.values()))
    _plot_images(error_axes, first)
    for (name, curve), colour in zip(curves.items(), cycle(COLOURS), strict=False):
        means = curve.errors.mean(0)
        error_axes.plot(curve.lengths, means, color=colour, linewidth=2.8, marker="o", label=name)
        for threshold, style in zip(first.thresholds, cycle(STYLES), strict=False):
            rates = rqpr(curve.errors, threshold)
            rate_axes.plot(curve.lengths, rates, style, color=colour, linewidth=2.4, marker="o", markersize=5)
    for threshold, style in zip(first.thresholds, cycle(STYLES), strict=False):
        rate_axes.plot([], [], style, color=GREY, linewidth=2.4, label=f"error at most {threshold}")
    if baseline is not None:
        means = baseline.errors.mean(0)
        error_axes.plot(baseline.lengths, means, "--", color="black", linewidth=2, label="PCA, equal floats")
    if floor is not None:
        name = "floor: the autoencoder alone"
        error_axes.axhline(floor.errors.mean().item(), linestyle=":", color="black", linewidth=2, label=name)
    error_axes.set_yscale("log")
    error_axes.set_ylabel("mean squared error, pixels in [0, 1]", size=15)
    error_axes.set_title("Reconstruction error, mean over images", loc="left", size=18)
    rate_axes.set_ylim(0, 1.02)
    rate_axes.yaxis.set_major_formatter(PercentFormatter(1))
    rate_axes.set_ylabel("share of images", size=15)
    rate_axes.set_title("Quality pass rate (rQPR)", loc="left", size=18)
    for axes in (error_axes, rate_axes):
        style_lengths(axes, first.lengths)
    write_figure(figure, path)


def _plot_images(axes: Axes, curve: RateDistortion) -> None:
    """Behind the means: about 40 images, evenly spaced in difficulty, and the interval of the mean."""
    by_difficulty = curve.errors[curve.errors.mean(1).argsort()]
    count = min(40, len(by_difficulty))
    some = by_difficulty[torch.arange(count) * len(by_difficulty) // count]
    lines = axes.plot(curve.lengths, some.T.clamp(min=1e-6), color=COLOURS[0], linewidth=0.8, alpha=0.22)
    lines[0].set_label("single images")
    low, high = curve.intervals
    axes.fill_between(curve.lengths, low, high, color=COLOURS[0], alpha=0.16, linewidth=0, label="95% interval")


def plot_codebook(codebook: CodebookStatistics, path: Path) -> None:
    """The perplexity at each position against the number of codes, and how unequal the shares of the codes are."""
    figure = Figure(figsize=(16, 6.5), dpi=DOTS_PER_INCH, layout="constrained")
    positions, ranks = figure.subplots(1, 2)
    perplexities, vocabulary, overall = codebook.per_position()["perplexity"], codebook.vocabulary, codebook.overall()
    positions.bar(range(1, len(perplexities) + 1), perplexities, color=COLOURS[0], width=0.85)
    positions.axhline(overall["perplexity"], color=COLOURS[1], linewidth=2, label="all positions together")
    positions.axhline(vocabulary, color=GREY, linestyle="--", label=f"K, {count(vocabulary, 'code')}")
    if codebook.num_images < vocabulary:  # no position has seen more codes than images
        positions.axhline(codebook.num_images, color="black", linestyle=":", label=f"{codebook.num_images} images")
    positions.set_xlim(0.4, len(perplexities) + 0.6)
    positions.xaxis.set_major_locator(MaxNLocator(integer=True))
    positions.set_xlabel("position of the token", size=15)
    positions.set_title("Perplexity at each position", loc="left", size=18)
    shares = codebook.shares.sort(descending=True).values
    seen = shares[shares > 0]
    name = f"usage {overall['usage']:.1%}, dead codes {overall['dead_codes']}"
    ranks.step(range(1, len(seen) + 1), seen, where="mid", color=COLOURS[0], linewidth=2.4, label=name)
    ranks.axhline(1 / vocabulary, color=GREY, linestyle="--", label="an even share, 1 / K")
    ranks.set_yscale("log")
    ranks.set_xlim(0, vocabulary + 1)
    ranks.set_xlabel("codes, the most common first", size=15)
    ranks.set_title("Share of each code among all tokens", loc="left", size=18)
    for axes in (positions, ranks):
        style_axes(axes)
    write_figure(figure, path)


def plot_curves(panels: Mapping[str, Curves], errors: Collection[str], path: Path) -> None:
    """Metrics against kept tokens: means over seeds as lines, from the lowest to the highest seed as a band.

    Args:
        panels: by metric.
        errors: metrics that are better lower; their axis is logarithmic where all values are positive.
        path: where to write, as a PNG.
    """
    names = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    height = 6 + 0.35 * (len(names) + 1) // 2
    width = 12 if len(panels) == 1 else 8 * len(panels)
    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, layout="constrained")
    for axes, (metric, curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name, curve in curves.items():
            at = names.index(name)
            colour, marker = COLOURS[at % len(COLOURS)], MARKERS[at % len(MARKERS)]
            lengths = sorted(curve)
            means = [sum(curve[length]) / len(curve[length]) for length in lengths]
            axes.plot(lengths, means, color=colour, linewidth=2.2, marker=marker, markersize=7, label=name)
            low, high = ([pick(curve[length]) for length in lengths] for pick in (min, max))
            axes.fill_between(lengths, low, high, color=colour, alpha=0.16, linewidth=0)
        style_lengths(axes, sorted({length for curve in curves.values() for length in curve}))
        axes.set_title(f"{metric}, mean and range over seeds", loc="left", size=18)
        if metric in errors and min(min(seeds) for curve in curves.values() for seeds in curve.values()) > 0:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(NullLocator())
        axes.get_legend().remove()
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, fontsize=13, ncols=2, loc="outside lower center")
    write_figure(figure, path)


def style_lengths(axes: Axes, lengths: Sequence[int]) -> None:
    """Kept tokens on the horizontal axis, and ``style_axes``."""
    axes.set_xscale("log", base=2)
    ticks = [length for length in lengths if length.bit_count() == 1 or length == lengths[-1]]
    axes.set_xticks(ticks, [str(length) for length in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("tokens kept per image", size=15)
    style_axes(axes)


def style_axes(axes: Axes) -> None:
    """A pale grid, no frame, and the legend below."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=14)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=13, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.12))


def plot_reconstructions(images: Tensor, by_length: Mapping[int, Tensor], path: Path) -> None:
    """A grid with one image a row: the original, then its reconstruction at each length with the PSNR below.

    Args:
        images: ``(b, 3, h, w)``.
        by_length: reconstructions ``(b, 3, h, w)`` by kept tokens.
        path: where to write.
    """
    rows = [[image, *(rebuilt[row] for rebuilt in by_length.values())] for row, image in enumerate(images)]
    captions = [["", *(f"{psnr_of(row[0], rebuilt):.1f} dB" for rebuilt in row[1:])] for row in rows]
    headings = ["original", *(count(length, "token") for length in by_length)]
    _write_sheet(rows, captions, headings, path)


def plot_tiled_photograph(photograph: Tensor, tokenizer: Tokenizer, lengths: Sequence[int], path: Path) -> None:
    """A whole photograph, larger than the tokenizer's images, rebuilt tile by tile at each length.

    Args:
        photograph: ``(3, h, w)``; scaled to at most 24 tiles on its longer side, cropped to whole tiles.
        tokenizer: in eval mode; a tile is one of its images.
        lengths: tokens kept of every tile.
        path: where to write.
    """
    photograph = fit_tiles(photograph, tokenizer.image_size)
    rebuilt = _by_tokenizer(photograph, tokenizer, lengths)
    num_tiles = photograph[0].numel() // tokenizer.image_size**2
    captions = [f"original\n{count(num_tiles, 'tile')} of {tokenizer.image_size} x {tokenizer.image_size}"]
    for length, cell in zip(lengths, rebuilt, strict=True):
        total = f"{length * num_tiles:,} in all"
        captions.append(f"{count(length, 'token')} a tile\n{total}, {psnr_of(photograph, cell):.1f} dB")
    per_row = 2 if photograph.shape[2] >= photograph.shape[1] else 1 + len(rebuilt)
    write_rows([photograph, *rebuilt], captions, per_row, path)


def plot_tiled_by_all(
    photograph: Tensor, tokenizers: Mapping[str, Tokenizer], lengths: Sequence[int], path: Path
) -> None:
    """One photograph rebuilt tile by tile by several tokenizers, one a row, at each length.

    Args:
        photograph: ``(3, h, w)``; fitted to the tiles of the first tokenizer, and to those of each other.
        tokenizers: by name, in eval mode.
        lengths: tokens kept of every tile; a tokenizer with fewer keeps all it has.
        path: where to write.
    """
    rows, captions = [], []
    largest = max(tokenizer.image_size for tokenizer in tokenizers.values())
    photograph = fit_tiles(photograph, largest)
    for name, tokenizer in tokenizers.items():
        original = fit_tiles(photograph, tokenizer.image_size)
        kept = [min(length, tokenizer.num_tokens) for length in lengths]
        rebuilt = _by_tokenizer(original, tokenizer, kept)
        rows.append([original, *rebuilt])
        cells = zip(kept, rebuilt, strict=True)
        numbers = [f"{count(length, 'token')}, {psnr_of(original, cell):.1f} dB" for length, cell in cells]
        captions.append(["original", *(f"{name}\n{text}" for text in numbers)])
        captions[-1][0] += "\n"
    _write_sheet(rows, captions, [], path)


def by_tiles(photograph: Tensor, size: int, rebuild: Callable[[Tensor], Iterable[Tensor]]) -> list[Tensor]:
    """A photograph of whole tiles, rebuilt in one or more ways, in chunks: the cost grows with its area alone.

    Args:
        photograph: ``(3, h, w)``.
        size: side of a tile.
        rebuild: tiles ``(b, 3, size, size)`` -> their reconstructions, one ``(b, 3, size, size)`` for each way.
    """
    columns = photograph.shape[2] // size
    tiles = rearrange(photograph, "c (rows h) (columns w) -> (rows columns) c h w", h=size, w=size)
    rebuilt = torch.cat([torch.stack(list(rebuild(chunk))).float().cpu() for chunk in tiles.split(64)], dim=1)
    return list(rearrange(rebuilt, "l (rows columns) c h w -> l c (rows h) (columns w)", columns=columns))


def _by_tokenizer(photograph: Tensor, tokenizer: Tokenizer, lengths: Sequence[int]) -> list[Tensor]:
    """At each length."""
    size, device = tokenizer.image_size, next(tokenizer.parameters()).device
    return by_tiles(photograph, size, lambda tiles: reconstructions(tokenizer, tiles.to(device), lengths))


def fit_tiles(photograph: Tensor, size: int) -> Tensor:
    """Scale to at most 24 tiles on the longer side and at least one on the shorter; crop the centre to whole tiles."""
    height, width = photograph.shape[1:]
    scale = max(min(1.0, 24 * size / max(height, width)), size / min(height, width))
    if scale != 1:
        photograph = _resize(photograph, max(size, round(height * scale)), max(size, round(width * scale)))
    height, width = (side // size * size for side in photograph.shape[1:])
    top, left = (photograph.shape[1] - height) // 2, (photograph.shape[2] - width) // 2
    return photograph[:, top : top + height, left : left + width]


def _resize(image: Tensor, height: int, width: int) -> Tensor:
    return interpolate(image[None], (height, width), mode="bicubic", antialias=True)[0].clamp(0, 1)


def write_rows(cells: Sequence[Tensor], captions: Sequence[str], per_row: int, path: Path) -> None:
    """Images of one size, so many a row, each with a caption below."""
    starts = range(0, len(cells), per_row)
    _write_sheet([cells[at : at + per_row] for at in starts], [captions[at : at + per_row] for at in starts], [], path)


def _write_sheet(
    rows: Sequence[Sequence[Tensor]], captions: Sequence[Sequence[str]], headings: Sequence[str], path: Path
) -> None:
    """Images on white, pixel by pixel, each with a caption below; headings stand above the columns."""
    gap, columns = 12, len(rows[0])
    line = 8 + 24 * (1 + captions[0][-1].count("\n"))  # pixels of a caption
    rows = [[_scale_for_display(image, (SHEET_WIDTH - gap) // columns - gap) for image in row] for row in rows]
    cell_height, cell_width = rows[0][0].shape[1:]
    top = line + gap if headings else gap
    height, width = top + len(rows) * (cell_height + line + gap), gap + columns * (cell_width + gap)
    sheet = torch.ones(3, height, width)
    figure = Figure(figsize=(width / DOTS_PER_INCH, height / DOTS_PER_INCH), dpi=DOTS_PER_INCH)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()

    def label(x: float, y: float, text: str, size: int, color: str) -> None:
        axes.text(x + cell_width / 2, y, text, size=size, color=color, ha="center", va="center")

    for row, (images, texts) in enumerate(zip(rows, captions, strict=True)):
        y = top + row * (cell_height + line + gap)
        for column, (image, text) in enumerate(zip(images, texts, strict=True)):
            x = gap + column * (cell_width + gap)
            sheet[:, y : y + cell_height, x : x + cell_width] = image
            label(x, y + cell_height + line / 2, text, size=min(14, cell_width // 7), color=GREY)
    for column, text in enumerate(headings):
        label(gap + column * (cell_width + gap), top / 2, text, size=16, color="black")
    pixels = (rearrange(sheet, "c h w -> h w c") * 255).round().byte().numpy()
    axes.imshow(pixels, interpolation="nearest", extent=(0, width, height, 0))
    write_figure(figure, path)


def _scale_for_display(image: Tensor, width: int) -> Tensor:
    """Small images grow by a whole factor, so that their pixels stay visible; large ones shrink to ``width``."""
    factor = width // image.shape[2]
    if factor:
        return image.repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    return _resize(image, round(image.shape[1] * width / image.shape[2]), width)


def psnr_of(image: Tensor, reconstruction: Tensor) -> float:
    """Of one image ``(3, h, w)``, in dB."""
    return psnr(squared_error(image[None], reconstruction[None])).item()


def count(number: int, noun: str) -> str:
    """``1 token`` or ``2 tokens``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def write_figure(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG, atomically."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    write_bytes(path, buffer.getvalue())
