from __future__ import annotations

import numpy as np
import torch

from framework.runtime.hashing import hashed, purpose_key, uniforms, unit_of


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


def test_torchs_form_is_splitmix() -> None:
    """Written out in Python's whole numbers, on which nothing wraps around by itself."""
    keys = [purpose_key(3, "code"), -5, 2**62]
    numbers = torch.tensor([0, 1, 17, 2**40])
    for key in keys:
        for number, found in zip(numbers.tolist(), hashed(torch.tensor(key), numbers).tolist(), strict=True):
            bits = (number * 0x9E3779B97F4A7C15 + key) % 2**64
            bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
            bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB % 2**64
            bits ^= bits >> 31
            assert found % 2**64 == bits
            assert unit_of(torch.tensor(found)).item() == (bits >> 11) * 2.0**-53


def test_keys_of_keys_are_independent() -> None:
    keys = hashed(purpose_key(0, "code"), torch.arange(2000))
    numbers = unit_of(hashed(keys[:, None], torch.arange(50)))
    assert abs(float(numbers.mean()) - 0.5) < 0.005 and len(numbers.unique()) == numbers.numel()
    assert float(torch.corrcoef(numbers.T).fill_diagonal_(0).abs().max()) < 0.11
    assert purpose_key(0, "code") != purpose_key(1, "code") != purpose_key(0, "stop")
