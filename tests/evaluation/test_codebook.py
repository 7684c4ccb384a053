from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from framework.data.stream import Sequential
from framework.evaluation.codebook import CodebookStatistics
from framework.evaluation.plots import plot_codebook
from framework.evaluation.rate_distortion import validation_errors
from framework.losses.reconstruction import PixelLoss
from framework.tasks.train_tokenizer import TrainTokenizer
from tests.evaluation.fakes import FixedImages, SignQuantizer
from tests.tokenizers.build import small_tokenizer


def counted(codes: list[list[int]], vocabulary: int) -> CodebookStatistics:
    codebook = CodebookStatistics(len(codes[0]), vocabulary)
    for part in torch.tensor(codes).split(3):
        codebook.add(part)
    return codebook


def images(count: int = 10) -> FixedImages:
    return FixedImages(torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0)), ["a"] * count)


def test_numbers_by_hand() -> None:
    codebook = counted([[0, 3], [1, 3], [0, 3], [1, 3]], vocabulary=8)
    assert codebook.counts.tolist() == [[2, 2, 0, 0, 0, 0, 0, 0], [0, 0, 0, 4, 0, 0, 0, 0]]
    assert codebook.shares.tolist() == [0.25, 0.25, 0, 0.5, 0, 0, 0, 0]
    summary = codebook.summary()
    overall = {"usage": 3 / 8, "dead_codes": 5, "entropy": 1.5, "perplexity": 2**1.5}
    assert {name: summary[name] for name in overall} == pytest.approx(overall)
    assert summary["per_position"] == {
        "usage": [2 / 8, 1 / 8], "dead_codes": [6, 7],
        "entropy": pytest.approx([1, 0]), "perplexity": pytest.approx([2, 1]),
    }  # fmt: skip
    assert (summary["vocabulary"], summary["bits_per_token"], summary["tokens"]) == (8, 3, 8)


def test_all_codes_alike_have_the_perplexity_of_their_number() -> None:
    codebook = counted([[code, 9 - code] for code in range(10)], vocabulary=10)
    for numbers in (codebook.overall(), {name: values[1] for name, values in codebook.per_position().items()}):
        expected = {"usage": 1, "dead_codes": 0, "entropy": math.log2(10), "perplexity": 10}
        assert numbers == pytest.approx(expected)


@pytest.mark.parametrize(
    ("num_images", "vocabulary", "told"),
    [
        (4000, 400, None),
        (3999, 400, "15,996 in all (of 16,000 wanted), 3,999 at each position (of 4,000 wanted)."),
        (4000, 401, "lower than they are: 4,000 at each position (of 4,010 wanted)."),
        (4000, 1601, "16,000 in all (of 16,010 wanted), 4,000 at each position (of 16,010 wanted)."),
    ],
)
def test_too_few_tokens_are_said(num_images: int, vocabulary: int, told: str | None) -> None:
    codebook = CodebookStatistics(4, vocabulary)
    codebook.add(torch.zeros(num_images, 4, dtype=torch.int64))
    few = codebook.summary()["few_tokens"]
    assert few is None if told is None else few.endswith(told)


def test_a_large_codebook_takes_four_bytes_for_each_code_and_position() -> None:
    codebook = CodebookStatistics(256, 64_000)
    codes = torch.randint(64_000, (2, 256), generator=torch.Generator().manual_seed(0))
    codebook.add(codes)
    assert codebook.counts.dtype == torch.int32 and codebook.counts.shape == (256, 64_000)
    assert codebook.overall()["dead_codes"] == 64_000 - len(codes.unique())


def test_every_image_is_counted_once_at_full_length_and_handed_on() -> None:
    tokenizer = small_tokenizer(quantizer=SignQuantizer(4)).eval()
    codebook = CodebookStatistics(6, 16)
    keys = [batch.keys for batch in codebook.counting(tokenizer, Sequential(images(), 4))]
    assert [len(part) for part in keys] == [4, 4, 2]
    codes = tokenizer.encode(images().images).codes
    assert codes is not None
    assert torch.equal(codebook.counts.long(), torch.nn.functional.one_hot(codes, 16).sum(0))


def test_a_validation_tells_how_codes_are_used() -> None:
    tokenizer = small_tokenizer(quantizer=SignQuantizer(4)).eval()
    task = TrainTokenizer({"pixel": PixelLoss()}, tokenizer=tokenizer)
    numbers = task.eval().validate(Sequential(images(), 4))
    codebook = CodebookStatistics(6, 16)
    codes = tokenizer.encode(images().images).codes
    assert codes is not None
    codebook.add(codes)
    assert numbers == {
        **validation_errors(tokenizer, Sequential(images(), 4)),
        "usage": codebook.overall()["usage"],
        "perplexity": pytest.approx(codebook.overall()["perplexity"]),
        "perplexity_lowest_position": pytest.approx(min(codebook.per_position()["perplexity"])),
    }
    continuous = TrainTokenizer({"pixel": PixelLoss()}, tokenizer=small_tokenizer())
    assert list(continuous.eval().validate(Sequential(images(), 4))) == ["mse@1", "mse@6"]


def test_the_picture_has_a_bar_for_each_position(tmp_path: Path) -> None:
    def blue(codes: list[list[int]]) -> np.ndarray:
        plot_codebook(counted(codes, vocabulary=8), tmp_path / "codebook.png")
        picture = np.asarray(Image.open(tmp_path / "codebook.png").convert("RGB"))
        assert picture.shape == (650, 1600, 3)
        return (picture[:, :790] == (0x1F, 0x5A, 0x92)).all(-1).sum(0)

    heights = blue([[0, 0], [1, 0], [2, 0], [3, 0]])
    first, second = (part[part > 0] for part in np.array_split(heights[60:], 2))
    assert np.median(first) == pytest.approx(4 * np.median(second), rel=0.05)
