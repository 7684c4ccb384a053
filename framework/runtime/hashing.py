"""Random numbers by counting: every number is a hash of its address, so no generator carries state.

SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), in numpy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def uniforms(seed: int, purpose: str, epoch: int, indices: Sequence[int] | NDArray[np.integer]) -> NDArray[np.float64]:
    """One number in [0, 1) per index, a function of (seed, purpose, epoch, index) alone.

    Args:
        seed: any integer.
        purpose: what the numbers are for ("flip"); different purposes give independent numbers.
        epoch: any integer.
        indices: non-negative integers ``(b,)``, in any order.

    Returns:
        ``(b,)`` float64, the same on every machine.
    """
    key = hashlib.blake2b(f"{seed}/{purpose}/{epoch}".encode(), digest_size=8).digest()
    bits = np.asarray(indices, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.frombuffer(key, "<u8")
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    bits ^= bits >> np.uint64(31)
    return (bits >> np.uint64(11)) * 2.0**-53


GOLDEN = 0x9E3779B97F4A7C15 - 2**64


def purpose_key(seed: int, purpose: str) -> int:
    """The key of a purpose for ``hashed``, from -2^63 to 2^63 - 1."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest(), "little", signed=True)


def hashed(keys: Tensor | int, numbers: Tensor) -> Tensor:
    """Bits of each (key, number), int64, on the tensors' device; keys broadcast, and the results are keys again.

    SplitMix64 as in ``uniforms``, in torch, whose integers wrap around.
    """
    bits = numbers * GOLDEN + keys
    bits = (bits ^ ((bits >> 30) & (2**34 - 1))).mul_(0xBF58476D1CE4E5B9 - 2**64)
    bits = (bits ^ ((bits >> 27) & (2**37 - 1))).mul_(0x94D049BB133111EB - 2**64)
    return bits ^ ((bits >> 31) & (2**33 - 1))


def unit_of(bits: Tensor) -> Tensor:
    """Bits as numbers in [0, 1), float64."""
    return ((bits >> 11) & (2**53 - 1)).double().mul_(2.0**-53)


def normals(keys: Tensor, count: int) -> Tensor:
    """Standard normal numbers, ``count`` for each of ``keys (b,)``: ``(b, count)`` float32.

    Each is the quantile of one hash, so that more of them leave the first ones as they are; the largest is 8.3.
    """
    units = unit_of(hashed(keys[:, None], torch.arange(count, device=keys.device)))
    return torch.special.ndtri(units + 2.0**-54).float()
