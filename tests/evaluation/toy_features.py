"""Features that cost nothing: colours of an image's quarters, and three logits of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from framework.evaluation.distribution_features import DistributionFeatures, Extracted


class ToyFeatures(DistributionFeatures):
    title = "colours of quarters"
    metric = "fd_toy"
    suffix = "_toy"
    dim = 12
    resize = "none"

    def __init__(self, gain: float = 1.0) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(gain))
        self.dropout = nn.Dropout()  # wrong numbers, should it ever be in training mode

    def extract(self, images: Tensor) -> Extracted:
        features = self.dropout(self.gain * adaptive_avg_pool2d(images.float() / 255, 2).flatten(1))
        return Extracted(features, 8 * features[:, :3])


class LikeInception(ToyFeatures):
    """Reads files that do not say whose features they hold."""

    metric = "fid"
    suffix = ""
