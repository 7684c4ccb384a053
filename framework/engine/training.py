"""The settings of training: the YAML node ``train:``."""

from __future__ import annotations

from typing import Literal

import torch

from framework.config.registry import Factory
from framework.engine.checkpoint import Best
from framework.engine.init_from import InitFrom
from framework.engine.optimizers import Optimizer
from framework.engine.schedules import Schedule
from framework.runtime.precision import has_fast_bfloat16


class Training:
    """How long, how fast and how carefully to train: the YAML node ``train:``.

    Args:
        max_steps: optimizer steps of the whole run.
        batch_size: images a step, of all processes that train together.
        optimizer: of every turn that has none of its own.
        schedule: factor on the learning rates, step by step.
        turn_optimizers: optimizers by turn name, such as ``{discriminator: {name: AdamW, lr: 1e-4}}``.
        clip_norm: gradients of a turn whose norm is larger are scaled down to it; ``null`` for no clipping.
        precision: of matrix products and the like (autocast); weights and averages stay float32. ``auto`` takes
            bfloat16 where the machine has instructions for it, else float32; the log and ``run.json`` say which.
        ema_decay: decay a step of the weights' moving average, in [0, 1); ``null`` for none.
        log_every: steps between lines of metrics; losses are means over these steps.
        validate_every: steps between validations, with averaged weights where there are some.
        validate_images: how many held-out images a validation reads, always the same random ones.
        checkpoint_every: steps between checkpoints.
        keep_last: how many verified checkpoints stay on disk.
        best: also keep the best checkpoint by a metric of validations, such as ``{metric: validation/mse@16}``; one is
            saved whenever a validation improves on it.
        accumulate: equal micro-batches that a process's images are split into, to fit memory; token sequences by
            length, about as many tokens in each, which spares padding. The step is that of the whole batch, to the
            rounding of floats, where losses are means over images and random numbers are drawn for each image.
        recompute: activation checkpointing: keep the transformer blocks' inputs only, and compute what lies between
            again going backward; the same numbers for less memory and about a third more time.
        compile: compile the transformer blocks (torch.compile); takes a minute at each start and changes last bits.
        freeze: globs over the task's parameters that are not trained. They stay in checkpoints and in the average,
            unlike a part with ``frozen: true``, and their modules in training mode.
        init_from: another run whose weights this one starts from.

    Raises:
        ValueError: if a count is below 1, ``clip_norm`` not positive, or ``batch_size`` no multiple of ``accumulate``.
    """

    def __init__(
        self,
        max_steps: int,
        batch_size: int,
        optimizer: Factory[Optimizer],
        schedule: Factory[Schedule],
        turn_optimizers: dict[str, Factory[Optimizer]] | None = None,
        clip_norm: float | None = 1.0,
        precision: Literal["auto", "float32", "bfloat16"] = "float32",
        ema_decay: float | None = 0.999,
        log_every: int = 20,
        validate_every: int = 250,
        validate_images: int = 512,
        checkpoint_every: int = 500,
        keep_last: int = 2,
        best: Best | None = None,
        accumulate: int = 1,
        recompute: bool = False,
        compile: bool = False,
        freeze: tuple[str, ...] = (),
        init_from: InitFrom | None = None,
    ) -> None:
        self.max_steps = max_steps
        self.batch_size = batch_size
        self.log_every = log_every
        self.validate_every = validate_every
        self.validate_images = validate_images
        self.checkpoint_every = checkpoint_every
        self.keep_last = keep_last
        self.accumulate = accumulate
        for name, count in vars(self).items():
            if count < 1:
                raise ValueError(f"train.{name} must be at least 1, got {count}")
        if clip_norm is not None and clip_norm <= 0:
            raise ValueError(f"train.clip_norm must be positive, or null for no clipping; got {clip_norm}")
        if batch_size % accumulate:
            raise ValueError(
                f"train.batch_size must be a multiple of train.accumulate, got {batch_size} images in {accumulate} "
                f"micro-batches: the nearest are {batch_size - batch_size % accumulate or accumulate} images"
            )
        self.optimizer = optimizer
        self.schedule = schedule
        self.turn_optimizers = turn_optimizers or {}
        self.clip_norm = clip_norm
        self.precision = precision
        self.ema_decay = ema_decay
        self.best = best
        self.recompute = recompute
        self.compile = compile
        self.freeze = freeze
        self.init_from = init_from

    def dtype(self, device: torch.device) -> torch.dtype:
        """What matrix products are computed in on a device."""
        chosen = self.precision
        if chosen == "auto":
            chosen = "bfloat16" if has_fast_bfloat16(device) else "float32"
        return torch.bfloat16 if chosen == "bfloat16" else torch.float32
