"""tools/tokens.py, and what docs/tokens.md shows, as a user types it."""

from __future__ import annotations

import csv
import json
import re
from functools import reduce
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import framework
from framework.allocation.adaptive_tokenizer import AdaptiveTokenizer
from framework.data.folder import ImageFolder
from framework.data.stream import subset
from framework.data.token_file import TokenFile
from framework.evaluation.codecs import CODECS, compress
from framework.evaluation.image_metrics import psnr, squared_error
from framework.models.export import export
from framework.models.loading import experiment_from, run_config
from framework.tokenizers.tokenizer import Tokenizer
from tests.data.token_sets import header, some_tokens, written
from tests.tiny_run import ROOT, files_of, run_tool

DOCUMENT = (ROOT / "docs/tokens.md").read_text()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Twelve images of two classes, and one that is none."""
    for number in range(12):
        path = tmp_path / "photos" / f"{'cat' if number % 3 else 'dog'}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    (tmp_path / "photos/cat/bad.png").write_text("no image")
    return tmp_path / "photos"


def test_a_folder_there_and_back(
    photos: Path, tiny_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = photos.with_name("photos.tokens")
    command = ["encode", photos, "--run", tiny_run, "--length", "9", "--out", out, "--max-broken", "0.1"]
    assert run_tool(monkeypatch, "tokens", *command) == 0
    said = capsys.readouterr().out
    assert "left out cat/bad.png: no image in a format" in said and re.search(r"13 images in .* images/s", said)
    assert "12 rows" in said and "9.00 a row on average, 16 at most" in said
    assert re.search(r"'9' by 'FixedLength \w{64}', 0.00 decoder passes a row", said)
    assert "4608.0 bits of tokens a row" in said
    before = files_of(out.parent)
    assert run_tool(monkeypatch, "tokens", *command) == 0
    assert "1 of 1 files are there already" in capsys.readouterr().out and files_of(out.parent) == before

    tokenizer = framework.load(tiny_run)
    assert isinstance(tokenizer, Tokenizer)
    data = ImageFolder(str(photos), max_broken=0.5, image_size=16, training=False, seed=0)
    batch = data.fetch(range(13), epoch=0)
    file = TokenFile(out)
    assert file.keys == batch.keys and file.labels is not None and batch.labels is not None
    assert torch.equal(file.labels, batch.labels)
    with torch.no_grad():
        expected = tokenizer.encode(batch.images, 9)
        torch.testing.assert_close(file.tokens(range(12)).latents, expected.latents[:, :9])
        pictures = (tokenizer.decode(expected.with_lengths(expected.lengths - 5)) * 255).round()

    rebuilt = photos.with_name("rebuilt")
    command = ["decode", out, "--run", tiny_run, "--length", "4", "--rows", "2", "7", "--out", rebuilt]
    assert run_tool(monkeypatch, "tokens", *command) == 0
    assert f"5 images in {rebuilt}" in capsys.readouterr().out
    assert sorted(path.name for path in rebuilt.iterdir()) == [*(f"{row:08}.png" for row in range(2, 7)), "rows.csv"]
    rows = list(csv.DictReader((rebuilt / "rows.csv").open()))
    assert [row["key"] for row in rows] == batch.keys[2:7] and {row["tokens"] for row in rows} == {"4"}
    assert [int(row["label"]) for row in rows] == batch.labels[2:7].tolist()
    for row in range(2, 7):
        pixels = torch.from_numpy(np.array(Image.open(rebuilt / f"{row:08}.png"))).permute(2, 0, 1)
        assert (pixels.float() - pictures[row]).abs().max() <= 1
    assert run_tool(monkeypatch, "tokens", *command) == 2
    assert f"{rebuilt} is there already" in capsys.readouterr().err
    command[command.index("--rows") + 2], command[-1] = "13", photos.with_name("more")
    assert run_tool(monkeypatch, "tokens", *command) == 2
    assert "there is no row 12" in capsys.readouterr().err and not photos.with_name("more.partial").exists()


def test_the_policys_lengths_of_the_runs_own_images(
    tmp_path: Path, tiny_policy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tokens"
    command = ["encode", "dataset", "--split", "test", "--run", tiny_policy, "--rows-per-file", "15", "--out", out]
    assert run_tool(monkeypatch, "tokens", *command) == 0
    file = TokenFile(out)
    assert len(file.files) == 3 and len(file) == 40 and file.header.images["split"] == "test"
    adaptive = framework.load(tiny_policy)
    assert isinstance(adaptive, AdaptiveTokenizer)
    assert file.header.budgets == list(adaptive.policy.budgets) and file.header.policy.startswith("LearnedPolicy ")
    assert file.header.source["run"] == str(tiny_policy)
    capsys.readouterr()
    for command in (["info", out], ["verify", out]):
        assert run_tool(monkeypatch, "tokens", *command) == 0
    said = capsys.readouterr().out
    assert "40 rows" in said and "'split'" not in said and "split: 'test'" in said and "40 rows, undamaged" in said
    shard = tmp_path / "tokens-00001-of-00003"
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    assert run_tool(monkeypatch, "tokens", "info", out) == 0
    assert run_tool(monkeypatch, "tokens", "verify", out) == 1
    assert f"{shard} cannot be read as tokens" in capsys.readouterr().err


def test_several_crops_of_a_folder(photos: Path, tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (photos / "cat/bad.png").unlink()
    out = photos.with_name("t")
    command = ["encode", photos, "--run", tiny_run, "--length", "16", "--crop", "RandomResizedCrop", "--crops", "2"]
    assert run_tool(monkeypatch, "tokens", *command, "--out", out) == 0
    file = TokenFile(out)
    assert len(file) == 24 and file.crops.tolist() == [0] * 12 + [1] * 12 and file.keys[:12] == file.keys[12:]
    assert "random square of area 0.25 to 1" in file.header.images["crop"]
    latents = file.tokens(range(24)).latents
    assert not torch.equal(latents[:12], latents[12:])


def test_tokens_stand_beside_codecs_at_equal_bytes(
    tmp_path: Path, tiny_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "tokens"
    encode = ["encode", "dataset", "--split", "test", "--run", tiny_run, "--length", "9", "--out", out]
    assert run_tool(monkeypatch, "tokens", *encode) == 0
    capsys.readouterr()
    compare = ["compare", out, "dataset", "--split", "test", "--run", tiny_run, "--length", "3", "--limit", "10"]
    assert run_tool(monkeypatch, "tokens", *compare) == 0
    said = capsys.readouterr().out
    rows = {cells[0]: cells[1:] for line in said.splitlines() if (cells := line.strip("| ").split(" | "))}
    data = experiment_from(run_config(tiny_run), "meta").data.test
    images = data.fetch(subset(len(data), 10), 0).images
    tokenizer, max_bytes = framework.load(tiny_run), 3 * 16 * 32 // 8
    assert isinstance(tokenizer, Tokenizer)
    with torch.no_grad():
        errors = squared_error(images, tokenizer.decode(tokenizer.encode(images, 3)))
    assert rows["tokens"][:3] == [f"{max_bytes:.1f}", f"{1000 * errors.mean():.3g}", f"{psnr(errors).mean():.2f}"]
    for codec in CODECS:
        coded = compress(images, codec, max_bytes)
        mse = squared_error(images, coded.reconstructions).mean()
        expected = [f"{coded.num_bytes.double().mean():.1f}", f"{1000 * mse:.3g}"]
        assert rows[codec.title][:2] == expected and rows[codec.title][3] == f"{coded.fits.double().mean():.0%}"
    assert "10 images." in said
    assert run_tool(monkeypatch, "tokens", "compare", out, "dataset", "--run", tiny_run) == 2
    assert "has no tokens of these images" in capsys.readouterr().err


def test_an_exported_model_does_what_its_run_does(
    photos: Path, tiny_policy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "cat/bad.png").unlink()
    monkeypatch.chdir(photos.parent)
    export(tiny_policy, Path("exported"))
    for name, run in (("own", tiny_policy), ("other", "exported")):
        assert run_tool(monkeypatch, "tokens", "encode", photos, "--run", run, "--out", name) == 0
    own, other = TokenFile("own"), TokenFile("other")
    assert torch.equal(own.lengths, other.lengths) and own.header.tokenizer == other.header.tokenizer
    assert torch.equal(own.tokens(range(12)).latents, other.tokens(range(12)).latents)
    assert run_tool(monkeypatch, "tokens", "decode", "own", "--run", "exported", "--out", "rebuilt") == 0
    assert run_tool(monkeypatch, "tokens", "compare", "own", photos, "--run", "exported") == 0
    assert len(list(Path("rebuilt").glob("*.png"))) == 12 and "| tokens | " in capsys.readouterr().out
    assert run_tool(monkeypatch, "tokens", "encode", "dataset", "--run", "exported", "--out", "more") == 2
    assert "an exported model comes without data: name a folder of images" in capsys.readouterr().err


WRONG = {
    "crops": (["compare", "CROPS", "PHOTOS", "--run", "RUN"], "has 2 random crops of each image"),
    "no policy": (["encode", "PHOTOS", "--run", "RUN", "--out", "t"], "length 'auto' needs a policy"),
    "no run": (["encode", "PHOTOS", "--run", "nothing", "--out", "t"], "nothing holds no run"),
    "no folder": (["encode", "nothing", "--run", "RUN", "--length", "4", "--out", "t"], "nothing does not exist"),
    "no crop": (["encode", "PHOTOS", "--crop", "CentreCrop", "--run", "RUN", "--out", "t"], "mean 'CenterCrop'?"),
    "broken": (["encode", "PHOTOS", "--run", "RUN", "--length", "4", "--out", "t"], "1 of 13 images cannot be read"),
    "own crop": (["encode", "dataset", "--crop", "CenterCrop", "--run", "RUN", "--out", "t"], "are for a folder"),
    "split": (["encode", "PHOTOS", "--split", "test", "--run", "RUN", "--out", "t"], "run's own data has a split"),
    "no tokens": (["info", "t"], "there are no tokens at t"),
    "no token file": (["decode", "PHOTOS/cat/bad.png", "--run", "RUN", "--out", "t"], "cannot be read as tokens"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_told_in_words(
    case: str, photos: Path, tiny_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(photos.parent)
    arguments, words = WRONG[case]
    written(Path("crops"), some_tokens(4), header(crops=2))
    names = {"RUN": str(tiny_run), "PHOTOS": "photos", "CROPS": "crops"}
    given = [reduce(lambda text, name: text.replace(name, names[name]), names, argument) for argument in arguments]
    assert run_tool(monkeypatch, "tokens", *given) == 2
    out, err = capsys.readouterr()
    assert words in err and "Traceback" not in err
    assert not Path("t").exists()


# The document


def python_block(holding: str) -> str:
    (found,) = [text for text in re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL) if holding in text]
    return str(found)


def test_the_five_lines(photos: Path, tiny_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (photos / "cat/bad.png").unlink()
    monkeypatch.chdir(photos.parent)
    Path("my").mkdir()
    photos.rename("my/photos")
    Path("runs/adatok").mkdir(parents=True)
    Path("runs/adatok/ntm").symlink_to(tiny_run)
    found: dict[str, object] = {}
    exec(python_block("encode_images"), found)
    file, images = found["file"], found["images"]
    assert isinstance(file, TokenFile) and len(file) == 12 and file.lengths.tolist() == [8] * 12
    assert isinstance(images, torch.Tensor) and images.shape == (2, 3, 16, 16)
    exec(python_block("statistics"), found)
    normal = found["normal"]
    assert isinstance(normal, torch.Tensor) and normal.shape == (4, 8, 16)


def test_reading_without_the_framework(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tokens = some_tokens(20, 4375)
    written(Path("my.tokens"), tokens, header(vocabulary=4375))
    code = python_block("safe_open")
    assert "framework" not in code
    found: dict[str, object] = {}
    exec(code, found)
    assert tokens.codes is not None and found["key"] == "image 7 ü"
    assert found["codes"] == tokens.codes[7, : int(tokens.lengths[7])].tolist()


def test_the_document_names_every_field(tmp_path: Path) -> None:
    made = header(dtype="float16", crops=2)
    whole = written(tmp_path / "t", some_tokens(3), made, labels=torch.arange(3)).read_bytes()
    size = int.from_bytes(whole[:8], "little")
    fields = json.loads(whole[8 : 8 + size])
    own = json.loads(fields.pop("__metadata__")["adatok.tokens"].partition(" ")[2])
    for name in (*fields, *own, *own["set"], *own["shard"]):
        assert f"`{name}`" in DOCUMENT, name
