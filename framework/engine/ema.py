"""Exponential moving average of a model's weights, which generalises better than the last step's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from framework.engine.frozen import live_state


class ExponentialMovingAverage:
    """average = decay * average + (1 - decay) * weights, over parameters and floating-point buffers.

    The decay warms up as min(decay, (1 + t) / (10 + t)) after t updates, so that the random start is soon forgotten
    (TensorFlow's rule). Integer buffers are copied, frozen parts left out.

    Args:
        module: starts the average and is followed.
        decay: in [0, 1); 0.999 looks back about a thousand steps.

    Raises:
        ValueError: if ``decay`` is outside [0, 1).
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"the decay of a moving average is at least 0 and below 1, got {decay}")
        self.decay = decay
        self.average = {name: value.clone() for name, value in live_state(module).items()}
        self._floating = [name for name, value in self.average.items() if value.is_floating_point()]
        self._other = [name for name, value in self.average.items() if not value.is_floating_point()]

    def state_dict(self) -> dict[str, Tensor]:
        """The averages, under the names of ``module.state_dict()``: they load into a model as its weights."""
        return self.average

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Continue from the averages of a checkpoint, whose names and shapes must be these."""
        for name, value in self.average.items():
            value.copy_(state[name])

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        """Take in the weights after ``step``, counted from 0."""
        weights = module.state_dict()
        decay = min(self.decay, (1 + step) / (10 + step))
        averages = [self.average[name] for name in self._floating]
        if averages:
            torch._foreach_lerp_(averages, [weights[name] for name in self._floating], 1 - decay)
        for name in self._other:
            self.average[name].copy_(weights[name])

    @contextmanager
    def swapped(self, module: nn.Module) -> Iterator[None]:
        """Inside, ``module`` holds the averages; afterwards its own weights again, bit for bit."""
        weights = module.state_dict()
        kept = {name: weights[name].clone() for name in self.average}
        try:
            _copy(self.average, weights)
            yield
        finally:
            _copy(kept, weights)


def _copy(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in source.items():
            target[name].copy_(value)
