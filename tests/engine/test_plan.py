from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from framework import runs
from framework.config import ConfigError, check, load_config
from framework.engine.experiment import Experiment
from framework.engine.plan import Parameters, count_operations, count_parameters
from framework.tokenizers.tokenizer import Tokenizer
from tests.tiny_run import ROOT, TINY, tiny_config
from tests.tokenizers.build import small_tokenizer


def by_hand(sequence: int, width: int, mlp: int = 4) -> int:
    """Multiply-adds of a one-block transformer with its last norm."""
    linear = sequence * width * width * (3 + 1 + 2 * mlp)  # queries, keys, values; output; the MLP's two
    products = 2 * sequence * sequence * width  # scores, then the mixed values; heads share the width out
    norms = 3 * 5 * sequence * width
    return linear + products + norms


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_operations_are_those_counted_by_hand(device: str) -> None:
    # 16 patches of 4x4x3 values and 6 tokens of 5 floats, width 32.
    with torch.device(device):
        tokenizer = small_tokenizer()
    counted = count_operations(tokenizer)
    encoder = 16 * 48 * 32 + by_hand(16 + 6, 32) + 6 * 32 * 5
    decoder = 6 * 5 * 32 + by_hand(16 + 6, 32) + 16 * 32 * 48
    quantizer = 4 * 6 * 5  # a norm without learned scales
    total = encoder + quantizer + decoder
    assert counted == {"encoder": encoder, "quantizer": quantizer, "decoder": decoder, "total": total}


def test_operations_do_not_hang_on_the_number_of_heads() -> None:
    def count(num_heads: int) -> dict[str, int]:
        return count_operations(small_tokenizer(encoder={"num_heads": num_heads}))

    assert count(1) == count(4)


def test_parameters_are_split_into_trainable_and_frozen() -> None:
    tokenizer = small_tokenizer()
    numel = sum(parameter.numel() for parameter in tokenizer.parameters())
    assert count_parameters("all", tokenizer) == Parameters("all", numel, 0)
    tokenizer.encoder.requires_grad_(False)
    frozen = sum(parameter.numel() for parameter in tokenizer.encoder.parameters())
    assert count_parameters("all", tokenizer) == Parameters("all", numel - frozen, frozen)
    assert count_parameters("all", tokenizer).total == numel
    tied = torch.nn.ModuleList([tokenizer.encoder, tokenizer.encoder])
    assert count_parameters("tied", tied).total == frozen


def rows(plan: str) -> dict[str, list[int]]:
    """The numbers of the first table, by part."""
    table = plan.partition("\n\n")[0]
    found = re.findall(r"^  (\w+) +([\d,]+) +([\d,]+) +([\d,]+)$", table, re.MULTILINE)
    return {part: [int(number.replace(",", "")) for number in numbers] for part, *numbers in found}


@pytest.mark.parametrize("frozen", [False, True])
def test_a_dry_run_tells_what_would_run(tmp_path: Path, frozen: bool) -> None:
    overrides = ["data.image_size=32", f"tokenizer.encoder.frozen={str(frozen).lower()}"]
    config = tiny_config(tmp_path / "run", *overrides)
    model = runs.experiment_from(config).task.model
    plan = runs.dry_run(config)
    encoder, whole = (sum(p.numel() for p in m.parameters()) for m in (model.get_submodule("encoder"), model))
    found = rows(plan)
    assert found["encoder"] == ([0, encoder, encoder] if frozen else [encoder, 0, encoder])
    assert found["total"] == ([whole - encoder, encoder, whole] if frozen else [whole, 0, whole])
    assert isinstance(model, Tokenizer) and f"{count_operations(model)['total']:,}" in plan
    assert "32x32 at 16 tokens" in plan
    assert "6 steps of 4 images = 24 images = 0.12 epochs of 200" in plan
    assert f"run directory: {tmp_path / 'run'}, seed 0" in plan
    operations = 6 * count_operations(model)["total"] * 24
    assert f"training takes {operations:.2g} operations at full length" in plan
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"memory before activations {4 * (whole + 4 * trainable) / 2**30:.2g} GiB" in plan
    assert f"a checkpoint {16 * trainable / 2**30:.2g} GiB, of which 2 are kept" in plan
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_allocates_no_weights(tmp_path: Path) -> None:
    sizes = [f"tokenizer.{part}.{size}" for part in ("encoder", "decoder") for size in ("width=8192", "depth=48")]
    frozen = [f"tokenizer.encoder.weights={tmp_path}/nothing", "tokenizer.encoder.frozen=true"]
    config = tiny_config(tmp_path, *sizes, *frozen)
    task = runs.experiment_from(config, device="meta").task
    state = [*task.parameters(), *task.buffers()]
    assert {tensor.device.type for tensor in state} == {"meta"}
    assert sum(tensor.numel() for tensor in state) > 1e10


def test_a_dry_run_finds_what_check_cannot(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(f"_base_: {ROOT}/projects/adatok/ntm.yaml\ntokenizer:\n  encoder:\n    patch_size: 5\n")
    config = load_config(file, TINY)
    check(config, Experiment)
    with pytest.raises(ConfigError) as caught:
        runs.dry_run(config)
    (problem,) = caught.value.problems
    assert problem.keys == ("tokenizer", "encoder") and problem.source == (str(file), 3)
    assert "patch_size must divide the input grid, got patch_size 5 and 16x16" in str(caught.value)


def test_a_dry_run_finds_optimizers_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no name matches \['\*layers\*'\]"):
        runs.dry_run(tiny_config(tmp_path, "train.optimizer.matrices=['*layers*']"))
    with pytest.raises(runs.RunError, match="train.turn_optimizers has critic"):
        runs.dry_run(tiny_config(tmp_path, "train.turn_optimizers={critic: {name: AdamW, lr: 1}}"))
