"""Rules that learn nothing: one length for all, the best length in hindsight, and a length by a score of complexity.

Shapes: b images of a batch, g budgets.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from framework.allocation.fidelity import Fidelity, SquaredError
from framework.allocation.rewards import Reward
from framework.allocation.search import Trials, candidate_budgets
from framework.tokenizers.interface import POLICIES, Allocation, AllocationPolicy, AllocationRequest

PNG_LEVEL = 6
"""The zlib level of ``png_bytes``: Pillow's and zlib's default."""


@POLICIES.register()
class FixedLength(AllocationPolicy):
    """Every image keeps the same number of tokens.

    Args:
        length: tokens kept, from 1 to n.
        num_tokens: n of the tokenizer.
        feature_dim: not read.
    """

    def __init__(self, length: int, *, num_tokens: int, feature_dim: int) -> None:
        super().__init__()
        self.budgets = candidate_budgets([length], num_tokens)

    def forward(self, request: AllocationRequest) -> Allocation:
        images = request.images
        return Allocation(torch.full((len(images),), self.budgets[0], device=images.device))


@POLICIES.register()
class OracleAllocation(AllocationPolicy):
    """Decodes every image at every budget and takes the one with the best reward; the shorter one where two are equal.

    No rule can do better on that reward, and none is dearer: g trials of each image.

    Args:
        reward: what is best.
        fidelity: how a reconstruction is measured; ``SquaredError`` unless given.
        budgets: lengths to choose from, increasing; a number for every length from it to n, ``null`` from 1.
        num_tokens: n of the tokenizer.
        feature_dim: not read.
    """

    def __init__(
        self,
        reward: Reward,
        fidelity: Fidelity | None = None,
        budgets: list[int] | int | None = None,
        *,
        num_tokens: int,
        feature_dim: int,
    ) -> None:
        super().__init__()
        self.reward = reward
        self.fidelity = fidelity or SquaredError()
        self.budgets = candidate_budgets(budgets, num_tokens)
        self.num_tokens = num_tokens

    @torch.no_grad()
    def forward(self, request: AllocationRequest) -> Allocation:
        trials = Trials(request, self.fidelity)
        budgets = torch.tensor(self.budgets, device=request.images.device)
        rewards = self.reward(trials.table(budgets), budgets, self.num_tokens)
        return trials.allocation(budgets[rewards.argmax(dim=1)])


@POLICIES.register()
class ComplexityLookup(AllocationPolicy):
    """A score of each image's complexity, looked up in ranges (CAT, whose scores are a language model's of captions).

    Args:
        edges: where one budget ends and the next begins, one fewer than budgets and not decreasing; a score equal to
            an edge keeps the shorter of the two.
        budgets: lengths, increasing.
        table: a CSV file with the columns ``key`` and ``score``; without one, scores are ``png_bytes``.
        num_tokens: n of the tokenizer.
        feature_dim: not read.

    Raises:
        ValueError: if edges, budgets or the table are not of that form.
    """

    def __init__(
        self, edges: list[float], budgets: list[int], table: Path | None = None, *, num_tokens: int, feature_dim: int
    ) -> None:
        super().__init__()
        self.budgets = candidate_budgets(budgets, num_tokens)
        if len(edges) != len(budgets) - 1 or list(edges) != sorted(edges):
            raise ValueError(f"{len(budgets)} budgets need {len(budgets) - 1} edges in increasing order, got {edges}")
        self.edges = tuple(edges)
        self.scores = None if table is None else read_scores(table)

    def forward(self, request: AllocationRequest) -> Allocation:
        if self.scores is None:
            scores = png_bytes(request.images)
        elif request.keys is None:
            raise ValueError("ComplexityLookup reads scores from a table: pass the images' names as keys")
        elif missing := [key for key in request.keys if key not in self.scores]:
            raise ValueError(f"the table of scores lacks {len(missing)} of {len(request.keys)} images: {missing[:3]}")
        else:
            scores = torch.tensor([self.scores[key] for key in request.keys], dtype=torch.float64)
        choices = torch.bucketize(scores, torch.tensor(self.edges, dtype=torch.float64))
        return Allocation(torch.tensor(self.budgets)[choices].to(request.images.device))


def quantile_edges(scores: Iterable[float], shares: Sequence[float]) -> list[float]:
    """Edges for ``ComplexityLookup`` that give each budget its share of the scored images.

    Score other images than those that it is tested on; with the shares of a learned policy, the two spend the same.

    Args:
        scores: one for each image.
        shares: one for each budget, in any unit.
    """
    quantiles = torch.tensor(shares, dtype=torch.float64).cumsum(0)[:-1] / sum(shares)
    return torch.tensor(list(scores), dtype=torch.float64).quantile(quantiles).tolist()


def png_bytes(images: Tensor) -> Tensor:
    """How well images compress: ``(b, 3, h, w)`` in [0, 1] -> bytes of each one's PNG file, ``(b,)`` float64.

    Pixels are rounded to 8 bits; Pillow writes the file, in memory and on the CPU, at zlib level ``PNG_LEVEL``.
    """
    sizes = []
    for pixels in rearrange((images * 255).round().byte().cpu(), "b c h w -> b h w c").numpy():
        file = BytesIO()
        Image.fromarray(pixels).save(file, "PNG", compress_level=PNG_LEVEL)
        sizes.append(file.tell())
    return torch.tensor(sizes, dtype=torch.float64)


def read_scores(path: Path) -> dict[str, float]:
    """Scores by key, from a CSV file with the columns ``key`` and ``score``; other columns are left alone.

    Raises:
        ValueError: naming the line without a key or a number.
    """
    with open(path, newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file)
        try:
            return {row["key"]: float(row["score"]) for row in rows}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{path}:{rows.line_num}: a table of scores has the columns 'key' and 'score', a number; got {error}"
            ) from error
