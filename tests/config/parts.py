"""A small world of components for the tests: a model of an encoder and a quantizer, losses and training options."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from torch import nn

from framework.config import Factory, Registry


class Quantizer(nn.Module):
    dim: int


class Encoder(nn.Module):
    pass


class Loss:
    pass


QUANTIZERS = Registry("quantizer", Quantizer)
ENCODERS = Registry("encoder", Encoder)
LOSSES = Registry("loss", Loss)


@QUANTIZERS.register()
class Identity(Quantizer):
    """Passes latents through."""


@QUANTIZERS.register()
class VQ(Quantizer):
    """A codebook.

    Args:
        dim: channels of a token.
    """

    def __init__(self, dim: int, codebook_size: int = 1024, decay: float = 0.99) -> None:
        super().__init__()
        if dim > codebook_size:
            raise ValueError(f"dim {dim} exceeds codebook_size {codebook_size}")
        self.dim, self.codebook_size, self.decay = dim, codebook_size, decay
        self.codebook = nn.Embedding(codebook_size, dim)


@QUANTIZERS.register()
class FSQ(Quantizer):
    def __init__(self, levels: list[int]) -> None:
        super().__init__()
        self.levels = levels
        self.dim = len(levels)


@QUANTIZERS.register()
class NeedsParent(Quantizer):
    def __init__(self, *, vocabulary: int) -> None:
        super().__init__()


@ENCODERS.register()
class ViT(Encoder):
    """A vision transformer."""

    def __init__(
        self, width: int = 128, depth: int = 2, norm: Literal["layer", "rms"] = "layer", *, out_dim: int
    ) -> None:
        super().__init__()
        if width < depth:
            raise ValueError("width is smaller than depth")
        self.width, self.depth, self.norm, self.out_dim = width, depth, norm, out_dim
        self.layer = nn.Linear(width, out_dim)


@ENCODERS.register()
class Stubborn(Encoder):
    def __init__(self, width: int = 1) -> None:
        super().__init__()


@LOSSES.register()
class PixelLoss(Loss):
    def __init__(self, weight: float = 1.0, frozen: bool = False) -> None:
        self.weight, self.frozen = weight, frozen


class Schedule:
    def __init__(self, warmup: int = 0, betas: tuple[float, float] = (0.9, 0.95)) -> None:
        self.warmup, self.betas = warmup, betas


class Training:
    def __init__(
        self,
        max_steps: int,
        lr: float = 1e-4,
        amp: bool = False,
        precision: int | Literal["auto"] = "auto",
        schedule: Schedule = Schedule(),  # noqa: B008  immutable by convention: the default of an unnamed part
        lengths: tuple[int, ...] = (),
    ) -> None:
        self.max_steps, self.lr, self.amp, self.precision = max_steps, lr, amp, precision
        self.schedule, self.lengths = schedule, lengths


class Model:
    def __init__(
        self,
        encoder: Factory[Encoder],
        quantizer: Quantizer | None = None,
        teacher: Factory[Encoder] | None = None,
    ) -> None:
        self.quantizer = quantizer
        self.encoder = encoder(out_dim=quantizer.dim if quantizer else 4)
        self.teacher = teacher and teacher(out_dim=2)


class Experiment:
    def __init__(
        self,
        model: Model,
        train: Training,
        losses: dict[str, Loss] | None = None,
        extras: list[Loss] | None = None,
        folder: Path = Path("runs"),
        title: str | None = None,
    ) -> None:
        self.model, self.train, self.losses, self.extras = model, train, losses, extras
        self.folder, self.title = folder, title
