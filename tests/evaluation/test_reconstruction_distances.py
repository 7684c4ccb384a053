from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from framework.allocation.adaptive_tokenizer import AdaptiveTokenizer
from framework.evaluation.image_metrics import to_uint8
from framework.evaluation.reconstruction_distances import (
    against_text,
    data_reference,
    policy_lengths,
    reconstruction_distances,
    table_lengths,
)
from framework.evaluation.reference_statistics import read_reference, write_reference
from framework.tokenizers.interface import Allocation, AllocationPolicy, AllocationRequest, Contract
from framework.tokenizers.tokenizer import Tokenizer
from framework.tokens import Tokens
from tests.evaluation.fakes import BasisTokenizer, FixedImages, orthonormal
from tests.evaluation.toy_features import ToyFeatures

COUNT = 40


class AnyLengths(BasisTokenizer):
    """Also encodes at a length for each image, and has features to choose by."""

    def encode(self, images: Tensor, length: int | Tensor | None = None) -> Tokens:
        tokens = super().encode(images)
        return tokens if length is None else tokens.with_lengths(torch.as_tensor(length).expand(len(images)).clone())

    def encode_with_features(self, images: Tensor) -> tuple[Tokens, Tensor]:
        return self.encode(images), images.mean((1, 2, 3))[:, None]


def tokenizer(contract: Contract = "truncate") -> Tokenizer:
    """Four tokens, each with 12 of 48 coefficients of a 4 x 4 image."""
    made = AnyLengths(torch.full((48,), 0.5), orthonormal(48, 48, seed=0), token_dim=12, contract=contract)
    return cast(Tokenizer, made.eval())


def data(seed: int = 0) -> FixedImages:
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(COUNT, 3, 4, 4, generator=generator) * torch.rand(COUNT, 1, 1, 1, generator=generator)
    return FixedImages(images, [f"group {i % 5}" for i in range(COUNT)])


def by_torch_fidelity(one: Tensor, other: Tensor) -> float:
    sets = [ToyFeatures()(to_uint8(images)).features.double() for images in (one, other)]
    found: float = fid_statistics_to_metric(*map(fid_features_to_statistics, sets), verbose=False)[
        "frechet_inception_distance"
    ]
    return found


def at(lengths: Tensor) -> Tensor:
    made = tokenizer()
    with torch.no_grad():
        return made.decode(made.encode(data().images).with_lengths(lengths))


class Brightness(AllocationPolicy):
    """Bright images keep three tokens, others one."""

    budgets = (1, 3)

    def forward(self, request: AllocationRequest) -> Allocation:
        return Allocation(torch.where(request.features[:, 0] > 0.3, 3, 1))


@pytest.mark.parametrize("contract", ["truncate", "length_conditioned"])
@pytest.mark.parametrize("batch_size", [7, 64])
def test_distances_at_lengths_and_at_each_images_own(contract: Contract, batch_size: int) -> None:
    made, table = tokenizer(contract), {key: 1 + row % 4 for row, key in enumerate(keys())}
    chosen = torch.where(data().images.mean((1, 2, 3)) > 0.3, 3, 1)
    found = reconstruction_distances(
        made,
        data(),
        ToyFeatures(),
        lengths=[1, 2, 4],
        own_lengths={"policy": policy_lengths(AdaptiveTokenizer(made, Brightness())), "table": table_lengths(table)},
        batch_size=batch_size,
        record={"step": 7},
    )
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    images = data().images
    for row in found["per_length"]:
        expected = by_torch_fidelity(at(torch.full((COUNT,), row["length"])), images)
        assert row["fd_toy"] == pytest.approx(expected, rel=1e-5, abs=1e-9) and row["images"] == COUNT
    assert [row["length"] for row in found["per_length"]] == [1, 2, 4]
    first, _, last = found["per_length"]
    assert first["fd_toy"] > 1e-4 > last["fd_toy"] and last["precision_toy"] == last["recall_toy"] == 1
    own = found["own_lengths"]
    assert own["policy"]["fd_toy"] == pytest.approx(by_torch_fidelity(at(chosen), images), rel=1e-5)
    assert own["policy"]["mean_length"] == pytest.approx(chosen.double().mean().item())
    lengths = torch.tensor(list(table.values()))
    assert own["table"]["fd_toy"] == pytest.approx(by_torch_fidelity(at(lengths), images), rel=1e-5)
    assert own["table"]["mean_length"] == 2.5
    assert set(found["originals"]) == {"inception_score", "inception_score_std"}


def keys() -> list[str]:
    return data().fetch(range(COUNT), 0).keys


def test_the_protocol_says_all_that_a_number_depends_on() -> None:
    found = reconstruction_distances(tokenizer(), data(), ToyFeatures(), [2], limit=30, record={"step": 7})
    protocol = found["protocol"]
    assert protocol["reference"] == {"images": "originals"}
    assert protocol["data"] == {"source": "given images"}
    assert (protocol["images"], protocol["of"], protocol["broken"], protocol["image_size"]) == (30, 40, 0, 4)
    assert protocol["uint8"].startswith("255 x, rounded to the nearest")
    assert protocol["features"] == ToyFeatures().protocol()
    assert (protocol["lengths"], protocol["weights"]) == ([2], {"step": 7})
    assert set(found["definitions"]) >= {"fid, fd_*", "precision, recall", "inception_score", "notes"}


def test_another_reference_is_compared_with_the_originals_too(tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    made = data_reference(data(1), ToyFeatures(), batch_size=16, progress=lambda *state: seen.append(state))
    assert seen == [("reference", 16, 40), ("reference", 32, 40), ("reference", 40, 40)]
    write_reference(tmp_path / "other.npz", made, ToyFeatures())
    reference = read_reference(tmp_path / "other.npz", ToyFeatures())
    found = reconstruction_distances(tokenizer(), data(), ToyFeatures(), [1, 4], reference=reference)
    assert found["originals"]["fd_toy"] == pytest.approx(by_torch_fidelity(data(1).images, data().images), rel=1e-5)
    first = found["per_length"][0]
    expected = by_torch_fidelity(data(1).images, at(torch.full((COUNT,), 1)))
    assert first["fd_toy"] == pytest.approx(expected, rel=1e-5) and first["precision_toy"] is None
    assert found["protocol"]["reference"]["file"] == "other.npz"
    assert found["protocol"]["reference"]["data"] == {"source": "given images"}
    assert against_text(found["protocol"]).startswith("against 40 images of other.npz (sha256 ")
    with_neighbours = reconstruction_distances(tokenizer(), data(), ToyFeatures(), [1], reference=made)
    assert against_text(with_neighbours["protocol"]).startswith("against 40 images of given images, in ")
    assert 0 < with_neighbours["per_length"][0]["precision_toy"] <= 1


def test_few_images_are_told_in_words() -> None:
    found = reconstruction_distances(tokenizer(), data(), ToyFeatures(), [4], limit=9)
    (row,) = found["per_length"]
    assert len(row["notes"]) == 2 and "has 9 images, not more than the 12 features" in row["notes"][0]
    assert "inception_score" not in row


def test_wrong_calls_and_broken_models_are_refused() -> None:
    with pytest.raises(ValueError, match=r"each length can be measured once, got \[1, 4, 1\]; try \[1, 4\]"):
        reconstruction_distances(tokenizer(), data(), ToyFeatures(), [1, 4, 1])
    with pytest.raises(ValueError, match="cannot keep 9 of the tokenizer's 4 tokens"):
        reconstruction_distances(tokenizer(), data(), ToyFeatures(), [9])
    with pytest.raises(ValueError, match=r"call tokenizer.eval\(\) first"):
        reconstruction_distances(tokenizer().train(), data(), ToyFeatures(), [1])
    with pytest.raises(ValueError, match="at least two images, and the reference has 1"):
        reconstruction_distances(tokenizer(), data(), ToyFeatures(), [1], limit=1)
    with pytest.raises(ValueError, match="at least two images, and there are 1"):
        data_reference(data(), ToyFeatures(), limit=1)
    diverged = tokenizer()
    torch.nn.init.constant_(next(diverged.parameters()), torch.nan)
    with pytest.raises(ValueError, match=r"length 2 are not finite, among group 0@0,0, .* probably diverged"):
        reconstruction_distances(diverged, data(), ToyFeatures(), [2])
