"""Systems side by side, in the columns of the AdaTok paper's Table 1, from evaluations that are on disk.

Nothing is measured here: every number is read from an evaluation's ``metrics.json``, and numbers that were not measured
alike are not put into one table.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from framework.evaluation.generated_images import generated_heading
from framework.evaluation.reconstruction_distances import against_text, heading
from framework.evaluation.tables import Places, columns_text, latex, markdown, protocol_text
from framework.runtime.files import write_text

LAYOUTS = {"2d": "2D tokenizers", "1d": "1D tokenizers"}
NO_GENERATOR = "-"
JUDGE = generated_heading("fd_digit_judge")
SHARED = ("data", "images", "of", "broken", "image_size")
"""Of the protocols, what must be equal."""
COLUMNS: dict[str, tuple[Callable[[float], str], Callable[[Sequence[float]], float] | None]] = {
    "#Params": (lambda number: f"{number / 1e6:.3g}M", None),
    "Codebook": (lambda number: f"{number:,}", None),
    "Dim": (str, None),
    "#Tokens": (lambda number: f"{number:.4g}", None),
    "Bits": (lambda number: f"{number:,.4g}", None),
    "MSE x 1000": (lambda number: f"{1000 * number:.3g}", min),
    "PSNR, dB": (lambda number: f"{number:.2f}", max),
    "SSIM": (lambda number: f"{number:.3f}", max),
}
"""How numbers are written, and which of a column is the best."""


@dataclass(frozen=True)
class System:
    """A row.

    Args:
        name: of the run, and of the length if it is one of several.
        layout: ``1d`` or ``2d``.
        elastic: whether it is trained to be read at several lengths.
        numbers: by column, where they were measured; Frechet distances by their metric, and those of generated images
            by ``generated_heading``.
        generator: its class and size, of a run that has trained one.
    """

    name: str
    layout: str
    elastic: bool
    numbers: Mapping[str, float]
    generator: str = NO_GENERATOR


def write_system_table(evaluations: Mapping[str, Path], out: Path, lengths: Sequence[int] = ()) -> str:
    """Write the table of evaluations, each by its run's name and a ``metrics.json``; returns it as Markdown.

    A tokenizer stands at all of its tokens, a policy at its own lengths; a generator on its tokenizer at the lengths of
    its samples with guidance, with how these compare with real images.

    Args:
        evaluations: in the order of the rows.
        out: a ``.md``, ``.tex`` or ``.csv`` file; ``.csv`` has numbers at full precision.
        lengths: rows for these lengths too, of tokenizers that were measured there.

    Raises:
        FileNotFoundError: if there is no such evaluation.
        ValueError: if one cannot be read, or is of an older version, or they were not measured alike, or the file's
            name ends in something else.
    """
    if out.suffix not in (".md", ".tex", ".csv"):
        raise ValueError(f"{out}: a table is a .md, .tex or .csv file")
    found = {name: _read(path) for name, path in evaluations.items()}
    protocol = _shared_protocol(found)
    systems = [system for name, metrics in found.items() for system in _systems(name, metrics, lengths)]
    systems.sort(key=lambda system: list(LAYOUTS).index(system.layout))
    metrics = [*dict.fromkeys(metric for each in found.values() for metric in _distances(each))]
    (rows, bold), text = _rows(systems, metrics), _scope(protocol, metrics)
    table = f"{markdown(rows, num_words=2, bold=bold)}\n{text}"
    if out.suffix == ".csv":
        columns: dict[str, Sequence[object]] = {"Tokenizer": [system.name for system in systems]}
        columns["Elastic"] = [system.elastic for system in systems]
        if any(system.generator != NO_GENERATOR for system in systems):
            columns["Generator"] = [system.generator for system in systems]
        columns |= {name: [system.numbers.get(name, "") for system in systems] for name in (*COLUMNS, *metrics)}
        write_text(out, columns_text(columns))
    else:
        write_text(out, latex(rows, num_words=2, bold=bold) if out.suffix == ".tex" else table)
    return table


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: evaluate the run first, with tools/evaluate.py --run")
    try:
        metrics: dict[str, Any] = json.loads(path.read_bytes())
        metrics["system"], metrics["distributions"]  # noqa: B018 - or it is of an older version
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged, or of an older version: evaluate the run again") from error
    return metrics


def _distances(metrics: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """How each Frechet distance was measured, by its column."""
    found = {}
    for metric, measured in metrics["distributions"].items():
        found[metric] = {key: measured["protocol"][key] for key in ("reference", "features", "uint8")}
    if not _is_generator(metrics):
        return found
    judge = {} if "judge" not in metrics else {JUDGE: metrics["judge"]["protocol"]}
    return {generated_heading(metric): each for metric, each in found.items()} | judge


def _is_generator(metrics: Mapping[str, Any]) -> bool:
    return "generator" in metrics["system"]


def _protocol(metrics: Mapping[str, Any]) -> dict[str, Any]:
    owners = [metrics, *(metrics[name] for name in ("rate_distortion", "allocation") if name in metrics)]
    return {key: owners[-1]["protocol"][key] for key in SHARED} | _distances(metrics)


def _shared_protocol(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """How all were measured, or an error if one was measured otherwise."""
    seen: dict[str, tuple[str, Any]] = {}
    for name, metrics in found.items():
        for key, value in _protocol(metrics).items():
            first, expected = seen.setdefault(key, (name, value))
            if value != expected:
                raise ValueError(
                    f"{first} and {name} were not measured alike: {key} is {expected!r} and {value!r}. Evaluate both "
                    "on the same images, with the same networks"
                )
    return {key: value for key, (_, value) in seen.items()}


def _systems(name: str, metrics: Mapping[str, Any], lengths: Sequence[int]) -> list[System]:
    facts, sets = metrics["system"], metrics["distributions"]
    same = {"#Params": facts["parameters"], "Codebook": facts["codebook"], "Dim": facts["token_dim"]}

    def system(suffix: str, numbers: Mapping[str, float | None]) -> System:
        known = {column: number for column, number in {**same, **numbers}.items() if number is not None}
        return System(name + suffix, facts["layout"], facts["elastic"], known)

    if _is_generator(metrics):
        chosen, drawn = list(metrics["samples"].items())[-1]
        count = sum(drawn["lengths"].values())
        numbers = {"#Tokens": sum(int(length) * number for length, number in drawn["lengths"].items()) / count}
        numbers |= {generated_heading(metric): each["sets"][chosen][metric] for metric, each in sets.items()}
        if "judge" in metrics:
            numbers[JUDGE] = metrics["judge"]["sets"][chosen]["fd_digit_judge"]
        size = f"{facts['generator']}, {facts['generator_parameters'] / 1e6:.3g}M"
        return [replace(system("", numbers), generator=size)]
    if "allocation" in metrics:
        own = metrics["systems"]["adaptive"]
        distances = {metric: found["own_lengths"]["policy"][metric] for metric, found in sets.items()}
        numbers = {"#Tokens": own["length"], "Bits": own["bits"], "MSE x 1000": own["mse"], "PSNR, dB": own["psnr"]}
        return [system("", {**numbers, **distances})]
    curve = metrics["rate_distortion"]["per_length"]
    bits_per_token = metrics.get("codebook", {}).get("bits_per_token")
    rows = []
    for column, at in enumerate(curve):
        if at is not curve[-1] and at["length"] not in lengths:
            continue
        numbers = {"#Tokens": at["length"], "Bits": None if bits_per_token is None else at["length"] * bits_per_token}
        numbers |= {"MSE x 1000": at["mse"], "PSNR, dB": at["psnr"], "SSIM": at.get("ssim")}
        numbers |= {metric: found["per_length"][column][metric] for metric, found in sets.items()}
        rows.append(system("" if at is curve[-1] else f", {at['length']} tokens", numbers))
    return rows


def _rows(systems: Sequence[System], metrics: Sequence[str]) -> tuple[list[list[str]], Places]:
    forms = COLUMNS | {metric: ((lambda number: f"{number:.4g}"), min) for metric in metrics}
    best = {
        column: choose([system.numbers[column] for system in systems if column in system.numbers])
        for column, (_, choose) in forms.items()
        if choose is not None and sum(column in system.numbers for system in systems) > 1
    }
    titles = [heading(column) if column in metrics else column for column in forms]
    heads = ["Tokenizer", "Elastic"]
    if any(system.generator != NO_GENERATOR for system in systems):
        heads.append("Generator")
    rows, bold, layout = [[*heads, *titles]], set(), ""
    for system in systems:
        if system.layout != layout:
            layout = system.layout
            rows.append([LAYOUTS[layout], *[""] * (len(heads) - 1 + len(forms))])
        for place, column in enumerate(forms, len(heads)):
            if column in best and system.numbers.get(column) == best[column]:
                bold.add((len(rows), place))
        numbers = system.numbers
        texts = (write(numbers[column]) if column in numbers else "-" for column, (write, _) in forms.items())
        own = [system.name, "yes" if system.elastic else "no", system.generator]
        rows.append([*own[: len(heads)], *texts])
    return rows, bold


def _scope(protocol: Mapping[str, Any], metrics: Sequence[str]) -> str:
    side = protocol["image_size"]
    texts = [f"{protocol['images']:,} images of {side}x{side}: {protocol_text(protocol['data'])}."]
    for metric in metrics:
        if metric == JUDGE:
            compared = protocol[metric]["compared_with"]
            texts.append(f"{JUDGE}: in a small classifier's features, against {compared['images']:,} training images.")
            continue
        texts.append(f"{heading(metric)}: {against_text(protocol[metric])}")
    texts.append("The best of each column in bold; #Params count frozen parts and spaces; - was not measured.")
    return " ".join(texts) + "\n"
