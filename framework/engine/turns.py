"""Taking a turn: one optimizer's share of a step, from losses to moved weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor
from torch.nn import Parameter

from framework.data.interface import Batch
from framework.engine.frozen import frozen_modules
from framework.engine.optimizers import Optimizer
from framework.engine.schedules import Schedule
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


def share_parameters(task: Task) -> dict[str, NamedParameters]:
    """Which parameters each turn trains, by the turn's name; frozen ones are left out.

    Raises:
        ValueError: if a turn trains nothing, or a trainable parameter belongs to no turn or to several.
    """
    frozen = {id(p) for module in frozen_modules(task).values() for p in module.parameters()}
    trainable = [(n, p) for n, p in task.named_parameters() if p.requires_grad and id(p) not in frozen]
    shares: dict[str, NamedParameters] = {turn.name: [] for turn in task.turns}
    for name, parameter in trainable:
        owners = [t.name for t in task.turns if any(fnmatchcase(name, glob) for glob in t.parameters)]
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
    ) -> None:
        self.turn = turn
        self.parameters = parameters
        self.others = others
        self.optimizer = optimizer
        self.schedule = schedule
        self.clip_norm = clip_norm
        self.autocast = autocast

    def take(self, task: Task, batch: Batch, context: Context) -> dict[str, float]:
        """Move the turn's weights once; returns its numbers by name.

        Raises:
            NonFiniteError: if a loss or the gradients' norm is not finite, before anything but buffers has changed.
        """
        self.optimizer.zero_grad()
        self._let_others_learn(False)
        try:
            with torch.autocast(batch.images.device.type, torch.bfloat16, enabled=self.autocast):
                output = task(batch, self.turn.name, context)
            losses = torch.stack([loss.float() for loss in output.losses.values()])
            losses.sum().backward()
        finally:
            self._let_others_learn(True)
        gradients = [p.grad for _, p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        *values, norm_value = torch.cat([losses.detach(), norm[None]]).tolist()  # the step's one wait for the device
        named = dict(zip(output.losses, values, strict=True))
        if not all(map(math.isfinite, (*values, norm_value))):
            raise NonFiniteError(context.step, self.turn.name, self._problem(named), batch.keys)
        if self.clip_norm is not None and norm_value > self.clip_norm:
            torch.nn.utils.clip_grads_with_norm_([p for _, p in self.parameters], self.clip_norm, norm)
        self.optimizer.scale_lr(self.schedule(context.step))
        self.optimizer.step()
        metrics = {name: float(value) for name, value in output.metrics.items()}
        return {"loss": math.fsum(values), **named, **metrics, "gradient_norm": norm_value}

    def _let_others_learn(self, allowed: bool) -> None:
        for parameter in self.others:
            parameter.requires_grad_(allowed)

    def _problem(self, losses: dict[str, float]) -> str:
        bad = [f"{name} is {value}" for name, value in losses.items() if not math.isfinite(value)]
        if bad:
            return "of the losses, " + ", ".join(bad)
        names = [name for name, p in self.parameters if p.grad is not None and not _is_finite(p.grad)]
        return f"the losses are finite, and the gradients of {len(names)} parameters are not, first {names[:3]}"


def _is_finite(value: Tensor) -> bool:
    return bool(value.isfinite().all())
