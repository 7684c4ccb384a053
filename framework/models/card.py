"""Model cards: what an exported model is, how it was trained and what it measures, in words and tables for people."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import nn

from framework.allocation.adaptive_tokenizer import AdaptiveTokenizer
from framework.config import dump_yaml
from framework.engine.experiment import Experiment
from framework.evaluation.tables import markdown
from framework.generators.image_generator import ImageGenerator
from framework.tokenizers.interface import ImageSpace
from framework.tokenizers.tokenizer import Tokenizer

Words = Mapping[str, str]
"""Facts by what they are of."""


def model_card(
    name: str, run: Path, experiment: Experiment, record: Mapping[str, object], license: str | None, more: Words
) -> str:
    """The text of a card, which names no folder of this machine but by its last part.

    Args:
        name: of the model.
        run: the run directory; evaluations of other weights than the exported ones are left out.
        experiment: the run's parts, with the exported weights.
        record: which weights these are.
        license: of the weights.
        more: what else to tell.
    """
    task, kind = experiment.task, "averaged weights" if record["weights"] == "ema" else "weights of the last step"
    steps = f"{record['step']} steps of {experiment.train.batch_size} images"
    facts = {
        **_facts(task.model),
        "parameters": f"{sum(parameter.numel() for parameter in task.model.parameters()):,}",
        "training": f"{type(task).__name__}, {steps}, {kind}, seed {record['seed']}",
        "licence": license or "not stated",
        **more,
    }
    if isinstance(task.model, ImageGenerator):
        classes = f"torch.arange({min(8, task.model.num_classes)})"
        tag, use = "image-generation", f"images = model.decode(model.generate({classes}, seed=0))"
    else:
        side = getattr(task.model, "image_size", 256)
        tag, use = "image-tokenizer", f"rebuilt = model.decode(model.encode(torch.rand(2, 3, {side}, {side})))"
    header = ({"license": license.lower()} if license else {}) | {"library_name": "adatok", "tags": [tag]}
    body = [
        f"# {name}",
        "It loads by itself, from this folder or by its id in the Hugging Face hub:",
        f'```python\nimport torch, framework\n\nmodel = framework.load("{name}")\n{use}\n```',
        markdown([["", ""], *([fact, text] for fact, text in facts.items())], num_words=2),
        _yaml({"training data": experiment.data.train.protocol()}),
        "## Numbers",
        *(_evaluations(run, record) or ["Not measured at these weights."]),
    ]
    return f"---\n{dump_yaml(header)}---\n\n" + _without_folders("\n\n".join(text.strip() for text in body)) + "\n"


def _facts(model: nn.Module) -> Words:
    """What a model is, by the words of a table."""
    if isinstance(model, AdaptiveTokenizer):
        budgets = model.policy.budgets
        chooses = f"{type(model.policy).__name__}, among {len(budgets)} lengths from {budgets[0]} to {budgets[-1]}"
        return {**_facts(model.tokenizer), "policy": chooses}
    if isinstance(model, ImageGenerator):
        lengths, tokenizer = model.budgets, _facts(model.tokenizer)
        makes = f"of {model.num_classes} classes, in {len(lengths)} lengths from {lengths[0]} to {lengths[-1]}"
        return {**tokenizer, "tokenizer": tokenizer["model"], "model": type(model.generator).__name__, "makes": makes}
    if isinstance(model, Tokenizer):
        vocabulary, parts = model.quantizer.vocabulary, (model, model.encoder, model.quantizer, model.decoder)
        token = f"{model.token_dim} floats" if vocabulary is None else f"one of {vocabulary:,} codes"
        return {
            "model": ", ".join(type(part).__name__ for part in parts),
            "images": f"{model.image_size}x{model.image_size} pixels, float in [0, 1]",
            "tokens": f"up to {model.num_tokens} an image, each {token}; contract: {model.contract}",
        }
    assert isinstance(model, ImageSpace), "nothing else is exported"
    latents = f"{model.channels} channels, one position for {model.downsampling}x{model.downsampling} pixels"
    return {"model": type(model).__name__, "latents": latents}


def _evaluations(run: Path, record: Mapping[str, object]) -> list[str]:
    """The tables and protocols of the run's evaluations of these weights."""
    found = []
    for file in sorted(run.glob("evaluation*/metrics.json")):
        with suppress(OSError, ValueError, LookupError, TypeError, AttributeError):  # one that is damaged is none
            metrics = json.loads(file.read_bytes())
            if "held_out" in metrics:  # of a generator
                protocol = measured = metrics["protocol"]
                definitions = protocol.pop("definitions")
            else:
                (part,) = [metrics[name] for name in ("rate_distortion", "allocation") if name in metrics]
                protocol, definitions = part["protocol"], metrics["definitions"]
                measured = protocol.pop("weights")
            if all(measured[key] == record[key] for key in ("step", "weights", "seed")):
                table = file.with_name("table.md").read_text().replace("in metrics.json", "below")
                notes = _yaml({"protocol": protocol, "definitions": definitions})
                found += [f"### On {protocol['data'].get('split', 'some')} images", table, notes]
    return found


def _yaml(tree: Mapping[str, Any]) -> str:
    return f"```yaml\n{dump_yaml(tree)}```"


def _without_folders(text: str) -> str:
    """Absolute paths by their last part, and addresses without what logs in."""
    text = re.sub(r"(?<=://)[^/\s@]+@", "", text)
    return re.sub(r"(?<![\w:/.)])/(?:[^/\s'\",|]+/)+(?=[^/\s])", "", text)
