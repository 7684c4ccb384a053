from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from framework.allocation.rewards import Reward
from framework.allocation.rules import (
    ComplexityLookup,
    FixedLength,
    OracleAllocation,
    png_bytes,
    quantile_edges,
    read_scores,
)
from framework.tokenizers.interface import AllocationRequest
from tests.allocation.curves import Curves, FirstPixel, random_errors


class Linear(Reward):
    """Error and share of tokens, one to one."""

    def forward(self, distortions: Tensor, budgets: Tensor, num_tokens: int) -> Tensor:
        return -distortions - budgets / num_tokens


def request_of(images: Tensor, keys: list[str] | None = None) -> AllocationRequest:
    def refuse(rows: Tensor, lengths: Tensor) -> Tensor:
        raise AssertionError("a lookup decodes nothing")

    return AllocationRequest(torch.zeros(len(images), 4), images, refuse, 0, keys)


def test_fixed_length_costs_nothing() -> None:
    policy = FixedLength(3, num_tokens=8, feature_dim=4)
    allocation = policy(request_of(torch.rand(5, 3, 4, 4)))
    assert policy.budgets == (3,)
    assert allocation.lengths.tolist() == [3] * 5 and allocation.lengths.dtype == torch.int64
    assert allocation.encoder_passes == allocation.decoder_passes == 0
    with pytest.raises(ValueError, match=r"8 tokens, got \[9\]; try \[8\]"):
        FixedLength(9, num_tokens=8, feature_dim=4)


@pytest.mark.parametrize("budgets", [None, [2, 5, 8]])
def test_oracle_takes_the_best_reward(budgets: list[int] | None) -> None:
    errors = random_errors(40, 8, monotone=False, seed=0)
    curves = Curves(errors, encoder_passes_per_trial=1)
    policy = OracleAllocation(Linear(), FirstPixel(), budgets, num_tokens=8, feature_dim=4)
    allocation = policy(curves.request)
    best = [max(policy.budgets, key=lambda budget: (-row[budget - 1] - budget / 8, -budget)) for row in errors.tolist()]
    assert allocation.lengths.tolist() == best
    assert curves.trials.tolist() == [len(policy.budgets)] * 40
    assert allocation.decoder_passes == allocation.encoder_passes == len(policy.budgets)


def test_oracle_takes_the_shorter_of_equals() -> None:
    errors = torch.tensor([[0.5, 0.25, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]])  # all of the first image's first three tie
    curves = Curves(errors)
    oracle = OracleAllocation(Linear(), FirstPixel(), num_tokens=4, feature_dim=4)
    assert oracle(curves.request).lengths.tolist() == [1, 2]


def test_png_bytes_are_those_of_a_file_and_rise_with_texture() -> None:
    flat = torch.full((3, 16, 16), 0.5)
    noise = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0))
    half = (torch.where(torch.arange(16) < 8, noise, flat) * 8).round() / 8  # compressible, so that the level counts
    sizes = png_bytes(torch.stack([flat, half, noise]))
    assert sizes[0] < sizes[1] < sizes[2]
    file = io.BytesIO()
    Image.fromarray((half * 255).round().byte().permute(1, 2, 0).numpy()).save(file, "PNG", compress_level=6)
    assert sizes[1] == len(file.getvalue())


def test_lookup_by_compressed_size() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.stack([torch.full((3, 16, 16), 0.5), torch.rand(3, 16, 16, generator=generator)])
    allocation = ComplexityLookup([400.0], [2, 8], num_tokens=8, feature_dim=4)(request_of(images))
    assert allocation.lengths.tolist() == [2, 8] and allocation.lengths.dtype == torch.int64
    assert allocation.encoder_passes == allocation.decoder_passes == 0


def test_lookup_by_table_keeps_the_shorter_at_an_edge(tmp_path: Path) -> None:
    table = tmp_path / "scores.csv"
    table.write_text("key,group,score\na,x,1\nb,x,1.5\nc,y,2\nd,y,7\n")
    policy = ComplexityLookup([1.0, 2.0], [1, 4, 8], table, num_tokens=8, feature_dim=4)
    images = torch.rand(4, 3, 4, 4)
    assert policy(request_of(images, ["d", "a", "c", "b"])).lengths.tolist() == [8, 1, 4, 4]
    with pytest.raises(ValueError, match=r"lacks 2 of 4 images: \['e', 'f'\]"):
        policy(request_of(images, ["a", "e", "b", "f"]))
    with pytest.raises(ValueError, match="pass the images' names as keys"):
        policy(request_of(images))


@pytest.mark.parametrize("text", ["name,score\na,1\n", "key,score\na,1\nb,many\n", "key,score\na\n"])
def test_a_table_without_scores_is_refused_with_its_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "scores.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"scores.csv:{text.count(chr(10))}: a table of scores has the columns"):
        read_scores(path)


@pytest.mark.parametrize("edges", [[], [1.0], [2.0, 1.0], [1.0, 2.0, 3.0]])
def test_edges_that_do_not_fit_are_refused(edges: list[float]) -> None:
    with pytest.raises(ValueError, match="3 budgets need 2 edges in increasing order, got"):
        ComplexityLookup(edges, [1, 4, 8], num_tokens=8, feature_dim=4)


def test_quantile_edges_give_each_budget_its_share() -> None:
    scores = torch.randperm(1000, generator=torch.Generator().manual_seed(0)).double()
    edges = quantile_edges(scores.tolist(), [1, 2, 5])
    counts = torch.bucketize(scores, torch.tensor(edges, dtype=torch.float64)).bincount()
    assert counts.tolist() == pytest.approx([125, 250, 625], abs=1)
