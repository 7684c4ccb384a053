from __future__ import annotations

import pytest
import torch

from framework.runtime.precision import has_fast_bfloat16

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("capabilities", "fast"),
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({"architecture": "aarch64", "bf16": True}, True),
        ({}, False),
    ],
)
def test_a_cpu_is_fast_if_it_has_instructions(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, object], fast: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert has_fast_bfloat16(CPU) is fast
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert has_fast_bfloat16(CPU) is False


@pytest.mark.parametrize(("capability", "fast"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_a_gpu_is_fast_from_ampere_on(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], fast: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert has_fast_bfloat16(torch.device("cuda")) is fast
