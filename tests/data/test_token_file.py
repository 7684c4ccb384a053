"""Token files: what is written is what is read, and what is damaged is told."""

from __future__ import annotations

import json
import pickle
import random
import re
import tracemalloc
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

from framework.data.token_file import TokenFile, TokenFileError
from framework.data.token_format import NAME, pack, unpack
from framework.data.token_statistics import TokenStatistics
from framework.data.token_writer import TokenWriter
from framework.tokens import Tokens

from .token_sets import N, header, some_tokens, written

# What is read


@pytest.mark.parametrize("vocabulary", [1, 2, 3, 255, 256, 257, 4375, 65_536, 2**20 + 1, 2**56])
def test_codes_lie_in_a_stream_of_bits(vocabulary: int, tmp_path: Path) -> None:
    tokens = some_tokens(50, vocabulary)
    file = TokenFile(written(tmp_path / "t", tokens, header(vocabulary=vocabulary)))
    bits = max(1, len(bin(vocabulary - 1)) - 2)
    stream = safetensors.numpy.load_file(tmp_path / "t")["tokens"]
    assert tokens.codes is not None
    kept = tokens.codes[tokens.mask].tolist()
    assert len(stream) == -(-len(kept) * bits // 8)
    number = int.from_bytes(stream.tobytes(), "little")
    assert [number >> bits * place & (1 << bits) - 1 for place in range(len(kept))] == kept
    read = file.tokens(range(50))
    assert read.codes is not None
    assert torch.equal(read.lengths, tokens.lengths) and torch.equal(file.lengths, tokens.lengths)
    assert torch.equal(read.codes, tokens.codes.masked_fill(~tokens.mask, 0))
    assert read.latents.shape == (50, N, 0)
    file.verify()


@pytest.mark.parametrize("bits", [8, 16, 32])
def test_whole_bytes_are_plain_integers(bits: int) -> None:
    codes = np.random.default_rng(0).integers(0, 2**bits, 70_000)
    packed = pack(codes, bits)
    assert np.array_equal(packed.view(f"<u{bits // 8}"), codes)
    assert np.array_equal(unpack(packed, np.arange(70_000), bits), codes)


@pytest.mark.parametrize(("dtype", "kind"), [("float16", torch.float16), ("float32", torch.float32)])
def test_latents_are_as_they_were(dtype: str, kind: torch.dtype, tmp_path: Path) -> None:
    tokens = some_tokens(40)
    file = TokenFile(written(tmp_path / "t", tokens, header(dtype=dtype)))
    read = file.tokens(range(40))
    assert read.codes is None and read.latents.dtype == torch.float32
    assert torch.equal(read.latents, tokens.latents.to(kind).float().masked_fill(~tokens.mask[..., None], 0))
    file.verify()


@pytest.mark.parametrize("files", [1, 4])
@pytest.mark.parametrize("dtype", ["codes", "float32"])
def test_any_rows_in_any_order_padded_to_the_longest(dtype: str, files: int, tmp_path: Path) -> None:
    tokens = some_tokens(41)
    tokens = tokens.with_lengths(torch.where(torch.arange(41) < 20, tokens.lengths.clamp(max=3), tokens.lengths))
    file = TokenFile(written(tmp_path / "t", tokens, header(dtype=dtype), files))
    assert len(file) == 41
    for rows in ([40, 0, 7, 7, 22], [3], [1, 2], []):
        expected = tokens.select(torch.tensor(rows, dtype=torch.int64))
        longest = max(expected.lengths.tolist(), default=0)
        for asked in (rows, np.array(rows, np.int64), torch.tensor(rows, dtype=torch.int64)):
            read = file.tokens(asked)
            assert torch.equal(read.lengths, expected.lengths) and read.latents.shape[1] == longest
            one, other = (read.codes, expected.codes) if dtype == "codes" else (read.latents, expected.latents)
            assert one is not None and other is not None
            mask = expected.mask[:, :longest].reshape(len(rows), longest, *[1] * (other.ndim - 2))
            assert torch.equal(one, other[:, :longest].masked_fill(~mask, 0))


@pytest.mark.parametrize("dtype", ["codes", "float16"])
def test_a_shorter_reading_is_a_prefix(dtype: str, tmp_path: Path) -> None:
    file = TokenFile(written(tmp_path / "t", some_tokens(30), header(dtype=dtype), files=2))
    whole, rows = file.tokens(range(30)), torch.arange(30)
    for wanted in (1, 3, N, 99, torch.arange(30) % 7 + 1):
        read = file.tokens(rows, wanted)
        lengths = torch.minimum(whole.lengths, torch.as_tensor(wanted))
        expected = whole.with_lengths(lengths).truncate(int(lengths.max()))
        assert torch.equal(read.lengths, lengths)
        behind = ~expected.mask
        assert torch.equal(read.latents, expected.latents.masked_fill(behind[..., None], 0))
        if expected.codes is not None:
            assert read.codes is not None and torch.equal(read.codes, expected.codes.masked_fill(behind, 0))


def test_other_contracts_are_read_at_their_own_length_only(tmp_path: Path) -> None:
    tokens = some_tokens(10)
    file = TokenFile(written(tmp_path / "t", tokens, header(contract="length_conditioned")))
    assert torch.equal(file.tokens(range(10), N).lengths, tokens.lengths)
    with pytest.raises(ValueError, match="contract is length_conditioned, so shorter rows are encoded anew"):
        file.tokens(range(10), 1)


def test_keys_labels_crops_and_what_was_left_out(tmp_path: Path) -> None:
    tokens, labels = some_tokens(11), torch.arange(11) * 1000 - 3
    file = TokenFile(written(tmp_path / "t", tokens, header(), 3, labels))
    assert file.keys == [f"image {row} ü" for row in range(11)]
    assert file.labels is not None and torch.equal(file.labels, labels) and file.labels.dtype == torch.int64
    assert torch.equal(file.crops, torch.zeros(11, dtype=torch.int64))
    assert file.broken == {f"bad {number}": "cut off" for number in range(3)}
    assert file.header == header() and "11 rows" in file.lines()[0] and "3 of 3 files" in file.lines()[0]
    assert TokenFile(written(tmp_path / "u", tokens, header())).labels is None
    writer = TokenWriter(tmp_path / "c", header(crops=3))
    for crop in (0, 2):
        writer.add(tokens, ["a"] * 11, crop=crop)
    writer.write()
    crops = TokenFile(tmp_path / "c")
    crops.verify()
    assert crops.crops.tolist() == [0] * 11 + [2] * 11 and crops.keys == ["a"] * 22


def test_a_file_without_rows(tmp_path: Path) -> None:
    for dtype in ("codes", "float16"):
        TokenWriter(tmp_path / dtype, header(dtype=dtype)).write({"bad": "cut off"})
        file = TokenFile(tmp_path / dtype)
        file.verify()
        assert len(file) == 0 and file.keys == [] and file.labels is None and file.broken and file.lines()
        assert len(file.tokens([])) == 0


def test_what_loader_workers_are_sent_is_the_path(tmp_path: Path) -> None:
    file = TokenFile(written(tmp_path / "t", some_tokens(1000), header()))
    sent = pickle.dumps(file)
    assert len(sent) < 500
    assert torch.equal(pickle.loads(sent).tokens([5, 999]).latents, file.tokens([5, 999]).latents)


def test_one_file_of_a_set_alone(tmp_path: Path) -> None:
    tokens = some_tokens(20)
    written(tmp_path / "t", tokens, header(), 4)
    file = TokenFile(tmp_path / "t-00002-of-00004")
    assert file.keys == [f"image {row} ü" for row in range(10, 15)] and "1 of 4 files" in file.lines()[0]


def test_opening_reads_no_rows(tmp_path: Path) -> None:
    big = Tokens(torch.zeros(20_000, N, 0), torch.full((20_000,), N), torch.zeros(20_000, N, dtype=torch.int64))
    writer = TokenWriter(tmp_path / "t", header(vocabulary=2**48))
    writer.add(big, ["key"] * 20_000)
    writer.write()
    assert (tmp_path / "t").stat().st_size > 900_000
    tracemalloc.start()
    file = TokenFile(tmp_path / "t")
    file.tokens([3, 19_999])
    assert tracemalloc.get_traced_memory()[1] < 200_000
    tracemalloc.stop()


# Statistics


def test_statistics_are_of_kept_tokens(tmp_path: Path) -> None:
    tokens = some_tokens(60)
    file = TokenFile(written(tmp_path / "t", tokens, header(dtype="float32"), 3))
    statistics = file.statistics
    assert statistics is not None
    for position in range(N):
        kept = tokens.latents[tokens.lengths > position, position].double().numpy()
        assert statistics.counts[position] == len(kept)
        np.testing.assert_allclose(statistics.mean[position], kept.mean(0), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(statistics.std[position], kept.std(0), rtol=1e-5)
    normal = statistics.normalise(tokens.latents)
    first = normal[:, 0]
    torch.testing.assert_close(first.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(first.std(0, correction=0), torch.ones(3))
    torch.testing.assert_close(statistics.denormalise(normal), tokens.latents)
    few = tokens.latents[:, :2]
    torch.testing.assert_close(statistics.denormalise(statistics.normalise(few)), few)


def test_statistics_are_of_what_is_stored(tmp_path: Path) -> None:
    tokens = some_tokens(30)
    stored = TokenFile(written(tmp_path / "t", tokens, header(dtype="float16"))).statistics
    expected = TokenStatistics.of(tokens.latents.half(), tokens.mask)
    assert stored is not None and torch.equal(stored.sums, expected.sums)
    assert TokenFile(written(tmp_path / "c", tokens, header())).statistics is None


def test_positions_that_hardly_a_row_keeps_take_the_spread_of_all() -> None:
    latents = torch.tensor([[[1.0], [5.0], [9.0]], [[3.0], [7.0], [9.0]]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    statistics = TokenStatistics.of(latents, mask)
    assert statistics.counts.tolist() == [2, 1, 0]
    torch.testing.assert_close(statistics.mean.flatten(), torch.tensor([2.0, 3.0, 3.0]))  # of 1, 3 and 5
    spread = float(np.std([1.0, 3.0, 5.0]))
    torch.testing.assert_close(statistics.std.flatten(), torch.tensor([1.0, spread, spread]))
    constant = TokenStatistics.of(torch.full((4, 2, 1), 3.0), torch.ones(4, 2, dtype=torch.bool))
    rounded = TokenStatistics.of(torch.full((12345, 1, 1), -0.42883), torch.ones(12345, 1, dtype=torch.bool))
    assert rounded.std.tolist() == [[1.0]], "what rounding leaves of its variance is above 0"
    assert constant.std.flatten().tolist() == [1, 1] and constant.normalise(torch.full((1, 2, 1), 3.0)).abs().max() == 0


# What is refused

WRONG_ROWS: dict[str, tuple[Any, type[Exception], str]] = {
    "too large": ([0, 30], IndexError, "there is no row 30: .* has rows 0 to 29"),
    "negative": ([-1], IndexError, "there is no row -1"),
    "no numbers": ([0.5], IndexError, "rows are a list of whole numbers, got float64"),
    "a mask": ([True, False], IndexError, "rows are a list of whole numbers, got bool"),
    "one number": (3, IndexError, "rows are a list of whole numbers, got int64 of shape ()"),
}


@pytest.mark.parametrize("case", WRONG_ROWS)
def test_rows_that_there_are_not(case: str, tmp_path: Path) -> None:
    file = TokenFile(written(tmp_path / "t", some_tokens(30), header()))
    rows, error, words = WRONG_ROWS[case]
    with pytest.raises(error, match=words.replace("()", r"\(\)")):
        file.tokens(rows)


@pytest.mark.parametrize("length", [0, -1, 1.5, [1, 2, 3], [0, 1], "auto"])
def test_lengths_that_cannot_be(length: Any, tmp_path: Path) -> None:
    file = TokenFile(written(tmp_path / "t", some_tokens(30), header()))
    with pytest.raises(ValueError, match="length is a number from 1, or one for each of 2 rows"):
        file.tokens([0, 1], length)


def _add(made: dict[str, Any], tokens: Tokens, *arguments: Any, **options: Any) -> None:
    TokenWriter("unused", header(**made)).add(tokens, *arguments or (["a"] * len(tokens),), **options)


def _latents(value: float) -> Tokens:
    latents = torch.ones(2, N, 3)
    latents[1, 0, 0] = value
    return Tokens(latents, torch.tensor([1, 1]))


T = some_tokens(2)
WRONG_TOKENS: dict[str, tuple[Callable[[], None], str]] = {
    "code": (lambda: _add({"vocabulary": 2}, T), "codes go from 0 to 1, got "),
    "no codes": (lambda: _add({}, _latents(1)), "the header says codes, and these tokens are continuous"),
    "channels": (lambda: _add({"dtype": "float32", "dim": 5}, T), "latents have 3 channels, and the header says 5"),
    "nan": (lambda: _add({"dtype": "float32"}, _latents(float("nan")), ["a", "b"]), "1 of 2 images .* float32, first"),
    "overflow": (lambda: _add({"dtype": "float16"}, _latents(1e6), ["a", "b"]), "in float16, first of b: take float32"),
    "budget": (lambda: _add({"budgets": [1]}, T.with_lengths(torch.tensor([1, 4]))), r"lengths \[4\] are none"),
    "keys": (lambda: _add({}, T, ["a"]), "2 rows need as many keys and labels, got 1"),
    "labels": (lambda: _add({}, T, ["a", "b"], torch.tensor([1])), "as many keys and labels"),
    "large label": (lambda: _add({}, T, ["a", "b"], torch.tensor([1, 2**40])), "labels are whole numbers of 32 bits"),
    "crop": (lambda: _add({"crops": 2}, T, ["a", "b"], crop=2), "crops go from 0 to 1, got 2"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_TOKENS)
def test_tokens_that_do_not_fit_their_header(case: str) -> None:
    act, words = WRONG_TOKENS[case]
    with pytest.raises(ValueError, match=words):
        act()


def test_labels_of_some_rows_only(tmp_path: Path) -> None:
    writer = TokenWriter(tmp_path / "t", header())
    writer.add(T, ["a", "b"])
    with pytest.raises(ValueError, match="either all rows have labels or none"):
        writer.add(T, ["c", "d"], torch.tensor([1, 2]))


@pytest.mark.parametrize(
    "changes",
    [{"vocabulary": None}, {"vocabulary": 2**57}, {"dtype": "int8"}, {"num_tokens": 0}, {"num_tokens": 1 << 17}]
    + [{"crops": True}, {"dim": "3"}, {"budgets": ["a"]}, {"images": []}, {"normalisation": "std"}, {"image_size": -1}],
)
def test_headers_that_cannot_be(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        header(**changes)


# Sets of files


def test_files_that_are_missing_or_too_many(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there are no tokens at .*/t: neither this file nor .*/t-\*-of-\*"):
        TokenFile(tmp_path / "t")
    written(tmp_path / "t", some_tokens(20), header(), 4)
    (tmp_path / "t-00001-of-00004").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 4 files are missing, first .*t-00001-of-00004"):
        TokenFile(tmp_path / "t")
    written(tmp_path / "t", some_tokens(20), header(), 2)
    with pytest.raises(TokenFileError, match="t is ambiguous: .* are of different sets; move one away"):
        TokenFile(tmp_path / "t")


def test_files_of_another_set(tmp_path: Path) -> None:
    written(tmp_path / "t", some_tokens(20), header(), 3)
    written(tmp_path / "u", some_tokens(20), header(tokenizer="cd" * 32), 3)
    (tmp_path / "u-00001-of-00003").replace(tmp_path / "t-00001-of-00003")
    with pytest.raises(TokenFileError, match="file 1 of 3 of another set than t-00000-of-00003"):
        TokenFile(tmp_path / "t")
    written(tmp_path / "v", some_tokens(20), header(), 3)
    names = [tmp_path / f"v-{number:05}-of-00003" for number in (0, 1)]
    contents = [name.read_bytes() for name in names]
    for name, content in zip(names, reversed(contents), strict=True):
        name.write_bytes(content)
    with pytest.raises(TokenFileError, match="v-00000-of-00003 .* it is file 1 of 3"):
        TokenFile(tmp_path / "v")


# Damage


def forged(content: bytes, change: Callable[[dict[str, Any]], object], **tensors: Any) -> bytes:
    """The file with another header and other tensors, and digests as if they had been so from the beginning."""
    loaded = safetensors.numpy.load(content) | tensors
    size = int.from_bytes(content[:8], "little")
    fields = json.loads(json.loads(content[8 : 8 + size])["__metadata__"][NAME].partition(" ")[2])
    fields["shard"]["sha256"] |= {name: sha256(array.tobytes()).hexdigest() for name, array in tensors.items()}
    change(fields)
    text = json.dumps(fields, sort_keys=True)
    return safetensors.numpy.save(loaded, {NAME: f"{sha256(text.encode()).hexdigest()} {text}"})


def damaged_files(whole: bytes) -> dict[str, tuple[bytes, str]]:
    size = int.from_bytes(whole[:8], "little")
    within = whole.index(b"num_tokens")
    offsets = safetensors.numpy.load(whole)["offsets"]
    falling, long = offsets.copy(), offsets.copy()
    falling[3], long[1:-1] = falling[-1] + 1, offsets[-1]
    return {
        "empty": (b"", "header too small"),
        "text": (b"hello tokens, are you there", "its header would have"),
        "cut within the header": (whole[:100], "invalid header length"),
        "cut at the end": (whole[:-1], "not fully covered"),
        "longer": (whole + b"\0", "not fully covered"),
        "a huge header": ((2**62).to_bytes(8, "little") + whole[8:], "its header would have 4,611,686,018,427,387,904"),
        "weights": (safetensors.numpy.save({"a": np.zeros(3)}), "safetensors file of something else"),
        "a flipped bit in the header": (whole[:within] + b"M" + whole[within + 1 :], "its header is damaged"),
        "another version": (forged(whole, lambda fields: fields.update(version=2)), "version 2, and this code reads 1"),
        "a number that is none": (forged(whole, lambda fields: fields["set"].update(dim="3")), "dim is 3"),
        "a field too many": (forged(whole, lambda fields: fields["set"].update(more=3)), "unexpected keyword"),
        "a field too few": (forged(whole, lambda fields: fields["set"].pop("crops")), "missing 1 required"),
        "endless files": (forged(whole, lambda fields: fields["shard"].update(of=2**50)), "99999 at most"),
        "other tensors": (forged(whole, lambda fields: fields["set"].update(crops=2)), "not those of its header"),
        "other codes": (forged(whole, lambda fields: fields["set"].update(vocabulary=9)), "do not fit each other"),
        "a late beginning": (forged(whole, lambda fields: None, offsets=offsets + 1), "do not fit each other"),
        "falling offsets": (forged(whole, lambda fields: None, offsets=falling), "row 2 is damaged, with tokens from"),
        "a long row": (forged(whole, lambda fields: None, offsets=long), "row 0 is damaged"),
        "nesting": (whole[:8] + (b"[" * size) + whole[8 + size :], "recursion|JSON"),
    }  # fmt: skip


def test_each_kind_of_damage_is_told_in_words(tmp_path: Path) -> None:
    whole = written(tmp_path / "t", some_tokens(30), header()).read_bytes()
    for case, (content, words) in damaged_files(whole).items():
        (tmp_path / "d").write_bytes(content)
        with pytest.raises(TokenFileError, match=words) as told:
            TokenFile(tmp_path / "d").tokens(range(30))
        assert str(told.value).startswith(f"{tmp_path / 'd'} cannot be read as tokens: "), case
        assert len(str(told.value)) < 500, case
    (tmp_path / "folder").mkdir()
    with pytest.raises(TokenFileError, match="no regular file"):
        TokenFile(tmp_path / "folder")


def test_verify_finds_what_opening_cannot(tmp_path: Path) -> None:
    whole = written(tmp_path / "t", some_tokens(30), header(), labels=torch.arange(30)).read_bytes()
    tensors = safetensors.numpy.load(whole)
    for name, array in tensors.items():
        place = whole.index(array.tobytes())
        (tmp_path / "d").write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(TokenFileError, match=f"its {name} are damaged|offsets do not begin with 0"):
            TokenFile(tmp_path / "d").verify()
    codes = np.full_like(tensors["tokens"], 255)
    (tmp_path / "d").write_bytes(forged(whole, lambda fields: None, tokens=codes))
    for act in (lambda file: file.verify(), lambda file: file.tokens([0])):
        with pytest.raises(TokenFileError, match="it holds the code 1023, and there are 1000"):
            act(TokenFile(tmp_path / "d"))
    (tmp_path / "d").write_bytes(forged(whole, lambda fields: None, keys=np.full_like(tensors["keys"], 255)))
    with pytest.raises(TokenFileError, match="its keys are damaged"):
        TokenFile(tmp_path / "d").verify()
    (tmp_path / "d").write_bytes(forged(whole, lambda fields: fields["set"].update(budgets=[1, 2])))
    with pytest.raises(TokenFileError, match="rows of 3 tokens, and its budgets are"):
        TokenFile(tmp_path / "d").verify()


Mutation = Callable[[random.Random, bytes], bytes]


def _flip(draw: random.Random, whole: bytes) -> bytes:
    content = bytearray(whole)
    for _ in range(draw.choice([1, 1, 1, 2, 8])):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return bytes(content)


def _flip_in_header(draw: random.Random, whole: bytes) -> bytes:
    place = draw.randrange(8 + int.from_bytes(whole[:8], "little"))
    return whole[:place] + bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1 :]


def _flip_in_tensors(draw: random.Random, whole: bytes) -> bytes:
    place = draw.randrange(8 + int.from_bytes(whole[:8], "little"), len(whole))
    return whole[:place] + bytes([whole[place] ^ 1 << draw.randrange(8)]) + whole[place + 1 :]


def _cut(draw: random.Random, whole: bytes) -> bytes:
    return whole[: draw.randrange(len(whole))]


def _repeat(draw: random.Random, whole: bytes) -> bytes:
    start, stop = sorted(draw.sample(range(len(whole)), 2))
    return whole[:stop] + whole[start:]


def _header_size(draw: random.Random, whole: bytes) -> bytes:
    size = draw.choice([0, 1, 2, len(whole), 2**22, 2**22 + 1, 2**31, 2**63, 2**64 - 1])
    return size.to_bytes(8, "little") + whole[8:]


def _digits(draw: random.Random, whole: bytes) -> bytes:
    """Another number somewhere in the header: a version, a size, a place."""
    size = int.from_bytes(whole[:8], "little")
    found = draw.choice(list(re.finditer(rb"\d+", whole[8 : 8 + size])))
    number = str(draw.choice([0, 1, 7, 2**31, 2**32, 2**63, 10**30])).encode()
    new = whole[8 : 8 + found.start()] + number + whole[8 + found.end() : 8 + size]
    return len(new).to_bytes(8, "little") + new + whole[8 + size :]


def _swap(draw: random.Random, whole: bytes) -> bytes:
    """Two tensors change places, or their names do."""
    size = int.from_bytes(whole[:8], "little")
    fields = json.loads(whole[8 : 8 + size])
    one, other = draw.sample([name for name in fields if name != "__metadata__"], 2)
    fields[one], fields[other] = fields[other], fields[one]
    if draw.random() < 0.5:
        for name in ("dtype", "shape"):
            fields[one][name], fields[other][name] = fields[other][name], fields[one][name]
    new = json.dumps(fields).encode()
    return len(new).to_bytes(8, "little") + new + whole[8 + size :]


def _forge_header(draw: random.Random, whole: bytes) -> bytes:
    def change(fields: dict[str, Any]) -> None:
        part = fields[draw.choice(["set", "shard"])]
        part[draw.choice(list(part))] = draw.choice([0, 1, -1, 2**40, 2**80, 1.5, None, True, "", "a", [], {}, [2**70]])

    return forged(whole, change)


def _forge_tensor(draw: random.Random, whole: bytes) -> bytes:
    tensors = safetensors.numpy.load(whole)
    name = draw.choice(list(tensors))
    array = tensors[name].copy().reshape(-1)
    kind = draw.choice([array.dtype, np.dtype(np.float64), np.dtype(np.int8)])
    array = np.frombuffer(draw.randbytes(array.nbytes // kind.itemsize * kind.itemsize), kind)
    if draw.random() < 0.5:
        array = array[: draw.randrange(len(array) + 1)]
    return forged(whole, lambda fields: None, **{name: array})


MUTATIONS: list[tuple[Mutation, int]] = [
    (_flip, 100), (_flip_in_header, 150), (_flip_in_tensors, 200), (_cut, 80), (_repeat, 40), (_header_size, 40),
    (_digits, 120), (_swap, 90), (_forge_header, 90), (_forge_tensor, 90),
]  # fmt: skip


def test_a_thousand_damaged_files(tmp_path: Path) -> None:
    """Each is refused or found out by ``verify``; or it is the same to the last token. None takes memory."""
    labels, path = torch.arange(30), tmp_path / "d"
    writer = TokenWriter(tmp_path / "codes", header(crops=2))
    for crop in range(2):
        writer.add(some_tokens(30, seed=crop), [f"é{crop} {row}" for row in range(30)], labels, crop)
    writer.write()
    wholes = [
        (tmp_path / "codes").read_bytes(),
        written(tmp_path / "latents", some_tokens(30), header(dtype="float16")).read_bytes(),
    ]
    expected = [contents(tmp_path / name) for name in ("codes", "latents")]
    draw, outcomes = random.Random(0), {"opening": 0, "verify": 0, "same": 0, "forged": 0}
    tracemalloc.start()
    for mutation, times in MUTATIONS:
        for number in range(times):
            which = number % 2
            path.write_bytes(mutation(draw, wholes[which]))
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            stage = "opening"
            try:
                file = TokenFile(path)
                stage = "verify"
                try:
                    contents(path)  # without verify it may be wrong, but does not crash
                except TokenFileError:
                    pass
                file.verify()
                stage = "same"
                if mutation in (_forge_header, _forge_tensor):  # digests are no signature
                    stage = "forged"
                else:
                    assert contents(path) == expected[which], (mutation, number)
            except TokenFileError as error:
                assert len(str(error)) < 1000
            outcomes[stage] += 1
            assert tracemalloc.get_traced_memory()[1] - before < 2_000_000, (mutation, number)
    tracemalloc.stop()
    assert sum(outcomes.values()) == 1000
    assert outcomes["opening"] > 500 and outcomes["verify"] > 200 and outcomes["same"] < 10, outcomes


def contents(path: Path) -> tuple[Any, ...]:
    """Everything that can be read."""
    file = TokenFile(path)
    read = file.tokens(range(len(file)))
    statistics = None if file.statistics is None else file.statistics.sums.tolist()
    labels = None if file.labels is None else file.labels.tolist()
    values = (read.latents if read.codes is None else read.codes).tolist()
    return values, read.lengths.tolist(), file.keys, labels, file.crops.tolist(), statistics, file.header
