"""The evaluation that a finished tokenizer leaves behind: a table of errors, curves and pictures.

Shapes: images (3, h, w) in [0, 1].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from framework.data.interface import ImageData
from framework.data.stream import Sequential, subset
from framework.evaluation.codebook import CodebookStatistics
from framework.evaluation.codecs import codecs_beside, codecs_text
from framework.evaluation.evaluation import Evaluation
from framework.evaluation.image_metrics import psnr, rqpr
from framework.evaluation.pca import MAX_VALUES, PrincipalComponents
from framework.evaluation.plots import (
    plot_codebook,
    plot_rate_distortion,
    plot_reconstructions,
    plot_tiled_photograph,
)
from framework.evaluation.rate_distortion import (
    Progress,
    RateDistortion,
    few_lengths,
    measure,
    rate_distortion,
    reconstructions,
    space_floor,
)
from framework.evaluation.reconstruction_distances import distances_text, heading, reconstruction_distances
from framework.evaluation.systems import system_facts
from framework.evaluation.tables import markdown
from framework.losses.perceptual import PerceptualLoss
from framework.runtime.files import write_text
from framework.tokenizers.tokenizer import Tokenizer

PCA_IMAGES = 24_000


def evaluate_tokenizer(
    tokenizer: Tokenizer,
    data: ImageData,
    folder: Path,
    record: Mapping[str, object],
    train_data: ImageData | None = None,
    measures: Evaluation | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
) -> dict[str, object]:
    """Measure a tokenizer on held-out images and leave the results in a folder.

    Writes ``metrics.json``, ``per_image.csv``, ``table.md``, ``rate_distortion.png``, ``reconstructions.png``,
    ``photograph.png`` and, of a discrete tokenizer, ``codebook.png``.

    Args:
        tokenizer: in eval mode.
        data: images that were not trained on.
        folder: created if needed.
        record: which weights these are (run, step, averaged or not, seed); goes into the protocol.
        train_data: what principal components are fitted to; without it there is no baseline.
        measures: what to measure, on the tokenizer's device.
        limit: measure a fixed random subset of so many images.
        progress: told how far the measuring is.

    Returns:
        The contents of ``metrics.json``.

    Raises:
        ValueError: see ``measure``, ``tokenizer_errors`` and ``reconstruction_distances``.
    """
    measures = measures or Evaluation()
    told: dict[str, Any] = {"limit": limit, "progress": progress}
    curve = rate_distortion(
        tokenizer, data, measures.lengths, record=record, distances=measures.distances, **told
    )
    curve = replace(curve, thresholds=measures.thresholds)
    baseline = principal_components(curve, tokenizer.token_dim, data, train_data, limit, progress)
    if baseline is not None:
        summary, note = baseline.summary(), "PCA keeps as many components as the tokens have floats."
    else:
        reason = "not asked for" if train_data is None else f"images of {_num_values(data)} values"
        summary, note = None, f"No PCA baseline: {reason}."
    sections: dict[str, Any] = {"system": system_facts(tokenizer), "idle_tail": curve.idle_tail(tokenizer.num_tokens)}
    floor = _floor(tokenizer, data, limit, progress, measures.distances)
    if floor is not None:
        sections["floor"] = floor.summary()
    if kinds := curve.by_kind():
        sections["kinds"] = kinds
    sections["distributions"] = {
        metric: reconstruction_distances(
            tokenizer, data, network, curve.lengths, reference=measures.reference(network), record=record, **told
        )
        for metric, network in measures.features.items()
    }
    if (vocabulary := tokenizer.quantizer.vocabulary) is not None:
        codebook = CodebookStatistics(tokenizer.num_tokens, vocabulary)
        for _ in codebook.counting(tokenizer, Sequential(data, 64, limit)):
            pass
        plot_codebook(codebook, folder / "codebook.png")
        sections["codebook"] = codebook.summary()
        bits = f"one of {vocabulary:,} codes, {sections['codebook']['bits_per_token']:.4g} bits"
        floats = f"{tokenizer.token_dim} floats for it are not coded"
        if baseline is not None:
            note += f" Equal floats are not equal bits: a token is {bits}, while PCA's {floats}."
        if measures.codec_images:
            bits_per_token = sections["codebook"]["bits_per_token"]
            sections["codecs"] = codecs_beside(curve, data, bits_per_token, measures.codec_images, limit, progress)
    metrics = curve.save(folder, sections | {"pca": summary, "pca_note": note})
    write_text(folder / "table.md", _table(curve, baseline, metrics, measures.distances))
    plot_rate_distortion({"tokenizer": curve}, baseline, folder / "rate_distortion.png", floor)

    indices = {data.key(index): index for index in subset(len(data), limit)}
    images = data.fetch([indices[curve.keys[row]] for row in spread_images(curve)], epoch=0).images
    rebuilt = reconstructions(tokenizer, images.to(next(tokenizer.parameters()).device), curve.lengths)
    by_length = {length: images.float().cpu() for length, images in zip(curve.lengths, rebuilt, strict=True)}
    plot_reconstructions(images, by_length, folder / "reconstructions.png")
    photograph = choose_photograph(data, curve.groups)
    plot_tiled_photograph(photograph, tokenizer, few_lengths(tokenizer.num_tokens), folder / "photograph.png")
    return metrics


def _floor(
    tokenizer: Tokenizer,
    data: ImageData,
    limit: int | None,
    progress: Progress | None,
    distances: Mapping[str, PerceptualLoss] | None,
) -> RateDistortion | None:
    """What the output space alone loses; ``None`` of pixels, and of a space that cannot encode."""
    if tokenizer.output_space.is_lossless:
        return None
    try:
        return space_floor(tokenizer.output_space, data, limit, progress=progress, distances=distances)
    except TypeError:
        return None


def _num_values(data: ImageData) -> int:
    return 3 * data.image_size**2


def principal_components(
    curve: RateDistortion,
    token_dim: int,
    data: ImageData,
    train_data: ImageData | None,
    limit: int | None,
    progress: Progress | None,
) -> RateDistortion | None:
    """The baseline at a curve's lengths and on its images; ``None`` where it cannot be fitted."""
    if train_data is None or _num_values(data) > MAX_VALUES:
        return None
    batches = Sequential(train_data, 256, PCA_IMAGES)
    components = PrincipalComponents.fit(batch.images for batch in batches)

    def errors(images: Tensor, lengths: Sequence[int]) -> Tensor:
        return components.errors(images, [length * token_dim for length in lengths])

    record = {
        "model": f"principal components, {token_dim} for each token",
        "fitted_to": train_data.protocol(),
        "fitted_images": components.num_images,
        **batches.record(),
    }
    return measure("PCA baseline", errors, data, curve.lengths, limit, record=record, progress=progress)


def _table(
    curve: RateDistortion,
    baseline: RateDistortion | None,
    metrics: Mapping[str, Any],
    distances: Mapping[str, PerceptualLoss],
) -> str:
    """The summary as a Markdown table, and what else there is to say."""
    titles = [distance.extractor.title for distance in distances.values()]
    rates = [f"rQPR {threshold}" for threshold in curve.thresholds]
    codebook, sets = metrics.get("codebook"), metrics["distributions"]
    similarity = [curve.distances["ssim"].mean(0).tolist()] if "ssim" in curve.distances else []
    header = ["tokens", *(["bits"] if codebook else []), "MSE x 1000", "95% interval", "PSNR, dB"]
    header += ["SSIM"] * len(similarity)
    rows = [[*header, *rates, *titles, *map(heading, sets), "falls", "PCA, MSE x 1000"]]
    for column, (length, errors) in enumerate(zip(curve.lengths, curve.errors.T, strict=True)):
        low, high = (1000 * curve.intervals[:, column]).tolist()
        falls = (errors < curve.errors[:, column - 1]).double().mean().item()
        pca = "" if baseline is None else f"{1000 * baseline.errors[:, column].mean().item():.3g}"
        rows.append(
            [
                str(length),
                *([f"{length * codebook['bits_per_token']:,.1f}"] if codebook else []),
                f"{1000 * errors.mean().item():.3g}",
                f"{low:.3g} to {high:.3g}",
                f"{psnr(errors).mean().item():.2f}",
                *(f"{values[column]:.3f}" for values in similarity),
                *(f"{rqpr(errors, threshold).item():.0%}" for threshold in curve.thresholds),
                *(f"{curve.distances[name][:, column].mean().item():.3g}" for name in distances),
                *(f"{found['per_length'][column][metric]:.4g}" for metric, found in sets.items()),
                f"{falls:.0%}" if column else "",
                pca,
            ]
        )
    scope = f"{images_of(curve)}; pixels in [0, 1]; definitions in metrics.json."
    texts = [markdown(rows, num_words=0), f"{scope} {metrics['pca_note']}\n"]
    texts += [distances_text(metric, found) for metric, found in sets.items()]
    if "floor" in metrics:
        (at,) = metrics["floor"]["per_length"]
        others = "".join(f", {title} {at[name]:.3g}" for name, title in zip(distances, titles, strict=True))
        texts.append(f"The floor, images through the output space alone: MSE x 1000 {1000 * at['mse']:.3g}{others}.\n")
    if codebook:
        texts.append(_codebook_text(codebook))
    if codecs := metrics.get("codecs"):
        texts.append(codecs_text(codecs))
    if (tail := metrics["idle_tail"]) and tail["tokens"]:
        texts.append(_idle_text(tail))
    if kinds := metrics.get("kinds"):
        rows = [["kind", "images", *map(str, curve.lengths)]]
        for kind, numbers in kinds.items():
            rows.append([kind, str(numbers["count"]), *(f"{1000 * at['mse']:.3g}" for at in numbers["per_length"])])
        texts.append(f"MSE x 1000 by kind of image and tokens:\n\n{markdown(rows, num_words=1)}")
    return "\n".join(texts)


def _codebook_text(codebook: Mapping[str, Any]) -> str:
    by_token = codebook["per_position"]["perplexity"]
    low, high = (f"{value:.4g} at token {by_token.index(value) + 1}" for value in (min(by_token), max(by_token)))
    few = f" {codebook['few_tokens']}" if codebook["few_tokens"] else ""
    return (
        f"Codebook, over {codebook['tokens']:,} tokens: usage {codebook['usage']:.1%}, perplexity "
        f"{codebook['perplexity']:.4g} of {codebook['vocabulary']:,}, dead codes {codebook['dead_codes']:,}. "
        f"By position, the lowest perplexity is {low}, the highest {high}.{few}\n\n"
        "Bits are tokens x log2 of the codes; what telling the number of tokens takes is not in them.\n"
    )


def _idle_text(tail: Mapping[str, Any]) -> str:
    length, measured = tail["length"], [0, *tail["measured"]]
    before = measured[measured.index(length) - 1]
    told = f"the last {tail['tokens']} do nearly nothing for it"
    if before < length - 1:
        told = f"at least {told} (no length between {before} and {length} was measured)"
    return (
        f"Of the measured lengths, {length} is the shortest whose mean MSE is at most {tail['tolerance']:.0%} above "
        f"that of all {length + tail['tokens']} tokens: {told}.\n"
    )


def images_of(curve: RateDistortion) -> str:
    """How many images a curve is of, in words."""
    broken = curve.protocol["broken"]
    left_out = f", {broken} left out that cannot be read" if broken else ""
    return f"{len(curve.keys)} images of {len(set(curve.groups))} groups{left_out}"


def spread_images(curve: RateDistortion, count: int = 6) -> list[int]:
    """Rows of at most ``count`` images that stand for the rest: groups in turn, from the easiest to the hardest images.

    The k-th image has the k-th of ``count`` evenly spaced ranks within its own group, by error averaged over lengths.
    """
    difficulty = curve.errors.mean(1).tolist()
    members: dict[str, list[int]] = {}
    for row in sorted(range(len(difficulty)), key=difficulty.__getitem__):
        members.setdefault(curve.groups[row], []).append(row)
    groups = [members[group] for group in sorted(members)]
    picks = [groups[k % len(groups)] for k in range(count)]
    rows = [rows[(2 * k + 1) * len(rows) // (2 * count)] for k, rows in enumerate(picks)]
    return list(dict.fromkeys(rows))


def choose_photograph(data: ImageData, groups: Sequence[str]) -> Tensor:
    """A photograph in colour if there is one, the largest of those; of at most 16 groups."""
    photographs = map(data.whole, list(dict.fromkeys(groups))[:16])  # one at a time, for they may be large
    return max(photographs, key=lambda photograph: (_is_colour(photograph), photograph.numel()))


def _is_colour(photograph: Tensor) -> bool:
    return bool((photograph.amax(0) - photograph.amin(0)).mean() > 0.02)
