from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from framework.evaluation.linear_probe import LinearProbe, Readout, linear_probe
from framework.evaluation.rate_distortion import mean_intervals
from framework.tokenizers.tokenizer import Tokenizer
from framework.tokens import Tokens
from tests.evaluation.fakes import FixedImages
from tests.evaluation.labelled import LabelledImages, blobs
from tests.tokenizers.build import small_tokenizer

READOUTS: tuple[Readout, ...] = ("concatenated", "mean")


def random_tokens(count: int = 300, seed: int = 0) -> tuple[Tokens, torch.Tensor]:
    """Five tokens of four channels, each at its own scale, that tell three classes apart now and then."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    centres = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(7))
    latents = 0.5 * centres[labels] + torch.randn(count, 5, 4, generator=generator)
    return Tokens(latents * torch.logspace(-1, 2, 5)[:, None] + 3, torch.full((count,), 5)), labels


def at(tokens: Tokens, length: int) -> Tokens:
    return tokens.with_lengths(torch.full_like(tokens.lengths, length))


def by_hand(tokens: Tokens, readout: Readout) -> np.ndarray:
    """Features of tokens of one length."""
    kept = tokens.latents[:, : int(tokens.lengths[0])].double().numpy()
    return kept.mean(1) if readout == "mean" else kept.reshape(len(kept), -1)


def fitted_by_sklearn(features: np.ndarray, labels: np.ndarray, weights: np.ndarray | None = None) -> Any:
    return LogisticRegression(C=1.0, tol=1e-9, max_iter=5000).fit(features, labels, weights)


@pytest.mark.parametrize("readout", READOUTS)
@pytest.mark.parametrize("length", [1, 3, 5])
def test_a_fit_is_that_of_scikit_learn(readout: Readout, length: int) -> None:
    (train, labels), (test, _) = random_tokens(), random_tokens(seed=1)
    probe = LinearProbe.fit([at(train, length)], labels, 3, readout)
    scaler = StandardScaler().fit(by_hand(at(train, length), readout))
    other = fitted_by_sklearn(scaler.transform(by_hand(at(train, length), readout)), labels.numpy())
    expected = other.predict_proba(scaler.transform(by_hand(at(test, length), readout)))
    np.testing.assert_allclose(probe.logits(at(test, length)).softmax(1).numpy(), expected, atol=2e-3)
    assert 1 < probe.iterations < 100 and expected.max(1).min() < 0.5  # not all are easy


def test_a_fit_over_views_is_one_over_all_of_them_with_dropped_tokens_at_zero() -> None:
    train, labels = random_tokens()
    views = [train.with_lengths(torch.randint(1, 6, (300,))) for _ in range(3)]
    probe = LinearProbe.fit(views, labels, 3, "concatenated")
    latents, kept = train.latents.double().numpy(), np.stack([view.mask.numpy() for view in views])
    standardised = np.zeros((3, 300, 5, 4))
    for token in range(5):
        rows = np.concatenate([latents[keeps[:, token], token] for keeps in kept])
        standardised[:, :, token] = (latents[:, token] - rows.mean(0)) / rows.std(0) * kept[:, :, token, None]
        assert probe.mean[4 * token : 4 * token + 4].numpy() == pytest.approx(rows.mean(0), rel=1e-5)
    other = fitted_by_sklearn(standardised.reshape(900, 20), labels.repeat(3).numpy(), np.full(900, 1 / 3))
    np.testing.assert_allclose(probe.weight.numpy(), other.coef_ - other.coef_.mean(0), atol=5e-3)


@pytest.mark.parametrize("readout", READOUTS)
def test_what_stands_behind_a_length_is_not_read(readout: Readout) -> None:
    tokens, labels = random_tokens()
    lengths = torch.randint(1, 6, (300,))
    behind = torch.where(tokens.with_lengths(lengths).mask[..., None], tokens.latents, torch.nan)
    full, cut = tokens.with_lengths(lengths), Tokens(behind, lengths)
    one, other = LinearProbe.fit([full], labels, 3, readout), LinearProbe.fit([cut], labels, 3, readout)
    assert torch.equal(one.weight, other.weight) and torch.equal(one.logits(full), other.logits(cut))
    assert not torch.equal(one.logits(full), one.logits(tokens))
    everything = LinearProbe.fit([tokens], labels, 3, readout)
    assert everything.is_right(tokens, labels).mean() > one.is_right(full, labels).mean() + 0.05


def probed(folder: Path, tokenizer: Tokenizer | None = None, **options: Any) -> dict[str, Any]:
    tokenizer = tokenizer or small_tokenizer().eval()
    sets = blobs(240, 16, seed=0), blobs(160, 16, seed=1)
    return linear_probe(tokenizer, *sets, folder, {"run": "tiny"}, **({"lengths": [1, 2, 6]} | options))


@pytest.mark.parametrize("encoder", ["SuffixTokenViT", "PatchEncoder"])
def test_accuracy_at_each_length_is_that_of_a_probe_at_that_length(encoder: str, tmp_path: Path) -> None:
    tokenizer = small_tokenizer(encoder_name=encoder).eval()
    assert tokenizer.contract == ("truncate" if encoder == "SuffixTokenViT" else "length_conditioned")
    metrics = probed(tmp_path, tokenizer)
    train, test = blobs(240, 16, seed=0), blobs(160, 16, seed=1)
    with torch.no_grad():
        pooled = [tokenizer.encode_with_features(data.images)[1].numpy() for data in (train, test)]
        pairs = [[by_hand(tokenizer.encode(d.images, k), "concatenated") for d in (train, test)] for k in (1, 2, 6)]
    found = [row["fixed_length"]["accuracy"] for row in metrics["per_length"]] + [metrics["pooled"]["accuracy"]]
    for accuracy, (seen, held_out) in zip(found, [*pairs, pooled], strict=True):
        scaler = StandardScaler().fit(seen)
        other = fitted_by_sklearn(scaler.transform(seen), train.labels.numpy())
        assert accuracy == pytest.approx(other.score(scaler.transform(held_out), test.labels.numpy()), abs=1 / 160)
    assert 0.34 < max(found[:3]) < 0.99, found
    common = int(train.labels.bincount().argmax())
    assert metrics["chance"]["accuracy"] == pytest.approx((test.labels == common).double().mean().item())


def test_results_and_their_protocol(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    metrics = probed(tmp_path, limit=100, train_limit=200, progress=lambda *state: told.append(state))
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics
    protocol = metrics["protocol"]
    assert (protocol["test"]["images"], protocol["test"]["of"], protocol["train"]["images"]) == (100, 160, 200)
    assert (protocol["classes"], protocol["weights"], protocol["seed"]) == (3, {"run": "tiny"}, 0)
    assert told[-1] == ("fitting probes", 5, 5) and ("encoding test images", 100, 100) in told
    for row in [*(row[name] for row in metrics["per_length"] for name in ("tail_drop", "fixed_length"))]:
        assert row["interval"][0] <= row["accuracy"] <= row["interval"][1]
    lines = (tmp_path / "table.md").read_text().splitlines()
    first = metrics["per_length"][0]["tail_drop"]["accuracy"]
    assert lines[4].startswith(f"| 1 | {first:.1%} | ") and [line[:4] for line in lines[5:7]] == ["| 2 ", "| 6 "]
    picture = np.asarray(Image.open(tmp_path / "linear_probe.png").convert("RGB"))
    for colour in ((0x1F, 0x5A, 0x92), (0xC4, 0x57, 0x2E)):
        assert (picture == np.array(colour)).all(-1).sum() > 300


def test_intervals_resample_groups(tmp_path: Path) -> None:
    metrics = probed(tmp_path)
    chance = (blobs(160, 16, seed=1).labels == blobs(240, 16, seed=0).labels.bincount().argmax()).double()
    expected = mean_intervals(chance, [f"pair {row // 2}" for row in range(160)])
    assert metrics["chance"]["interval"] == pytest.approx(expected.tolist())


def test_random_tail_drop_has_its_own_generator(tmp_path: Path) -> None:
    tokenizer = small_tokenizer().eval()
    torch.manual_seed(1)
    one = probed(tmp_path, tokenizer)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert probed(tmp_path, tokenizer) == one
    assert torch.equal(torch.get_rng_state(), state)
    other = probed(tmp_path, tokenizer, seed=1)
    dropped, fixed = (
        [[row[name] for row in metrics["per_length"]] for metrics in (one, other)]
        for name in ("tail_drop", "fixed_length")
    )
    assert dropped[0] != dropped[1] and fixed[0] == fixed[1]


def test_images_without_labels_are_refused(tmp_path: Path) -> None:
    labelled, without = blobs(8, 16, seed=0), FixedImages(blobs(8, 16, seed=0).images, ["a"] * 8)
    for sets in ((without, labelled), (labelled, without)):
        with pytest.raises(ValueError, match="no labels. Sets that have them: Digits, DigitScenes, .*given images"):
            linear_probe(small_tokenizer().eval(), *sets, tmp_path, {})
    assert list(tmp_path.iterdir()) == []


def relabelled(labels: list[int], classes: tuple[str, ...] = ()) -> LabelledImages:
    return LabelledImages(blobs(len(labels), 16, seed=0).images, torch.tensor(labels), classes)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (relabelled([0, 0, 0, 0]), relabelled([0, 0]), r"which are \[0\], and one is not enough"),
        (relabelled([0, 1, 3, 1]), relabelled([0, 2, 5]), r"\[0, 1, 3\]; test images are also of \[2, 5\]"),
        (
            relabelled([0, 1], ("cat", "dog")),
            relabelled([0, 1], ("cat", "cow", "dog")),
            "class 1 is 'dog' of 2 in training, and 'cow' of 3 in the other. Give both the same list",
        ),
    ],
)
def test_classes_must_be_the_same(train: LabelledImages, test: LabelledImages, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        linear_probe(small_tokenizer().eval(), train, test, tmp_path, {})


def test_what_cannot_be_probed_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="training mode"):
        probed(tmp_path, small_tokenizer().train())
    with pytest.raises(ValueError, match=r"got \[2, 9\]; try \[2, 6\]"):
        probed(tmp_path, lengths=[2, 9])
    with pytest.raises(ValueError, match="no images to probe: the data set holds 160 and the limit is 0"):
        probed(tmp_path, limit=0)
    broken = small_tokenizer().eval()
    cast(torch.nn.Linear, broken.encoder.to_latents).bias.data[0] = torch.nan
    with pytest.raises(ValueError, match="from pair 0@0,0 to pair 31@63,0 are not finite"):
        probed(tmp_path, broken)
