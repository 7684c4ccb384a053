from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from framework.data.interface import Batch
from framework.engine.trainer import make_turns
from framework.losses.interface import Loss
from framework.losses.kl import KLLoss
from framework.losses.reconstruction import PixelLoss
from framework.runs import experiment_from
from framework.runtime.rng import Generators
from framework.tasks.interface import Context, StepOutput
from framework.tasks.train_tokenizer import TrainTokenizer
from framework.tokenizers.interface import MaskingSchedule, Quantized, Quantizer
from framework.tokenizers.masking import FullLength
from framework.tokenizers.quantizers.gaussian_bottleneck import GaussianBottleneck
from tests.engine.fakes import training
from tests.stir import stirred
from tests.tiny_run import tiny_config
from tests.tokenizers.build import small_tokenizer


class Costly(Quantizer):
    """Passes latents on, each token at the price of its mean square."""

    dim = 5

    def forward(self, latents: Tensor, generator: torch.Generator | None = None) -> Quantized:
        return Quantized(latents, None, {"commitment": latents.float().square().mean(-1)})


class Progressing(MaskingSchedule):
    """As long as training has come."""

    def lengths(self, batch_size: int, num_tokens: int, progress: float, generator: torch.Generator) -> Tensor:
        return torch.full((batch_size,), 1 + round(progress * (num_tokens - 1)))


def a_batch(size: int = 8) -> Batch:
    names = [f"image{index}" for index in range(size)]
    return Batch(torch.rand(size, 3, 16, 16, generator=torch.Generator().manual_seed(1)), names, names)


def context(generators: Callable[[str], torch.Generator] | None = None, step: int = 0) -> Context:
    return Context(step, step / 10, generators or Generators(0))


def output_of(task: TrainTokenizer, given: Context | None = None) -> StepOutput:
    return task(a_batch(), "tokenizer", given or context())


def test_losses_are_those_named_and_the_quantizers() -> None:
    losses: dict[str, Loss] = {"pixel": PixelLoss("l2"), "absolute": PixelLoss("l1", weight=0.5)}
    task = TrainTokenizer(losses, tokenizer=small_tokenizer(quantizer=Costly(), masking=FullLength()))
    output = output_of(task)
    images = a_batch().images
    result = task.tokenizer(images, torch.full((8,), 6))
    expected = {
        "pixel": 4 * (result.images - images).square().mean(),
        "absolute": 0.5 * 2 * (result.images - images).abs().mean(),
        "quantizer_commitment": result.tokens.latents.square().mean(),
    }
    assert list(output.losses) == list(expected)
    for name, value in expected.items():
        torch.testing.assert_close(output.losses[name], value)


def test_the_sum_of_all_losses_is_minimised() -> None:
    task = TrainTokenizer({"pixel": PixelLoss(weight=0.0)}, tokenizer=small_tokenizer(quantizer=Costly()))
    (turn,) = make_turns(task, training())
    numbers = [turn.take(task, [a_batch()], context(step=step)) for step in range(6)]
    assert numbers[0]["loss"] == pytest.approx(numbers[0]["pixel"] + numbers[0]["quantizer_commitment"])
    # With the pixels weighted 0 the quantizer's price alone moves weights, and falls.
    assert numbers[0]["gradient_norm"] > 0 and numbers[-1]["loss"] < numbers[0]["loss"]


def test_lengths_come_from_their_own_generator() -> None:
    task = TrainTokenizer({"pixel": PixelLoss()}, tokenizer=small_tokenizer())
    asked: list[str] = []

    def generators(purpose: str) -> torch.Generator:
        asked.append(purpose)
        return torch.Generator().manual_seed(5)

    first = output_of(task, context(generators))
    torch.manual_seed(99)
    again = output_of(task, context(generators))
    assert asked == ["lengths", "noise"] * 2
    assert torch.equal(first.losses["pixel"], again.losses["pixel"])
    lengths = task.tokenizer.masking.lengths(8, 6, 0.0, torch.Generator().manual_seed(5))
    assert first.metrics["mean_length"] == lengths.double().mean() and len(lengths.unique()) > 1

    one = Generators(0)
    drawn = [output_of(task, context(one)).metrics["mean_length"] for _ in range(6)]
    assert len(set(map(float, drawn))) > 1  # the generator goes on from step to step


def test_noise_comes_from_its_own_generator_and_only_where_there_is_some() -> None:
    still, noisy = Generators(0), Generators(0)
    task = TrainTokenizer({"pixel": PixelLoss()}, tokenizer=small_tokenizer())
    untouched = Generators(0)("noise").get_state()
    output_of(task, context(still))
    assert torch.equal(still("noise").get_state(), untouched)
    task = TrainTokenizer({"pixel": PixelLoss()}, tokenizer=small_tokenizer(quantizer=GaussianBottleneck(5)))
    losses = [output_of(task, context(noisy)).losses["pixel"] for _ in range(2)]
    again = output_of(task, context(Generators(0))).losses["pixel"]
    assert not torch.equal(noisy("noise").get_state(), untouched)
    assert losses[0] == again and losses[0] != losses[1]
    assert torch.equal(noisy("lengths").get_state(), two_draws_of_lengths().get_state())


def two_draws_of_lengths() -> torch.Generator:
    generators = Generators(0)
    for _ in range(2):
        small_tokenizer().draw_lengths(8, 0.0, generators("lengths"))
    return generators("lengths")


def test_what_tokens_say_is_paid_for_and_logged_in_bits() -> None:
    quantizer = GaussianBottleneck(5, KLLoss(weight=0.01))
    task = TrainTokenizer({"pixel": PixelLoss()}, tokenizer=small_tokenizer(quantizer=quantizer, masking=FullLength()))
    output = output_of(task)
    latents = task.tokenizer.encoder(a_batch().images * 2 - 1).latents
    nats = quantizer.kl.divergence(*latents.chunk(2, dim=-1)).mean()
    torch.testing.assert_close(output.losses["quantizer_kl"], 0.01 * nats)
    torch.testing.assert_close(output.metrics["quantizer_kl_bits"], nats.detach() / math.log(2))


def test_the_schedule_is_told_the_progress() -> None:
    task = TrainTokenizer({"pixel": PixelLoss()}, tokenizer=small_tokenizer(masking=Progressing()))
    assert [float(output_of(task, context(step=step)).metrics["mean_length"]) for step in (0, 4, 10)] == [1, 3, 6]


def test_only_kept_tokens_are_learned_from() -> None:
    class One(MaskingSchedule):
        def lengths(self, batch_size: int, num_tokens: int, progress: float, generator: torch.Generator) -> Tensor:
            return torch.ones(batch_size, dtype=torch.int64)

    task = TrainTokenizer({"pixel": PixelLoss()}, tokenizer=small_tokenizer(masking=One()))
    output_of(task).losses["pixel"].backward()
    gradient = task.tokenizer.get_parameter("decoder.token_positions").grad
    assert gradient is not None and not gradient[1:].any()


def test_losses_are_float32_under_autocast() -> None:
    task = TrainTokenizer({"pixel": PixelLoss()}, tokenizer=small_tokenizer(quantizer=Costly()))
    with torch.autocast("cpu", torch.bfloat16):
        output = output_of(task)
        assert task.tokenizer(a_batch().images, torch.full((8,), 6)).images.dtype == torch.bfloat16
    assert {name: loss.dtype for name, loss in output.losses.items()} == dict.fromkeys(output.losses, torch.float32)


def test_a_length_conditioned_encoder_trains_by_overrides_alone(tmp_path: Path) -> None:
    encoder = "tokenizer.encoder={name: PatchEncoder, num_tokens: 4, patch_size: 8, width: 32, depth: 1, num_heads: 2}"
    task = stirred(experiment_from(tiny_config(tmp_path, encoder, "tokenizer.decoder.drop_mode=zero")).task)
    assert isinstance(task, TrainTokenizer) and task.tokenizer.contract == "length_conditioned"
    lengths, images = torch.tensor([1, 2, 3, 4]), a_batch(4).images
    output_of(task).losses["pixel"].backward()
    for name in ("kept_embedding", "masked_embedding"):
        gradient = task.tokenizer.get_parameter(f"encoder.{name}").grad
        assert gradient is not None and gradient.any()
    with torch.no_grad():
        numbers = task.eval().validate([a_batch(4)])
        rebuilt = [task.tokenizer.decode(task.tokenizer.encode(images, length)) for length in (1, 4)]
        reread = task.tokenizer.decode(task.tokenizer.encode(images, 4).with_lengths(torch.ones_like(lengths)))
    errors = [(made - images).square().mean().item() for made in rebuilt]
    assert numbers == {"mse@1": pytest.approx(errors[0]), "mse@4": pytest.approx(errors[1])}
    assert not torch.allclose(reread, rebuilt[0], atol=1e-4)


def test_without_losses_there_is_nothing_to_train() -> None:
    with pytest.raises(ValueError, match="a task without losses trains nothing: set task.losses to"):
        TrainTokenizer({}, tokenizer=small_tokenizer())


def test_validation_is_an_error_at_few_lengths() -> None:
    task = TrainTokenizer({"pixel": PixelLoss()}, tokenizer=small_tokenizer()).eval()
    assert task.model is task.tokenizer
    with torch.no_grad():
        numbers = task.validate([a_batch(5), a_batch(3)])
        tokens = task.tokenizer.encode(a_batch(5).images, length=1)
        errors = [(task.tokenizer.decode(tokens) - a_batch(5).images).square().mean((1, 2, 3))]
        errors += [(task.tokenizer.decode(tokens.select(torch.arange(3))) - a_batch(3).images).square().mean((1, 2, 3))]
    assert list(numbers) == ["mse@1", "mse@6"]
    assert numbers["mse@1"] == pytest.approx(float(torch.cat(errors).mean()), rel=1e-5)
