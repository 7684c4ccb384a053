"""What tasks that train networks to rebuild images have in common: losses on pixels, and a discriminator's turn.

Shapes: b batch.
"""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import torch
from torch import Tensor, nn

from framework.data.interface import Batch
from framework.losses.adversarial import AdversarialLoss
from framework.losses.interface import Loss
from framework.tasks.interface import Context, StepOutput, Task, Turn

Values = dict[str, Tensor]


class ReconstructionTask(Task):
    """Named losses on reconstructions, and a second turn where there is a discriminator.

    A subclass has one turn, by the name of the attribute that holds what it trains.

    Args:
        losses: named losses on images.
        adversarial: a discriminator that is trained in a second turn, ``discriminator``, on the images and
            reconstructions of the first, and what those learn from it; ``None`` for none.
    """

    def __init__(self, losses: dict[str, Loss], adversarial: AdversarialLoss | None) -> None:
        super().__init__()
        self.losses = nn.ModuleDict(losses)
        self.adversarial = adversarial
        if adversarial is not None:
            (first,) = self.turns
            first = replace(first, parameters=(f"{first.name}.*", "losses.*", "value_losses.*"))
            self.turns = (first, Turn("discriminator", ("adversarial.*",), start=adversarial.start))
        self._rebuilt: deque[Tensor] = deque()  # from a step's micro-batches, for its second turn

    def judge(self, rebuilt: Tensor, images: Tensor, others: Values, context: Context) -> tuple[Values, Values]:
        """The losses on reconstructions by name, and numbers to log.

        Args:
            rebuilt: ``(b, 3, h, w)`` in about [0, 1], with the graph that made them.
            images: ``(b, 3, h, w)`` in [0, 1].
            others: losses that the same step minimises besides; an adaptive adversarial weight counts them in.
        """
        losses: Values = {name: loss(rebuilt, images) for name, loss in self.losses.items()}
        if self.adversarial is None or context.step < self.adversarial.start:
            return losses, {}
        total = torch.stack([*losses.values(), *others.values()]).sum()
        losses["adversarial"], metrics = self.adversarial.deceive(rebuilt, total)
        self._rebuilt.append(rebuilt.detach())
        return losses, metrics

    def discriminate(self, batch: Batch) -> StepOutput:
        """The second turn, which draws nothing: it judges what the first has just rebuilt of the same images."""
        assert self.adversarial is not None, "without a discriminator there is no second turn"
        return StepOutput(*self.adversarial.discriminate(self._rebuilt.popleft(), batch.images))

    def alarms(self) -> dict[str, str]:
        """A discriminator that wins, an adaptive weight that explodes."""
        return {} if self.adversarial is None else self.adversarial.alarms()
