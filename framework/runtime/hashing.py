"""Random numbers by counting: every number is a hash of its address, so no generator carries state.

SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014), in numpy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


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
