from __future__ import annotations

from copy import deepcopy
from functools import partial
from math import exp, log
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from framework.engine.between_steps import learn_between_steps
from framework.losses.adversarial import AdversarialLoss, RunningMeans, adaptive_factor, last_layer
from framework.losses.discriminators import BlurPatchDiscriminator, Discriminator
from framework.runtime.ranks import Ranks
from framework.tokenizers.decoders.multi_head_lora import MultiHeadLoRA
from framework.tokenizers.heads import PixelShuffleHead
from tests.tokenizers.build import small_tokenizer


class Brightness(Discriminator):
    """Logits are the brightness of each of four pixels, times a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        return self.weight * images.sum(1, keepdim=True)


def loss_of(**changes: Any) -> AdversarialLoss:
    return AdversarialLoss(Brightness(), **changes)


def with_logits(*logits: float) -> Tensor:
    """Images of 2x2 pixels for which ``Brightness`` says so."""
    image = torch.zeros(len(logits) // 4, 3, 2, 2)
    image[:, 0] = torch.tensor(logits).view(-1, 2, 2)
    return image


REAL, FAKE = with_logits(2.0, 0.5, -1.0, 3.0), with_logits(-2.0, 0.5, -0.5, -3.0)


def softplus(value: float) -> float:
    return log(1 + exp(value))


def test_hinge() -> None:
    loss = loss_of(weight=0.1)
    losses, numbers = loss.discriminate(FAKE, REAL)
    assert losses["hinge"].item() == pytest.approx(((0 + 0.5 + 2 + 0) / 4 + (0 + 1.5 + 0.5 + 0) / 4) / 2)
    assert list(losses) == ["hinge"]
    assert {name: value.item() for name, value in numbers.items()} == {
        "real": pytest.approx(4.5 / 4),
        "fake": pytest.approx(-5 / 4),
        "accuracy": pytest.approx((3 / 4 + 3 / 4) / 2),
    }
    deceived, more = loss.deceive(FAKE, torch.tensor(1.0))
    assert deceived.item() == pytest.approx(0.1 * 5 / 4) and more == {}


def test_non_saturating() -> None:
    loss = loss_of(form="non_saturating", weight=0.3)
    real = sum(map(softplus, (-2.0, -0.5, 1.0, -3.0))) / 4
    fake = sum(map(softplus, (-2.0, 0.5, -0.5, -3.0))) / 4
    assert loss.discriminate(FAKE, REAL)[0]["non_saturating"].item() == pytest.approx((real + fake) / 2)
    deceived = sum(map(softplus, (2.0, -0.5, 0.5, 3.0))) / 4
    assert loss.deceive(FAKE, torch.tensor(1.0))[0].item() == pytest.approx(0.3 * deceived)


def test_the_discriminator_does_not_teach_the_tokenizer_in_its_own_turn() -> None:
    fake = FAKE.clone().requires_grad_()
    loss = loss_of()
    sum(loss.discriminate(fake, REAL)[0].values(), torch.zeros(())).backward()
    assert fake.grad is None and loss.discriminator.get_parameter("weight").grad is not None
    loss.deceive(fake, torch.tensor(1.0))[0].backward()
    assert fake.grad is not None and fake.grad.any()


def test_lecam() -> None:
    loss = loss_of(lecam=0.1)
    assert loss.discriminate(FAKE, REAL)[0]["lecam"].item() == pytest.approx(
        0.1 * ((4 + 0.25 + 0 + 9) / 4 + (4 + 0 + 0.25 + 9) / 4)  # running means are zeros before the first step
    )
    learn_between_steps(loss, Ranks())
    usual_real, usual_fake = 4.5 / 4, -5 / 4  # after one step, that step's
    real = sum(max(x - usual_fake, 0) ** 2 for x in (2.0, 0.5, -1.0, 3.0)) / 4
    fake = sum(max(usual_real - x, 0) ** 2 for x in (-2.0, 0.5, -0.5, -3.0)) / 4
    assert loss.discriminate(FAKE, REAL)[0]["lecam"].item() == pytest.approx(0.1 * (real + fake))


def test_running_means_are_of_hundred_steps_and_know_no_batch_twice() -> None:
    means = RunningMeans(1)
    expected = 0.0
    for step in range(300):
        means.collect(torch.tensor(float(step)))
        assert means.values.item() == pytest.approx(expected)  # it learns between steps only
        learn_between_steps(means, Ranks())
        expected = step / 2 if step < 100 else 0.99 * expected + 0.01 * step
    settled = means.settled()
    assert settled == [means.values.item()] and means.steps == 300
    learn_between_steps(means, Ranks())  # a step that has brought nothing changes nothing
    assert means.settled() == settled and means.steps == 300
    means.eval().collect(torch.tensor(1e9))
    means.train()
    learn_between_steps(means, Ranks())
    assert means.settled() == settled
    assert set(means.state_dict()) == {"values", "steps"}


def test_micro_batches_and_ranks_make_the_step_of_the_whole_batch() -> None:
    whole = AdversarialLoss(BlurPatchDiscriminator(width=32, depth=1), lecam=1.0)
    parts, other_rank = deepcopy(whole), deepcopy(whole)
    for _ in range(2):  # the second with running means that are not zeros
        real, fake = torch.rand(2, 8, 3, 16, 16)
        for module in (whole, parts, other_rank):
            module.zero_grad()
        losses, _ = whole.discriminate(fake, real)
        sum(losses.values(), torch.zeros(())).backward()
        for module, rows in ((parts, (slice(0, 2), slice(2, 4))), (other_rank, (slice(4, 6), slice(6, 8)))):
            for row in rows:
                losses, _ = module.discriminate(fake[row], real[row])
                (sum(losses.values(), torch.zeros(())) / 4).backward()
        for parameter, first, second in zip(
            whole.parameters(), parts.parameters(), other_rank.parameters(), strict=True
        ):
            assert parameter.grad is not None and first.grad is not None and second.grad is not None
            torch.testing.assert_close(first.grad + second.grad, parameter.grad, rtol=1e-4, atol=1e-6)
        for one, other in zip(parts.judgement.averaged(), other_rank.judgement.averaged(), strict=True):
            mean = (one + other) / 2  # as Ranks.average does
            one.copy_(mean), other.copy_(mean)
        for module in (whole, parts, other_rank):
            learn_between_steps(module, Ranks())
        torch.testing.assert_close(parts.judgement.values, whole.judgement.values, rtol=1e-5, atol=1e-6)
        assert torch.equal(parts.judgement.values, other_rank.judgement.values)


def test_the_adaptive_factor_by_hand() -> None:
    weight = nn.Parameter(torch.tensor([[1.0, 2.0]]))
    made = weight.sum(1) * 1.0
    assert adaptive_factor(12 * made.sum(), 3 * made.sum(), weight).item() == pytest.approx(12 / (3 + 1e-4 / 2**0.5))
    assert adaptive_factor(12 * made.sum(), 0 * made.sum(), weight).item() == pytest.approx(1e4)  # 1.7e5, at most
    assert adaptive_factor(made.sum() * 0, made.sum(), weight).item() == 0


def test_an_adaptive_weight_makes_both_gradients_equal_at_the_last_layer() -> None:
    layer = nn.Linear(4, 12)
    loss = loss_of(weight=0.5, weighting="adaptive")
    rebuilt = layer(torch.rand(3, 4)).view(3, 3, 2, 2)
    others = 70 * rebuilt.square().mean()
    adversarial, numbers = loss.deceive(rebuilt, others)
    (theirs,) = torch.autograd.grad(others, layer.weight, retain_graph=True)
    (own,) = torch.autograd.grad(adversarial, layer.weight)
    assert own.norm().item() == pytest.approx(0.5 * theirs.norm().item(), rel=1e-3)
    learn_between_steps(loss, Ranks())
    assert loss.factor.values.item() == pytest.approx(numbers["adversarial_factor"].item()) and own.norm() > 0


@pytest.mark.parametrize("refine_channels", [0, 4])
def test_the_last_layer_is_the_heads(refine_channels: int) -> None:
    head = partial(PixelShuffleHead, refine_channels=refine_channels)
    tokenizer = small_tokenizer(decoder={"head": head, "lora": MultiHeadLoRA(2), "drop_mode": "null_token"})
    for precision in (torch.float32, torch.bfloat16):
        with torch.autocast("cpu", precision, enabled=precision != torch.float32):
            images = tokenizer(torch.rand(2, 3, 16, 16), torch.tensor([1, 6])).images
        names = [name for name, parameter in tokenizer.named_parameters() if parameter is last_layer(images)]
        assert names == ["decoder.head.refine.2.weight" if refine_channels else "decoder.head.to_patch.weight"]
    with pytest.raises(ValueError, match="none is trained: take a fixed one"):
        last_layer(torch.rand(2, requires_grad=True) * 2)


def test_alarms() -> None:
    def after(loss: AdversarialLoss, real: Tensor, fake: Tensor, steps: int) -> dict[str, str]:
        for _ in range(steps):
            loss.discriminate(fake, real)
            learn_between_steps(loss, Ranks())
        return loss.alarms()

    right = with_logits(2.0, 2.0, 2.0, 2.0)
    assert after(loss_of(), right, -right, 99) == {}
    told = after(loss_of(), right, -right, 100)
    assert list(told) == ["discriminator"]
    assert "the discriminator wins: it tells 100.0% of the patches right, at a loss of 0." in told["discriminator"]
    assert after(loss_of(), REAL, FAKE, 100) == {}
    assert after(loss_of(), 0.4 * right, -0.4 * right, 100) == {}  # right, but not sure of it
    assert list(after(loss_of(form="non_saturating"), 2 * right, -2 * right, 100)) == ["discriminator"]

    loss = loss_of(weighting="adaptive")
    for _ in range(100):
        loss.factor.collect(torch.tensor(2000.0))
        learn_between_steps(loss, Ranks())
    assert list(loss.alarms()) == ["adversarial weight"]
    assert "has grown to 2e+03" in loss.alarms()["adversarial weight"]


@pytest.mark.parametrize("name", ["weight", "start", "lecam"])
def test_negative_settings_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"adversarial.{name} is at least 0, got -1"):
        loss_of(**{name: -1})
