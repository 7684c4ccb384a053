"""How much a Gaussian posterior says: its divergence from the unit Gaussian.

Shapes: b batch, n tokens, d channels of a token.
"""

from __future__ import annotations

from torch import Tensor


class KLLoss:
    """The weighted KL divergence of diagonal Gaussians from the unit Gaussian (Kingma & Welling 2014, appendix B).

    It is in nats a token, summed over channels. The tokenizer takes its mean over the tokens that each image keeps. Two
    conventions differ from that, and so do their weights: TiTok (as LDM) sums over all N tokens of an image, whose
    1e-6 is a weight of N * 1e-6 here at full length, and times 4 more with ``PixelLoss``, whose images are scaled to
    [-1, 1]. ElasticTok sums over the kept tokens, with 1e-8.

    Args:
        weight: factor of the loss.
    """

    def __init__(self, weight: float = 1e-6) -> None:
        self.weight = weight

    def divergence(self, mean: Tensor, log_variance: Tensor) -> Tensor:
        """Means and natural logarithms of variances ``(b, n, d)`` -> nats ``(b, n)``, without the weight."""
        return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(dim=-1)
