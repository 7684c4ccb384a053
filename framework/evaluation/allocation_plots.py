"""Pictures of a policy at work: what lengths are worth, which it chooses, how it learned, and what it leaves of images.

Shapes: i images, g budgets; images (3, h, w) in [0, 1], on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from framework.allocation.adaptive_tokenizer import AdaptiveTokenizer
from framework.evaluation.allocation_study import AllocationStudy
from framework.evaluation.plots import (
    COLOURS,
    DOTS_PER_INCH,
    GREY,
    count,
    fit_tiles,
    psnr_of,
    style_axes,
    style_lengths,
    write_figure,
    write_rows,
)
from framework.evaluation.rate_distortion import mean_intervals, rows_by_kind
from framework.tokenizers.tokenizer import Tokenizer

History = Sequence[Mapping[str, Any]]
"""The lines of a run's ``metrics.jsonl``."""

PANELS = {
    "Entropy of the policy, nats": "policy/entropy",
    "Log-probability of the most likely budget": "policy/log_probability",
    "Expected tokens per image": "policy/length",
    "Reward on held-out images, between two bounds": "share",
}
"""Keys of a history, by the title of the panel (AdaTok, figures 9 and 10)."""

POINTS = {"policy": "o", "oracle": "*", "binary_search": "s", "png": "D", "shuffled": "x"}
"""Ways to choose, the one on top first."""
PER_ROW = 12
"""Images of the wall."""


def plot_landscape(study: AllocationStudy, path: Path) -> None:
    """Reward against kept tokens, averaged and of single images (AdaTok, figure 6), and what ways to choose achieve."""
    figure = Figure(figsize=(16, 7.5), dpi=DOTS_PER_INCH, layout="constrained")
    every, means = figure.subplots(1, 2)
    _plot_images(every, study)
    means.plot(study.budgets, study.rewards.mean(0), color=COLOURS[0], linewidth=2.8, label="one length for all")
    for at, (name, marker) in enumerate(POINTS.items(), start=1):
        point = [study.choices[name].mean(study.tables[metric]) for metric in ("length", "reward")]
        (dot,) = means.plot(*point, marker, color=COLOURS[at], markersize=12, markeredgewidth=3, zorder=9 - at)
        dot.set_label(name.replace("_", " "))
    # Very short lengths may be worth so little that nothing else could be told apart.
    rewards = [choice.mean(study.rewards) for choice in study.choices.values()]
    margin = 0.15 * (max(rewards) - min(rewards)) or 1.0
    means.set_ylim(min(rewards) - margin, max(rewards) + margin)
    every.set_title(f"{type(study.reward).__name__}: images and their mean", loc="left", size=18)
    means.set_title("Mean reward of ways to choose, at their mean length", loc="left", size=18)
    for axes in (every, means):
        axes.set_ylabel("reward", size=15)
        style_lengths(axes, study.budgets)
    write_figure(figure, path)


def _plot_images(axes: Axes, study: AllocationStudy) -> None:
    for row, colour in zip(study.spread(6), COLOURS[1:], strict=False):
        rewards, length = study.rewards[row], int(study.lengths[row])
        axes.plot(study.budgets, rewards, color=colour, linewidth=1.6, alpha=0.85)
        axes.plot(length, rewards[study.budgets.index(length)], "o", color=colour, markersize=11)
        best = int(rewards.argmax())
        axes.plot(study.budgets[best], rewards[best], "*", color=colour, markersize=19, markeredgecolor="white")
    axes.plot([], [], color=GREY, linewidth=1.6, label="single images")
    axes.plot([], [], "o", color=GREY, markersize=11, label="chosen")
    axes.plot([], [], "*", color=GREY, markersize=17, label="best")
    axes.plot(study.budgets, study.rewards.mean(0), color=COLOURS[0], linewidth=3.6, label="mean over images")
    low, high = mean_intervals(study.rewards, study.groups)
    axes.fill_between(study.budgets, low, high, color=COLOURS[0], alpha=0.16, linewidth=0, label="95% interval")


def plot_lengths(study: AllocationStudy, path: Path) -> None:
    """Which lengths are chosen, and how they go with the error at the shortest budget, the PNG size and the kind."""
    figure = Figure(figsize=(16, 12 if study.kinds else 6), dpi=DOTS_PER_INCH, layout="constrained")
    grid = figure.subplots(2, 2) if study.kinds else figure.subplots(1, 3)
    histogram, by_error, by_size, *by_kind = grid.flat
    num_budgets = len(study.budgets)
    choices = {name: study.choices[name] for name in ("policy", "oracle")}
    means = [f"{name}, mean {choice.mean(study.tables['length']):.3g}" for name, choice in choices.items()]
    shares = [choice.shares.mean(0).tolist() for choice in choices.values()]
    bins = np.linspace(-0.5, num_budgets - 0.5, min(num_budgets, 32) + 1).tolist()
    histogram.hist([range(num_budgets)] * 2, bins, weights=shares, color=COLOURS[:2], label=means)
    ticks = range(0, num_budgets, math.ceil(num_budgets / 10))
    histogram.set_xticks(ticks, [str(study.budgets[tick]) for tick in ticks])
    histogram.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g}%")
    histogram.set_xlabel("tokens kept per image", size=15)
    histogram.set_title("Chosen lengths, share of images", loc="left", size=16)
    by_error.set_xscale("log")
    by_error.set_xlabel(f"squared error at {count(study.budgets[0], 'token')}", size=15)
    by_size.set_xlabel("bytes of the PNG file", size=15)
    _plot_against(by_error, study, study.squared_errors[:, 0].clamp(min=1e-6), "error_at_shortest")
    _plot_against(by_size, study, study.png_bytes, "png_bytes")
    for axes in by_kind:
        _plot_by_kind(axes, study)
    for axes in grid.flat:
        style_axes(axes)
    write_figure(figure, path)


def _plot_against(axes: Axes, study: AllocationStudy, values: Tensor, name: str) -> None:
    # Equal lengths lie apart by steps of the golden ratio, which fill a band evenly, so that crowds are seen.
    band = 0.7 * min(np.diff(study.budgets).tolist(), default=1)
    apart = (torch.arange(len(values)) * 0.618034 % 1 - 0.5) * band
    axes.plot(values, study.lengths + apart, ".", color=COLOURS[0], markersize=4, alpha=0.35)
    parts = [rows for rows in values.argsort().tensor_split(20) if len(rows)]
    trend = [[float(of[rows].double().mean()) for rows in parts] for of in (values, study.lengths)]
    axes.plot(*trend, color=COLOURS[1], linewidth=2.8, label="mean of each 20th of the images")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_ylabel("tokens kept", size=15)
    correlation = study.rank_correlation[name]
    told = "one is constant" if correlation is None else f"rank correlation {correlation:.2f}"
    axes.set_title(told, loc="left", size=16)


def _plot_by_kind(axes: Axes, study: AllocationStudy) -> None:
    """A histogram of each kind's lengths on its side, scaled to its own highest bar."""
    thickness = 0.8 * min(np.diff(study.budgets).tolist(), default=1)
    kinds = study.by_kind()
    for at, rows in enumerate(rows_by_kind(study.kinds).values()):
        shares = study.choices["policy"].shares[rows].mean(0)
        widths = 0.8 * shares / shares.max()
        axes.barh(study.budgets, widths, thickness, at - widths / 2, color=COLOURS[0], alpha=0.5)
    means = [numbers["length"] for numbers in kinds.values()]
    axes.plot(range(len(kinds)), means, "o-", color=COLOURS[1], linewidth=2.8, label="mean of the kind")
    axes.set_xticks(range(len(kinds)), list(kinds))
    axes.set_xlim(-0.6, len(kinds) - 0.4)
    axes.set_ylabel("tokens kept", size=15)
    axes.set_title("How often each length, by kind of image", loc="left", size=16)


def plot_training(histories: Mapping[str, History], num_budgets: Collection[int], path: Path) -> None:
    """What a policy does while it learns: entropy, certainty, length, and its share of the oracle's gain in reward.

    Args:
        histories: by the name of the run; one colour each.
        num_budgets: the runs' g, whose logarithms bound the entropy.
        path: where to write.
    """
    figure = Figure(figsize=(16, 11), dpi=DOTS_PER_INCH, layout="constrained")
    grid = figure.subplots(2, 2)
    for (title, key), axes in zip(PANELS.items(), grid.flat, strict=True):
        for (name, history), colour in zip(histories.items(), cycle(COLOURS), strict=False):
            known = [(line["step"], line[key]) for line in map(_with_share, history) if line.get(key) is not None]
            axes.plot(*np.array(known).reshape(-1, 2).T, color=colour, linewidth=2, label=name)
        axes.set_title(title, loc="left", size=17)
        axes.set_xlabel("steps", size=15)
    for number in sorted(set(num_budgets)):
        grid[0, 0].axhline(math.log(number), color=GREY, linestyle=":", label=f"log {number}: all budgets alike")
    for level, style, bound in ((0, "--", "best fixed length"), (1, ":", "oracle")):
        grid[1, 1].axhline(level, color=GREY, linestyle=style, label=bound)
    for axes in grid.flat:
        style_axes(axes)
    write_figure(figure, path)


def _with_share(line: Mapping[str, float]) -> Mapping[str, float]:
    """A validation's line with the share of the oracle's gain over the best fixed length that the policy has."""
    policy, fixed, oracle = (line.get(f"validation/reward{end}") for end in ("", "_fixed", "_oracle"))
    if policy is None or fixed is None or oracle is None or oracle <= fixed:
        return line
    return {**line, "share": (policy - fixed) / (oracle - fixed)}


@torch.no_grad()
def rebuild(tokenizer: Tokenizer, images: Tensor, lengths: Tensor) -> Tensor:
    """Images ``(b, 3, h, w)``, each from as many tokens as ``lengths (b,)`` says, on the CPU."""
    device = next(tokenizer.parameters()).device
    pairs = zip(images.split(64), lengths.split(64), strict=True)
    parts = [tokenizer.decode(tokenizer.encode(part.to(device), kept.to(device))).float().cpu() for part, kept in pairs]
    return torch.cat(parts)


def plot_wall(images: Tensor, lengths: Tensor, tokenizer: Tokenizer, path: Path) -> None:
    """Images in the order given, each above its reconstruction and the number of tokens that this was made from.

    Args:
        images: ``(b, 3, h, w)``.
        lengths: ``(b,)``.
        tokenizer: in eval mode.
        path: where to write.
    """
    line = images.new_ones(3, max(1, images.shape[2] // 32), images.shape[3])
    pairs = zip(images, rebuild(tokenizer, images, lengths), strict=True)
    cells = [torch.cat([image, line, rebuilt], dim=1) for image, rebuilt in pairs]
    captions = [count(length, "token") for length in lengths.tolist()]
    write_rows(cells, captions, PER_ROW, path)


def plot_allocated_photograph(photograph: Tensor, model: AdaptiveTokenizer, path: Path) -> None:
    """A whole photograph in tiles: from the tokens that each asks for, where these are, and from equal shares of them.

    Args:
        photograph: ``(3, h, w)``; cut into tiles as by ``plot_tiled_photograph``.
        model: in eval mode.
        path: where to write.

    Raises:
        ValueError: if the policy looks images up by name, which tiles have not.
    """
    size = model.image_size
    photograph = fit_tiles(photograph, size)
    height, width = photograph.shape[1:]
    tiles = rearrange(photograph, "c (rows h) (columns w) -> (rows columns) c h w", h=size, w=size)
    device = next(model.tokenizer.parameters()).device
    lengths = torch.cat([model.allocate(part.to(device))[1].lengths.cpu() for part in tiles.split(64)])
    total = int(lengths.sum())
    shares = (torch.arange(len(tiles) + 1) * total // len(tiles)).diff()  # equal, but for what a whole number leaves

    def rebuilt(lengths: Tensor) -> Tensor:
        parts = rebuild(model.tokenizer, tiles, lengths)
        return rearrange(parts, "(rows columns) c h w -> c (rows h) (columns w)", columns=width // size)

    chosen, fixed = rebuilt(lengths), rebuilt(shares)
    least, most = int(lengths.min()), int(lengths.max())
    shades = ((lengths - least) / max(1, most - least)).reshape(height // size, width // size)
    tokens = 0.6 * _coloured(shades.repeat_interleave(size, 0).repeat_interleave(size, 1)) + 0.4 * photograph.mean(0)
    scale = _coloured(torch.linspace(0, 1, width).expand(max(1, width // 48), -1))
    white = torch.ones_like(scale)
    each, budget = " or ".join(map(str, shares.unique().tolist())), f"{total:,} in all"
    cells = {
        f"original\n{count(len(tiles), 'tile')} of {size} x {size}": (photograph, white),
        f"policy: {least} to {most} tokens a tile\n{budget}, {psnr_of(photograph, chosen):.1f} dB": (chosen, white),
        f"the policy's tokens a tile\ncolours from {least} on the left to {most}": (tokens, scale),
        f"fixed: {each} tokens a tile\n{budget}, {psnr_of(photograph, fixed):.1f} dB": (fixed, white),
    }
    write_rows([torch.cat([image, white, below], dim=1) for image, below in cells.values()], list(cells), 2, path)


def _coloured(values: Tensor) -> Tensor:
    """Values ``(h, w)`` in [0, 1] as colours ``(3, h, w)``."""
    return rearrange(torch.from_numpy(colormaps["viridis"](values.numpy())[..., :3]).float(), "h w c -> c h w")
