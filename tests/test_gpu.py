"""The main job on a CUDA device, for machines that have one: ``pytest -m gpu``."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import framework
from framework import runs
from framework.allocation.adaptive_tokenizer import AdaptiveTokenizer
from framework.data.interface import Batch
from framework.engine.checkpoint import latest_checkpoint
from framework.generators.autoregressive import LlamaGenAR
from framework.generators.decode_engine import DecodeEngine, Policy
from framework.generators.guidance import Guidance
from framework.generators.interface import TokenSpace
from framework.generators.length_modes import LENGTH_MODES, LengthModeName
from framework.tasks.interface import Context, StepOutput
from framework.tasks.train_tokenizer import TrainTokenizer
from framework.tokenizers.tokenizer import Tokenizer
from tests.generators.test_generator_laws import BUDGETS, IDS, LABELS, NAMES, generator_of
from tests.stir import stirred
from tests.tiny_run import tiny_policy_config, train_tiny

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("options", [[], ["train.accumulate=2", "train.recompute=true"]], ids=["plain", "in parts"])
def test_the_main_job_trains_stops_and_goes_on(
    tmp_path: Path, quick_report: None, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    options = [f"run.device={DEVICE}", "train.log_every=1", *options]
    assert train_tiny(tmp_path / "whole", *options)[0] == ("finished", 6)

    forward = TrainTokenizer.forward
    devices: set[str] = set()

    def interrupted(task: TrainTokenizer, batch: Batch, turn: str, context: Context) -> StepOutput:
        devices.update((batch.images.device.type, next(task.parameters()).device.type))
        if context.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(task, batch, turn, context)

    with monkeypatch.context() as patch:
        patch.setattr(TrainTokenizer, "forward", interrupted)
        assert train_tiny(tmp_path / "parts", *options)[0] == ("stopped", 3)
    assert devices == {DEVICE}
    assert train_tiny(tmp_path / "parts", *options)[0] == ("finished", 6)

    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "parts")]
    assert len(lines[0]) == len(lines[1]) == 8
    # Kernels that add in no fixed order may differ in last bits; another batch or other lengths would differ in all.
    for whole, parts in zip(*lines, strict=True):
        assert json.loads(parts) == pytest.approx(json.loads(whole), rel=1e-2)
    saved = [latest_checkpoint(tmp_path / name / "checkpoints") for name in ("whole", "parts")]
    assert saved[0] is not None and saved[1] is not None and saved[0].step == saved[1].step == 6
    expected, found = (checkpoint.weights("ema") for checkpoint in saved if checkpoint is not None)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-3)

    tokenizer = framework.load(tmp_path / "parts")
    assert isinstance(tokenizer, Tokenizer) and {p.device.type for p in tokenizer.parameters()} == {"cpu"}
    tokenizer.to(DEVICE)
    images = torch.rand(2, 3, 16, 16, device=DEVICE)
    with torch.no_grad():
        rebuilt = tokenizer.decode(tokenizer.encode(images, length=[4, 16]))
    assert rebuilt.shape == images.shape and rebuilt.device.type == DEVICE


def test_compiled_steps_run(tmp_path: Path, quick_report: None) -> None:
    options = [f"run.device={DEVICE}", "train.compile=true"]
    assert train_tiny(tmp_path / "run", *options)[0] == ("finished", 6)
    losses = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all(line["tokenizer/loss"] > 0 for line in losses if "tokenizer/loss" in line)


@pytest.mark.parametrize(
    "quantizer", ["VectorQuantizer, num_codes: 16, dim: 4", "FiniteScalarQuantizer", "LookupFreeQuantizer"]
)
def test_discrete_tokens_with_adapters_train(tmp_path: Path, quick_report: None, quantizer: str) -> None:
    options = [f"tokenizer.quantizer={{name: {quantizer}}}", "tokenizer.decoder.lora={ranges: 2, rank: 2}"]
    options += [f"run.device={DEVICE}", "train.precision=bfloat16", "train.recompute=true"]
    assert train_tiny(tmp_path / "run", *options)[0] == ("finished", 6)
    tokenizer = framework.load(tmp_path / "run").to(DEVICE)
    assert isinstance(tokenizer, Tokenizer)
    tokens = tokenizer.encode(torch.rand(3, 3, 16, 16, device=DEVICE), length=[2, 9, 16])
    assert tokens.codes is not None and tokens.codes.device.type == DEVICE
    assert torch.equal(tokenizer.codes_to_tokens(tokens.codes, tokens.lengths).latents, tokens.latents)
    short = tokenizer.merged(2)
    expected = tokenizer.decode(tokens.with_lengths(torch.full_like(tokens.lengths, 2)))
    found = short.decode(tokens.with_lengths(torch.full_like(tokens.lengths, 2)))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("distortions", ["table", "online"])
@pytest.mark.parametrize("config", ["ata", "ata_grpo"])
def test_a_policy_trains(config: str, distortions: str, tiny_run: Path, tmp_path: Path) -> None:
    changes = [f"run.device={DEVICE}", f"task.distortions={distortions}", "train.precision=bfloat16"]
    runs.train(tiny_policy_config(tmp_path / "policy", tiny_run, *changes, config=config), print)
    adaptive = framework.load(tmp_path / "policy").to(DEVICE)
    assert isinstance(adaptive, AdaptiveTokenizer)
    tokens = adaptive.encode(torch.rand(3, 3, 16, 16, device=DEVICE))
    assert tokens.lengths.device.type == DEVICE and adaptive.decode(tokens).shape == (3, 3, 16, 16)
    study = json.loads((tmp_path / "policy/evaluation/metrics.json").read_text())["allocation"]
    assert study["policies"]["oracle"]["reward"] >= study["policies"]["policy"]["reward"]


@pytest.mark.parametrize("name", NAMES)
def test_a_generator_learns_and_makes_the_same_there_as_here(name: str, tmp_path: Path) -> None:
    generator, tokens, labels = generator_of(name, tmp_path)
    given: dict[str, Any] = {"seed": 3, "guidance": Guidance(2.0, (0.2, 1.0))}
    lengths = torch.tensor(BUDGETS)[torch.arange(9) % 3]
    expected = generator.generate(LABELS, sample_ids=IDS, lengths=lengths, **given)
    loss = generator.loss(tokens, labels, torch.Generator().manual_seed(0))
    generator.to(DEVICE)
    there = {"sample_ids": IDS.to(DEVICE), "lengths": lengths.to(DEVICE), **given}
    made = generator.generate(LABELS.to(DEVICE), **there)
    assert made.latents.device.type == made.lengths.device.type == DEVICE
    if made.codes is not None and expected.codes is not None:
        assert (made.codes.cpu() == expected.codes).float().mean() > 0.95, "ties apart"
    torch.testing.assert_close(made.latents.cpu(), expected.latents, rtol=1e-2, atol=1e-2)
    chosen = generator.generate(LABELS.to(DEVICE), sample_ids=IDS.to(DEVICE), **given)
    assert set(chosen.lengths.tolist()) <= set(BUDGETS)
    found = generator.train().loss(tokens.to(DEVICE), labels.to(DEVICE), torch.Generator().manual_seed(0))
    sum(found.losses.values(), torch.zeros((), device=DEVICE)).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in generator.parameters())
    found = generator.eval().loss(tokens.to(DEVICE), labels.to(DEVICE), torch.Generator().manual_seed(0))
    for key, value in loss.losses.items():
        torch.testing.assert_close(found.losses[key].cpu(), value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("policy", ["static", "compact", "refill"])
@pytest.mark.parametrize("mode", LENGTH_MODES)
def test_decoding_policies_agree_there(mode: LengthModeName, policy: Policy) -> None:
    torch.manual_seed(0)
    space = TokenSpace(8, 2, 30, (2, 3, 6), 3)
    model = stirred(LlamaGenAR(None, 32, 2, 4, length_mode=mode, space=space)).eval()
    given: dict[str, Any] = {"seed": 1, "sample_ids": torch.arange(40), "guidance": Guidance(2.0, (0.3, 1.0))}
    expected = DecodeEngine(model, 40, "static").generate(torch.arange(40) % 3, **given)
    engine = DecodeEngine(model.to(DEVICE), 7, policy)
    made = engine.generate(torch.arange(40, device=DEVICE) % 3, **given)
    assert expected.codes is not None and made.codes is not None and made.codes.device.type == DEVICE
    same = (made.codes.cpu() == expected.codes).all(1) & (made.lengths.cpu() == expected.lengths)
    assert same.float().mean() > 0.9, "ties apart"
