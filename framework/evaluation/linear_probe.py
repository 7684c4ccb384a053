"""Linear probing: how well a linear layer tells classes apart by an image's first k tokens.

AdaTok (appendix B.5 and figure 8) follows TiTok, which follows MAE (He et al. 2022, appendix A.1): the encoder is
frozen, its outputs are pooled over tokens, standardised, and classified by one linear layer, trained with random tail
drop. Here accuracy is measured at every budget. The fit is the optimum of a convex problem in place of epochs of LARS,
so that no learning rate favours a budget. The paper does not say which outputs: here they are the tokens themselves.

Shapes: i images, b images of a chunk, n tokens, d channels of a token, f features, c classes, v views.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter
from torch import Tensor
from torch.nn.functional import cross_entropy

from framework.allocation.search import candidate_budgets
from framework.data.interface import ImageData
from framework.data.stream import Sequential
from framework.evaluation.labels import labels_of, refuse_other_classes
from framework.evaluation.plots import COLOURS, DOTS_PER_INCH, GREY, style_lengths, write_figure
from framework.evaluation.rate_distortion import Progress, default_lengths, mean_intervals
from framework.evaluation.tables import markdown
from framework.runtime.files import write_text
from framework.runtime.rng import Generators
from framework.tokenizers.tokenizer import Tokenizer
from framework.tokens import Tokens

Readout = Literal["concatenated", "mean"]

DEFINITIONS = {
    "accuracy": "share of test images whose class has the largest logit (top-1)",
    "interval": "95% bootstrap interval: 1000 resamples of groups, then of images within each, seed 0",
    "tail_drop": "one probe for all lengths, trained on training images that keep random lengths",
    "fixed_length": "a probe for each length, trained at that length",
    "pooled": "a probe on the encoder's pooled image features, which no length bounds",
    "chance": "accuracy of always naming the class that is most common in training",
    "concatenated": "kept tokens one after the other, each number standardised by those training images that keep it; "
    "0, which is the mean, in place of dropped tokens",
    "mean": "the mean of the kept tokens, standardised",
    "iterations": "steps of L-BFGS; the fit stopped short of its optimum where they are max_iterations",
}
TITLES = {"tail_drop": "one probe, random tail drop", "fixed_length": "a probe for each length"}
DROPS = 4
"""Random lengths at which a probe of random tail drop sees each training image."""
CHUNK = 8192
MAX_ITERATIONS = 300


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """A linear classifier of standardised features of kept tokens.

    Args:
        readout: which features; see ``DEFINITIONS``.
        mean: of each feature where it is kept, ``(f,)``.
        deviation: likewise, ``(f,)``.
        weight: ``(c, f)``.
        bias: ``(c,)``.
        iterations: what the fit took.
    """

    readout: Readout
    mean: Tensor
    deviation: Tensor
    weight: Tensor
    bias: Tensor
    iterations: int

    @classmethod
    def fit(
        cls, views: Sequence[Tokens], labels: Tensor, num_classes: int, readout: Readout, penalty: float = 1.0
    ) -> LinearProbe:
        """Minimise cross-entropy by L-BFGS from zero: the sum over images of its mean over views, and a penalty.

        Args:
            views: the same images, such as at several lengths each.
            labels: ``(i,)`` int64 from 0 to ``num_classes - 1``.
            penalty: times half the squared norm of the weights: 1 / C of scikit-learn's ``LogisticRegression``.
        """
        mean, deviation = _moments(views, readout)
        weight = mean.new_zeros(num_classes, len(mean), requires_grad=True)
        bias = mean.new_zeros(num_classes, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [weight, bias],
            max_iter=MAX_ITERATIONS,
            tolerance_grad=1e-5,
            tolerance_change=1e-8,
            line_search_fn="strong_wolfe",
        )
        probe = cls(readout, mean, deviation, weight, bias, 0)

        def closure() -> float:
            optimizer.zero_grad()
            shrinkage = penalty / 2 * weight.square().sum() / len(labels)
            shrinkage.backward()
            total = shrinkage.item()
            for view in views:
                for rows in torch.arange(len(labels)).split(CHUNK):
                    loss = cross_entropy(probe.logits(view.select(rows)), labels[rows], reduction="sum")
                    loss = loss / (len(labels) * len(views))
                    loss.backward()
                    total += loss.item()
            return total

        optimizer.step(closure)
        iterations = optimizer.state[weight]["n_iter"]
        return cls(readout, mean, deviation, weight.detach(), bias.detach(), iterations)

    def logits(self, tokens: Tokens) -> Tensor:
        """Tokens of b images -> ``(b, c)``; what stands behind a length is not read."""
        features, kept = features_of(tokens, self.readout)
        standardised = ((features - self.mean) / self.deviation).masked_fill(~kept, 0)
        return standardised @ self.weight.T + self.bias

    @torch.no_grad()
    def is_right(self, tokens: Tokens, labels: Tensor) -> Tensor:
        """Of images ``(i,)``, as 1 and 0 in float64."""
        chunks = torch.arange(len(labels)).split(CHUNK)
        predicted = torch.cat([self.logits(tokens.select(rows)).argmax(1) for rows in chunks])
        return (predicted == labels).double()


def features_of(tokens: Tokens, readout: Readout) -> tuple[Tensor, Tensor]:
    """Features ``(b, f)`` float32, and which of them come from kept tokens, bool ``(b, f)``: see ``DEFINITIONS``."""
    mask = tokens.mask[..., None]
    latents = tokens.latents.float().masked_fill(~mask, 0)
    if readout == "mean":
        pooled = latents.sum(1) / tokens.lengths[:, None]
        return pooled, torch.ones_like(pooled, dtype=torch.bool)
    return latents.flatten(1), mask.expand_as(latents).flatten(1)


def _moments(views: Sequence[Tokens], readout: Readout) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each feature over where it is kept, ``(f,)``; 0 and nearly 0 where it never is."""
    totals: list[Tensor] = []
    for view in views:
        for rows in torch.arange(len(view)).split(CHUNK):
            features, kept = (values.double() for values in features_of(view.select(rows), readout))
            sums = torch.stack([kept.sum(0), features.sum(0), features.square().sum(0)])
            totals = [sums + totals[0]] if totals else [sums]
    counts, sums, squares = totals[0]
    mean = sums / counts.clamp(min=1)
    variance = (squares / counts.clamp(min=1) - mean.square()).clamp(min=0)
    return mean.float(), (variance + 1e-6).sqrt().float()  # as MAE's batch normalisation


@dataclass(frozen=True, eq=False)
class _Encoded:
    """A data set as probes read it.

    Args:
        drops: views at random lengths.
        at: a view at each length.
        pooled: the encoder's pooled image features, each as one token of f channels.
        labels: ``(i,)``.
        groups: one per image.
        record: what the protocol says of the set.
    """

    drops: Sequence[Tokens]
    at: Mapping[int, Tokens]
    pooled: Tokens
    labels: Tensor
    groups: Sequence[str]
    record: Mapping[str, object]


@torch.no_grad()
def _encoded(
    tokenizer: Tokenizer,
    data: ImageData,
    lengths: Sequence[int],
    generator: torch.Generator | None,
    limit: int | None,
    stage: str,
    progress: Progress,
) -> _Encoded:
    """Encode a data set once where the contract is to truncate, else once for each view.

    Args:
        generator: draws the random lengths; without one there are none.
    """
    if tokenizer.training:
        raise ValueError("the tokenizer is in training mode, which is another model: call tokenizer.eval() first")
    device = next(tokenizer.parameters()).device
    batches = Sequential(data, 64, limit)
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    groups: list[str] = []
    for batch in batches:
        labels, size = labels_of(batch, data.protocol()), len(batch.keys)
        kept = torch.tensor(lengths)[:, None].expand(-1, size)  # (v, b)
        if generator is not None:
            kept = torch.cat([torch.randint(1, tokenizer.num_tokens + 1, (DROPS, size), generator=generator), kept])
        images = batch.images.to(device)
        tokens, features = tokenizer.encode_with_features(images)
        latents = tokens.latents[None]  # of all views; without the contract, (v, b, n, d)
        if tokenizer.contract != "truncate":
            latents = torch.stack([tokenizer.encode(images, of_view.to(device)).latents for of_view in kept])
        if not (latents.isfinite().all() and features.isfinite().all()):
            raise ValueError(
                f"latents or features of images from {batch.keys[0]} to {batch.keys[-1]} are not finite: the "
                "tokenizer's weights have probably diverged"
            )
        parts.append((latents.float(), kept.to(device), features.float(), labels.to(device)))
        groups += batch.groups
        progress(stage, len(groups) + len(batches.broken), min(limit or len(data), len(data)))
    if not groups:
        raise ValueError(f"there are no images to probe: the data set holds {len(data)} and the limit is {limit}")
    of_latents, of_kept, of_features, of_labels = zip(*parts, strict=True)
    latents, kept, features = torch.cat(of_latents, dim=1), torch.cat(of_kept, dim=1), torch.cat(of_features)
    views = [Tokens(latents[min(view, len(latents) - 1)], kept[view]) for view in range(len(kept))]
    drops, at = views[: -len(lengths)], dict(zip(lengths, views[-len(lengths) :], strict=True))
    pooled = Tokens(features[:, None], torch.ones_like(kept[0]))
    record = {"data": data.protocol(), "images": len(groups), "of": len(data), **batches.record()}
    return _Encoded(drops, at, pooled, torch.cat(of_labels), groups, record | {"groups": len(set(groups))})


def linear_probe(
    tokenizer: Tokenizer,
    train_data: ImageData,
    test_data: ImageData,
    folder: Path,
    record: Mapping[str, object],
    lengths: Sequence[int] | None = None,
    readout: Readout = "concatenated",
    limit: int | None = None,
    train_limit: int | None = None,
    seed: int = 0,
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Probe a tokenizer at several lengths; leave ``metrics.json``, ``table.md`` and ``linear_probe.png``.

    Features are kept on the tokenizer's device, 4 n d bytes an image.

    Args:
        tokenizer: in eval mode; it is not trained.
        train_data: labelled images that probes are trained on, as they look in epoch 0.
        test_data: labelled images that they are measured on.
        folder: created if needed.
        record: which weights these are; goes into the protocol.
        lengths: kept tokens, increasing; ``default_lengths`` unless given.
        readout: what a probe reads of the kept tokens. TiTok's and so AdaTok's is ``mean``, which says little where
            tokens have few channels.
        limit: measure on a fixed random subset of so many images.
        train_limit: train on such a subset.
        seed: of the random tail drop.
        progress: told how far it is.

    Returns:
        The contents of ``metrics.json``.

    Raises:
        ValueError: if a set has no labels or no images, the sets number their classes differently, a test image is of
            a class that training lacks, there is only one class, lengths do not fit, or a feature is not finite.
        TooManyBroken: if more images cannot be read than a set allows.
    """
    wanted = default_lengths(tokenizer.num_tokens) if lengths is None else lengths
    lengths = candidate_budgets(wanted, tokenizer.num_tokens)
    refuse_other_classes(train_data, test_data)
    test = _encoded(tokenizer, test_data, lengths, None, limit, "encoding test images", progress)
    drawn = Generators(seed)("tail drop")
    train = _encoded(tokenizer, train_data, lengths, drawn, train_limit, "encoding training images", progress)
    counts = train.labels.bincount()
    known = counts.nonzero().flatten().tolist()
    if len(known) < 2 or (strange := set(test.labels.tolist()) - set(known)):
        raise ValueError(
            f"probes tell apart classes that training shows, which are {known}"
            + (f"; test images are also of {sorted(strange)}" if len(known) > 1 else ", and one is not enough")
        )
    fitted: dict[str, LinearProbe] = {}
    right: dict[str, Tensor] = {}

    def fit(name: str, views: Sequence[Tokens], readout: Readout, tested: Mapping[str, Tokens]) -> None:
        fitted[name] = LinearProbe.fit(views, train.labels, len(counts), readout)
        right.update({at: fitted[name].is_right(tokens, test.labels) for at, tokens in tested.items()})
        progress("fitting probes", len(fitted), len(lengths) + 2)

    fit("tail_drop", train.drops, readout, {f"tail_drop@{length}": view for length, view in test.at.items()})
    for length in lengths:
        name = f"fixed_length@{length}"
        fit(name, [train.at[length]], readout, {name: test.at[length]})
    fit("pooled", [train.pooled], "concatenated", {"pooled": test.pooled})
    right["chance"] = (test.labels == counts.argmax()).double()

    values = torch.stack(list(right.values()), dim=1).cpu()
    columns = zip(right, values.mean(0).tolist(), mean_intervals(values, test.groups).T.tolist(), strict=True)
    measured = {name: {"accuracy": accuracy, "interval": interval} for name, accuracy, interval in columns}
    metrics: dict[str, Any] = {
        "definitions": DEFINITIONS,
        "protocol": {
            "train": dict(train.record),
            "test": dict(test.record),
            "classes": len(known),
            "image_size": tokenizer.image_size,
            "value_range": [0, 1],
            "features": "the tokens that the decoder reads, behind the quantizer",
            "readout": readout,
            "probe": "softmax regression by L-BFGS from zero, with a penalty of half the squared norm of the weights "
            "on the summed cross-entropy (scikit-learn's C=1); the tokenizer is frozen, one look at each image",
            "tail_drop": f"{DROPS} lengths for each training image, each uniform from 1 to {tokenizer.num_tokens}",
            "seed": seed,
            "max_iterations": MAX_ITERATIONS,
            "iterations": {name: probe.iterations for name, probe in fitted.items()},
            "weights": dict(record),
        },
        "per_length": [
            {"length": length, **{name: measured[f"{name}@{length}"] for name in TITLES}} for length in lengths
        ],
        "pooled": measured["pooled"],
        "chance": measured["chance"],
    }
    write_text(folder / "metrics.json", json.dumps(metrics, indent=2, allow_nan=False) + "\n")
    write_text(folder / "table.md", _table(metrics))
    plot_linear_probe(metrics, folder / "linear_probe.png")
    return metrics


def _table(metrics: Mapping[str, Any]) -> str:
    def cells(of: Mapping[str, Any]) -> list[str]:
        low, high = of["interval"]
        return [f"{of['accuracy']:.1%}", f"{low:.1%} to {high:.1%}"]

    protocol = metrics["protocol"]
    rows = [["tokens", *(text for title in TITLES.values() for text in (title, "95% interval"))]]
    for at in metrics["per_length"]:
        rows.append([str(at["length"]), *(text for name in TITLES for text in cells(at[name]))])
    pooled, interval = cells(metrics["pooled"])
    train, test = (f"{protocol[name]['images']:,} images of {protocol[name]['groups']:,}" for name in ("train", "test"))
    return (
        f"Top-1 accuracy of linear probes, {protocol['classes']} classes, readout {protocol['readout']}:\n\n"
        f"{markdown(rows, num_words=0)}\n"
        f"Pooled image features, whatever the length: {pooled} ({interval}). Chance: "
        f"{metrics['chance']['accuracy']:.1%}.\n\n"
        f"Trained on {train} groups, measured on {test}; definitions in metrics.json.\n"
    )


def plot_linear_probe(metrics: Mapping[str, Any], path: Path) -> None:
    """Accuracy against kept tokens with intervals, beside pooled features and chance (AdaTok, figure 8), as a PNG."""
    figure = Figure(figsize=(11, 7.5), dpi=DOTS_PER_INCH, layout="constrained")
    axes = figure.subplots()
    lengths = [at["length"] for at in metrics["per_length"]]
    for (name, title), colour in zip(TITLES.items(), COLOURS, strict=False):
        accuracies = [at[name]["accuracy"] for at in metrics["per_length"]]
        low, high = zip(*(at[name]["interval"] for at in metrics["per_length"]), strict=True)
        axes.plot(lengths, accuracies, color=colour, linewidth=2.8, marker="o", label=title)
        axes.fill_between(lengths, low, high, color=colour, alpha=0.16, linewidth=0)
    axes.axhline(metrics["pooled"]["accuracy"], linestyle="--", color="black", linewidth=2, label="pooled features")
    axes.axhline(metrics["chance"]["accuracy"], linestyle=":", color=GREY, linewidth=2, label="chance")
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylabel("top-1 accuracy", size=15)
    title = f"Linear probes, {metrics['protocol']['classes']} classes, {metrics['protocol']['readout']} tokens"
    axes.set_title(title, loc="left", size=18)
    style_lengths(axes, lengths)
    write_figure(figure, path)
