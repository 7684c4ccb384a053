"""What shorter sequences save: lengths as asked for, counts as they follow from lengths, and the official sampler."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from scipy.stats import chisquare

from framework import runs
from framework.engine import generation_benchmark
from framework.engine.benchmark import Time, Times
from framework.engine.generation_benchmark import DecodeCosts, model_of_lengths, time_policies
from framework.engine.official_llamagen import OfficialSampler
from framework.generators.decode_engine import DecodeStatistics
from framework.generators.guidance import Guidance
from framework.generators.length_modes import LengthModeName
from framework.launch.benchmarks import benchmark_lines
from tests.tasks.test_train_generator import make_task
from tests.tiny_run import run_tool

TINY: dict[str, Any] = {"size": "16x1x2", "codes": 8, "rounds": 1, "batch_sizes": [2], "images": 2}


@pytest.mark.parametrize("mode", ["eos", "hazard", "prefix"])
def test_lengths_come_in_the_shares_that_are_asked_for(mode: LengthModeName) -> None:
    model = model_of_lengths(mode, (16, 1, 2), 8, [2, 3, 3, 3, 6])
    numbers = torch.arange(2000)
    tokens = model.generate(numbers % 10, seed=0, sample_ids=numbers, guidance=Guidance(3.0))
    counts = [int((tokens.lengths == budget).sum()) for budget in (2, 3, 6)]
    assert sum(counts) == 2000
    assert chisquare(counts, [400, 1200, 400]).pvalue > 0.001


@pytest.mark.parametrize("mode", ["hazard", "prefix"])
def test_counts_follow_from_lengths(monkeypatch: pytest.MonkeyPatch, mode: LengthModeName) -> None:
    def once(cases: dict[str, Any], rounds: int, device: torch.device) -> Times:
        for run in cases.values():
            run()
        return Times({name: [Time(1.0, 1.0)] * rounds for name in cases})

    monkeypatch.setattr(generation_benchmark, "take_turns", once)
    finished: list[int] = []
    model = model_of_lengths(mode, (16, 1, 2), 8, [1, 3, 6])
    costs = time_policies(model, 3, 12, Guidance(), 2, finish=lambda tokens: finished.append(len(tokens)))
    assert finished == [12] * 5 and list(costs.statistics) == ["full length", "static", "compact", "refill", "shortest"]
    observed = [length + (mode == "hazard" and length < 6) for length in costs.lengths.tolist()]
    rows = {name: spent.rows for name, spent in costs.statistics.items()}
    assert rows["full length"] == 12 * 6 and rows["compact"] == rows["refill"] == sum(observed) < rows["static"]
    assert rows["static"] == 3 * costs.statistics["static"].steps
    mean = sum(costs.lengths.tolist()) / 12
    assert costs.token_ratio == pytest.approx(6 / mean)
    assert costs.bound == pytest.approx(6 / (mean + (mode == "hazard")))


def test_the_formula_finds_both_costs() -> None:
    """Times made of 2 s a pass and 0.1 s a position."""
    lengths = torch.tensor([2, 4, 8, 8])

    def seconds(length: float) -> float:
        return 2 * length + 0.1 * length * (length + 1) / 2

    own = sum(map(seconds, lengths.tolist())) / 4
    counted = {name: DecodeStatistics(8, 32) for name in ("full length", "static", "compact", "refill")}
    taken = {"full length": seconds(8), "static": seconds(8), "compact": own, "refill": own, "shortest": seconds(2)}
    times = Times({name: [Time(9.0, value)] * 2 for name, value in taken.items()})
    costs = DecodeCosts(times, counted, lengths, 8, 2, 4, True)
    assert costs.formula == pytest.approx(seconds(8) / own)
    title, head, *lines = costs.table().splitlines()
    assert f"bound m / (E[L] + 1) {8 / 6.5:.2f}, formula {seconds(8) / own:.2f}" in title
    assert head.split()[:2] == ["images/s", "speed-up"] and len(lines) == 4
    assert lines[-1].split()[:4] == ["refill", "0.44", "1.00", f"{seconds(8) / own:.2f}"]


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--size", "16x1x2", "--lengths", "2", "4", "--batch", "2", "3", "--modes", "none", "prefix"]
    assert run_tool(monkeypatch, "benchmark", "generate", *options, "--rounds", "1") == 0
    titles = [line for line in capsys.readouterr().out.splitlines() if "token ratio" in line]
    expected = [f"mode {mode}" for mode in ("none", "prefix") for _ in range(2)]
    assert [title.partition(",")[0] for title in titles] == expected
    assert "2 alternating" not in titles[0] and "rounds of 32 images" in titles[0] and "of 48 images" in titles[1]


def test_a_run_is_measured_with_its_decoder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(runs, "load", lambda run: make_task().images.eval())
    lines = list(benchmark_lines("generate", run=tmp_path, rounds=1, batch_sizes=[2], images=2))
    titles = [line.partition(", batch")[0] for line in lines[1:]]
    assert titles == ["tokens", "tokens and images"]
    monkeypatch.setattr(runs, "load", lambda run: torch.nn.Identity())
    with pytest.raises(TypeError, match="no run of a generator"):
        list(benchmark_lines("generate", run=tmp_path, rounds=1))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"run": Path("run"), "codes": 8}, "--codes has no part"),
        ({"tokens": 16}, "--tokens has no part"),
        ({"size": "16x2"}, "such as 128x4x4; got '16x2'"),
        ({"lengths": ["4", "x.tokens"]}, "numbers, or one file"),
    ],
)
def test_options_that_have_no_part(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(benchmark_lines("generate", rounds=1, **given))


# Beside the official sampler

GPT = """
import torch
from torch import nn
from utils.drop_path import DropPath

class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.wqkv, self.wo = nn.Linear(64, 192, bias=False), nn.Linear(64, 64, bias=False)

class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1, self.w3 = nn.Linear(64, 96, bias=False), nn.Linear(64, 96, bias=False)
        self.w2 = nn.Linear(96, 64, bias=False)

class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64))

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.feed_forward = Attention(), FeedForward()
        self.attention_norm, self.ffn_norm = Norm(), Norm()

class Labels(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, 64)

class Transformer(nn.Module):
    def __init__(self, vocab_size, block_size, num_classes):
        super().__init__()
        self.cls_embedding, self.tok_embeddings = Labels(num_classes), nn.Embedding(vocab_size, 64)
        self.layers, self.norm = nn.ModuleList([Layer(), Layer()]), Norm()
        self.output = nn.Linear(64, vocab_size, bias=False)
        nn.init.zeros_(self.output.weight)

GPT_models = {"GPT-B": Transformer}
"""
GENERATE = """
import torch
from framework.interop.llamagen import import_llamagen

def generate(model, cond, max_new_tokens, cfg_scale, temperature, top_k, top_p, sample_logits):
    ours = import_llamagen(model.state_dict(), max_new_tokens).build().eval()
    codes = cond.new_zeros(len(cond), 0)
    for _ in range(max_new_tokens):  # everything anew each time
        c, u = (ours(codes, labels)[:, -1] for labels in (cond, torch.full_like(cond, 1000)))
        logits = u + cfg_scale * (c - u)
        drawn = torch.multinomial(logits.softmax(-1), 1) if sample_logits else logits.argmax(-1, keepdim=True)
        codes = torch.cat([codes, drawn], 1)
    return codes OTHER
"""


def checkout(folder: Path, other: str = "") -> Path:
    """What stands where the official code would: its names, and a sampler that keeps nothing."""
    files = {"autoregressive/models/gpt.py": GPT, "autoregressive/models/generate.py": GENERATE.replace("OTHER", other)}
    for name, text in {**files, "utils/drop_path.py": "DropPath = None\n"}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def test_beside_the_official_sampler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    own = ModuleType("utils")
    monkeypatch.setitem(sys.modules, "utils", own)
    given: dict[str, Any] = {"official": checkout(tmp_path), "tokens": 9, "rounds": 2, "batch_sizes": [3]}
    machine, equal, table, ratio = benchmark_lines("generate", **given)
    assert "LlamaGen B with random weights, guidance 2, 3 x 9 tokens" in machine
    assert equal == "greedy codes: 27 of 27 equal, 27 of them before a row's first other one"
    assert "2 alternating rounds of 3 images" in table and "in CPU time" in ratio
    assert sys.modules["utils"] is own and "autoregressive.models" not in sys.modules
    assert str(tmp_path) not in sys.path


def test_other_greedy_codes_are_told(tmp_path: Path) -> None:
    given: dict[str, Any] = {"official": checkout(tmp_path, "+ (torch.arange(4) == 2)"), "tokens": 4, "rounds": 1}
    lines = list(benchmark_lines("generate", batch_sizes=[3], **given))
    assert lines[1] == "greedy codes: 9 of 12 equal, 6 of them before a row's first other one"


def test_what_is_no_checkout(tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"FoundationVision/LlamaGen .*gpt\.py.* nor .*DiT \(models\.py is missing"
    ):
        list(benchmark_lines("generate", official=tmp_path, rounds=1))
    with pytest.raises(FileNotFoundError, match="FoundationVision/LlamaGen"):
        OfficialSampler(tmp_path, "B", 16)
    with pytest.raises(ValueError, match="no GPT-S; there are GPT-B"):
        OfficialSampler(checkout(tmp_path), "S", 16)
    with pytest.raises(ValueError, match="--lengths has no part in this beside .*LlamaGen; what has is --size, --to"):
        list(benchmark_lines("generate", official=tmp_path, rounds=1, lengths=["4"]))
