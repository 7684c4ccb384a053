"""The plan of a run before it runs: parameters, operations per image, steps, epochs, images."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from framework.allocation.adaptive_tokenizer import AdaptiveTokenizer
from framework.engine.experiment import Experiment
from framework.engine.trainer import make_turns
from framework.engine.training import Training
from framework.generators.image_generator import ImageGenerator
from framework.nn.lora import LowRankHeads
from framework.tokenizers.tokenizer import Tokenizer

H100_OPERATIONS = 989e12
"""A second, dense bfloat16, from NVIDIA's data sheet (SXM)."""
SHARE_OF_PEAK = 0.4
"""What well-fed transformers of these sizes reach; an assumption, which ``tools/benchmark.py train`` measures."""


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters of one part."""

    part: str
    trainable: int
    frozen: int

    @property
    def total(self) -> int:
        """Trainable and frozen."""
        return self.trainable + self.frozen


def count_parameters(part: str, module: nn.Module) -> Parameters:
    """Parameters of a module, shared ones once."""
    sizes = [(parameter.requires_grad, parameter.numel()) for parameter in module.parameters()]
    return Parameters(part, sum(n for grad, n in sizes if grad), sum(n for grad, n in sizes if not grad))


class _FullPass(nn.Module):
    """A tokenizer's pass over images at full length, as fvcore wants it: tensors in, a tensor out."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def forward(self, images: Tensor) -> Tensor:
        return self.tokenizer(images, torch.full((len(images),), self.tokenizer.num_tokens)).images


def _attention_operations(inputs: list[Any], outputs: list[Any]) -> int:
    query, value = inputs[0].type().sizes(), inputs[2].type().sizes()
    return math.prod(query) * value[-2] + math.prod(query[:-1]) * math.prod(value[-2:])


def count_operations(tokenizer: Tokenizer) -> dict[str, int]:
    """Multiply-adds of one image at full length, per part of the tokenizer and in ``total`` (fvcore's count).

    One on the meta device is counted on an uninitialised copy, since tracing a convolution wants real sizes. As is
    usual in such counts, layer norms are 5 a value (4 without learned scales), and additions, activations and softmax
    nothing.
    """
    with warnings.catch_warnings():  # fvcore uses torch.jit, whose every use torch now warns of
        warnings.simplefilter("ignore")
        return _count_operations(tokenizer)


def _count_operations(tokenizer: Tokenizer) -> dict[str, int]:
    from fvcore.nn import FlopCountAnalysis

    device = next(tokenizer.parameters()).device
    if device.type == "meta":
        device = torch.device("cpu")
        tokenizer = deepcopy(tokenizer).to_empty(device=device)
    images = torch.zeros(1, 3, tokenizer.image_size, tokenizer.image_size, device=device)
    analysis = FlopCountAnalysis(_FullPass(tokenizer).eval(), images)
    analysis.set_op_handle("aten::scaled_dot_product_attention", _attention_operations)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    by_module = analysis.by_module()
    parts = {name: by_module[f"tokenizer.{name}"] for name, _ in tokenizer.named_children()}
    return {name: count for name, count in parts.items() if count} | {"total": by_module[""]}


def plan(experiment: Experiment) -> str:
    """What would run, as text: one line a fact.

    Raises:
        ValueError: if the optimizers do not fit the task's turns and parameters.
        CheckpointError: if the weights of ``train.init_from`` do not fit.
    """
    make_turns(experiment.task, experiment.train)
    if experiment.train.init_from is not None:
        experiment.train.init_from.match(experiment.task)
    model, train, data = experiment.task.model, experiment.train, experiment.data
    rows = [count_parameters(name, child) for name, child in model.named_children()]
    adapters = nn.ModuleList(module for module in model.modules() if isinstance(module, LowRankHeads))
    rows.append(count_parameters("of which adapters", adapters))
    rows.append(count_parameters("total", experiment.task))
    lines = ["parameters" + _table(("part", "trainable", "frozen", "total"), _parameter_rows(rows))]
    tokenizer = model.tokenizer if isinstance(model, AdaptiveTokenizer | ImageGenerator) else model
    if isinstance(tokenizer, Tokenizer):
        counted = count_operations(tokenizer)
        alone = "" if tokenizer is model else ", of the tokenizer alone"
        lines.append(
            f"multiply-adds per image of {data.image_size}x{data.image_size} at {tokenizer.num_tokens} tokens{alone}"
            + _table(("part", "operations"), [(name, f"{count:,}") for name, count in counted.items()])
        )
        if tokenizer is model:
            lines.append(_cost(counted["total"], train, rows[-1]))
    num_images = train.max_steps * train.batch_size
    epochs = num_images / len(data.train)
    parts = "" if train.accumulate == 1 else f" in {train.accumulate} micro-batches"
    lines.append(
        f"training: {train.max_steps:,} steps of {train.batch_size} images{parts} = {num_images:,} images "
        f"= {epochs:.2f} epochs of {len(data.train):,}"
    )
    lines.append(f"run directory: {experiment.run.dir}, seed {experiment.run.seed}")
    return "\n\n".join(lines)


def _cost(multiply_adds: int, train: Training, parameters: Parameters) -> str:
    """What training takes, from counts alone: operations, hours on a GPU, memory before activations, disk."""
    # Two operations a multiply-add forward, and twice as many backward.
    operations = 6 * multiply_adds * train.max_steps * train.batch_size
    hours = operations / (SHARE_OF_PEAK * H100_OPERATIONS) / 3600
    # In float32: weights, gradients, two moments, and the average.
    copies = 2 + (train.ema_decay is not None)
    held = 4 * (parameters.total + (1 + copies) * parameters.trainable)
    kept = 4 * (1 + copies) * parameters.trainable
    return (
        f"training takes {operations:.2g} operations at full length: {hours:.2g} hours of an H100 (bfloat16) at "
        f"{SHARE_OF_PEAK:.0%} of its peak\nmemory before activations {_gib(held)}; a checkpoint {_gib(kept)}, of which "
        f"{train.keep_last} are kept"
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.2g} GiB"


def _parameter_rows(rows: list[Parameters]) -> list[tuple[str, ...]]:
    return [(row.part, f"{row.trainable:,}", f"{row.frozen:,}", f"{row.total:,}") for row in rows if row.total]


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    cells = [header, *rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return "".join(
        "\n  " + "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
        for row in cells
    )
