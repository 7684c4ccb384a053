"""Training generators: from images to tokens, from tokens to samples of every class."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import framework
from framework import runs
from framework.allocation.rules import FixedLength
from framework.allocation.search import LinearSearch
from framework.config import ConfigError
from framework.data.digits import DigitScenes
from framework.data.interface import Batch
from framework.engine.optimizers import AdamW
from framework.engine.schedules import Constant
from framework.engine.turns import TurnTraining, micro_batches, share_parameters
from framework.evaluation.generator_report import HeldOut, length_divergence
from framework.generators.autoregressive import LlamaGenAR
from framework.generators.guidance import Guidance
from framework.generators.image_generator import ImageGenerator
from framework.generators.interface import GeneratorLoss
from framework.runtime.ranks import Ranks
from framework.tasks.interface import Context
from framework.tasks.train_generator import TrainGenerator
from framework.tokenizers.quantizers.finite_scalar_quantizer import FiniteScalarQuantizer
from framework.tokens import Tokens
from tests.tasks.test_fine_tune_decoder import ByBrightness
from tests.tiny_run import generator_config
from tests.tokenizers.build import small_tokenizer


def make_task(is_frozen: bool = True, seed: int = 0, **more: Any) -> TrainGenerator:
    tokenizer = small_tokenizer(quantizer=FiniteScalarQuantizer([5, 4])).requires_grad_(False).eval()
    tokenizer.is_frozen = is_frozen  # type: ignore[assignment]
    torch.manual_seed(seed)
    generator = partial(LlamaGenAR, None, 16, 1, 2, input_dropout=0.0, label_dropout=0.0)
    return TrainGenerator(generator, 10, **({"samples": 40} | more), tokenizer=tokenizer)


def by_brightness(**given: Any) -> ByBrightness:
    policy = ByBrightness(**given).requires_grad_(False)
    policy.is_frozen = True  # type: ignore[assignment]
    return policy


def scenes(count: int = 40) -> DigitScenes:
    return DigitScenes("train", count, image_size=16, training=True, seed=0)


def silent(stage: str, done: int, total: int) -> None:
    pass


@pytest.mark.parametrize("policy", [None, by_brightness])
def test_training_tokens_are_the_coders(tmp_path: Path, policy: Any) -> None:
    task, data = make_task(policy=policy), scenes()
    cached = task.prepare(data, tmp_path, silent)
    batch, images = cached.fetch(range(40), 0), data.fetch(range(40), 0)
    assert batch.tokens is not None and batch.tokens.codes is not None and batch.labels is not None
    expected = task._encoded(data.fetch(range(40), 0))
    assert expected.codes is not None
    assert torch.equal(batch.labels, images.labels if images.labels is not None else batch.labels)
    if policy is None:
        assert task.generator.space.budgets == (6,) == tuple(set(batch.tokens.lengths.tolist()))
    assert torch.equal(batch.tokens.codes[expected.mask], expected.codes[expected.mask])
    written = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    task.prepare(data, tmp_path, silent)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == written
    make_task(policy=policy).prepare(scenes(20), tmp_path, silent)
    assert len(list(tmp_path.iterdir())) == 2


def searching(threshold: float, **given: Any) -> LinearSearch:
    policy = LinearSearch(threshold, **given)
    policy.is_frozen = True  # type: ignore[assignment]
    return policy


def test_tokens_of_another_policy_are_not_taken(tmp_path: Path) -> None:
    """Though it is of the same class and has no weights; nor do other budgets collide with what is there."""
    lengths = []
    for policy in (
        partial(searching, 10.0), partial(searching, 1e-9),
        partial(FixedLength, 3), partial(FixedLength, 5),
    ):  # fmt: skip
        task = make_task(policy=policy)
        tokens = task.prepare(scenes(), tmp_path, silent).fetch(range(40), 0).tokens
        assert tokens is not None
        lengths.append(tokens.lengths.double().mean().item())
    assert lengths == [1, 6, 3, 5] and len(list(tmp_path.iterdir())) == 4


def batch_of(rows: Sequence[int]) -> Batch:
    """Sequences of one to six codes."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(20, (12, 6), generator=generator)
    tokens = Tokens(torch.zeros(12, 6, 0), torch.arange(12) % 6 + 1, codes)
    names = [str(row) for row in range(12)]
    return Batch(torch.zeros(12, 3, 0, 0), names, names, torch.arange(12) % 10, tokens=tokens).select(rows)


class TwoRanks(Ranks):
    """Two threads that share tensors."""

    size = 2

    def __init__(self, rank: int, barrier: threading.Barrier, held: dict[int, list[Tensor]]) -> None:
        self.rank, self.barrier, self.held = rank, barrier, held

    def average(self, tensors: Sequence[Tensor]) -> None:
        self.held[self.rank] = [tensor.clone() for tensor in tensors]
        self.barrier.wait(timeout=30)
        for number, tensor in enumerate(tensors):
            tensor.copy_((self.held[0][number] + self.held[1][number]) / 2)
        self.barrier.wait(timeout=30)


def task_of_codes() -> TrainGenerator:
    task = make_task(policy=by_brightness)
    task.generator.head.weight.data.normal_(generator=torch.Generator().manual_seed(1))
    return task


def move(task: TrainGenerator, batches: list[Batch], ranks: Ranks | None = None) -> dict[str, float]:
    """One step along plain gradients, as AdamW with a large eps takes it."""
    (turn,), parameters = task.turns, share_parameters(task)["generator"]
    optimizer = AdamW(lr=1e4, eps=1e4, weight_decay=0.0, parameters=parameters)
    schedule = Constant(max_steps=1)
    training = TurnTraining(turn, parameters, [], optimizer, schedule, None, False, ranks or Ranks())
    noise = torch.Generator()
    return training.take(task, batches, Context(0, 0.0, lambda purpose: noise))


def test_every_token_of_a_step_counts_the_same() -> None:
    """Whether its batch is taken at once, in micro-batches of other lengths, or by several ranks."""
    start, whole, in_parts, *of_rank = (task_of_codes() for _ in range(5))
    numbers = move(whole, [batch_of(range(12))])
    assert (whole.generator.code_embedding - start.generator.code_embedding).abs().max() > 1e-4
    parts = micro_batches(batch_of(range(12)), 3)
    lengths = [part.tokens.lengths.tolist() for part in parts if part.tokens]
    assert lengths == [[1, 1, 2, 2, 3, 3], [4, 4, 5], [5, 6, 6]]  # 12, 13 and 17 tokens
    numbers_of = {"parts": move(in_parts, parts)}
    barrier = threading.Barrier(2)
    held: dict[int, list[Tensor]] = {}

    def work(rank: int) -> None:
        own = batch_of([0, 1, 2, 6, 7, 8] if rank else [3, 4, 5, 9, 10, 11])
        numbers_of[f"rank {rank}"] = move(of_rank[rank], [own], TwoRanks(rank, barrier, held))

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for other in (in_parts, *of_rank):
        for name, value in whole.state_dict().items():
            torch.testing.assert_close(other.state_dict()[name], value, rtol=0, atol=1e-5)
    for found in numbers_of.values():
        assert found == pytest.approx(numbers, rel=1e-5)
    assert len(numbers_of) == 3 and numbers["mean_length"] == 3.5 and numbers["nll"] == pytest.approx(
        numbers["code"] + numbers["stop"], rel=1e-5
    )


@pytest.mark.parametrize("lengths", [[16, 1, 1, 1], [1, 1, 1, 16], [16, 16, 1, 1], [3, 3, 3, 3]])
def test_no_micro_batch_is_empty(lengths: list[int]) -> None:
    tokens = Tokens(torch.zeros(4, 16, 0), torch.tensor(lengths), torch.zeros(4, 16, dtype=torch.long))
    keys = ["a", "b", "c", "d"]
    parts = micro_batches(Batch(torch.zeros(4, 3, 0, 0), keys, keys, torch.zeros(4), tokens=tokens), 4)
    assert sorted(key for part in parts for key in part.keys) == keys and {len(part.keys) for part in parts} == {1}


# A run


def test_a_run_leaves_its_evaluation(generator_run: Path) -> None:
    results = generator_run / "evaluation"
    metrics = json.loads((results / "metrics.json").read_text())
    assert set(metrics["samples"]) == {"samples, guidance 1", "samples, guidance 2 constant"}
    assert metrics["samples"]["samples, guidance 1"]["lengths"] == {"5": 40}
    assert len(metrics["by_position"]) == 5 and min(metrics["by_position"]) > 0
    held_out = metrics["held_out"]
    mean = sum(metrics["by_position"]) / 5  # every image keeps five
    assert held_out["code"] == pytest.approx(mean, rel=1e-5)
    assert held_out["bits"] == pytest.approx(held_out["nll"] * 5 / 0.6931472, rel=1e-5)
    assert metrics["protocol"]["images"] == 40 and metrics["protocol"]["step"] == 6
    assert "floor" in (results / "table.md").read_text()
    for picture in ("samples.png", "positions.png"):
        assert Image.open(results / picture).size[0] > 100


def test_a_run_loads_as_a_model(generator_run: Path) -> None:
    model = framework.load(generator_run)
    assert isinstance(model, ImageGenerator) and not model.training and not model.tokenizer.training
    labels = torch.arange(10)
    tokens = model.generate(labels, seed=3, guidance=Guidance(2.0))
    assert tokens.lengths.tolist() == [5] * 10 and tokens.latents.shape[2] == model.tokenizer.token_dim
    some = model.generate(labels[4:6], seed=3, guidance=Guidance(2.0), sample_ids=torch.tensor([4, 5]))
    assert torch.equal(some.codes, tokens.codes[4:6])  # type: ignore[index]
    images = model.decode(tokens, batch_size=4)
    assert images.shape == (10, 3, 16, 16) and 0 <= images.min() and images.max() <= 1
    torch.testing.assert_close(images[4:6], model.decode(some))
    with pytest.raises(ValueError, match="from 0 to 9"):
        model.generate(labels + 1)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.frozen=true"):
        make_task(is_frozen=False)
    with pytest.raises(ValueError, match=r"task\.policy\.frozen=true"):
        make_task(policy=ByBrightness)
    untrained = generator_config(tmp_path, "projects/adatok/ar.yaml", "tokenizer.weights=null", "task.policy=null")
    with pytest.raises(ConfigError, match=r"tokenizer\.weights to the run that has trained it"):
        runs.experiment_from(untrained)
    with pytest.raises(ValueError, match="1 or more"):
        make_task(looks=0)
    task = make_task()
    with pytest.raises(ValueError, match="look the same"):
        make_task(looks=2).prepare(scenes(), tmp_path, silent)
    few = TrainGenerator(partial(LlamaGenAR, None, 16, 1, 2), 5, tokenizer=task.images.tokenizer)
    with pytest.raises(ValueError, match="from 0 to 4"):
        few.prepare(scenes(), tmp_path, silent)


def test_divergence_of_lengths() -> None:
    reference = torch.tensor([4] * 600 + [8] * 300 + [12] * 100)
    assert length_divergence(reference, reference, (4, 8, 12)) == 0
    other = torch.tensor([4] * 100 + [8] * 300 + [12] * 600)
    expected = 0.1 * torch.tensor(1 / 6).log() + 0.6 * torch.tensor(6.0).log()
    assert length_divergence(other, reference, (4, 8, 12)) == pytest.approx(float(expected), rel=0.02)
    assert length_divergence(torch.tensor([4]), torch.tensor([8]), (4, 8)) < float("inf")


def test_held_out_means_are_over_tokens() -> None:
    held_out = HeldOut(3)
    for loss, lengths in ((2.0, [1, 1]), (1.0, [3, 3, 2])):
        count = torch.tensor(sum(lengths))
        at = torch.tensor([[2.0, 0, 0], [4.0, 3, 1]])[int(loss == 1)]
        metrics, bits = {"nll": torch.tensor(loss)}, {"bits": torch.tensor(10.0 * loss)}
        held_out.add(GeneratorLoss({"code": torch.tensor(loss)}, count, metrics, at, bits), torch.tensor(lengths))
    means = held_out.means()
    assert means == pytest.approx({"code": 1.2, "nll": 1.2, "bits": 14.0, "length": 2.0})
    assert held_out.by_position() == pytest.approx([6 / 5, 3 / 3, 1 / 2])
