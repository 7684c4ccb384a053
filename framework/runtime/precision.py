"""Which number formats a machine is fast in."""

from __future__ import annotations

import torch

_INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16")


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are faster than in float32 there.

    A CPU without instructions for them emulates them: products take 60 times as long as in float32, and convolutions
    up to 200 times (AVX2, torch 2.14).
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(name, False) for name in _INSTRUCTIONS)
