"""Training a tokenizer: draw lengths, reconstruct from the kept tokens, compare.

Shapes: b batch, c channels of a space, h and w its grid.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from framework.data.interface import Batch, ImageData
from framework.evaluation.codebook import CodebookStatistics
from framework.evaluation.comparison import compare_tokenizers
from framework.evaluation.rate_distortion import validation_errors
from framework.evaluation.report import evaluate_tokenizer
from framework.losses.adversarial import AdversarialLoss
from framework.losses.interface import Loss
from framework.losses.values import ValueLoss
from framework.tasks.interface import TASKS, Context, Report, StepOutput, Turn
from framework.tasks.reconstruction_task import ReconstructionTask
from framework.tokenizers.target_cache import CachedTargets
from framework.tokenizers.tokenizer import Tokenizer


@TASKS.register()
class TrainTokenizer(ReconstructionTask):
    """Reconstruction from prefixes whose lengths the tokenizer's masking schedule draws (AdaTok, stage one).

    Args:
        losses: named losses on images, which with those on values and the quantizer's are minimised. ``null`` for
            none: then the output space need not decode.
        adversarial: a discriminator that is trained in a second turn, ``discriminator``, on the images and
            reconstructions of the first, and what the tokenizer learns from it; ``null`` for none.
        value_losses: named losses before the output space's decoder: on latents of a frozen autoencoder, or on the
            codes of a VQGAN.
        cache_looks: how often each training image, every time in another draw of its augmentation, is encoded in the
            output space before training, so that no step encodes any; these looks take turns from epoch to epoch. 0
            encodes in every step.
        tokenizer: what is trained.

    Raises:
        ValueError: if there are no losses, or losses on values or their cache have no frozen space.
    """

    turns: tuple[Turn, ...] = (Turn("tokenizer"),)

    def __init__(
        self,
        losses: dict[str, Loss] | None = None,
        adversarial: AdversarialLoss | None = None,
        value_losses: dict[str, ValueLoss] | None = None,
        cache_looks: int = 0,
        *,
        tokenizer: Tokenizer,
    ) -> None:
        super().__init__(losses or {}, adversarial)
        if not losses and not value_losses:
            raise ValueError(
                "a task without losses trains nothing: set task.losses to {pixel: {name: PixelLoss}}, or "
                "task.value_losses to {latent: {name: LatentLoss}}"
            )
        self.tokenizer = tokenizer
        self.value_losses = nn.ModuleDict(value_losses or {})
        self.cache_looks = cache_looks
        space = tokenizer.output_space
        learns = any(p.requires_grad for p in space.parameters()) and not getattr(space, "is_frozen", False)
        if self.value_losses and learns:
            raise ValueError(
                f"losses on values compare with what {type(space).__name__} says of an image, which must not change: "
                "set frozen=true beside the weights of the output space"
            )
        if cache_looks < 0 or (cache_looks and (space.is_lossless or not self.value_losses)):
            raise ValueError(
                f"task.cache_looks={cache_looks}: a number of looks from 1 keeps what losses on values in a frozen "
                "autoencoder's space compare with; elsewhere there is nothing to keep, and it is 0"
            )

    @property
    def model(self) -> Tokenizer:
        """The tokenizer."""
        return self.tokenizer

    @property
    def _in_one_space(self) -> bool:
        """Whether what the output space says of an image is also what the encoder reads."""
        return self.tokenizer.output_space is self.tokenizer.input_space

    def prepare(self, data: ImageData, cache: Path, progress: Callable[[str, int, int], None]) -> ImageData:
        """Encode the training images in the output space, or find them encoded in ``cache``."""
        if not self.cache_looks:
            return data

        def tell(done: int, total: int) -> None:
            progress("encoding the training images", done, total)

        needs_images = bool(self.losses) or self.adversarial is not None or not self._in_one_space
        space = self.tokenizer.output_space
        return CachedTargets.cached(cache, space, data, self.cache_looks, needs_images, tell)

    def forward(self, batch: Batch, turn: str, context: Context) -> StepOutput:
        """Losses at lengths drawn from the generator ``lengths``, with the quantizer's noise from ``noise``."""
        if turn == "discriminator":
            return self.discriminate(batch)
        tokenizer = self.tokenizer
        lengths = tokenizer.draw_lengths(len(batch.images), context.progress, context.generator("lengths"))
        values, target = self._known(batch)
        result = tokenizer.reconstruct(values, lengths.to(values.device), context.generator("noise"))
        losses: dict[str, Tensor] = {name: loss(result.values, target) for name, loss in self.value_losses.items()}
        metrics = {f"quantizer_{name}": value for name, value in result.quantizer_metrics.items()}
        if self.losses or self.adversarial is not None:
            more, factor = self.judge(result.images, batch.images, losses, context)
            losses, metrics = losses | more, metrics | factor
        losses |= {f"quantizer_{name}": value for name, value in result.quantizer_losses.items()}
        if (usage := tokenizer.quantizer.usage) is not None:
            metrics |= {f"quantizer_{name}": value for name, value in usage.metrics().items()}
        return StepOutput(losses, {"mean_length": lengths.double().mean()} | metrics)

    def _known(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """What the encoder reads, ``(b, c, h, w)``, and what losses on values compare with; no image is read twice."""
        space, target = self.tokenizer.output_space, batch.target
        if target is None and self.value_losses:
            with torch.no_grad():
                target = space.target(batch.images)
        if target is not None and self._in_one_space:
            return space.from_target(target), target
        return self.tokenizer.input_space.encode(batch.images), target

    def alarms(self) -> dict[str, str]:
        """A codebook that has collapsed, a discriminator that wins."""
        usage = self.tokenizer.quantizer.usage
        alarm = None if usage is None else usage.alarm()
        return ({} if alarm is None else {"codebook": alarm}) | super().alarms()

    def validate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Mean squared error on [0, 1] at the shortest, a middle and the full length, and how codes are used."""
        tokenizer = self.tokenizer
        if tokenizer.quantizer.vocabulary is None:
            return validation_errors(tokenizer, batches)
        codebook = CodebookStatistics(tokenizer.num_tokens, tokenizer.quantizer.vocabulary)
        errors = validation_errors(tokenizer, codebook.counting(tokenizer, batches))
        overall, lowest = codebook.overall(), min(codebook.per_position()["perplexity"])
        used = {name: overall[name] for name in ("usage", "perplexity")}
        return errors | used | {"perplexity_lowest_position": lowest}

    def report(self, wanted: Report) -> None:
        """Rate-distortion numbers, plots and pictures."""
        evaluate_tokenizer(
            self.tokenizer,
            wanted.data,
            wanted.folder,
            wanted.record,
            wanted.baseline_data,
            wanted.measures,
            wanted.limit,
            wanted.progress,
        )

    @classmethod
    def compare(cls, tasks: Mapping[str, TrainTokenizer], wanted: Report) -> None:
        """Errors at several lengths, beside principal components."""
        tokenizers = {name: task.tokenizer for name, task in tasks.items()}
        compare_tokenizers(
            tokenizers,
            wanted.data,
            wanted.folder,
            wanted.baseline_data,
            wanted.measures,
            wanted.limit,
            wanted.progress,
        )
