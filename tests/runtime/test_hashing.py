from __future__ import annotations

import numpy as np

from framework.runtime.hashing import uniforms


def test_numbers_belong_to_their_address_and_not_to_the_call() -> None:
    together = uniforms(3, "flip", 1, range(100))
    assert np.array_equal(uniforms(3, "flip", 1, [42, 7]), together[[42, 7]])
    for seed, purpose, epoch in ((4, "flip", 1), (3, "order", 1), (3, "flip", 2)):
        assert not np.any(uniforms(seed, purpose, epoch, range(100)) == together)


def test_values_are_stable() -> None:
    """Stored positions and crops rely on these numbers: they must never change between versions or machines."""
    expected = [0.14601288050760075, 0.26027898651355064, 0.21340918028150968]
    assert uniforms(0, "flip", 0, [0, 1, 2**40]).tolist() == expected


def test_uniform_and_uncorrelated() -> None:
    numbers = uniforms(0, "flip", 0, range(100_000))
    assert numbers.dtype == np.float64 and numbers.min() >= 0 and numbers.max() < 1
    counts = np.histogram(numbers, bins=50, range=(0, 1))[0]
    assert ((counts - 2000) ** 2 / 2000).sum() < 90  # chi-square, 49 degrees of freedom: 99.97%
    for other in (uniforms(0, "flip", 1, range(100_000)), uniforms(1, "flip", 0, range(100_000)), np.roll(numbers, 1)):
        assert abs(np.corrcoef(numbers, other)[0, 1]) < 0.015
