from __future__ import annotations

import torch
from torch.distributions import Normal, kl_divergence

from framework.losses.kl import KLLoss


def test_nats_summed_over_channels_against_the_unit_gaussian() -> None:
    mean, log_variance = torch.randn(3, 4, 5), torch.randn(3, 4, 5)
    expected = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(0.0, 1.0)).sum(-1)
    torch.testing.assert_close(KLLoss().divergence(mean, log_variance), expected)


def test_it_is_zero_and_smallest_at_the_unit_gaussian() -> None:
    zero = torch.zeros(1, 1, 2, requires_grad=True)
    nats = KLLoss().divergence(zero, zero)
    nats.sum().backward()
    assert nats.item() == 0 and zero.grad is not None and not zero.grad.any()
    assert (KLLoss().divergence(torch.randn(9, 9, 2), torch.randn(9, 9, 2)) > 0).all()
