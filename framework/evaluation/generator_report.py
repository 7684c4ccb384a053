"""What a trained generator leaves behind: losses by position, lengths beside those of the data, samples of each class.

Shapes: s samples, m tokens of the longest sequence, k budgets.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from framework.data.interface import Batch
from framework.evaluation.generated_images import ImageSet, RealImages, compare_with_real, comparison_texts
from framework.evaluation.plots import COLOURS, DOTS_PER_INCH, count, style_axes, write_figure, write_rows
from framework.evaluation.systems import system_facts
from framework.evaluation.tables import markdown
from framework.generators.guidance import Guidance
from framework.generators.image_generator import ImageGenerator
from framework.generators.interface import GeneratorLoss
from framework.runtime.files import write_text
from framework.tokens import Tokens

PER_CLASS, CLASSES = 8, 20
"""Samples in the picture."""
AT_ONCE = 256
Progress = Callable[[str, int, int], None]

DEFINITIONS = {
    "held out": "means over all kept tokens of images that were not trained on; of an autoregressive generator nll is "
    "the negative log likelihood of code and length together, in nats a token, and bits the same in bits an image",
    "by_position": "the mean of the tokens' own loss at each position, over the images that keep it",
    "length_kl": "Kullback-Leibler divergence of the samples' lengths from those of held-out images, in nats, with "
    "half a count added to each budget of both",
    "floor": "the same between two halves of the held-out images, one against the other",
    "samples": "of every class equally often, numbered from 0, seed 0",
}


class HeldOut:
    """Sums of a generator's losses over batches of held-out sequences.

    Args:
        longest: m.
    """

    def __init__(self, longest: int) -> None:
        self._sums: dict[str, float] = defaultdict(float)
        self._image_sums: dict[str, float] = defaultdict(float)
        self._count = 0
        self._lengths: list[Tensor] = []
        self._at, self._kept = torch.zeros(2, longest, dtype=torch.float64)

    def add(self, loss: GeneratorLoss, lengths: Tensor) -> None:
        """A batch's losses, and lengths ``(b,)``."""
        count, lengths = int(loss.count), lengths.cpu()
        for name, value in {**loss.losses, **loss.metrics}.items():
            self._sums[name] += count * float(value)
        for name, value in loss.image_metrics.items():
            self._image_sums[name] += len(lengths) * float(value)
        self._count += count
        self._lengths.append(lengths)
        if loss.by_position is not None:
            self._at += loss.by_position.double().cpu()
        self._kept += (torch.arange(len(self._kept)) < lengths[:, None]).sum(0)

    @property
    def lengths(self) -> Tensor:
        """Of all sequences, ``(i,)``."""
        return torch.cat(self._lengths)

    def means(self) -> dict[str, float]:
        """Losses and metrics, means over tokens (bits: over images), and the mean length."""
        means = {name: value / self._count for name, value in self._sums.items()}
        of_images = {name: value / len(self.lengths) for name, value in self._image_sums.items()}
        return means | of_images | {"length": self.lengths.double().mean().item()}

    def by_position(self) -> list[float | None]:
        """The tokens' own loss at each position; ``None`` where no image keeps it, or the generator does not say."""
        pairs = zip(self._at.tolist(), self._kept.tolist(), strict=True)
        return [value / kept if kept and value else None for value, kept in pairs]


def length_divergence(lengths: Tensor, reference: Tensor, budgets: Sequence[int]) -> float:
    """KL of the lengths ``(s,)`` from the reference's ``(i,)``, in nats, half a count added to each budget of both."""
    at = torch.tensor(budgets)
    shares = []
    for each in (lengths, reference):
        counts = (each[:, None] == at).double().sum(0) + 0.5
        shares.append(counts / counts.sum())
    return float((shares[0] * (shares[0] / shares[1]).log()).sum())


@torch.no_grad()
def evaluate_generator(
    model: ImageGenerator,
    held_out: HeldOut,
    guidance: Guidance,
    num_samples: int,
    folder: Path,
    protocol: Mapping[str, object],
    progress: Progress | None = None,
    real: RealImages | None = None,
) -> dict[str, object]:
    """Draw samples without guidance and with, and leave the results in a folder.

    Writes ``metrics.json``, ``table.md``, ``positions.png`` if there are losses of positions, and ``samples.png``, of
    the samples with guidance. Lengths are those of all samples; images are compared in sets of equal size, as many as
    there are of samples and of held-out images.

    Args:
        model: in eval mode.
        held_out: losses and lengths of images that were not trained on.
        guidance: beside none.
        num_samples: with either.
        folder: created if needed.
        protocol: which weights and images these are.
        progress: told how far it is.
        real: what images are compared with, unless they are not.

    Returns:
        The contents of ``metrics.json``.
    """
    labels = torch.arange(num_samples) % model.num_classes
    drawn: dict[str, object] = {}
    generated: dict[str, ImageSet] = {}
    rows = [["", "mean length", "std", "KL of lengths"]]
    shuffled = torch.randperm(len(held_out.lengths), generator=torch.Generator().manual_seed(0))
    halves = held_out.lengths[shuffled].chunk(2)
    floor = length_divergence(halves[0], halves[-1], model.budgets)
    rows.append(["held-out images", *_moments(held_out.lengths), f"{floor:.4f} (floor)"])
    for chosen in dict.fromkeys([Guidance(), guidance]):
        tokens = _sampled(model, labels, chosen, progress)
        kl = length_divergence(tokens.lengths.cpu(), held_out.lengths, model.budgets)
        name = f"samples, guidance {chosen.scale:g}" + ("" if chosen.scale == 1 else f" {chosen.schedule}")
        counts = {str(budget): int((tokens.lengths == budget).sum()) for budget in model.budgets}
        drawn[name] = {"guidance": vars(chosen), "length_kl": kl, "lengths": counts}
        rows.append([name, *_moments(tokens.lengths.cpu()), f"{kl:.4f}"])
        generated[name] = partial(_pictures, model, labels, tokens, min(num_samples, len(held_out.lengths)))
    means, positions = held_out.means(), held_out.by_position()
    metrics: dict[str, Any] = {
        "protocol": {**protocol, "images": len(held_out.lengths), "samples": num_samples, "definitions": DEFINITIONS},
        "held_out": means,
        "by_position": positions,
        "floor": floor,
        "samples": drawn,
        "system": system_facts(model.tokenizer)
        | {
            "generator": type(model.generator).__name__,
            "generator_parameters": sum(parameter.numel() for parameter in model.generator.parameters()),
        },
        "distributions": {},
    }
    if real is not None:
        count = min(num_samples, len(held_out.lengths))
        metrics |= compare_with_real(generated, real, count, progress or (lambda stage, done, total: None))
    table = markdown([list(means), [f"{value:.4g}" for value in means.values()]], 0)
    texts = [table, markdown(rows, 1), f"{DEFINITIONS['length_kl']}.\n", *comparison_texts(metrics)]
    write_text(folder / "metrics.json", json.dumps(metrics, indent=1, default=str))
    write_text(folder / "table.md", "\n".join(texts))
    if any(value is not None for value in positions):
        _plot_positions(positions, folder / "positions.png")
    _draw_samples(model, labels, tokens, folder / "samples.png")
    return metrics


def _sampled(model: ImageGenerator, labels: Tensor, guidance: Guidance, progress: Progress | None) -> Tokens:
    parts = []
    if progress is not None:
        progress(f"samples at guidance {guidance.scale:g}", 0, len(labels))
    for numbers in torch.arange(len(labels)).split(AT_ONCE):
        parts.append(model.generate(labels[numbers], sample_ids=numbers, guidance=guidance))
        if progress is not None:
            progress(f"samples at guidance {guidance.scale:g}", int(numbers[-1]) + 1, len(labels))
    return Tokens.join(parts)


def _pictures(model: ImageGenerator, labels: Tensor, tokens: Tokens, count: int) -> Iterator[Batch]:
    for rows in torch.arange(count).split(AT_ONCE):
        names = [str(row) for row in rows.tolist()]
        yield Batch(model.decode(tokens.select(rows.to(tokens.lengths.device))).cpu(), names, names, labels[rows])


def _moments(lengths: Tensor) -> list[str]:
    return [f"{lengths.double().mean():.2f}", f"{lengths.double().std(correction=0):.2f}"]


def _plot_positions(losses: Sequence[float | None], path: Path) -> None:
    figure = Figure(figsize=(6, 4), dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots()
    shown = [(number + 1, loss) for number, loss in enumerate(losses) if loss is not None]
    axes.plot(*zip(*shown, strict=True), "o-", color=COLOURS[0], markersize=4)
    axes.set(xlabel="token", ylabel="loss", title="Held-out images, by position")
    style_axes(axes)
    write_figure(figure, path)


def _draw_samples(model: ImageGenerator, labels: Tensor, tokens: Tokens, path: Path) -> None:
    """One row for each of the first classes, each sample with its length."""
    rows = [number for label in range(min(CLASSES, model.num_classes)) for number in _first(labels, label)]
    some = tokens.select(torch.tensor(rows, device=tokens.lengths.device))
    named = zip(labels[rows].tolist(), some.lengths.tolist(), strict=True)
    captions = [f"{label}, {count(length, 'token')}" for label, length in named]
    write_rows(list(model.decode(some).cpu()), captions, PER_CLASS, path)


def _first(labels: Tensor, label: int) -> list[int]:
    return (labels == label).nonzero().flatten()[:PER_CLASS].tolist()
