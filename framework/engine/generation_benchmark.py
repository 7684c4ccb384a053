"""What sequences of different lengths save in decoding: the engine's policies against decoding all to full length.

All sides take turns, see ``framework/engine/benchmark.py``. Time depends on what else a machine does; beside it stand
passes of the transformer and row-steps (rows with a class, summed over passes), which are counted.

Shapes: i images, k budgets, m tokens of the longest sequence, d width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from framework.engine.benchmark import Times, machine, take_turns
from framework.generators.autoregressive import LlamaGenAR
from framework.generators.decode_engine import DecodeEngine, DecodeStatistics, Policy
from framework.generators.guidance import Guidance
from framework.generators.image_generator import ImageGenerator
from framework.generators.interface import TokenSpace
from framework.generators.length_modes import EndOfSequence, LengthModeName, LengthPrefix, StopHazard
from framework.tokens import Tokens

POLICIES: tuple[Policy, ...] = ("static", "compact", "refill")
FULL, SHORTEST = "full length", "shortest"
CLASSES = 10


@dataclass(frozen=True)
class DecodeCosts:
    """What decoding the same images costs with each policy, at full length first, and if all were of the shortest.

    Args:
        times: by case.
        statistics: likewise.
        lengths: of the images at their own lengths, ``(i,)``.
        longest: m.
        shortest: the smallest budget.
        batch_size: images at a time.
        observes: whether a sequence that ends takes one more pass, which sees the stop.
    """

    times: Times
    statistics: Mapping[str, DecodeStatistics]
    lengths: Tensor
    longest: int
    shortest: int
    batch_size: int
    observes: bool

    @property
    def token_ratio(self) -> float:
        """m / E[L]."""
        return self.longest / self.lengths.double().mean().item()

    @property
    def bound(self) -> float:
        """The most that shorter sequences can save: m / E[L], or m / (E[L] + 1) where the stop takes a pass."""
        return self.longest / (self.lengths.double().mean().item() + self.observes)

    @property
    def formula(self) -> float | None:
        """What a model of the two costs says of ``refill``, each measured; ``None`` with one budget.

        A pass takes ``g`` whatever the position, and ``b`` for each position it attends to, so that l tokens take
        ``l g + b l (l + 1) / 2``. Decoding at full length and at the shortest tells both.
        """
        if self.shortest == self.longest:
            return None
        full, short = (self.times.seconds(case).cpu for case in (FULL, SHORTEST))
        known = torch.tensor([self.longest, self.shortest], dtype=torch.float64)
        costs = torch.linalg.solve(_work(known), known.new_tensor([full, short])).clamp(min=0)
        return float((_work(known[:1]) @ costs / (_work(self.lengths.double()) @ costs).mean()).item())

    def table(self) -> str:
        """A line a case; speed-ups are medians over the rounds, and shares are of ``bound``."""
        rounds = len(next(iter(self.times.rounds.values())))
        formula = "" if self.formula is None else f", formula {self.formula:.2f}"
        named = "m / (E[L] + 1)" if self.observes else "m / E[L]"
        lines = [
            f"batch {self.batch_size}, medians of {rounds} alternating rounds of {len(self.lengths)} images of "
            f"{self.lengths.double().mean():.2f} of {self.longest} tokens: token ratio {self.token_ratio:.2f}, bound "
            f"{named} {self.bound:.2f}{formula}",
            f"{'':14}{'images/s':>10}{'speed-up':>10}{'in CPU time':>13}{'passes':>9}{'fewer':>8}{'row-steps':>11}"
            f"{'fewer':>8}{'of bound: time':>16}{'row-steps':>11}",
        ]
        full = self.statistics[FULL]
        for case in (FULL, *POLICIES):
            spent, faster = self.statistics[case], 1 / self.times.ratio(case).cpu
            rows = full.rows / spent.rows
            lines.append(
                f"{case:14}{len(self.lengths) / self.times.seconds(case).wall:10.2f}"
                f"{1 / self.times.ratio(case).wall:10.2f}{faster:13.2f}{spent.steps:9}{full.steps / spent.steps:8.2f}"
                f"{spent.rows:11}{rows:8.2f}{faster / self.bound:16.2f}{rows / self.bound:11.2f}"
            )
        return "\n".join(lines)


def _work(lengths: Tensor) -> Tensor:
    """Passes, and positions that they attend to, of sequences of these lengths, ``(i, 2)``."""
    return torch.stack([lengths, lengths * (lengths + 1) / 2], dim=1)


def time_policies(
    model: LlamaGenAR,
    batch_size: int,
    num_images: int,
    guidance: Guidance,
    rounds: int,
    lengths: Tensor | None = None,
    finish: Callable[[Tokens], object] = lambda tokens: None,
) -> DecodeCosts:
    """Decode the same images by one engine with each policy, and at full length.

    Args:
        model: in eval mode.
        batch_size: images at a time.
        num_images: i, a multiple of ``batch_size``.
        guidance: of all.
        rounds: how often.
        lengths: ``(i,)`` of budgets, which the engine knows beforehand; as the model finds right unless given.
        finish: what is done with tokens within the measured time.
    """
    engine = DecodeEngine(model, batch_size, "static")
    numbers, space = torch.arange(num_images), model.space
    statistics: dict[str, DecodeStatistics] = {}
    found: dict[str, Tensor] = {}

    def decode(case: str, policy: Policy, lengths: Tensor | None) -> None:
        engine.policy = policy
        tokens = engine.generate(
            numbers % space.num_classes, seed=0, sample_ids=numbers, guidance=guidance, lengths=lengths
        )
        statistics[case], found[case] = replace(engine.statistics), tokens.lengths.cpu()
        finish(tokens)

    longest, shortest = space.longest, space.budgets[0]
    cases = {FULL: partial(decode, FULL, "static", torch.full_like(numbers, longest))}
    cases |= {policy: partial(decode, policy, policy, lengths) for policy in POLICIES}
    if shortest < longest:
        cases[SHORTEST] = partial(decode, SHORTEST, "static", torch.full_like(numbers, shortest))
    times = take_turns(cases, rounds, next(model.parameters()).device)
    observes = lengths is None and isinstance(model.length, EndOfSequence | StopHazard)
    return DecodeCosts(times, statistics, found["refill"], longest, shortest, batch_size, observes)


def model_of_lengths(mode: LengthModeName, size: Sequence[int], codes: int, lengths: Sequence[int]) -> LlamaGenAR:
    """A model in eval mode whose sequences have lengths as they stand in ``lengths``, in these shares.

    Blocks add nothing, as at the start of training, and embeddings are 0, so that states depend on positions alone;
    what the mode reads lengths from is solved for the shares. It takes as long as any other.

    Args:
        mode: how it knows lengths; with ``none`` all are the longest.
        size: d, blocks and heads.
        codes: of the vocabulary.
        lengths: of which each is as likely as any other; those that occur twice are twice as likely.
    """
    ordered = torch.tensor(sorted(lengths))
    budgets, counts = ordered.unique(return_counts=True)
    space = TokenSpace(int(budgets[-1]), 1, codes, tuple(budgets.tolist()), CLASSES)
    width, depth, num_heads = size
    model = LlamaGenAR(
        None, width, depth, num_heads, positions=["rope1d", "learned"], length_mode=mode, space=space
    ).eval()
    shares = counts.double() / counts.sum()
    left = shares.flip(0).cumsum(0).flip(0)  # that are at least as long
    with torch.no_grad():
        for embedding in (model.code_embedding, model.class_embedding):
            embedding.zero_()
        zeros = torch.zeros(1, space.longest, dtype=torch.int64)
        if isinstance(model.length, LengthPrefix):
            model.length.embedding.zero_()
            states, wanted = model.states(zeros, zeros[0, :1], budgets[:1])[0, :1], shares.log()[None]
            model.length.head.weight.copy_(_solved(states, wanted))
        elif len(budgets) > 1 and mode != "none":
            states = model.states(zeros, zeros[0, :1], budgets[:1])[0, budgets[:-1]]
            logits = (shares / left)[:-1].logit()[:, None]
            if isinstance(model.length, StopHazard):
                model.length.head.weight.copy_(_solved(states, logits))
            else:  # an entry beside codes whose logits are all 0
                model.head.weight[codes:] = _solved(states, logits + torch.tensor(codes).log())
    return model


def _solved(states: Tensor, logits: Tensor) -> Tensor:
    """Weights ``(e, d)`` that give states ``(s, d)`` the logits ``(s, e)``."""
    return (torch.linalg.pinv(states.double()) @ logits).T.float()


def generation_lines(
    rounds: int,
    batch_sizes: Sequence[int],
    guidance: float,
    images_per_row: int,
    images: ImageGenerator | None = None,
    modes: Sequence[LengthModeName] = ("none", "eos", "hazard", "prefix"),
    size: Sequence[int] = (),
    codes: int = 0,
    lengths: Sequence[int] = (),
) -> Iterator[str]:
    """What ``time_policies`` finds: a table for each length mode and batch size.

    Args:
        rounds: of each table.
        batch_sizes: images at a time.
        guidance: scale.
        images_per_row: of a round, for each image at a time.
        images: a trained generator, also measured with its decoder; its length mode is its own.
        modes: of models that are made here, by ``model_of_lengths``, like what follows.
        size, codes, lengths: of that function.

    Raises:
        TypeError: if the generator has no engine.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    yield f"{machine(device)}, float32, guidance {guidance:g}; passes draw a token for each row"
    if images is not None:
        model = images.to(device).generator
        if not isinstance(model, LlamaGenAR):
            raise TypeError(f"only a LlamaGenAR has decoding policies, and this generator is a {type(model).__name__}")
        for batch_size in batch_sizes:
            given: dict[str, Any] = {"num_images": batch_size * images_per_row, "rounds": rounds}
            for title, finish in (("tokens", None), ("tokens and images", partial(_decoded, images))):
                chosen = given if finish is None else given | {"finish": finish}
                costs = time_policies(model, batch_size, guidance=Guidance(guidance), **chosen)
                yield f"{title}, {costs.table()}"
        return
    drawn = torch.Generator().manual_seed(0)
    for mode in modes:
        model = model_of_lengths(mode, size, codes, lengths).to(device)
        for batch_size in batch_sizes:
            number = batch_size * images_per_row
            asked = torch.tensor(lengths)[torch.randint(len(lengths), (number,), generator=drawn)]
            given = {"lengths": asked} if mode == "none" else {}
            costs = time_policies(model, batch_size, number, Guidance(guidance), rounds, **given)
            note = ", lengths are asked for" if mode == "none" else ""
            yield f"mode {mode}{note}, {costs.table()}"


def _decoded(images: ImageGenerator, tokens: Tokens) -> Tensor:
    assert tokens.codes is not None
    return images.decode(images.tokenizer.codes_to_tokens(tokens.codes, tokens.lengths))
