"""Several tokenizers on the same images: one table, one plot, and one photograph rebuilt by all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from framework.data.interface import ImageData
from framework.evaluation.evaluation import Evaluation
from framework.evaluation.plots import plot_rate_distortion, plot_tiled_by_all
from framework.evaluation.rate_distortion import Progress, default_lengths, few_lengths, rate_distortion
from framework.evaluation.reconstruction_distances import distances_text, heading, reconstruction_distances
from framework.evaluation.report import choose_photograph, images_of, principal_components
from framework.evaluation.tables import markdown, protocol_text
from framework.runtime.files import write_text
from framework.tokenizers.tokenizer import Tokenizer


def compare_tokenizers(
    tokenizers: Mapping[str, Tokenizer],
    data: ImageData,
    folder: Path,
    train_data: ImageData | None = None,
    measures: Evaluation | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Measure several tokenizers on the same images; leave ``comparison.md``, its plot, and one photograph by all.

    Args:
        tokenizers: by name, in eval mode; lengths and the PCA baseline follow the first.
        data: images that were not trained on.
        folder: created if needed.
        train_data: what principal components are fitted to; without it there is no baseline.
        measures: what to measure, on the tokenizers' device.
        limit: measure a fixed random subset of so many images.
        progress: told how far the measuring is.

    Raises:
        ValueError: see ``measure``, ``tokenizer_errors`` and ``reconstruction_distances``.
    """
    first, measures = next(iter(tokenizers.values())), measures or Evaluation()
    lengths = measures.lengths or default_lengths(first.num_tokens)
    curves = {
        name: rate_distortion(tokenizer, data, lengths, limit, progress=progress, distances=measures.distances)
        for name, tokenizer in tokenizers.items()
    }
    shown = next(iter(curves.values()))
    baseline = principal_components(shown, first.token_dim, data, train_data, limit, progress)
    every = curves if baseline is None else curves | {"PCA, equal floats": baseline}
    errors = {name: [1000 * error for error in curve.errors.mean(0).tolist()] for name, curve in every.items()}
    texts = [_by_length("MSE x 1000", lengths, errors)]
    titles = {"ssim": "SSIM"} if "ssim" in shown.distances else {}
    titles |= {metric: distance.extractor.title for metric, distance in measures.distances.items()}
    for metric, title in titles.items():
        means = {name: curve.distances[metric].mean(0).tolist() for name, curve in curves.items()}
        texts.append(_by_length(title, lengths, means))
    for metric, network in measures.features.items():
        reference = measures.reference(network)
        found = {
            name: reconstruction_distances(
                tokenizer, data, network, lengths, reference=reference, limit=limit, progress=progress
            )
            for name, tokenizer in tokenizers.items()
        }
        numbers = {name: [at[metric] for at in measured["per_length"]] for name, measured in found.items()}
        texts += [_by_length(heading(metric), lengths, numbers), distances_text(metric, next(iter(found.values())))]
    texts.append(f"{images_of(shown)}; pixels in [0, 1]; {protocol_text(data.protocol())}.\n")
    write_text(folder / "comparison.md", "\n".join(texts))
    plot_rate_distortion(curves, baseline, folder / "comparison.png")
    photograph = choose_photograph(data, shown.groups)
    plot_tiled_by_all(photograph, tokenizers, few_lengths(first.num_tokens)[-2:], folder / "photograph.png")


def _by_length(title: str, lengths: Sequence[int], numbers: Mapping[str, Sequence[float]]) -> str:
    rows = [[f"{title} at tokens", *map(str, lengths)]]
    rows += [[name, *(f"{number:.3g}" for number in row)] for name, row in numbers.items()]
    return markdown(rows, num_words=1)
