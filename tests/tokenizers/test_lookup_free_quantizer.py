from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from framework.engine.between_steps import learn_between_steps
from framework.runtime.ranks import Ranks
from framework.tokenizers.quantizers.lookup_free_quantizer import LookupFreeQuantizer


def latents(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_codes_against_vector_quantize_pytorch() -> None:
    peer = pytest.importorskip("vector_quantize_pytorch").LFQ(dim=7).eval()
    quantizer = LookupFreeQuantizer(7).eval()
    given = latents(8, 50, 7)
    given[0, 0] = 0
    theirs, their_codes, _ = peer(given)
    result = quantizer(given)
    assert torch.equal(result.latents, theirs) and torch.equal(result.codes, their_codes.long())
    every = torch.arange(128)[None]
    assert torch.equal(quantizer.codes_to_latents(every), peer.indices_to_codes(every))


def test_losses_against_vector_quantize_pytorch() -> None:
    peer = pytest.importorskip("vector_quantize_pytorch").LFQ(dim=1, commitment_loss_weight=1.0)
    given = latents(8, 50, 1)
    _, parts = peer(given, inv_temperature=1.0, return_loss_breakdown=True)
    losses = LookupFreeQuantizer(1, commitment=1.0, entropy=1.0)(given).losses
    torch.testing.assert_close(losses["commitment"].mean(), parts.commitment)
    entropy = parts.per_sample_entropy - parts.batch_entropy
    torch.testing.assert_close(losses["entropy"].mean(), entropy, atol=1e-4, rtol=0)


def test_the_entropy_of_a_token_is_that_of_all_its_codes() -> None:
    """By the sum over all 2^3 codes, with independent bits in the batch, where the factorised form is exact."""
    values = torch.tensor(list(itertools.product([-0.3, 0.5], [-0.2, 0.1], [0.0, 0.7])))[None]
    given = values.clone().requires_grad_()
    loss = LookupFreeQuantizer(3, entropy=1.0)(given).losses["entropy"].mean()
    reference = values.clone().requires_grad_()
    codebook = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=3)))
    chances = (-(reference[0, :, None] - codebook).square().sum(-1)).softmax(-1)
    expected = torch.special.entr(chances).sum(-1).mean() - torch.special.entr(chances.mean(0)).sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, given), torch.autograd.grad(expected, reference))


def test_commitment_is_the_mean_square_and_gradients_pass_straight_through() -> None:
    quantizer = LookupFreeQuantizer(2, commitment=0.5)
    given = torch.tensor([[[0.5, -3.0]]]).requires_grad_()
    result = quantizer(given)
    torch.testing.assert_close(result.losses["commitment"], torch.tensor([[0.5 * (0.25 + 4) / 2]]))
    upstream = torch.tensor([[[2.0, -5.0]]])
    assert torch.equal(torch.autograd.grad(result.latents, given, upstream)[0], upstream)


def test_a_token_without_loss_gets_no_gradient_of_entropy() -> None:
    given = latents(4, 6, 5).requires_grad_()
    LookupFreeQuantizer(5)(given).losses["entropy"][:, :2].sum().backward()
    assert given.grad is not None and (given.grad[:, :2] != 0).all() and (given.grad[:, 2:] == 0).all()


@pytest.mark.parametrize("entropy", [0.1, 0.0])
def test_the_entropy_penalty_balances_bits(entropy: float) -> None:
    """Latents that begin mostly on one side: the commitment alone draws them there wholly."""
    quantizer = LookupFreeQuantizer(6, entropy=entropy)
    images = latents(256, 1, 8)
    encoder = torch.nn.Linear(8, 6)
    with torch.no_grad():
        encoder.weight.copy_(latents(6, 8, seed=1) / 8)
        encoder.bias.copy_(0.5 * torch.tensor([1, -1, 1, -1, 1, -1]))
    optimizer = torch.optim.Adam(encoder.parameters(), lr=0.03)
    for _ in range(150):
        result = quantizer(encoder(images))
        optimizer.zero_grad()
        torch.stack([loss.mean() for loss in result.losses.values()]).sum().backward()
        optimizer.step()
        learn_between_steps(quantizer, Ranks())
    ones = (quantizer(encoder(images)).latents > 0).float().mean((0, 1))
    balanced = ((ones > 0.35) & (ones < 0.65)).sum()
    perplexity = quantizer.usage.metrics()["perplexity"]
    assert balanced == 6 and perplexity > 32 if entropy else balanced == 0 and perplexity < 4


@pytest.mark.parametrize("dim", [0, 25])
def test_bits_are_few_enough_to_count_codes(dim: int) -> None:
    with pytest.raises(ValueError, match=f"from 1 to 24, got {dim}"):
        LookupFreeQuantizer(dim)
