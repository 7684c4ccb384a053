from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from framework.nn.channel_statistics import ChannelStatistics

VALUES = 3 + 2 * torch.randn(12, 4, 5, 6, generator=torch.Generator().manual_seed(0))


def test_measured_values_come_out_standardised_and_back() -> None:
    one, other = ChannelStatistics(4), ChannelStatistics(4)
    one.measure([VALUES])
    other.measure(VALUES.split([1, 5, 6]))
    torch.testing.assert_close(one.mean, other.mean)
    torch.testing.assert_close(one.std, VALUES.std((0, 2, 3), correction=0))
    torch.testing.assert_close(one(VALUES).mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(one.inverse(one(VALUES)), VALUES)
    with pytest.raises(ValueError, match="no image"):
        one.measure([])


def test_one_step_of_micro_batches_or_ranks_is_one_of_the_whole() -> None:
    whole, parts = ChannelStatistics(4), ChannelStatistics(4)
    whole.collect(VALUES)
    for part in VALUES.split([3, 9]):
        parts.collect(part)
    rank = deepcopy(parts)
    (pending,) = rank.averaged()
    pending /= 2  # a mean over two ranks, one of which saw nothing
    for each in (whole, parts, rank):
        each.learn()
        torch.testing.assert_close(each.mean, VALUES.mean((0, 2, 3)))
        torch.testing.assert_close(each.std, VALUES.std((0, 2, 3), correction=0))
        assert each.steps == 1 and not each.pending.any()
    before = whole.mean.clone()
    whole.learn()  # nothing was shown
    assert torch.equal(whole.mean, before) and whole.steps == 1


def test_it_follows_what_moves() -> None:
    statistics = ChannelStatistics(4)
    for _ in range(200):
        statistics.collect(VALUES)
        statistics.learn()
    for _ in range(300):
        statistics.collect(10 * VALUES - 7)
        statistics.learn()
    torch.testing.assert_close(statistics.mean, (10 * VALUES - 7).mean((0, 2, 3)), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(statistics.std, 10 * VALUES.std((0, 2, 3), correction=0), rtol=2e-2, atol=0)
    kept = deepcopy(statistics.state_dict())
    statistics.eval().collect(VALUES)
    statistics.learn()
    assert all(torch.equal(value, kept[name]) for name, value in statistics.state_dict().items())
