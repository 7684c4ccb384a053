"""The policy of AdaTok: the image's features, read once, say how many tokens it keeps.

Shapes: b batch, f image features, g candidate budgets, n tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from framework.allocation.search import candidate_budgets
from framework.nn.transformer import init_linear
from framework.tokenizers.interface import POLICIES, Allocation, AllocationPolicy, AllocationRequest


@POLICIES.register()
class LearnedPolicy(AllocationPolicy):
    """A categorical distribution over budgets from pooled features (AdaTok, section 4.2); the most likely is used.

    Features are layer-normalised, then standardised over images: what images have in common is far larger than what
    tells them apart, and without the second step policies often end at one length for all. The last layer starts at
    zero, so that every image starts with all budgets equally likely. It computes in float32 whatever the tokenizer's
    precision.

    Args:
        budgets: candidate lengths, increasing; a number for every length from it to n, ``null`` from 1.
        width: of the hidden layers.
        depth: number of hidden layers.
        num_tokens: n.
        feature_dim: f.

    Raises:
        ValueError: if the budgets are not increasing or not within 1 to n.
    """

    def __init__(
        self,
        budgets: list[int] | int | None = None,
        width: int = 128,
        depth: int = 2,
        *,
        num_tokens: int,
        feature_dim: int,
    ) -> None:
        super().__init__()
        self.budgets = candidate_budgets(budgets, num_tokens)
        # Neither step has weights to learn: the second undoes those of the first in training, where they would drift,
        # and in use it has the means over all of training, which would not know of the drift.
        normalise = nn.LayerNorm(feature_dim, elementwise_affine=False)
        standardise = nn.BatchNorm1d(feature_dim, momentum=None, affine=False)
        layers: list[nn.Module] = [normalise, standardise]
        for in_dim in [feature_dim, *[width] * depth][:depth]:
            layers += [nn.Linear(in_dim, width), nn.GELU()]
        last = nn.Linear(width if depth else feature_dim, len(self.budgets))
        self.network = nn.Sequential(*layers, last).apply(init_linear)
        nn.init.zeros_(last.weight)

    def logits(self, features: Tensor) -> Tensor:
        """Features ``(b, f)`` -> unnormalised log-probabilities of the budgets, ``(b, g)`` float32."""
        with torch.autocast(features.device.type, enabled=False):
            logits: Tensor = self.network(features.float())
        return logits

    @torch.no_grad()
    def forward(self, request: AllocationRequest) -> Allocation:
        """The most likely budget of each image, the shortest of equals; without any pass of encoder or decoder."""
        chosen = self.logits(request.features).argmax(dim=1)
        return Allocation(torch.tensor(self.budgets, device=chosen.device)[chosen])
