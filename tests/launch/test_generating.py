"""Images of a run's generator: what is in the folder, that it can be made again, and what is refused."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import framework
from framework.generators.autoregressive import LlamaGenAR
from framework.generators.dit import DiT
from framework.generators.guidance import Guidance
from framework.generators.image_generator import ImageGenerator
from framework.generators.interface import TokenSpace
from framework.generators.masked import MaskGIT
from framework.generators.samplers import Euler
from framework.launch import generating
from framework.launch.generating import generate_images
from framework.runtime.weights import weights_digest
from framework.tokenizers.quantizers.finite_scalar_quantizer import FiniteScalarQuantizer
from tests.tiny_run import run_tool
from tests.tokenizers.build import small_tokenizer


def with_decoder(images: ImageGenerator) -> ImageGenerator:
    """An untrained decoder makes grey of everything; this one does not."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in images.tokenizer.decoder.parameters():
            weight.normal_(std=0.2, generator=generator)
    return images


@pytest.fixture(autouse=True)
def colourful(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = generating._loaded

    def again(*args: Any) -> Any:
        images, record = loaded(*args)
        return with_decoder(images), record

    monkeypatch.setattr(generating, "_loaded", again)


def silent(*told: object) -> None:
    pass


def pixels_of(out: Path) -> Any:
    return np.load(out / "samples.npz")["arr_0"]


def test_the_folder(
    generator_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "samples"
    options = ["--num", 7, "--classes", 4, 2, "--guidance", 2, "--interval", 0, 0.5, "--seed", 3, "--top-k", 5]
    assert run_tool(monkeypatch, "generate", "--run", generator_run, "--out", out, *options, "--batch", 1) == 0
    assert "images: 7, classes: 2, tokens on average: 5.00" in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"images", "grid.png", "samples.csv", "samples.npz", "record.json"}
    assert list(tmp_path.iterdir()) == [out]

    with np.load(out / "samples.npz") as archive:
        assert archive.files == ["arr_0", "arr_1"]
        pixels, labels = archive["arr_0"], archive["arr_1"]
    assert pixels.shape == (7, 16, 16, 3) and pixels.dtype == np.uint8
    assert labels.tolist() == [4, 2, 4, 2, 4, 2, 4]
    for number, rows in enumerate(csv.DictReader((out / "samples.csv").open())):
        assert rows == {"image": f"{number:08}.png", "label": str(labels[number]), "tokens": "5"}
        assert np.array_equal(np.asarray(Image.open(out / "images" / rows["image"])), pixels[number])

    model = framework.load(generator_run)
    assert isinstance(model.generator, LlamaGenAR)
    record = json.loads((out / "record.json").read_text())
    assert record["run"]["step"] == 6 and record["run"]["weights_sha256"] == weights_digest(model.state_dict())
    assert record["generator"]["name"] == "LlamaGenAR" and record["generator"]["batch_size"] == 1
    assert record["generator"]["sampling"] == {"temperature": 1.0, "top_k": 5, "top_p": 1.0}
    assert (record["seed"], record["lengths"]) == (3, {"5": 7})
    guidance = Guidance(**record["guidance"] | {"interval": tuple(record["guidance"]["interval"])})
    model.generator.sampling = generating.replace(model.generator.sampling, top_k=5)
    tokens = model.generate(torch.from_numpy(labels), seed=3, guidance=guidance)
    expected = (with_decoder(model).decode(tokens) * 255).round().permute(0, 2, 3, 1).numpy()
    assert np.abs(expected - pixels).max() <= 1  # where other batches round differently
    assert len(np.unique(pixels.reshape(7, -1), axis=0)) > 1


def test_an_image_depends_neither_on_how_many_there_are_nor_on_the_policy(generator_run: Path, tmp_path: Path) -> None:
    several: dict[str, Any] = {
        "few": {"num": 5}, "many": {"num": 12, "policy": "static", "batch_size": 3}, "other": {"num": 5, "seed": 1},
        "asked": {"num": 5, "lengths": [5]}, "cool": {"num": 5, "temperature": 0.0},
    }  # fmt: skip
    for name, given in several.items():
        generate_images(generator_run, tmp_path / name, progress=silent, say=silent, **given)
    few, many, other, asked, cool = (pixels_of(tmp_path / name).astype(int) for name in several)
    assert np.abs(few - many[:5]).max() <= 1 and np.abs(few - asked).max() <= 1
    assert np.abs(few - other).max() > 1 and np.abs(few - cool).max() > 1


@pytest.mark.parametrize("stopped_in", ["_write_grid", "write_text"])
def test_a_command_that_was_stopped_goes_on(
    generator_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped_in: str
) -> None:
    """Where it was, if it is to make the same, fast or slowly; another finds its folder taken."""
    wanted = {"num": 9, "batch_size": 1, "progress": silent}
    calls: list[object] = []
    once = getattr(generating, stopped_in)

    def stop(*args: object) -> None:
        calls.append(args)
        if stopped_in == "_write_grid" or len(calls) == 3:  # of three parts the second was made, and not noted
            raise KeyboardInterrupt
        once(*args)

    generate_images(generator_run, tmp_path / "whole", say=silent, **wanted)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(generating, stopped_in, stop)
        generate_images(generator_run, tmp_path / "out", say=silent, **wanted)
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out.partial"}
    shutil.copytree(tmp_path / "out.partial", tmp_path / "other.partial")
    told: list[str] = []
    generate_images(generator_run, tmp_path / "out", say=told.append, **wanted)
    assert f"going on behind the first {9 if stopped_in == '_write_grid' else 4} images" in told[0]
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert {path.name for path in whole.iterdir()} == {path.name for path in out.iterdir()}
    assert (pixels_of(whole) == pixels_of(out)).all()
    assert (whole / "samples.csv").read_bytes() == (out / "samples.csv").read_bytes()
    assert all((out / "images" / file.name).read_bytes() == file.read_bytes() for file in (whole / "images").iterdir())

    before = {path: path.read_bytes() for path in (tmp_path / "other.partial").rglob("*.*") if path.is_file()}
    with pytest.raises(FileExistsError, match="stopped and differs in seed, images: give the same again"):
        generate_images(generator_run, tmp_path / "other", **(wanted | {"num": 3, "seed": 1}), say=silent)
    assert all(path.read_bytes() == content for path, content in before.items())
    generate_images(generator_run, tmp_path / "other", **(wanted | {"batch_size": 5, "policy": "static"}), say=silent)
    assert np.abs(pixels_of(whole).astype(int) - pixels_of(tmp_path / "other")).max() <= 1
    assert (whole / "samples.npz").read_bytes() == (out / "samples.npz").read_bytes()


def test_a_folder_of_something_else_is_left_alone(generator_run: Path, tmp_path: Path) -> None:
    own = tmp_path / "out.partial"
    own.mkdir()
    (own / "notes.txt").write_text("precious")
    with pytest.raises(FileExistsError, match=r"out\.partial is in the way"):
        generate_images(generator_run, tmp_path / "out", 2, silent, silent)
    assert (own / "notes.txt").read_text() == "precious"
    (own / "unfinished.json").write_text('{"made": {}, "lengths": [4]}')
    with pytest.raises(FileExistsError, match=r"leaves \(arr_0\.npy\)"):
        generate_images(generator_run, tmp_path / "out", 2, silent, silent)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--classes", "10"], "classes are numbers from 0 to 9, got 10"),
        (["--lengths", "5", "6"], r"lengths are [5], got 6: the nearest is 5"),
        (["--temperature", "-1"], "the temperature is 0, for the likeliest, or from 1e-6; got -1.0"),
        (["--interval", "1", "0"], "interval of progress from 0 to 1"),
        (["--checkpoint", "best"], "keeps no best checkpoint"),
    ],
)
def test_refusals(
    generator_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    options: list[str], message: str,
) -> None:  # fmt: skip
    wanted = ["--run", generator_run, "--out", tmp_path / "out", "--num", 2, *options]
    assert run_tool(monkeypatch, "generate", *wanted) == 2
    assert message in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_other_folders_and_generators(generator_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileExistsError, match="another folder, or remove it"):
        generate_images(generator_run, tmp_path, 2, silent, silent)
    with monkeypatch.context() as patched:
        other = SimpleNamespace(task=SimpleNamespace(model=torch.nn.Identity()))
        patched.setattr(generating, "experiment_from", lambda *args, **given: other)
        with pytest.raises(TypeError, match="no run of a generator: its model is Identity"):
            generate_images(generator_run, tmp_path / "out", 2, silent, silent)
    with pytest.raises(framework.runs.RunError, match="holds no run"):
        generate_images(tmp_path / "nothing", tmp_path / "out", 2, silent, silent)
    loaded = generating._loaded

    def without_policy(*args: Any) -> Any:
        images, record = loaded(*args)
        del images.generator.policy
        return images, record

    monkeypatch.setattr(generating, "_loaded", without_policy)
    with pytest.raises(ValueError, match="policy is no setting of this run's generator, a Llama.*; it has batch"):
        generate_images(generator_run, tmp_path / "out", 2, silent, silent, policy="static")
    assert not (tmp_path / "out").exists()


def dit() -> ImageGenerator:
    tokenizer = small_tokenizer().eval()
    space = TokenSpace(6, tokenizer.token_dim, None, (2, 6), 10)
    return ImageGenerator(DiT(None, 16, 1, 2, sampler=Euler(steps=3), space=space), tokenizer).eval()


def maskgit() -> ImageGenerator:
    tokenizer = small_tokenizer(quantizer=FiniteScalarQuantizer([5, 4])).eval()
    space = TokenSpace(6, tokenizer.token_dim, 20, (2, 6), 10)
    return ImageGenerator(MaskGIT(16, 1, 2, steps=3, space=space), tokenizer).eval()


@pytest.mark.parametrize(("make", "settings"), [(dit, {}), (maskgit, {"temperature": 0.5, "batch_size": 3})])
def test_other_generators(
    make: Callable[[], ImageGenerator], settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generating, "_loaded", lambda *args: (make(), {}))
    generate_images(tmp_path, tmp_path / "out", 12, silent, silent, lengths=[6, 2], guidance=Guidance(2.0), **settings)
    rows = list(csv.DictReader((tmp_path / "out/samples.csv").open()))
    assert [row["tokens"] for row in rows] == ["6"] * 10 + ["2"] * 2
    record = json.loads((tmp_path / "out/record.json").read_text())["generator"]
    if make is dit:
        assert record["sampler"]["name"] == "Euler" and record["sampler"]["steps"] == 3
        with pytest.raises(ValueError, match="top_p is no setting of this run's generator, a DiT; it has batch_size"):
            generate_images(tmp_path, tmp_path / "other", 2, silent, silent, top_p=0.5)
    else:
        assert (record["steps"], record["sampling"]["temperature"], record["batch_size"]) == (3, 0.5, 3)
    with pytest.raises(ValueError, match="policy is no setting"):
        generate_images(tmp_path, tmp_path / "other", 2, silent, silent, policy="static")
