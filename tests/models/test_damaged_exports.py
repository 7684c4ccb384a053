"""Exported folders that are damaged, forged or of another format: each is refused in words, none is a wrong model."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load, save
from torch import Tensor

import framework
from framework.config import ConfigError
from framework.engine.checkpoint import CheckpointError
from framework.runs import RunError
from framework.runtime.weights import weights_digest
from tests.faults.damage import (
    Harm,
    flip,
    forge,
    forge_key,
    of_file,
    remove,
    replace_file,
    safetensors_bytes,
    truncate,
    write,
)
from tests.models.exports import TREE, exported

CONFIG, WEIGHTS, MANIFEST = FILES = ("config.yaml", "model.safetensors", "manifest.json")
REFUSED = (CheckpointError, ConfigError, RunError)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exports") / "sound"
    exported(folder, TREE)
    return folder


def other_config(change: Callable[[dict[str, Any]], object]) -> Harm:
    """Another configuration, which the manifest agrees with."""

    def harm(folder: Path) -> None:
        tree = yaml.safe_load((folder / CONFIG).read_text())
        changed = change(tree)
        replace_file(CONFIG, yaml.safe_dump(tree if changed is None else changed).encode())(folder)

    return harm


def setting(value: object, *keys: str) -> Harm:
    def change(tree: dict[str, Any]) -> None:
        for key in keys[:-1]:
            tree = tree[key]
        tree[keys[-1]] = value

    return other_config(change)


def other_weights(change: Callable[[dict[str, Tensor]], object], agree: bool = False) -> Harm:
    """Other tensors, which the manifest agrees with: sizes, digests and, if told to, the digest of the weights."""

    def harm(folder: Path) -> None:
        tensors = load((folder / WEIGHTS).read_bytes())  # not mapped: the file is overwritten
        change(tensors)
        replace_file(WEIGHTS, save(tensors))(folder)
        if agree:
            forge_key(weights_digest(tensors), "weights_sha256")(folder)

    return harm


def first(tensors: dict[str, Tensor]) -> str:
    return min(name for name in tensors if tensors[name].ndim == 2)


def changed(change: Callable[[Tensor], Tensor]) -> Harm:
    """Another matrix in the place of one, which everything agrees with but the configuration."""
    return other_weights(lambda held: held.update({first(held): change(held[first(held)])}), agree=True)


def lied_header(**changes: object) -> Harm:
    """A tensor that the header describes wrongly."""

    def harm(folder: Path) -> None:
        content = (folder / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header = json.loads(content[8 : 8 + length])
        name = min(name for name in header if name != "__metadata__")
        header[name] |= changes
        replace_file(WEIGHTS, safetensors_bytes(header, content[8 + length :]))(folder)

    return harm


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


ENCODER = ("tokenizer", "encoder")
SIZE = "image_size"
UNREADABLE, APART, LARGER = "cannot be read as safetensors", "do not belong together", "describes a larger model"
FORGED: dict[str, tuple[Harm, str]] = {
    # manifests
    "newer": (forge_key(2, "version"), "format version 2, and this framework reads up to 1: update it"),
    "far newer": (forge_key(10**30, "version"), "reads up to 1"),
    "version 0": (forge_key(0, "version"), "does not hold what format version 1 asks for"),
    "version in words": (forge_key("one", "version"), "does not hold what format version 1 asks for"),
    "version null": (forge_key(None, "version"), "does not hold what"),
    "no version": (forge_key(..., "version"), "does not hold what"),
    "no files": (forge_key({}, "files"), "does not hold what"),
    "one file": (forge_key(..., "files", CONFIG), "does not hold what"),
    "a third file": (forge_key({"bytes": 0, "sha256": ""}, "files", "../other"), "does not hold what"),
    "a file elsewhere": (
        forge(lambda body: body["files"].update({"/etc/passwd": body["files"].pop(CONFIG)})),
        "does not hold what",
    ),
    "files are a list": (forge_key([CONFIG, WEIGHTS], "files"), "does not hold what"),
    "negative size": (forge_key(-1, "files", WEIGHTS, "bytes"), "bytes instead of -1"),
    "infinite size": (forge_key(float("inf"), "files", WEIGHTS, "bytes"), "does not hold what"),
    "another digest": (forge_key("0" * 64, "files", WEIGHTS, "sha256"), "does not have the SHA-256 of its manifest"),
    "another digest of the weights": (forge_key("0" * 64, "weights_sha256"), "not have the SHA-256 that manifest.json"),
    "no digest of the weights": (forge_key(..., "weights_sha256"), "does not hold what"),
    "body is a list": (forge(lambda body: [1, 2]), "does not hold what"),
    "body is text": (forge(lambda body: "body"), "does not hold what"),
    "a checkpoint's": (of_file(MANIFEST, write(b'{"format": "framework checkpoint"}')), "not one of this framework's"),
    "empty manifest": (of_file(MANIFEST, write(b"")), "is not readable JSON"),
    "binary manifest": (of_file(MANIFEST, write(b"\xff\xfe")), "is not readable JSON"),
    "deep manifest": (of_file(MANIFEST, write(b"[" * 100_000)), "is not readable JSON"),
    "manifest is a list": (of_file(MANIFEST, write(b"[]")), "is not one of this framework's"),
    # configurations that the manifest agrees with
    "empty config": (replace_file(CONFIG, b""), "the top level must be a mapping"),
    "config is a list": (replace_file(CONFIG, b"[1, 2]"), "the top level must be a mapping"),
    "config is no YAML": (replace_file(CONFIG, b"a: [b"), "not valid YAML"),
    "binary config": (replace_file(CONFIG, b"\xff\xfe\x00"), "cannot be read"),
    "deep config": (replace_file(CONFIG, b"[" * 5_000), "not valid YAML"),
    "large config": (replace_file(CONFIG, b"# " * (1 << 20)), "more than any model's configuration"),
    "an alias": (replace_file(CONFIG, b"a: &a [1]\nb: *a\n"), "aliases are not supported"),
    "no parts": (replace_file(CONFIG, b"image_size: 8\n"), "a model is a tokenizer with image_size"),
    "no size": (setting(None, "image_size"), "a model is a tokenizer with image_size"),
    "a run's": (setting({"dir": "runs/x"}, "run"), "unknown key 'run'"),
    "inherits": (setting("../../../etc/other.yaml", "_base_"), "unknown key '_base_'"),
    "reads the environment": (setting("$env:HOME", SIZE), "expected an integer or null, got the string '$env:HOME"),
    "refers": (setting("$tokenizer.encoder.num_tokens", "image_size"), "expected an integer"),
    "weights from elsewhere": (setting("runs/adatok/ntm", *ENCODER, "weights"), "asks for the weights runs/adatok/ntm"),
    "unknown part": (setting({"name": "Elsewhere"}, *ENCODER), "unknown encoder 'Elsewhere'"),
    "unknown argument": (setting(1, *ENCODER, "widht"), "did you mean 'width'"),
    "imports": (setting(["os", "antigravity"], "imports"), "asks for code: importing os, antigravity runs"),
    "imports a name": (setting("antigravity", "imports"), "asks for code: importing antigravity runs"),
    "imports numbers": (setting([1], "imports"), "asks for code: importing 1 runs"),
    "another width": (setting(16, *ENCODER, "width"), APART),
    "twice the width": (setting(64, *ENCODER, "width"), LARGER),
    "vast width": (setting(1 << 40, *ENCODER, "width"), "sound"),
    "many tokens": (setting(1 << 40, *ENCODER, "num_tokens"), LARGER),
    "many blocks": (setting(1 << 40, *ENCODER, "depth"), LARGER),
    "many tokens to choose from": (
        other_config(lambda tree: (tree["tokenizer"]["encoder"].update(num_tokens=1 << 33),
                                   tree.update(policy={"name": "LearnedPolicy"}), None)[-1]),
        LARGER,
    ),  # fmt: skip
    "negative width": (setting(-32, *ENCODER, "width"), "sound"),
    "no depth": (setting(0, *ENCODER, "depth"), APART),
    "more depth": (setting(3, *ENCODER, "depth"), APART),
    "another image": (setting(16, "image_size"), APART),
    "uneven image": (setting(9, "image_size"), "patch_size must divide"),
    "no image": (setting(0, "image_size"), "sound"),
    "huge image": (setting(10**30, "image_size"), "sound"),
    "a policy more": (setting({"name": "LearnedPolicy"}, "policy"), LARGER),
    "a space more": (setting({"name": "PixelSpace"}, "space"), "a model is a tokenizer with image_size"),
    "another quantizer": (setting({"name": "VectorQuantizer", "dim": 4}, "tokenizer", "quantizer"), APART),
    # weights that the manifest agrees with
    "a tensor less": (other_weights(lambda held: held.pop(first(held)), True), "none stored"),
    "a tensor more": (other_weights(lambda held: held.update(more=torch.ones(1)), True), "none in the model"),
    "a tensor renamed": (other_weights(lambda held: held.update(renamed=held.pop(first(held))), True), "2 weights"),
    "another shape": (changed(lambda value: torch.ones(3, 3)), "float32 (3, 3) stored"),
    "transposed": (changed(lambda value: value.T.contiguous()), APART),
    "another type": (changed(Tensor.double), "float64 ("),
    "half precision": (changed(Tensor.half), "float16 ("),
    "other values": (other_weights(lambda held: held[first(held)].add_(1)), "the SHA-256 that manifest.json states"),
    "no tensors": (other_weights(dict.clear, True), LARGER),
    "empty weights": (replace_file(WEIGHTS, b""), UNREADABLE),
    "text for weights": (replace_file(WEIGHTS, b"<html>404</html>"), UNREADABLE),
    "vast header": (replace_file(WEIGHTS, struct.pack("<Q", 1 << 62) + b"{}"), UNREADABLE),
    "header beyond the file": (replace_file(WEIGHTS, struct.pack("<Q", 10_000) + b"{}"), UNREADABLE),
    "large header": (replace_file(WEIGHTS, safetensors_bytes(b"{" + b" " * 50_000_000 + b"}")), UNREADABLE),
    "header is no JSON": (replace_file(WEIGHTS, safetensors_bytes(b"{" * 50)), UNREADABLE),
    "vast shape": (lied_header(shape=[1 << 40, 1 << 40]), UNREADABLE),
    "negative shape": (lied_header(shape=[-1]), UNREADABLE),
    "offsets beyond": (lied_header(data_offsets=[0, 1 << 50]), UNREADABLE),
    "offsets backwards": (lied_header(data_offsets=[8, 0]), UNREADABLE),
    "unknown type": (lied_header(dtype="F7"), UNREADABLE),
    "smaller type": (lied_header(dtype="U8"), UNREADABLE),
    # things that are no files
    "weights are a folder": (of_file(WEIGHTS, folder_instead), "model.safetensors is not a file"),
    "config is a folder": (of_file(CONFIG, folder_instead), "config.yaml is not a file"),
    "manifest is a folder": (of_file(MANIFEST, folder_instead), "manifest.json cannot be read: Is a directory"),
    "broken link": (of_file(WEIGHTS, lambda path: (path.unlink(), path.symlink_to("nowhere"))), "is missing"),
}
RANDOM: dict[str, Harm] = {
    **{f"bit at {n}/24 of {name}": of_file(name, flip((n + 0.37) / 24)) for name in FILES for n in range(24)},
    **{f"{name} cut to {n}/12": of_file(name, truncate(n / 12)) for name in FILES for n in range(12)},
    **{f"no {name}": of_file(name, remove) for name in FILES},
}


def refusal(folder: Path) -> str:
    """What a user reads."""
    before = torch.get_rng_state()
    with pytest.raises(REFUSED) as caught:
        framework.load(folder)
    assert type(caught.value) in REFUSED and torch.equal(torch.get_rng_state(), before)
    return str(caught.value)


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_folder_is_refused(case: str, sound: Path, tmp_path: Path) -> None:
    harm, words = FORGED[case]
    folder = shutil.copytree(sound, tmp_path / "sound")
    harm(folder)
    told = refusal(folder)
    assert words in told and str(folder) in told and len(told) < 2500
    assert told.count("\n") <= 1  # a list of errors has a line before them


def test_a_damaged_folder_is_refused(sound: Path, tmp_path: Path) -> None:
    for case, harm in RANDOM.items():
        folder = shutil.copytree(sound, tmp_path / case.replace("/", " of "))
        harm(folder)
        told = refusal(folder)
        assert str(folder) in told and "\n" not in told, (case, told)
        name = next(name for name in FILES if name in case)
        assert name in told, (case, told)
    assert len(RANDOM) + len(FORGED) > 185


def test_manifests_of_any_values_are_refused(sound: Path, tmp_path: Path) -> None:
    """Another value in the place of every value of the body, under a digest that fits."""
    draw = random.Random(0)
    values: list[Any] = [None, True, -1, 10**40, 0.5, float("nan"), "", "x", [], {}, [[1]], {"a": {}}]
    body = json.loads((sound / MANIFEST).read_text())["body"]
    places = [("version",), ("files",), ("weights_sha256",)]
    places += [("files", name, key) for name in (CONFIG, WEIGHTS) for key in ("bytes", "sha256")]
    assert body.keys() == {"version", "files", "weights_sha256", "made"}
    folder = shutil.copytree(sound, tmp_path / "sound")
    for place in places:
        for value in draw.sample(values, 6):
            if place == ("version",) and value is True:
                continue  # which is 1
            shutil.copy(sound / MANIFEST, folder / MANIFEST)
            forge_key(value, *place)(folder)
            assert "\n" not in refusal(folder), (place, value)


def test_what_the_card_says_and_what_lies_beside_does_not_matter(sound: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(sound, tmp_path / "sound")
    (folder / "README.md").write_text("# Another card\n")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    expected = weights_digest(framework.load(sound).state_dict())
    assert weights_digest(framework.load(folder).state_dict()) == expected
    (folder / "README.md").unlink()
    assert weights_digest(framework.load(folder).state_dict()) == expected
    forge_key({"step": 3}, "made")(folder)
    assert weights_digest(framework.load(folder).state_dict()) == expected


@pytest.mark.parametrize(
    "harm, reason",
    [
        (setting(10**12, "num_classes"), LARGER),
        (setting(10**12, "generator", "width"), LARGER),
        (setting(-1, "num_classes"), "at least one each"),
        (setting([4, 2], "budgets"), "that increase"),
        (setting([2, 10**12], "budgets"), "lengths from 1 to 4"),
        (setting([2, 3], "budgets"), APART),
        (setting(None, "budgets"), "comes with its num_classes and budgets"),
    ],
)
def test_forged_generators(harm: Harm, reason: str, tmp_path: Path) -> None:
    own = {"name": "DiT", "size": None, "width": 32, "depth": 1, "num_heads": 2}
    exported(tmp_path / "made", TREE | {"generator": own, "num_classes": 3, "budgets": [2, 3, 4]})
    assert framework.load(tmp_path / "made").num_classes == 3
    harm(tmp_path / "made")
    with pytest.raises(REFUSED, match=reason):
        framework.load(tmp_path / "made")
