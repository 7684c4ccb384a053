"""Damaged files: each is named in words, and an older checkpoint is used where there is one."""

from __future__ import annotations

import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from framework.engine.checkpoint import (
    MANIFEST,
    STATE,
    CheckpointError,
    checkpoint_folders,
    read_checkpoint,
    read_weights,
)
from tests.engine.fakes import FakeTask, trainer
from tests.faults.damage import (
    PARTS,
    Harm,
    RunsCode,
    empty_folder,
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
from tests.faults.inject import faults
from tests.tiny_run import files_of

SHORT: dict[str, Any] = {"max_steps": 4, "checkpoint_every": 2, "log_every": 1}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    with faults():
        trainer(folder, **SHORT).fit()
    assert len(checkpoint_folders(folder / "checkpoints")) == 2
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def go_on(folder: Path, task: FakeTask | None = None, **changes: Any) -> str:
    """Continue; returns what was said."""
    before = (folder / "log.txt").read_text()
    with faults():
        trainer(folder, task, **(SHORT | changes)).fit()
    return (folder / "log.txt").read_text().removeprefix(before)


def lasting(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in files_of(folder).items() if name not in ("log.txt", "timing.jsonl")}


SOUND = "0" * 64
DAMAGES: dict[str, tuple[Harm, str]] = {
    **{f"{part} flipped at {at:.0%}": (of_file(part, flip(at)), part) for part in PARTS for at in (0, 0.03, 0.5, 1)},
    **{f"{part} cut to {at:.0%}": (of_file(part, truncate(at)), part) for part in PARTS for at in (0, 0.1, 0.5, 0.99)},
    **{f"{part} removed": (of_file(part, remove), part) for part in PARTS},
    **{f"{part} is a folder": (of_file(part, empty_folder), part) for part in PARTS},
    **{f"{part} is random": (of_file(part, write(random.Random(0).randbytes(999))), part) for part in PARTS},
    "empty folder": (empty_folder, "has no manifest.json"),
    "null": (of_file(MANIFEST, write(b"null")), "not one of this framework's"),
    "foreign": (of_file(MANIFEST, write(b'{"format": "pt", "version": 3}')), "not one of this framework's"),
    "nested deeply": (of_file(MANIFEST, write(b"[" * 100_000)), "not readable JSON"),
    "a long number": (of_file(MANIFEST, write(b"1" * 100_000)), "not readable JSON"),
    "newer": (forge_key(2, "version"), "format version 2, and this framework reads up to 1: update it"),
    "body is a list": (forge(lambda body: [1, 2]), "does not hold what format version 1 asks for"),
    "body is null": (of_file(MANIFEST, write(b'{"format": "framework checkpoint"}')), "does not have the SHA-256"),
    **{f"without {key}": (forge_key(..., key), f"asks for: KeyError('{key}')")
       for key in ("version", "step", "files", "frozen")},
    **{f"{key} is {value!r}": (forge_key(value, key), "does not hold what format version 1 asks for")
       for key in ("version", "step", "files", "frozen", "metrics") for value in (None, "four", [1], float("inf"))},
    "an entry is a list": (forge_key([1, 2], "files", STATE), "asks for: TypeError"),
    "an entry lacks its size": (forge_key(..., "files", STATE, "bytes"), "asks for: KeyError('bytes')"),
    "a digest is a number": (forge_key(7, "files", STATE, "sha256"), "does not have the SHA-256"),
    "a file of no name": (forge_key({"bytes": 1, "sha256": SOUND}, "files", "\0"), "asks for: ValueError"),
    "a file of a long name": (forge_key({"bytes": 1, "sha256": SOUND}, "files", "a" * 999), "File name too long"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_older_one_used(run: Path, finished: Path, damage: str) -> None:
    harm, message = DAMAGES[damage]
    newest = run / "checkpoints/step_00000004"
    harm(newest)
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(newest)
    assert str(caught.value).startswith(str(newest)) and message in str(caught.value)
    said = go_on(run).splitlines()
    assert said[0] == f"checkpoint skipped: {caught.value}"
    assert said[1] == f"continuing from {run}/checkpoints/step_00000002"
    assert lasting(run) == lasting(finished)


def test_damage_at_random_is_found(run: Path, finished: Path) -> None:
    generator = random.Random(0)
    newest = run / "checkpoints/step_00000004"
    for _ in range(100):
        part = newest / generator.choice(PARTS)
        sound = part.read_bytes()
        generator.choice((flip, truncate))(generator.random())(part)
        with pytest.raises(CheckpointError, match=str(newest)):
            read_checkpoint(newest)
        part.write_bytes(sound)
    assert read_checkpoint(newest).step == 4


def values(generator: random.Random, depth: int = 0) -> Any:
    """Any JSON."""
    kind = generator.randrange(9 if depth < 3 else 7)
    if kind < 7:
        return [None, True, -1, 10**400, 0.5, "text", "9"][kind]
    count = generator.randrange(3)
    if kind == 7:
        return [values(generator, depth + 1) for _ in range(count)]
    return {generator.choice(["bytes", "sha256", "a"]): values(generator, depth + 1) for _ in range(count)}


def test_manifests_of_any_types_are_read_or_refused(run: Path) -> None:
    generator = random.Random(0)
    newest = run / "checkpoints/step_00000004"
    sound = (newest / MANIFEST).read_bytes()
    refused = 0
    for _ in range(200):

        def change(body: Any) -> Any:
            if generator.random() < 0.1:
                return values(generator)
            node = generator.choice([body, body["files"], body["files"][STATE]])
            key = generator.choice([*node, "another"])
            if generator.random() < 0.2:
                node.pop(key, None)
            else:
                node[key] = values(generator)
            return body

        forge(change)(newest)
        try:
            read_checkpoint(newest)
        except CheckpointError as error:
            assert str(error).startswith(str(newest))
            refused += 1
        (newest / MANIFEST).write_bytes(sound)
    assert 80 < refused < 200


def test_all_damaged_is_an_error_that_starts_nothing_anew(run: Path) -> None:
    for path in checkpoint_folders(run / "checkpoints"):
        truncate(0.5)(path / STATE)
    before = lasting(run)
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints in .* can be used"):
        go_on(run)
    assert lasting(run) == before


def test_other_files_beside_a_checkpoints_own_are_left_alone(run: Path, finished: Path) -> None:
    newest = run / "checkpoints/step_00000004"
    (newest / "notes.txt").write_text("mine")
    (newest / "other.safetensors").write_bytes(save({"a": torch.zeros(1)}))
    (run / "checkpoints/notes").mkdir()
    (run / "checkpoints/step_5").write_text("")
    assert go_on(run) == f"continuing from {newest}\n"
    with pytest.raises(CheckpointError, match="holds no weights named other, only ema, model"):
        read_checkpoint(newest).weights("other")  # nobody vouches for it
    assert (newest / "notes.txt").read_text() == "mine" and (run / "checkpoints/notes").exists()


def test_a_linked_folder_of_checkpoints_works(run: Path, finished: Path, tmp_path: Path) -> None:
    (run / "checkpoints").rename(tmp_path / "elsewhere")
    (run / "checkpoints").symlink_to(tmp_path / "elsewhere")
    truncate(0.5)(run / "checkpoints/step_00000004" / STATE)
    go_on(run)
    assert (run / "checkpoints").is_symlink()
    assert files_of(tmp_path / "elsewhere") == files_of(finished / "checkpoints")


# A manifest that agrees with files of somebody else


def torch_bytes(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def state_bytes(run: Path, change: Callable[[dict[str, Any]], object]) -> bytes:
    state = read_checkpoint(run / "checkpoints/step_00000004").state()
    change(state)
    return torch_bytes(state)


def test_a_state_that_brings_code_is_not_run(run: Path, tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    content = torch_bytes({"optimizers": RunsCode(proof)})
    torch.load(io.BytesIO(content), weights_only=False)
    assert proof.exists()  # it would have
    proof.unlink()
    newest = run / "checkpoints/step_00000004"
    replace_file(STATE, content)(newest)
    with pytest.raises(CheckpointError) as caught:
        go_on(run)
    assert str(caught.value) == (
        f"{newest}/trainer.pt is not read: it asks for posix.system, and more than tensors and plain containers can "
        "run code"
    )
    assert not proof.exists()


@pytest.mark.parametrize("content", [b"", b"text", torch_bytes([1]), torch_bytes(3)[:-9], b"PK\3\4" + b"\0" * 99])
def test_a_state_of_no_sense_is_refused(run: Path, content: bytes) -> None:
    newest = run / "checkpoints/step_00000004"
    replace_file(STATE, content)(newest)
    with pytest.raises(CheckpointError, match=f"^{newest}/trainer.pt (is not read|holds a list instead of)"):
        go_on(run)


STATES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "of another optimizer": (lambda state: state["optimizers"]["tokenizer"].clear(), "it lacks"),
    "without generators": (lambda state: state["ranks"][0].pop("generators"), "it lacks 'generators'"),
    "of another turn": (lambda state: state["optimizers"].update(tokenizer=None), "cannot be continued: "),
    "of fewer images": (lambda state: state["stream"].update(num_images=6), "saved with 6 images, but the data set"),
    "of a short generator": (
        lambda state: state["ranks"][0]["generators"].update(noise=torch.zeros(3, dtype=torch.uint8)),
        "cannot be continued: ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", STATES)
def test_a_state_that_does_not_fit_is_refused(run: Path, case: str) -> None:
    change, message = STATES[case]
    newest = run / "checkpoints/step_00000004"
    replace_file(STATE, state_bytes(run, change))(newest)
    with pytest.raises(CheckpointError) as caught:
        go_on(run)
    assert str(caught.value).startswith(f"{newest} cannot be continued: ") and message in str(caught.value)


def test_a_checkpoint_of_another_architecture_is_refused(run: Path) -> None:
    weights = read_checkpoint(run / "checkpoints/step_00000004").weights("model")
    weights["net.positions"] = torch.zeros(1, 49)
    replace_file("model.safetensors", save(weights))(run / "checkpoints/step_00000004")
    with pytest.raises(CheckpointError, match=r"do not fit FakeTask; 1 of another shape: .*\(1, 49\) instead of"):
        go_on(run)


def test_a_checkpoint_without_a_part_is_refused(run: Path) -> None:
    newest = run / "checkpoints/step_00000004"
    for name in ("ema.safetensors", STATE):
        forge_key(..., "files", name)(newest)
        (newest / name).unlink()
        with pytest.raises(CheckpointError, match="holds no weights named ema|trainer.pt is missing"):
            go_on(run)


LYING: dict[str, bytes] = {
    "empty": b"",
    "a header of an exabyte": b"\0" * 7 + b"\1{}",
    "no JSON": safetensors_bytes(b"nonsense"),
    "a list": safetensors_bytes([1]),
    "more than there is": safetensors_bytes({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}),
    "less than there is": safetensors_bytes({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}),
    "another shape": safetensors_bytes({"a": {"dtype": "F32", "shape": [99], "data_offsets": [0, 8]}}),
    "a negative shape": safetensors_bytes({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}),
    "overlapping": safetensors_bytes(
        {name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for name in ("a", "b")}
    ),
    "a type of tomorrow": safetensors_bytes({"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}),
    "a pickle": torch_bytes({"a": torch.zeros(2)}),
}


@pytest.mark.parametrize("case", LYING)
def test_weights_whose_header_lies_are_refused(run: Path, tmp_path: Path, case: str) -> None:
    file = tmp_path / "weights.safetensors"
    file.write_bytes(LYING[case])
    with pytest.raises(CheckpointError, match=f"^{file} cannot be read as safetensors: "):
        read_weights(file)
    replace_file("model.safetensors", LYING[case])(run / "checkpoints/step_00000004")
    with pytest.raises(CheckpointError, match="model.safetensors cannot be read as safetensors: "):
        go_on(run)


@pytest.mark.parametrize("name", ["weights.pt", "pytorch_model.bin", "weights.ckpt", "weights"])
def test_weights_in_other_formats_are_refused_with_the_reason(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(torch_bytes({"a": RunsCode(tmp_path / "proof")}))
    with pytest.raises(CheckpointError, match="not a .safetensors file, and other formats can run code when they are"):
        read_weights(tmp_path / name)
    assert not (tmp_path / "proof").exists()


# metrics.jsonl


@pytest.mark.parametrize(
    "harm",
    [truncate(0.4), truncate(0.99), write(b"\xff\xfe\0"), write(b"[" * 100_000), write(b'{"step": "x"}\n{}\n3\n')],
    ids=["cut at 40%", "torn line", "binary", "nested deeply", "other JSON"],
)
def test_damaged_metrics_stop_nothing(run: Path, finished: Path, harm: Harm) -> None:
    truncate(0.5)(run / "checkpoints/step_00000004" / STATE)
    harm(run / "metrics.jsonl")
    go_on(run)
    whole = (finished / "metrics.jsonl").read_text().splitlines()
    found = (run / "metrics.jsonl").read_text().splitlines()
    assert [line for line in found if line not in whole] == []  # no line is made up
    assert found[-2:] == whole[-2:] and all(json.loads(line) for line in found)


def test_a_damaged_line_costs_that_line_only(run: Path, finished: Path) -> None:
    truncate(0.5)(run / "checkpoints/step_00000004" / STATE)
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(lines[0][:9] + b"\xff" + lines[0][9:] + b"".join(lines[1:]))
    go_on(run)
    assert (run / "metrics.jsonl").read_bytes() == b"".join(lines[1:])
