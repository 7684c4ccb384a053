"""Training a tokenizer: draw lengths, reconstruct from the kept tokens, compare.

Shapes: b batch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from framework.data.interface import Batch
from framework.evaluation.codebook import CodebookStatistics
from framework.evaluation.rate_distortion import validation_errors
from framework.evaluation.report import compare_tokenizers, evaluate_tokenizer
from framework.losses.adversarial import AdversarialLoss
from framework.losses.interface import Loss
from framework.tasks.interface import TASKS, Context, Report, StepOutput, Task, Turn
from framework.tokenizers.tokenizer import Tokenizer


@TASKS.register()
class TrainTokenizer(Task):
    """Reconstruction from prefixes whose lengths the tokenizer's masking schedule draws (AdaTok, stage one).

    Args:
        losses: named losses on images; their weighted sum and the quantizer's losses are minimised.
        adversarial: a discriminator that is trained in a second turn, ``discriminator``, on the images and
            reconstructions of the first, and what the tokenizer learns from it; ``null`` for none.
        tokenizer: what is trained.

    Raises:
        ValueError: if there are no losses.
    """

    turns: tuple[Turn, ...] = (Turn("tokenizer"),)

    def __init__(
        self, losses: dict[str, Loss], adversarial: AdversarialLoss | None = None, *, tokenizer: Tokenizer
    ) -> None:
        super().__init__()
        if not losses:
            raise ValueError("a task without losses trains nothing: set task.losses to {pixel: {name: PixelLoss}}")
        self.tokenizer = tokenizer
        self.losses = nn.ModuleDict(losses)
        self.adversarial = adversarial
        if adversarial is not None:
            second = Turn("discriminator", ("adversarial.*",), start=adversarial.start)
            self.turns = (Turn("tokenizer", ("tokenizer.*", "losses.*")), second)
        self._rebuilt: deque[Tensor] = deque()  # from a step's micro-batches, for its second turn

    @property
    def model(self) -> Tokenizer:
        """The tokenizer."""
        return self.tokenizer

    def forward(self, batch: Batch, turn: str, context: Context) -> StepOutput:
        """Losses at lengths drawn from the generator ``lengths``, with the quantizer's noise from ``noise``.

        The second turn draws nothing: it judges what the first has just rebuilt of the same images.
        """
        if self.adversarial is not None and turn == "discriminator":
            return StepOutput(*self.adversarial.discriminate(self._rebuilt.popleft(), batch.images))
        lengths = self.tokenizer.draw_lengths(len(batch.images), context.progress, context.generator("lengths"))
        result = self.tokenizer(batch.images, lengths.to(batch.images.device), context.generator("noise"))
        losses: dict[str, Tensor] = {name: loss(result.images, batch.images) for name, loss in self.losses.items()}
        metrics = {f"quantizer_{name}": value for name, value in result.quantizer_metrics.items()}
        if self.adversarial is not None and context.step >= self.adversarial.start:
            others = torch.stack(list(losses.values())).sum()
            losses["adversarial"], factor = self.adversarial.deceive(result.images, others)
            metrics |= factor
            self._rebuilt.append(result.images.detach())
        losses |= {f"quantizer_{name}": value for name, value in result.quantizer_losses.items()}
        if (usage := self.tokenizer.quantizer.usage) is not None:
            metrics |= {f"quantizer_{name}": value for name, value in usage.metrics().items()}
        return StepOutput(losses, {"mean_length": lengths.double().mean()} | metrics)

    def alarms(self) -> dict[str, str]:
        """A codebook that has collapsed, a discriminator that wins."""
        usage = self.tokenizer.quantizer.usage
        alarm = None if usage is None else usage.alarm()
        told = {} if alarm is None else {"codebook": alarm}
        return told if self.adversarial is None else told | self.adversarial.alarms()

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
            wanted.train_data,
            wanted.lengths,
            wanted.limit,
            wanted.progress,
        )

    @classmethod
    def compare(cls, tasks: Mapping[str, TrainTokenizer], wanted: Report) -> None:
        """Errors at several lengths, beside principal components."""
        tokenizers = {name: task.tokenizer for name, task in tasks.items()}
        compare_tokenizers(
            tokenizers, wanted.data, wanted.folder, wanted.train_data, wanted.lengths, wanted.limit, wanted.progress
        )
