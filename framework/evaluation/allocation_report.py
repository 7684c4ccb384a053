"""The evaluation that a policy leaves behind: its choices beside all others, in numbers, a table and pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from framework.allocation.adaptive_tokenizer import AdaptiveTokenizer
from framework.allocation.fidelity import Fidelity
from framework.allocation.rewards import Reward
from framework.data.interface import ImageData
from framework.data.stream import subset
from framework.evaluation.allocation_plots import (
    PER_ROW,
    History,
    plot_allocated_photograph,
    plot_landscape,
    plot_lengths,
    plot_training,
    plot_wall,
)
from framework.evaluation.allocation_study import DEFINITIONS, AllocationStudy, study_allocation
from framework.evaluation.evaluation import Evaluation
from framework.evaluation.rate_distortion import Progress
from framework.evaluation.reconstruction_distances import (
    distances_text,
    heading,
    policy_lengths,
    reconstruction_distances,
)
from framework.evaluation.report import choose_photograph
from framework.evaluation.systems import system_facts
from framework.evaluation.tables import columns_text, markdown, protocol_text
from framework.runtime.files import write_text

WALL_ROWS = 5
MEANS = ("tokens", "reward", "MSE x 1000")


def evaluate_allocation(
    model: AdaptiveTokenizer,
    reward: Reward,
    fidelity: Fidelity,
    data: ImageData,
    folder: Path,
    record: Mapping[str, object],
    history: History = (),
    measures: Evaluation | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
) -> dict[str, object]:
    """Measure a policy on held-out images and leave the results in a folder.

    Writes ``metrics.json``, ``per_image.csv``, ``table.md``, ``landscape.png``, ``lengths.png``, ``wall.png``,
    ``photograph.png`` where the policy can read tiles of one, and ``training.png`` where the history tells of training.

    Args:
        model: in eval mode, with any policy.
        reward: in eval mode.
        fidelity: what the reward reads.
        data: images that were not trained on.
        folder: created if needed.
        record: which weights these are (run, step, seed); goes into the protocol.
        history: lines of the run's ``metrics.jsonl``.
        measures: what to measure beside, without perceptual distances.
        limit: measure a fixed random subset of so many images.
        progress: told how far the measuring is.

    Returns:
        The contents of ``metrics.json``.

    Raises:
        ValueError: see ``study_allocation`` and ``reconstruction_distances``.
    """
    measures = measures or Evaluation()
    study = study_allocation(model, reward, fidelity, data, record, limit, progress)
    study = replace(study, thresholds=measures.thresholds)
    summary = study.summary()
    metrics: dict[str, Any] = {"definitions": DEFINITIONS, "allocation": summary, "systems": study.systems()}
    mean = summary["policies"]["policy"]["length"]
    fixed = sorted({min(study.budgets, key=lambda budget: abs(budget - mean)), study.budgets[-1]})
    metrics["system"] = system_facts(model)
    metrics["distributions"] = {
        metric: reconstruction_distances(
            model.tokenizer,
            data,
            network,
            fixed,
            {"policy": policy_lengths(model)},
            measures.reference(network),
            limit,
            record=record,
            progress=progress,
        )
        for metric, network in measures.features.items()
    }
    if kinds := study.by_kind():
        metrics["kinds"] = kinds
    write_text(folder / "metrics.json", json.dumps(metrics, indent=2, allow_nan=False) + "\n")
    write_text(folder / "per_image.csv", _per_image(study))
    plot_landscape(study, folder / "landscape.png")
    plot_lengths(study, folder / "lengths.png")
    if any("policy/entropy" in line for line in history):
        plot_training({"policy": history}, [len(model.policy.budgets)], folder / "training.png")
    rows = study.spread(WALL_ROWS * PER_ROW)
    indices = {data.key(index): index for index in subset(len(data), limit)}
    images = data.fetch([indices[study.keys[row]] for row in rows], epoch=0).images
    plot_wall(images, study.lengths[rows], model.tokenizer, folder / "wall.png")
    note = ""
    try:
        plot_allocated_photograph(choose_photograph(data, study.groups), model, folder / "photograph.png")
    except ValueError as error:  # a policy that looks images up by name knows no tiles
        note = f"\nNo photograph: {error}.\n"
    write_text(folder / "table.md", _table(metrics) + note)
    return metrics


def compare_allocations(
    models: Mapping[str, tuple[AdaptiveTokenizer, Reward, Fidelity, History]],
    data: ImageData,
    folder: Path,
    measures: Evaluation | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
) -> None:
    """Measure several policies on the same images; leave ``comparison.md`` and, of their training, ``comparison.png``.

    Args:
        models: by name, each with its reward, what that reads, and the lines of its run's ``metrics.jsonl``.
        data: images that were not trained on.
        folder: created if needed.
        measures: what to measure beside, without perceptual distances.
        limit: measure a fixed random subset of so many images.
        progress: told how far the measuring is.

    Raises:
        ValueError: see ``study_allocation`` and ``reconstruction_distances``.
    """
    discrete = any(model.tokenizer.quantizer.vocabulary is not None for model, *_ in models.values())
    header = ["run", *MEANS, *(["bits per image"] if discrete else []), "reward minus fixed at mean's"]
    header += ["of the gap to the oracle", "of that of the best fixed", "rank correlation with error"]
    measures = measures or Evaluation()
    rows = [[*header, *map(heading, measures.features)]]
    told: dict[str, Any] = {"limit": limit, "progress": progress}
    for name, (model, reward, fidelity, _) in models.items():
        study = study_allocation(model, reward, fidelity, data, {}, limit, progress)
        summary = study.summary()
        rows.append(
            [
                name,
                *_means(summary["policies"]["policy"]),
                *([_bits(study.systems()["adaptive"])] if discrete else []),
                _difference(summary["differences"]["fixed_at_mean"], "reward"),
                *(_text(share, ".0%") for share in summary["gap"].values()),
                _text(summary["rank_correlation"]["error_at_shortest"], ".2f"),
            ]
        )
        for metric, network in measures.features.items():
            own, reference = {"policy": policy_lengths(model)}, measures.reference(network)
            found = reconstruction_distances(model.tokenizer, data, network, [], own, reference, **told)
            rows[-1].append(f"{found['own_lengths']['policy'][metric]:.4g}")
    write_text(folder / "comparison.md", f"{markdown(rows, num_words=1)}\n{_scope(summary)}\n")
    histories = {name: history for name, (*_, history) in models.items()}
    plot_training(histories, [len(model.policy.budgets) for model, *_ in models.values()], folder / "comparison.png")


def _per_image(study: AllocationStudy) -> str:
    """One row per image: what the policy chose and got, beside four others."""
    columns: dict[str, Sequence[object]] = {"key": study.keys, "group": study.groups}
    columns |= {} if study.kinds is None else {"kind": study.kinds}
    columns["png_bytes"] = study.png_bytes.tolist()
    for name in ("policy", "fixed_at_mean", "best_fixed", "binary_search", "oracle"):
        for metric, table in study.tables.items():
            column = metric if name == "policy" else f"{name}_{metric}"
            columns[column] = study.choices[name].per_image(table).tolist()
    return columns_text(columns)


def _table(metrics: Mapping[str, Any]) -> str:
    summary = metrics["allocation"]
    rates = _rates(summary["policies"]["policy"])
    header = ["", *MEANS, *rates, "encodings", "decodings"]
    rows = [[*header, "policy's reward minus this", "policy's MSE x 1000 minus this"]]
    for name, numbers in summary["policies"].items():
        difference = summary["differences"].get(name)
        rows.append(
            [
                name.replace("_", " "),
                *_means(numbers),
                *(f"{share:.0%}" for share in numbers["rqpr"].values()),
                *(f"{numbers[passes]:.3g}" for passes in ("encoder_passes", "decoder_passes")),
                *([_difference(difference, metric) for metric in ("reward", "mse")] if difference else ["", ""]),
            ]
        )
    at_mean, best_fixed = (_text(share, ".0%") for share in summary["gap"].values())
    with_error, with_bytes = (_text(correlation, ".2f") for correlation in summary["rank_correlation"].values())
    hard = f" ({summary['unimodal_hard']:.1%} with tau 0)" if "unimodal_hard" in summary else ""
    lines = [
        "Means over images ± standard deviations; differences with 95% intervals over groups, then the images of each.",
        f"The policy recovers {at_mean} of the oracle's gain in reward over the fixed length at its mean, and "
        f"{best_fixed} of that over the best fixed length.",
        f"Rank correlation of its lengths with the error at the shortest: {with_error}; with PNG bytes: {with_bytes}.",
        f"Rewards are unimodal for {summary['unimodal']:.1%} of images{hard}; the distortion falls at "
        f"{summary['falling']:.1%} of steps between budgets. The search asks for {summary['search_threshold']:.4g}.",
        f"The reward: {summary['protocol']['reward']}.",
        *(distances_text(metric, found).strip() for metric, found in metrics["distributions"].items()),
        _scope(summary),
    ]
    tables = [_systems(metrics), markdown(rows, num_words=1).rstrip()]
    if kinds := metrics.get("kinds"):
        rows = [["kind", "images", "tokens", "MSE x 1000"]]
        for kind, numbers in kinds.items():
            rows.append([kind, str(numbers["count"]), f"{numbers['length']:.2f}", f"{1000 * numbers['mse']:.3g}"])
        lines.append(f"The policy's choices by kind of image:\n\n{markdown(rows, num_words=1).rstrip()}")
    return "\n\n".join([*tables, *lines]) + "\n"


def _systems(metrics: Mapping[str, Any]) -> str:
    full, adaptive, sets = metrics["systems"]["full"], metrics["systems"]["adaptive"], metrics["distributions"]
    rows = [["", "tokens", "bits per image", "MSE x 1000", "PSNR, dB", *_rates(full), *map(heading, sets)]]
    every = full["length"] == metrics["allocation"]["protocol"]["num_tokens"]
    for name, numbers in {"Full" if every else "longest budget": full, "Adaptive": adaptive}.items():
        tokens, _, mse = _means(numbers)
        rates = (f"{share:.0%}" for share in numbers["rqpr"].values())
        distances = (
            f"{(each['own_lengths']['policy'] if name == 'Adaptive' else each['per_length'][-1])[metric]:.4g}"
            for metric, each in sets.items()
        )
        rows.append([name, tokens, _bits(numbers), mse, f"{numbers['psnr']:.2f}", *rates, *distances])
    return markdown(rows, num_words=1).rstrip()


def _rates(numbers: Mapping[str, Any]) -> list[str]:
    return [f"rQPR {threshold}" for threshold in numbers["rqpr"]]


def _bits(system: Mapping[str, Any]) -> str:
    return "continuous" if system["bits"] is None else f"{system['bits']:,.1f}"


def _scope(summary: Mapping[str, Any]) -> str:
    protocol = summary["protocol"]
    left_out = f", {protocol['broken']} left out that cannot be read" if protocol["broken"] else ""
    images = f"{protocol['images']} images of {protocol['groups']} groups{left_out}"
    return f"{images}; pixels in [0, 1]; {protocol_text(protocol['data'])}."


def _means(numbers: Mapping[str, Any]) -> list[str]:
    """What stands under ``MEANS``."""
    forms = {"length": (1, ".2f"), "reward": (1, ".4f"), "mse": (1000, ".2f")}
    return [
        f"{factor * numbers[metric]:{form}} ± {factor * numbers[metric + '_std']:{form}}"
        for metric, (factor, form) in forms.items()
    ]


def _difference(numbers: Mapping[str, Any], metric: str) -> str:
    factor, form = (1000, "+.2f") if metric == "mse" else (1, "+.4f")
    mean, low, high = (factor * number for number in (numbers[metric], *numbers[f"{metric}_interval"]))
    return f"{mean:{form}} ({low:{form}} to {high:{form}})"


def _text(number: float | None, form: str) -> str:
    return "none" if number is None else f"{number:{form}}"
