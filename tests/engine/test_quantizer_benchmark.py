from __future__ import annotations

import sys

import pytest
import torch

from framework.engine.quantizer_benchmark import peak_memory, quantizations, quantizer_lines
from tests.tiny_run import run_tool

CPU = torch.device("cpu")


def test_all_sides_quantize_equally() -> None:
    pytest.importorskip("vector_quantize_pytorch")
    sides = quantizations(50, 6, CPU)
    assert list(sides) == ["ours", "TiTok's form", "vq-pytorch"]
    latents = torch.randn(3, 20, 6, requires_grad=True)
    results = {name: quantize(latents) for name, quantize in sides.items()}
    gradient = torch.randn(3, 20, 6)
    passed = {
        name: torch.autograd.grad([result[0], result[2]], latents, [gradient, torch.ones(())])[0]
        for name, result in results.items()
    }
    for name in sides:
        torch.testing.assert_close(results[name][0], results["ours"][0])
        assert torch.equal(results[name][1], results["ours"][1])
        torch.testing.assert_close(passed[name], passed["ours"], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(results["ours"][2], results["TiTok's form"][2])


def test_peak_memory_counts_what_is_held_at_once() -> None:
    def run() -> None:
        for _ in range(3):
            first = torch.zeros(1 << 20)
            second = first + 1
            del first, second

    assert 8 << 20 <= peak_memory(run) < 9 << 20


def test_without_the_other_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", None)
    assert list(quantizations(5, 4, CPU)) == ["ours", "TiTok's form"]
    assert "pip install vector-quantize-pytorch" in list(quantizer_lines(5, 4, 3, 2, 1))[1]


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("vector_quantize_pytorch")
    options = ["--codes", "512", "--dim", "4", "--tokens", "64", "--batch", "4", "--rounds", "1"]
    assert run_tool(monkeypatch, "benchmark", "quantizer", *options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("float32; 4 x 64 tokens, 512 codes of dimension 4") and "1 alternating rounds" in lines[2]
    names = ["ours", "TiTok's form", "vq-pytorch"]
    assert [line[:14].strip() for line in lines[4:7]] == [line[:14].strip() for line in lines[8:]] == names
    assert lines[7].split() == ["peak", "MiB", "codes", "equal", "to", "ours"]
    ours, *others = (float(line[14:24]) for line in lines[8:])
    assert 0 < ours < min(others)  # the others hold a distance of each token from each code
    assert [line.split()[-1] for line in lines[8:]] == ["100.0000%"] * 3
