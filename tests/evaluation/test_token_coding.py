"""Images to token files and back: the tokens are the model's, whatever the files, crops, stops and damage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from framework.allocation.adaptive_tokenizer import AdaptiveTokenizer
from framework.allocation.rules import ComplexityLookup, png_bytes, quantile_edges
from framework.data.interface import Batch, ImageData, TooManyBroken
from framework.data.token_file import TokenFile
from framework.evaluation.image_metrics import squared_error
from framework.evaluation.token_coding import decode_tokens, encode_images
from framework.tokenizers.quantizers.finite_scalar_quantizer import FiniteScalarQuantizer
from framework.tokenizers.tokenizer import Tokenizer
from tests.faults.inject import Killed, faults
from tests.tiny_run import files_of
from tests.tokenizers.build import small_tokenizer


class Pictures(ImageData):
    """Smooth pictures of 16x16 that move with the epoch, some of them broken; remembers what was read."""

    image_size = 16

    def __init__(self, count: int, bad: Sequence[int] = (), moving: bool = False, max_broken: float = 0.5) -> None:
        generator = torch.Generator().manual_seed(0)
        coarse = torch.rand(count, 3, 4, 4, generator=generator)
        self.images = nn.functional.interpolate(coarse, scale_factor=4, mode="bilinear").clamp(0, 1)
        self.bad, self.moving, self.max_broken = bad, moving, max_broken
        self.was_read: list[tuple[int, int]] = []

    def __len__(self) -> int:
        return len(self.images)

    def key(self, index: int) -> str:
        return f"picture {index}"

    def fetch(self, indices: Sequence[int], epoch: int) -> Batch:
        self.was_read += [(index, epoch) for index in indices]
        good = [index for index in indices if index not in self.bad]
        images = self.images[good].roll(epoch if self.moving else 0, dims=3)
        broken = {self.key(index): "cut off" for index in indices if index in self.bad}
        keys = [self.key(index) for index in good]
        return Batch(images, keys, keys, torch.tensor(good, dtype=torch.int64) % 7, broken)

    def whole(self, group: str) -> Tensor:
        raise NotImplementedError

    def protocol(self) -> dict[str, object]:
        return {"source": "pictures", "sizes": (16, 16)}


@pytest.fixture(scope="module")
def continuous() -> Tokenizer:
    return small_tokenizer().eval()


@pytest.fixture(scope="module")
def discrete() -> Tokenizer:
    return small_tokenizer(quantizer=FiniteScalarQuantizer((7, 5, 5))).eval()


@pytest.fixture(scope="module")
def adaptive(discrete: Tokenizer) -> AdaptiveTokenizer:
    edges = quantile_edges(png_bytes(Pictures(30).images).tolist(), [1, 1, 1])
    policy = ComplexityLookup(edges, [1, 3, 6], num_tokens=6, feature_dim=discrete.encoder.feature_dim)
    return AdaptiveTokenizer(discrete, policy).eval()


def no_decoder(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the decoder ran")

    tokenizer = model.tokenizer if isinstance(model, AdaptiveTokenizer) else model
    monkeypatch.setattr(tokenizer.decoder, "forward", refuse)


# The tokens


def test_codes_are_the_tokenizers(discrete: Tokenizer, tmp_path: Path) -> None:
    data = Pictures(20)
    with torch.no_grad():
        tokens = discrete.encode(data.images, 4)
        rebuilt = discrete.decode(tokens)
        shorter = discrete.decode(tokens.with_lengths(tokens.lengths - 2))
    file = encode_images(discrete, data, tmp_path / "t", 4, batch_size=20)
    read = file.tokens(range(20))
    assert file.header.dtype == "codes" and file.header.vocabulary == 175 and file.header.bits == 8
    assert read.codes is not None and tokens.codes is not None and torch.equal(read.codes, tokens.codes[:, :4])
    assert file.keys == [data.key(row) for row in range(20)] and file.labels is not None
    assert file.labels.tolist() == [row % 7 for row in range(20)]
    torch.testing.assert_close(torch.cat(list(decode_tokens(discrete, file, batch_size=7))), rebuilt)
    torch.testing.assert_close(torch.cat(list(decode_tokens(discrete, file, length=2))), shorter)
    torch.testing.assert_close(torch.cat(list(decode_tokens(discrete, file, [5, 3]))), rebuilt[[5, 3]])


@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
def test_latents_are_the_tokenizers(dtype: str | None, continuous: Tokenizer, tmp_path: Path) -> None:
    kind = torch.float16 if dtype == "float16" else torch.float32
    data = Pictures(9)
    with torch.no_grad():
        tokens = continuous.encode(data.images)
        rebuilt = continuous.decode(tokens)
    file = encode_images(continuous, data, tmp_path / "t", 6, dtype=dtype, batch_size=9)
    assert torch.equal(file.tokens(range(9)).latents, tokens.latents.to(kind).float())
    atol = 1e-2 if kind == torch.float16 else 1e-5
    torch.testing.assert_close(torch.cat(list(decode_tokens(continuous, file))), rebuilt, atol=atol, rtol=0)


def test_latents_of_codes(discrete: Tokenizer, tmp_path: Path) -> None:
    file = encode_images(discrete, Pictures(5), tmp_path / "t", 6, dtype="float32")
    codes = encode_images(discrete, Pictures(5), tmp_path / "u", 6).tokens(range(5)).codes
    assert codes is not None and torch.equal(file.tokens(range(5)).latents, discrete.quantizer.codes_to_latents(codes))


def test_the_policy_chooses_and_nothing_is_decoded(
    adaptive: AdaptiveTokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = Pictures(30)
    chosen = adaptive.allocate(data.images)[1].lengths
    assert len(chosen.unique()) == 3
    no_decoder(adaptive, monkeypatch)
    file = encode_images(adaptive, data, tmp_path / "t")
    assert torch.equal(file.lengths, chosen) and file.header.budgets == [1, 3, 6]
    assert file.header.length == "auto" and file.header.policy.startswith("ComplexityLookup ")
    fixed = encode_images(adaptive, data, tmp_path / "u", "2")
    assert fixed.lengths.tolist() == [2] * 30 and fixed.header.budgets == [2]


def errors_at_every_length(tokenizer: Tokenizer, images: Tensor) -> Tensor:
    with torch.no_grad():
        tokens = tokenizer.encode(images)
        lengths = [torch.full_like(tokens.lengths, length) for length in range(1, 7)]
        return torch.stack([squared_error(images, tokenizer.decode(tokens.with_lengths(each))) for each in lengths], 1)


def test_the_smallest_length_that_is_good_enough(continuous: Tokenizer, tmp_path: Path) -> None:
    data = Pictures(40)
    errors = errors_at_every_length(continuous, data.images)
    threshold = round(float(errors.median()), 4)
    passing = [[length for length, error in enumerate(row, 1) if error <= threshold] for row in errors.tolist()]
    expected = [min(lengths, default=6) for lengths in passing]
    assert len(set(expected)) > 3 and any(not lengths for lengths in passing)
    file = encode_images(continuous, data, tmp_path / "t", f"quality:{threshold}")
    assert file.lengths.tolist() == expected
    trials = sum(min(length, 5) for length in expected)
    assert sum(each.shard.decoder_passes for each in file.files) == trials
    assert f"{trials / 40:.2f} decoder passes a row" in "\n".join(file.lines())
    binary = encode_images(continuous, data, tmp_path / "u", f"quality:{threshold}:binary")
    for length, lengths in zip(binary.lengths.tolist(), passing, strict=True):
        assert length in lengths or length == 6
    assert sum(each.shard.decoder_passes for each in binary.files) <= 40 * 3


# Crops, files, workers, damage


def test_crops_are_epochs(continuous: Tokenizer, tmp_path: Path) -> None:
    data = Pictures(10, moving=True)
    file = encode_images(continuous, data, tmp_path / "t", 6, crops=3, batch_size=10, rows_per_file=7)
    assert len(file) == 30 and len(file.files) == 5
    assert file.keys == [data.key(row % 10) for row in range(30)]
    assert file.crops.tolist() == [row // 10 for row in range(30)]
    for crop in range(3):
        with torch.no_grad():
            expected = continuous.encode(data.images.roll(crop, dims=3)).latents
        torch.testing.assert_close(file.tokens(range(10 * crop, 10 * crop + 10)).latents, expected)
    with pytest.raises(ValueError, match="2 crops of each image would be so many copies"):
        encode_images(continuous, Pictures(10), tmp_path / "u", 6, crops=2)


def test_files_and_workers_change_nothing(discrete: Tokenizer, tmp_path: Path) -> None:
    one = encode_images(discrete, Pictures(20), tmp_path / "one", 3)
    many = encode_images(discrete, Pictures(20), tmp_path / "many", 3, rows_per_file=6, batch_size=5)
    assert sorted(files_of(tmp_path)) == [*(f"many-{number:05}-of-00004" for number in range(4)), "one"]
    assert one.keys == many.keys and one.header == many.header
    codes = [file.tokens(range(20)).codes for file in (one, many)]
    assert codes[0] is not None and codes[1] is not None and torch.equal(codes[0], codes[1])
    encode_images(discrete, Pictures(20), tmp_path / "workers", 3, num_workers=2)
    assert (tmp_path / "workers").read_bytes() == (tmp_path / "one").read_bytes()


def test_broken_images_are_named_and_left_out(discrete: Tokenizer, tmp_path: Path) -> None:
    said: list[str] = []
    told: list[tuple[str, int, int]] = []
    data = Pictures(10, [0, 4], moving=True)
    file = encode_images(
        discrete, data, tmp_path / "t", 3, crops=2, batch_size=3, rows_per_file=10, say=said.append,
        progress=lambda *state: told.append(state),
    )  # fmt: skip
    good = [data.key(row) for row in range(10) if row not in (0, 4)]
    assert file.keys == good * 2 and file.broken == {"picture 0": "cut off", "picture 4": "cut off"}
    assert said[:2] == ["left out picture 0: cut off", "left out picture 4: cut off"] and "images/s" in said[-1]
    assert len(said) == 3 and told[-1] == ("images", 20, 20)
    with pytest.raises(TooManyBroken, match="2 of 10 images cannot be read, 20.00%"):
        encode_images(discrete, Pictures(10, [0, 4], max_broken=0.1), tmp_path / "u", 3)
    assert not (tmp_path / "u").exists()
    nothing = encode_images(discrete, Pictures(4, [0, 1], max_broken=0.9), tmp_path / "v", 3, rows_per_file=2)
    assert [len(each) for each in nothing.files] == [0, 2] and nothing.keys == ["picture 2", "picture 3"]


# Stops


def test_a_stop_leaves_no_trace(discrete: Tokenizer, tmp_path: Path) -> None:
    def encode(folder: Path) -> None:
        encode_images(discrete, Pictures(12, [7]), folder / "t", 3, batch_size=4, rows_per_file=3)

    with faults() as operations:
        encode(tmp_path / "whole")
    whole = files_of(tmp_path / "whole")
    assert len(whole) == 4 and len(operations) >= 12
    for half in (False, True):
        for at in range(len(operations)):
            folder = tmp_path / f"{at} {half}"
            with pytest.raises(Killed), faults(at=at, half=half):
                encode(folder)
            kept = {name: content for name, content in files_of(folder).items() if not name.endswith(".partial")}
            assert kept.items() <= whole.items()
            encode(folder)
            assert files_of(folder) == whole


def test_finished_files_are_not_made_again(
    discrete: Tokenizer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    encode_images(discrete, Pictures(12), tmp_path / "t", 3, rows_per_file=3)
    (tmp_path / "t-00002-of-00004").unlink()
    said: list[str] = []
    data = Pictures(12)
    encode_images(discrete, data, tmp_path / "t", 3, rows_per_file=3, say=said.append)
    assert data.was_read == [(6, 0), (7, 0), (8, 0)] and said[0] == "3 of 4 files are there already"
    no_decoder(discrete, monkeypatch)
    monkeypatch.setattr(discrete.encoder, "forward", None)
    data = Pictures(12)
    again = encode_images(discrete, data, tmp_path / "t", 3, rows_per_file=3)
    assert data.was_read == [] and len(again) == 12


def test_broken_images_of_finished_files_count(discrete: Tokenizer, tmp_path: Path) -> None:
    encode_images(discrete, Pictures(12, [0, 1]), tmp_path / "t", 3, rows_per_file=6)
    (tmp_path / "t-00001-of-00002").unlink()
    with pytest.raises(TooManyBroken, match="4 of 12 images cannot be read"):
        encode_images(discrete, Pictures(12, [0, 1, 8, 9], max_broken=0.2), tmp_path / "t", 3, rows_per_file=6)


CHANGED: dict[str, tuple[dict[str, Any], str]] = {
    "length": ({"length": 2}, "its length is 3, not 2"),
    "dtype": ({"dtype": "float32"}, "its dtype is codes, not float32"),
    "images": ({"data": Pictures(11)}, "its images is .*'count': 12.* not .*'count': 11"),
    "crops": ({"crops": 2, "data": Pictures(12, moving=True), "rows_per_file": 12}, "its crops is 1, not 2"),
    "source": ({"source": {"run": "b"}}, "its source is {}, not {'run': 'b'}"),
    "files": ({"rows_per_file": 4}, "belongs to another number of files: choose another name, or remove it"),
}


@pytest.mark.parametrize("case", CHANGED)
def test_another_encoding_of_the_same_name_is_refused(case: str, discrete: Tokenizer, tmp_path: Path) -> None:
    usual: dict[str, Any] = {"data": Pictures(12), "out": tmp_path / "t", "length": 3, "rows_per_file": 6}
    encode_images(discrete, **usual)
    before = files_of(tmp_path)
    changes, words = CHANGED[case]
    with pytest.raises(FileExistsError, match=words):
        encode_images(discrete, **usual | changes)
    with pytest.raises(FileExistsError, match="its tokenizer is .*Choose another name, or remove it"):
        encode_images(small_tokenizer(seed=1, quantizer=FiniteScalarQuantizer((7, 5, 5))).eval(), **usual)
    assert files_of(tmp_path) == before


# What is refused


def test_another_tokenizer_is_refused(continuous: Tokenizer, discrete: Tokenizer, tmp_path: Path) -> None:
    file = encode_images(discrete, Pictures(3), tmp_path / "t", 3, source={"run": "runs/a"})
    changed = small_tokenizer(quantizer=FiniteScalarQuantizer((7, 5, 5))).eval()
    assert len(list(decode_tokens(changed, file))) == 1  # equal weights are the same tokenizer
    with torch.no_grad():
        next(changed.decoder.parameters()).view(-1)[0] += 1e-3
    for other in (changed, continuous):
        with pytest.raises(ValueError, match=r"by another tokenizer: .* It is from {'run': 'runs/a'}: take that"):
            decode_tokens(other, file)


def test_equal_weights_with_other_codes_are_refused(tmp_path: Path) -> None:
    def tokenizer(levels: tuple[int, ...]) -> Tokenizer:
        made = small_tokenizer(quantizer=FiniteScalarQuantizer(levels)).eval()
        made.quantizer.usage = None  # the one state that has the vocabulary's size
        return made

    file = encode_images(tokenizer((7, 5, 5)), Pictures(3), tmp_path / "t", 3)
    with pytest.raises(ValueError, match="was made by another tokenizer: with other codes, tokens or channels"):
        decode_tokens(tokenizer((7, 7, 5)), file)


REFUSED: dict[str, tuple[Callable[[Tokenizer], Any], dict[str, Any], type[Exception], str]] = {
    "no policy": (lambda t: t, {"length": "auto"}, ValueError, "'auto' needs a policy, and this is a tokenizer alone"),
    "too long": (lambda t: t, {"length": 7}, ValueError, "length is auto, a number from 1 to 6, .* got 7"),
    "none": (lambda t: t, {"length": "0"}, ValueError, "a number from 1 to 6"),
    "no rule": (lambda t: t, {"length": "quality"}, ValueError, "quality:0.01 or quality:0.01:binary; got 'quality'"),
    "no number": (lambda t: t, {"length": "quality:good"}, ValueError, "got 'quality:good'"),
    "negative": (lambda t: t, {"length": "quality:-1"}, ValueError, "got 'quality:-1'"),
    "no codes": (lambda t: t, {"dtype": "codes"}, ValueError, "this tokenizer has no codes"),
    "no model": (lambda t: nn.Linear(1, 1), {}, TypeError, "only a tokenizer makes tokens, and this model is Linear"),
    "training": (lambda t: small_tokenizer(), {}, ValueError, "in training mode"),
    "no images": (lambda t: t, {"data": Pictures(0)}, ValueError, "nothing to encode: 1 crops of 0 images"),
    "no crops": (lambda t: t, {"crops": 0}, ValueError, "nothing to encode: 0 crops of 3 images"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_encoded_is_told_in_words(case: str, continuous: Tokenizer, tmp_path: Path) -> None:
    model, arguments, error, words = REFUSED[case]
    usual: dict[str, Any] = {"data": Pictures(3), "out": tmp_path / "t", "length": 3}
    with pytest.raises(error, match=words):
        encode_images(model(continuous), **usual | arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_read_without_its_model(discrete: Tokenizer, tmp_path: Path) -> None:
    encode_images(discrete, Pictures(3), tmp_path / "t", 3, source={"run": "runs/a", "step": 7})
    header = TokenFile(tmp_path / "t").header
    assert header.source == {"run": "runs/a", "step": 7} and header.images["sizes"] == [16, 16]
    assert header.images["count"] == 3 and header.image_size == 16 and header.contract == "truncate"
