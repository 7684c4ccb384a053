"""How far a reconstruction is from its image, one number each, which searches, rewards and error tables are made of.

Shapes: r rows, b images, g budgets.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from einops import reduce
from torch import Tensor, nn

from framework.config.registry import Registry


class Fidelity(nn.Module, ABC):
    """A distance of each reconstruction from its image; lower is better.

    A training loss averages over the batch, and a classifier (ALIT's token selection criteria) compares no images, so
    each takes a small class of one's own::

        @FIDELITIES.register()
        class LossPerImage(Fidelity):
            def __init__(self, loss: Loss) -> None:
                super().__init__()
                self.loss = loss

            def forward(self, reconstructions: Tensor, images: Tensor) -> Tensor:
                return torch.stack([self.loss(*pair) for pair in zip(reconstructions.split(1), images.split(1))])

        @FIDELITIES.register()
        class KeepsItsClass(Fidelity):
            def __init__(self, classifier: Classifier) -> None:
                super().__init__()
                self.classifier = classifier

            def forward(self, reconstructions: Tensor, images: Tensor) -> Tensor:
                classes = self.classifier(images).argmax(1)
                return F.cross_entropy(self.classifier(reconstructions), classes, reduction="none")

    Tables of errors are told apart by the module's ``repr``, so a setting that matters belongs into ``extra_repr``.
    """

    @abstractmethod
    def forward(self, reconstructions: Tensor, images: Tensor) -> Tensor:
        """Reconstructions and images ``(r, 3, h, w)``, both in [0, 1] -> distortions ``(r,)``."""


FIDELITIES = Registry("fidelity", Fidelity)


@FIDELITIES.register()
class SquaredError(Fidelity):
    """Mean squared error over pixels and channels in [0, 1], in float32; AdaTok's threshold of .02 is in this unit."""

    def forward(self, reconstructions: Tensor, images: Tensor) -> Tensor:
        """Reconstructions and images ``(r, 3, h, w)`` -> errors ``(r,)``."""
        return reduce((reconstructions.float() - images.float()).square(), "r c h w -> r", "mean")
