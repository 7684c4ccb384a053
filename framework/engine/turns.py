"""Taking a turn: one optimizer's share of a step, from losses to moved weights."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.profiler import record_function

from framework.data.interface import Batch
from framework.engine.frozen import frozen_modules
from framework.engine.globs import matches, unmatched
from framework.engine.meters import Phase
from framework.engine.optimizers import Optimizer
from framework.engine.schedules import Schedule
from framework.runtime.ranks import Ranks
from framework.tasks.interface import Context, Task, Turn

NamedParameters = list[tuple[str, Parameter]]


class NonFiniteError(RuntimeError):
    """A loss or a gradient is not finite; the turn's weights, their average and their optimizer have not moved.

    Attributes:
        keys: of the batch's images.
    """

    def __init__(self, step: int, turn: str, problem: str, keys: Sequence[str]) -> None:
        shown = ", ".join(keys[:8]) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
        super().__init__(f"step {step}, turn {turn!r}: {problem}; no weight was changed. The batch's images: {shown}")
        self.keys = list(keys)


def freeze(task: Task, globs: Sequence[str]) -> None:
    """Train the parameters that the globs match no further; unlike frozen parts they stay in checkpoints and averages.

    Raises:
        ValueError: if a glob matches none; says the nearest.
    """
    parameters = dict(task.named_parameters())
    if problems := unmatched(globs, parameters):
        raise ValueError("train.freeze: " + "; ".join(problems))
    for name, parameter in parameters.items():
        if matches(name, globs):
            parameter.requires_grad_(False)


def micro_batches(batch: Batch, count: int) -> list[Batch]:
    """A batch in ``count`` parts: of images equally many in their order; of tokens about equally many, by length.

    Short sequences then stand with short ones, without much padding.
    """
    if count == 1:
        return [batch]
    if batch.tokens is None:
        size = len(batch.images) // count
        return [batch.select(range(start, start + size)) for start in range(0, size * count, size)]
    lengths, rows = batch.tokens.lengths.sort(stable=True)
    tokens = lengths.cumsum(0)
    cuts = [0]
    for part in range(1, count):
        cut = int(torch.searchsorted(tokens, tokens[-1] * part / count, right=True))
        cuts.append(min(max(cut, cuts[-1] + 1), len(rows) - count + part))  # at least one row in each
    return [batch.select(rows[a:b].tolist()) for a, b in pairwise([*cuts, len(rows)])]


def share_parameters(task: Task) -> dict[str, NamedParameters]:
    """Which parameters each turn trains, by the turn's name; frozen ones are left out.

    Raises:
        ValueError: if a turn trains nothing, or a trainable parameter belongs to no turn or to several.
    """
    frozen = {id(p) for module in frozen_modules(task).values() for p in module.parameters()}
    trainable = [(n, p) for n, p in task.named_parameters() if p.requires_grad and id(p) not in frozen]
    shares: dict[str, NamedParameters] = {turn.name: [] for turn in task.turns}
    for name, parameter in trainable:
        owners = [t.name for t in task.turns if matches(name, t.parameters)]
        if len(owners) != 1:
            count = f"several turns ({', '.join(owners)})" if owners else f"no turn of {', '.join(shares)}"
            raise ValueError(f"{type(task).__name__}: {count} would train {name}; exactly one must, or freeze it")
        shares[owners[0]].append((name, parameter))
    for turn in task.turns:
        if not shares[turn.name]:
            globs = ", ".join(turn.parameters)
            raise ValueError(f"{type(task).__name__}: turn {turn.name!r} trains nothing: no parameter matches {globs}")
    return shares


class TurnTraining:
    """A turn with all that it takes to train its parameters.

    Args:
        turn: when it is taken.
        parameters: what it trains.
        others: what other turns train; no gradient reaches them meanwhile.
        optimizer: over ``parameters``.
        schedule: factor on the learning rates.
        clip_norm: largest norm of all gradients together; ``None`` for no limit.
        autocast: compute in bfloat16 what bears it.
        ranks: who else takes the turn on other images; gradients are means over all of them.
    """

    def __init__(
        self,
        turn: Turn,
        parameters: NamedParameters,
        others: list[Parameter],
        optimizer: Optimizer,
        schedule: Schedule,
        clip_norm: float | None,
        autocast: bool,
        ranks: Ranks,
    ) -> None:
        self.turn = turn
        self.parameters = parameters
        self.others = others
        self.optimizer = optimizer
        self.schedule = schedule
        self.clip_norm = clip_norm
        self.autocast = autocast
        self.ranks = ranks

    def take(
        self, task: Task, batches: Sequence[Batch], context: Context, phase: Phase = record_function
    ) -> dict[str, float]:
        """Move the turn's weights once, by the mean gradient of all micro-batches on all ranks; returns mean numbers.

        Args:
            task: whose turn it is.
            batches: one after the other, as much as memory holds.
            context: of the step.
            phase: entered around ``forward``, ``backward``, ``communication`` and ``optimizer``.

        Raises:
            NonFiniteError: on every rank, if a loss or the gradients' norm is not finite on any, before anything but
                buffers has changed.
        """
        self.optimizer.zero_grad()
        self._let_others_learn(False)
        names: list[tuple[list[str], list[str]]] = []  # of losses and of metrics, by micro-batch
        counts: list[Tensor] = []  # of targets, likewise, where the task counts them
        numbers: list[Tensor] = []
        weights: list[Tensor] = []  # of each number in its mean
        try:
            for batch in batches:
                with phase("forward"):
                    with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=self.autocast):
                        output = task(batch, self.turn.name, context)
                    losses = torch.stack([loss.float() for loss in output.losses.values()])
                with phase("backward"):
                    count = losses.new_ones(()) if output.count is None else output.count.to(losses)
                    share = 1 / len(batches) if output.count is None else count
                    (losses.sum() * share).backward()
                counts += [] if output.count is None else [count]
                others = {**output.metrics, **output.image_metrics}
                names.append((list(output.losses), list(others)))
                numbers.append(losses.detach().double())
                numbers += [metric.detach().reshape(1).to(losses.device).double() for metric in others.values()]
                weights.append(count.double().expand(len(output.losses) + len(output.metrics)))
                weights.append(numbers[0].new_full((len(output.image_metrics),), len(batch.keys)))
        finally:
            self._let_others_learn(True)
        own, weight = torch.cat(numbers), torch.cat(weights)
        shared, total = own * weight, torch.stack(counts).sum() if counts else None
        if self.ranks.size > 1:
            with phase("communication"):
                self.ranks.average([*self._shared_gradients(), shared, weight, *([] if total is None else [total])])
        with phase("optimizer"):
            gradients = [p.grad for _, p in self.parameters if p.grad is not None]
            if total is not None:
                torch._foreach_div_(gradients, total)
            norm = torch.nn.utils.get_total_norm(gradients)
            # The step's one wait for the device.
            *values, norm_value = torch.cat([own, shared, weight, norm[None].double()]).tolist()
            own_values, sums, shares = (values[start : start + len(own)] for start in range(0, len(values), len(own)))
            rows = _rows(sums, names)
            if not all(map(math.isfinite, [norm_value, *(loss for losses, _ in rows for loss in losses.values())])):
                raise self._error([losses for losses, _ in _rows(own_values, names)], batches, context.step)
            if self.clip_norm is not None and norm_value > self.clip_norm:
                torch.nn.utils.clip_grads_with_norm_([p for _, p in self.parameters], self.clip_norm, norm)
            self.optimizer.scale_lr(self.schedule(context.step))
            self.optimizer.step()
        return _means(rows, _rows(shares, names)) | {"gradient_norm": norm_value}

    def _shared_gradients(self) -> list[Tensor]:
        """Gradients of the parameters that have one on any rank, zeros where it is not this one."""
        present = torch.tensor([p.grad is not None for _, p in self.parameters], dtype=torch.float32)
        self.ranks.average([present])
        for (_, parameter), share in zip(self.parameters, present.tolist(), strict=True):
            if share and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [p.grad for _, p in self.parameters if p.grad is not None]

    def _let_others_learn(self, allowed: bool) -> None:
        for parameter in self.others:
            parameter.requires_grad_(allowed)

    def _error(self, rows: Sequence[Mapping[str, float]], batches: Sequence[Batch], step: int) -> NonFiniteError:
        """What is not finite, on the first rank that knows, and the keys of the micro-batches that brought it."""
        bad = [{name: value for name, value in row.items() if not math.isfinite(value)} for row in rows]
        told = [f"{name} is {value}" for row in bad for name, value in row.items()]
        keys = [key for batch, row in zip(batches, bad, strict=True) if row or not told for key in batch.keys]
        every = self.ranks.gather(("of the losses, " + ", ".join(dict.fromkeys(told)) if told else "", keys))
        for rank, (problem, its_keys) in enumerate(every):
            if problem:
                where = f"on rank {rank}, " if self.ranks.size > 1 else ""
                return NonFiniteError(step, self.turn.name, where + problem, its_keys)
        names = [name for name, p in self.parameters if p.grad is not None and not _is_finite(p.grad)]
        problem = f"the losses are finite, and the gradients of {len(names)} parameters are not, first {names[:3]}"
        return NonFiniteError(step, self.turn.name, problem, [key for _, its_keys in every for key in its_keys])


Rows = list[tuple[dict[str, float], dict[str, float]]]
"""Losses and metrics by name, for each micro-batch."""


def _rows(values: Sequence[float], names: Sequence[tuple[list[str], list[str]]]) -> Rows:
    """Numbers in a row, as losses and metrics by name for each micro-batch."""
    left = iter(values)  # each name takes one number, and what is left goes to the next
    return [({name: next(left) for name in losses}, {name: next(left) for name in others}) for losses, others in names]


def _means(sums: Rows, weights: Rows) -> dict[str, float]:
    """Weighted sums over weights, of each name over the micro-batches that have it; and of all losses together."""
    totals: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for (losses, others), (loss_weights, other_weights) in zip(sums, weights, strict=True):
        totals["loss"].append((math.fsum(losses.values()), next(iter(loss_weights.values()))))
        for name, value in {**losses, **others}.items():
            totals[name].append((value, (loss_weights | other_weights)[name]))
    return {name: math.fsum(v for v, _ in found) / math.fsum(w for _, w in found) for name, found in totals.items()}


def _is_finite(value: Tensor) -> bool:
    return bool(value.isfinite().all())
