"""Learning-rate schedules: what share of the peak a step gets. They are functions of the step alone, without state."""

from __future__ import annotations

from fvcore.common.param_scheduler import ConstantParamScheduler, CosineParamScheduler, ParamScheduler

from framework.config.registry import Registry


class Schedule:
    """A linear warm-up to 1, then a shape over the rest of the run.

    Args:
        shape: fvcore's scheduler; gets the share of the steps after the warm-up, in [0, 1).
        warmup_steps: the first step gets 1 / warmup_steps, the last of them 1; 0 for none.
        max_steps: of the run. A run shorter than its warm-up ends inside it.

    Raises:
        ValueError: if ``warmup_steps`` is negative.
    """

    def __init__(self, shape: ParamScheduler, warmup_steps: int, max_steps: int) -> None:
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps must be 0 or more, got {warmup_steps}")
        self.shape = shape
        self.warmup_steps = warmup_steps
        self.max_steps = max_steps

    def __call__(self, step: int) -> float:
        """The factor on the peak learning rate at ``step``, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return self.shape((step - self.warmup_steps) / (self.max_steps - self.warmup_steps))


SCHEDULES = Registry("schedule", Schedule)


@SCHEDULES.register()
class WarmupCosine(Schedule):
    """Half a cosine from 1 to ``end`` after the warm-up (Loshchilov and Hutter 2017, without restarts).

    Args:
        warmup_steps: steps of linear warm-up.
        end: factor that the last steps approach, in [0, 1].
        max_steps: of the run.

    Raises:
        ValueError: if ``end`` is outside [0, 1].
    """

    def __init__(self, warmup_steps: int = 100, end: float = 0.02, *, max_steps: int) -> None:
        if not 0 <= end <= 1:
            raise ValueError(f"end is a share of the peak learning rate, from 0 to 1; got {end}")
        super().__init__(CosineParamScheduler(1.0, end), warmup_steps, max_steps)


@SCHEDULES.register()
class Constant(Schedule):
    """The peak throughout, after the warm-up.

    Args:
        warmup_steps: steps of linear warm-up.
        max_steps: of the run.
    """

    def __init__(self, warmup_steps: int = 0, *, max_steps: int) -> None:
        super().__init__(ConstantParamScheduler(1.0), warmup_steps, max_steps)
