"""Training an autoencoder whose latents or codes are a space for tokenizers: AutoencoderKL, or a VQGAN.

Shapes: b batch.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from framework.data.interface import Batch
from framework.evaluation.autoencoder_report import evaluate_autoencoder
from framework.evaluation.image_metrics import squared_error
from framework.losses.adversarial import AdversarialLoss
from framework.losses.interface import Loss
from framework.tasks.interface import TASKS, Context, Report, StepOutput, Turn
from framework.tasks.reconstruction_task import ReconstructionTask
from framework.tokenizers.interface import ImageSpace


@TASKS.register()
class TrainAutoencoder(ReconstructionTask):
    """Images through the bottleneck and back, with the bottleneck's own losses (VQGAN, LDM).

    The configuration has no ``tokenizer:``. One that names the run as the ``weights`` of its input space takes the
    autoencoder from it.

    Args:
        autoencoder: what is trained.
        losses: named losses on images, which with the bottleneck's are minimised.
        adversarial: a discriminator that is trained in a second turn; ``null`` for none.

    Raises:
        ValueError: if there are no losses, or the space has nothing to train.
    """

    turns: tuple[Turn, ...] = (Turn("autoencoder"),)

    def __init__(
        self, autoencoder: ImageSpace, losses: dict[str, Loss], adversarial: AdversarialLoss | None = None
    ) -> None:
        super().__init__(losses, adversarial)
        if not losses:
            raise ValueError("a task without losses trains nothing: set task.losses to {pixel: {name: PixelLoss}}")
        if not any(parameter.requires_grad for parameter in autoencoder.parameters()):
            raise ValueError(f"{type(autoencoder).__name__} has nothing to train: take AutoencoderKL, and not frozen")
        self.autoencoder = autoencoder

    @property
    def model(self) -> ImageSpace:
        """The autoencoder."""
        return self.autoencoder

    def forward(self, batch: Batch, turn: str, context: Context) -> StepOutput:
        """Losses of reconstructions through the bottleneck, whose noise is drawn from the generator ``noise``."""
        if turn == "discriminator":
            return self.discriminate(batch)
        result = self.autoencoder.reconstruct(batch.images, context.generator("noise"))
        losses, metrics = self.judge(result.images, batch.images, result.losses, context)
        return StepOutput(losses | result.losses, result.metrics | metrics)

    def validate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Mean squared error on [0, 1] of images that go through without noise."""
        space = self.autoencoder
        errors: list[Tensor] = []
        for batch in batches:
            rebuilt = space.decode(space.encode(batch.images)).clamp(0, 1)
            errors.append(squared_error(batch.images, rebuilt))
        return {"mse": torch.cat(errors).double().mean().item()}

    def report(self, wanted: Report) -> None:
        """Errors, the spread of the latents, and pictures."""
        if wanted.measures.lengths is not None:
            raise ValueError("an autoencoder's images have one length: leave out --lengths and evaluation.lengths")
        evaluate_autoencoder(
            self.autoencoder,
            wanted.data,
            wanted.folder,
            wanted.record,
            wanted.measures,
            wanted.limit,
            wanted.progress,
        )
