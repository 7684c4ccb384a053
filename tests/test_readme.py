"""What the README shows works as it stands there."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from functools import partial, reduce
from operator import getitem
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import framework
from framework.allocation.rewards import REWARDS
from framework.config import load_config, resolve
from framework.engine.experiment import Experiment
from framework.evaluation.digit_judge import DigitJudge, JudgeTraining
from framework.launch import judging
from framework.tokenizers.interface import POLICIES, QUANTIZERS
from framework.tokenizers.tokenizer import Tokenizer
from tests.tiny_run import ROOT, TINY, run_tool

BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
COMMANDS = [
    line[line.index("python tools/") :]
    for language, text in BLOCKS
    if language == "bash"
    for line in text.replace("\\\n", " ").splitlines()
    if "python tools/" in line
]
PYTHON = (
    'load("runs/adatok/ntm")', 'load("runs/adatok/ata")', 'load("runs/adatok/discrete/ata_grpo")',
    'load("runs/adatok/ar")', "# my_parts.py", "# my_allocation.py", "fit()",
)  # fmt: skip
FEW_SCENES = [f"data.{split}.num_images=40" for split in ("train", "validation", "test")]


def python_block(*, holding: str) -> str:
    """The one block of Python with these words."""
    (found,) = [text for language, text in BLOCKS if language == "python" and holding in text]
    return str(found)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, empty, with the README's own parts in it; what importing them changes is undone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for module in ("my_parts", "my_allocation"):
        (tmp_path / f"{module}.py").write_text(python_block(holding=f"# {module}.py"))
        monkeypatch.delitem(sys.modules, module, raising=False)
    for registry in (QUANTIZERS, REWARDS, POLICIES):
        monkeypatch.setattr(registry, "_obj_map", dict(registry._obj_map))
    return tmp_path


def arguments_of(command: str) -> tuple[str, list[str]]:
    """A tool's name and its arguments, without what stands behind ``#``."""
    _, script, *arguments = shlex.split(command, comments=True)
    return Path(script).stem, arguments


def test_every_block_is_accounted_for() -> None:
    python = [text for language, text in BLOCKS if language == "python"]
    assert python == [python_block(holding=words) for words in PYTHON]
    tools = {"evaluate", "report", "generate", "ablate", "info", "make_shards", "benchmark", "tokens", "convert"}
    assert {arguments_of(command)[0] for command in COMMANDS} == tools | {"train_net"}


@pytest.mark.parametrize("command", [command for command in COMMANDS if "train_net.py" in command])
def test_training_commands_pass_the_check(
    command: str, elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, arguments = arguments_of(command)
    if "--slurm" in arguments:
        assert run_tool(monkeypatch, name, *arguments) == 0 and "#SBATCH --nodes=2" in capsys.readouterr().out
        return
    kept = [argument for argument in arguments if argument not in ("--check", "--dry-run", "--profile")]
    assert run_tool(monkeypatch, name, *kept, "--check") == 0, capsys.readouterr().err
    assert run_tool(monkeypatch, name, *kept, "--check", "run.no_such_key=1") == 2  # it is the check that passes


@pytest.mark.parametrize("command", [command for command in COMMANDS if "train_net.py" not in command])
def test_other_commands_work(
    command: str,
    tiny_run: Path,
    tiny_policy: Path,
    finished_on_scenes: Path,
    elsewhere: Path,
    quick_report: None,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(tiny_run, "runs/adatok/ntm")
    shutil.copytree(tiny_policy, "runs/adatok/ata")
    shutil.copytree(tiny_policy, "runs/adatok/ata_grpo")
    labelled = "--probe" in command or "--judge" in command
    shutil.copytree(finished_on_scenes if labelled else tiny_run, "runs/adatok/discrete/ntm")
    shutil.copytree(tiny_policy, "runs/adatok/discrete/ata_grpo")
    if "runs/adatok/ar" in command.split():
        shutil.copytree(request.getfixturevalue("generator_run"), "runs/adatok/ar")
    few = JudgeTraining(steps=20, batch_size=32)
    monkeypatch.setattr(judging.DigitJudge, "trained", partial(DigitJudge.trained, training=few))
    Path("my/photos").mkdir(parents=True)
    Image.new("RGB", (40, 30)).save("my/photos/a.png")
    if "--root my/shards" in command:
        assert run_tool(monkeypatch, "make_shards", "my/photos", "my/shards") == 0
    if "my/photos.tokens" in command and "encode" not in command:
        given = ("--run", "runs/adatok/ata", "--out", "my/photos.tokens")
        assert run_tool(monkeypatch, "tokens", "encode", "my/photos", *given) == 0, capsys.readouterr().err
    name, arguments = arguments_of(command)
    only = ["--dry-run"] if name == "ablate" else []  # tests/test_ablation.py trains
    assert run_tool(monkeypatch, name, *arguments, *only) == 0, capsys.readouterr().err
    assert len(capsys.readouterr().out) > 50


def test_a_generator_is_used(generator_run: Path, elsewhere: Path) -> None:
    shutil.copytree(generator_run, "runs/adatok/ar")
    names: dict[str, Any] = {}
    exec(python_block(holding='load("runs/adatok/ar")'), names)
    images, tokens = names["images"], names["tokens"]
    assert images.shape == (2, 3, 16, 16) and 0 <= images.min() <= images.max() <= 1
    assert torch.equal(names["model"].generate(torch.tensor([3, 8])).codes, tokens.codes)


def test_the_three_stages_of_discrete_tokens(
    elsewhere: Path, quick_report: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    smaller = [change for change in TINY if not change.startswith("data.")] + FEW_SCENES
    stages = [command for command in COMMANDS if "projects/adatok/discrete/" in command]
    for command in stages:
        name, arguments = arguments_of(command)
        assert run_tool(monkeypatch, name, *arguments, *smaller) == 0, capsys.readouterr().err
    found: dict[str, Any] = {}
    exec(python_block(holding="discrete/ata_grpo"), found)
    tokens, rebuilt = found["tokens"], found["rebuilt"]
    assert tokens.codes.shape == (2, 16) and tokens.codes.max() < 240 and rebuilt.shape == (2, 3, 32, 32)
    assert torch.equal(rebuilt, found["adaptive"].decode(tokens))
    last = framework.load("runs/adatok/discrete/adaptive")
    assert torch.equal(last.encode(torch.rand(2, 3, 32, 32), [2, 3]).lengths, torch.tensor([2, 3]))


def test_a_part_of_ones_own_trains(
    elsewhere: Path, quick_report: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (command,) = [command for command in COMMANDS if "my_parts" in command]
    name, arguments = arguments_of(command)
    assert run_tool(monkeypatch, name, *arguments, *TINY, "train.max_steps=2") == 0, capsys.readouterr().err
    tokenizer = framework.load("runs/noisy")
    assert isinstance(tokenizer, Tokenizer) and type(tokenizer.quantizer).__name__ == "NoisyIdentity"
    assert sys.modules["my_parts"].__file__ == str(elsewhere / "my_parts.py")
    latents = torch.randn(2, 3, 16)
    assert torch.equal(tokenizer.quantizer(latents).latents, latents.tanh())
    assert not torch.equal(tokenizer.quantizer(latents, torch.Generator()).latents, latents.tanh())


def test_rewards_and_rules_of_ones_own(
    elsewhere: Path, tiny_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(tiny_run, "runs/adatok/ntm")
    commands = [command for command in COMMANDS if "my_allocation" in command]
    for command in commands:
        name, arguments = arguments_of(command)
        tiny = [change for change in TINY if change.partition("=")[0] not in command]
        assert run_tool(monkeypatch, name, *arguments, *tiny) == 0, capsys.readouterr().err
    names = ("decibels", "by_contrast")
    study = {name: json.loads(Path(f"runs/{name}/evaluation/metrics.json").read_text()) for name in names}
    assert study["decibels"]["allocation"]["protocol"]["reward"] == {"name": "Decibels", "price": 0.5}
    adaptive = framework.load("runs/by_contrast")
    flat, busy = torch.full((1, 3, 16, 16), 0.5), torch.rand(1, 3, 16, 16)
    assert adaptive.encode(torch.cat([flat, busy])).lengths.tolist() == [4, 16]
    assert study["by_contrast"]["allocation"]["policies"]["policy"]["decoder_passes"] == 0
    assert sys.modules["my_allocation"].__file__ == str(elsewhere / "my_allocation.py")


@pytest.mark.parametrize("run", ["ntm", "ata"])
def test_a_trained_model_is_used(run: str, tiny_run: Path, tiny_policy: Path, elsewhere: Path) -> None:
    shutil.copytree(tiny_run if run == "ntm" else tiny_policy, f"runs/adatok/{run}")
    shown = python_block(holding=f'load("runs/adatok/{run}")')
    code = shown.replace("3, 32, 32", "3, 16, 16")
    assert code != shown
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["rebuilt"].shape == (2, 3, 16, 16) and 0 <= names["rebuilt"].min() <= names["rebuilt"].max() <= 1
    assert names["tokens"].lengths.tolist() == [4, 16] or run == "ata"


def test_training_without_yaml_is_the_same_to_the_last_bit(
    elsewhere: Path, quick_report: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    code = python_block(holding="fit()")
    config = "projects/adatok/ntm.yaml"
    shipped = resolve(load_config(ROOT / config), Experiment)
    changes = {}
    for path, few in {"train.max_steps": 2, "data.train.num_crops": 200, "data.validation.num_crops": 40}.items():
        *groups, name = path.split(".")
        value: Any = reduce(getitem, [*groups, name], shipped)
        code, replaced = re.subn(rf"\b{name}={value:_}|\b{name}={value}", f"{name}={few}", code, count=1)
        assert replaced, f"the README's {name} is not the {value} of {config}"
        changes[path] = few
    exec(code, {"__name__": "__main__"})
    (plain,) = {path.parents[2] for path in elsewhere.rglob("model.safetensors")}
    overrides = [f"{path}={few}" for path, few in changes.items()]
    command = ["--config", config, *overrides, "run.dir=from_yaml"]
    assert run_tool(monkeypatch, "train_net", *command) == 0, capsys.readouterr().err
    names = ["metrics.jsonl", *(f"checkpoints/step_00000002/{name}.safetensors" for name in ("model", "ema"))]
    same = [(plain / name).read_bytes() == Path("from_yaml", name).read_bytes() for name in names]
    assert same == [True, True, True]
