"""Laws of autoregressive generators: what is decoded is what training has in mind, whoever decodes it and how."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from framework.engine.acceleration import recompute_blocks
from framework.generators.autoregressive import SIZES, LlamaGenAR
from framework.generators.decode_engine import DecodeEngine, Policy
from framework.generators.guidance import Guidance, guided
from framework.generators.interface import TokenSpace
from framework.generators.sampling import Sampling
from framework.tokens import Tokens
from tests.stir import stirred

SPACE = TokenSpace(14, 3, 40, (3, 6, 9, 12), 5)
MODES = ("none", "eos", "hazard", "prefix")
POLICIES: tuple[Policy, ...] = ("static", "compact", "refill")
GUIDANCES = {
    "none": Guidance(),
    "all": Guidance(3.0),
    "early": Guidance(3.0, (0.0, 0.4)),
    "late": Guidance(3.0, (0.3, 0.8)),
    "rising": Guidance(4.0, schedule="linear"),
}
LABELS, IDS = torch.arange(11) % 5, torch.arange(11) * 7 + 3


def generator_of(mode: str = "hazard", space: TokenSpace = SPACE, **more: Any) -> LlamaGenAR:
    torch.manual_seed(0)
    chosen = {"size": None, "width": 32, "depth": 2, "num_heads": 4, "mlp_ratio": 2.0} | more
    chosen.setdefault("positions", ["rope1d", "learned"])
    generator = LlamaGenAR(length_mode=mode, space=space, **chosen)  # type: ignore[arg-type]
    return stirred(generator).eval()


def decode(generator: LlamaGenAR, policy: Policy = "refill", batch_size: int = 4, **more: Any) -> Tokens:
    given = {"labels": LABELS, "sample_ids": IDS, "seed": 1, "guidance": GUIDANCES["all"]} | more
    return DecodeEngine(generator, batch_size, policy).generate(given.pop("labels"), **given)


def sequences(generator: torch.Generator, count: int = 12) -> tuple[Tokens, Tensor]:
    """Codes of all lengths, with labels."""
    lengths = torch.tensor(SPACE.budgets)[torch.arange(count) % 4]
    codes = torch.randint(40, (count, 14), generator=generator)
    return Tokens(torch.zeros(count, 14, 0), lengths, codes), torch.arange(count) % 5


# Decoding is what teacher forcing says


@pytest.mark.parametrize(
    ("guidance", "positions"),
    [("none", ["rope2d"]), ("all", ["rope1d"]), ("early", ["learned"]), ("late", ["rope2d"]), ("late", ["rope1d"]),
     ("rising", ["rope1d", "learned"])],
)  # fmt: skip
@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_cached_decoding_is_teacher_forcing(mode: str, guidance: str, positions: list[str]) -> None:
    """Each code is the likeliest of logits that are computed without a cache, from the codes before it."""
    grid = positions == ["rope2d"]
    if grid and mode == "prefix":
        pytest.skip("rope2d has no place for a length")
    space = TokenSpace(9, 3, 40, (3, 6, 9), 5) if grid else SPACE
    generator, chosen = generator_of(mode, space, positions=positions, qk_norm=guidance == "all"), GUIDANCES[guidance]
    generator.sampling = Sampling(temperature=0)
    tokens = generator.generate(LABELS, seed=0, sample_ids=IDS, guidance=chosen)
    assert tokens.codes is not None
    nothing = torch.full_like(LABELS, space.num_classes)
    longest = space.longest
    conditional = generator(tokens.codes[:, : longest - 1], LABELS, tokens.lengths)
    unconditional = generator(tokens.codes[:, : longest - 1], nothing, tokens.lengths)
    scales = torch.tensor([chosen.scale_at(t / longest) for t in range(longest)])[:, None]
    every = guided(conditional, unconditional, scales).nan_to_num(nan=float("-inf"))  # of two stops that may not be
    expected, kept = every.argmax(-1), tokens.mask[:, :longest]
    assert torch.equal(expected[kept], tokens.codes[kept])
    assert not tokens.codes[~kept].any()
    for row, length in enumerate(tokens.lengths.tolist()):
        if mode == "eos" and length < longest:
            assert expected[row, length] == space.vocabulary


def test_positions_see_the_past_only() -> None:
    generator = generator_of("none")
    codes = torch.arange(12)[None]
    changed = codes.clone()
    changed[0, 7] = 39
    logits, others = generator(codes, LABELS[:1]), generator(changed, LABELS[:1])
    assert torch.equal(logits[:, :8], others[:, :8])
    assert not torch.allclose(logits[:, 8:], others[:, 8:])


# A sample is a function of its number


@pytest.mark.parametrize("guidance", GUIDANCES)
@pytest.mark.parametrize("mode", MODES)
def test_policies_and_batch_sizes_agree(mode: str, guidance: str) -> None:
    generator = generator_of(mode)
    first = decode(generator, "static", 2, guidance=GUIDANCES[guidance])
    assert len(set(first.lengths.tolist())) > (mode in ("hazard", "prefix"))
    for policy in POLICIES:
        for batch_size in (3, 11):
            tokens = decode(generator, policy, batch_size, guidance=GUIDANCES[guidance])
            assert torch.equal(tokens.codes, first.codes) and torch.equal(tokens.lengths, first.lengths)


@pytest.mark.parametrize("mode", MODES)
def test_samples_do_not_depend_on_their_neighbours_or_order(mode: str) -> None:
    generator = generator_of(mode)
    every = decode(generator)
    chosen = torch.tensor([7, 3, 10])
    some = decode(generator, labels=LABELS[chosen], sample_ids=IDS[chosen])
    assert torch.equal(some.codes, every.codes[chosen]) and torch.equal(some.lengths, every.lengths[chosen])
    others = decode(generator, sample_ids=IDS + 1)
    assert (others.codes != every.codes).any(1).all()
    assert (decode(generator, seed=2).codes != every.codes).any(1).all()


def test_an_engine_is_as_new_after_a_call() -> None:
    for mode in MODES:
        engine = DecodeEngine(generator_of(mode), 4)
        given: dict[str, Any] = {"seed": 1, "sample_ids": IDS, "guidance": GUIDANCES["late"]}
        first, second = engine.generate(LABELS, **given), engine.generate(LABELS, **given)
        assert torch.equal(first.codes, second.codes)


# Lengths


@pytest.mark.parametrize("mode", MODES)
def test_sequences_end_at_budgets_only(mode: str) -> None:
    generator = generator_of(mode)
    labels = torch.arange(200) % 5
    lengths = decode(generator, batch_size=64, labels=labels, sample_ids=torch.arange(200)).lengths
    assert set(lengths.tolist()) <= set(SPACE.budgets)
    assert set(lengths.tolist()) == {12} if mode == "none" else len(set(lengths.tolist())) > 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("policy", POLICIES)
def test_lengths_can_be_asked_for(mode: str, policy: Policy) -> None:
    generator = generator_of(mode)
    wanted = torch.tensor(SPACE.budgets)[torch.arange(11) % 4]
    tokens = decode(generator, policy, lengths=wanted)
    assert torch.equal(tokens.lengths, wanted)
    assert tokens.codes is not None and int(tokens.codes.max()) < 40
    if mode == "none":
        full = decode(generator, policy)
        kept = tokens.mask[:, :12]
        assert torch.equal(full.codes[kept], tokens.codes[kept])


def test_no_length_mode_is_fixed_decoding_at_full_length() -> None:
    adaptive, fixed = generator_of("none"), generator_of("none", TokenSpace(12, 3, 40, (12,), 5))
    assert torch.equal(decode(adaptive).codes, decode(fixed).codes)


@pytest.mark.parametrize("guidance", [Guidance(), Guidance(5.0)])
def test_hazards_are_chances_that_guidance_does_not_touch(guidance: Guidance) -> None:
    """With a head that sees nothing, lengths follow its one chance at every budget before the last."""
    generator = generator_of("hazard")
    with torch.no_grad():
        generator.length.head.weight.zero_()
        generator.length.head.bias.fill_(math.log(0.3 / 0.7))
    ids = torch.arange(3000)
    lengths = decode(generator, batch_size=512, labels=ids % 5, sample_ids=ids, guidance=guidance).lengths
    shares = torch.bincount(lengths, minlength=13)[list(SPACE.budgets)] / 3000
    torch.testing.assert_close(shares, torch.tensor([0.3, 0.21, 0.147, 0.343]), atol=0.03, rtol=0)


def test_prefixes_follow_their_own_softmax() -> None:
    generator = generator_of("prefix")
    ids = torch.arange(2500)
    lengths = decode(generator, batch_size=512, labels=ids % 5, sample_ids=ids).lengths
    with torch.no_grad():
        some = torch.full((5,), 3)
        states = generator.states(torch.zeros(5, 0, dtype=torch.int64), torch.arange(5), some)
        chances = generator.length.logits(states[:, 0]).softmax(1)  # type: ignore[operator]
    for label in range(5):
        shares = torch.bincount(lengths[ids % 5 == label], minlength=13)[list(SPACE.budgets)] / 500
        torch.testing.assert_close(shares, chances[label], atol=0.08, rtol=0)


# Costs


@pytest.mark.parametrize(("policy", "steps", "rows"), [("static", 18, 72), ("compact", 18, 54), ("refill", 15, 54)])
def test_steps_are_counted(policy: Policy, steps: int, rows: int) -> None:
    """By hand, of four rows: known lengths are begun longest first, so 12, 12, 9, 6 and then 6, 3, 3, 3."""
    lengths = torch.tensor([3, 12, 6, 9, 3, 3, 12, 6])
    engine = DecodeEngine(generator_of("none"), 4, policy)
    engine.generate(LABELS[:8], seed=0, sample_ids=IDS[:8], guidance=Guidance(), lengths=lengths)
    found = engine.statistics
    assert (found.steps, found.rows, found.unconditional_rows, found.tokens) == (steps, rows, 0, 54)


@pytest.mark.parametrize("mode", ["eos", "hazard", "prefix"])
def test_rows_of_sequences_that_stop(mode: str) -> None:
    generator = generator_of(mode)
    for guidance in (Guidance(), Guidance(3.0), Guidance(3.0, (0.0, 0.5))):
        engine = DecodeEngine(generator, 4)
        lengths = engine.generate(LABELS, seed=1, sample_ids=IDS, guidance=guidance).lengths
        own = lengths if mode == "prefix" else (lengths + 1).clamp(max=12)
        assert engine.statistics.rows == own.sum()
        without = {0: 0, 1: own.sum(), 2: own.clamp(max=7).sum()}  # at progress 0/12 to 6/12
        number = 0 if guidance.scale == 1 else 1 if guidance.interval[1] == 1 else 2
        assert engine.statistics.unconditional_rows == without[number]
        assert engine.statistics.prefilled == (5 + (number > 0) if mode == "prefix" else 0)


# Training


@pytest.mark.parametrize("mode", MODES)
def test_padding_changes_nothing(mode: str) -> None:
    """A padded batch's loss is that of batches of one length each, weighted by their tokens."""
    generator = generator_of(mode)
    tokens, labels = sequences(torch.Generator().manual_seed(0))
    assert tokens.codes is not None
    whole = generator.loss(tokens, labels, torch.Generator())
    padded = tokens.codes.masked_fill(~tokens.mask, 33)
    other = generator.loss(Tokens(tokens.latents, tokens.lengths, padded), labels, torch.Generator())
    parts = []
    for length in SPACE.budgets:
        rows = (tokens.lengths == length).nonzero().flatten()
        parts.append(generator.loss(tokens.select(rows).truncate(length), labels[rows], torch.Generator()))
    assert int(whole.count) == sum(int(part.count) for part in parts) == int(tokens.lengths.sum())
    for name, loss in whole.losses.items():
        torch.testing.assert_close(other.losses[name], loss)
        torch.testing.assert_close(sum(part.losses[name] * part.count for part in parts) / whole.count, loss)
    torch.testing.assert_close(whole.metrics["nll"], torch.stack(list(whole.losses.values())).sum())


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_the_loss_is_the_likelihood_of_codes_and_length(mode: str) -> None:
    """Written out for one row at a time from what the model says at each place."""
    generator = generator_of(mode)
    tokens, labels = sequences(torch.Generator().manual_seed(1), 8)
    assert tokens.codes is not None
    nats, at = 0.0, torch.zeros(12)
    for row, length in enumerate(tokens.lengths.tolist()):
        codes, label, lengths = (
            tokens.codes[row : row + 1, :length],
            labels[row : row + 1],
            tokens.lengths[row : row + 1],
        )
        logs = generator(codes, label, lengths)[0].log_softmax(1)
        nats -= float(logs[torch.arange(length), codes[0]].sum())
        at[:length] -= logs[torch.arange(length), codes[0]]
        states = generator.states(codes, label, lengths)
        if mode == "eos" and length < 12:
            nats -= float(logs[length, 40])
        for place in SPACE.budgets[:-1] if mode == "hazard" else ():
            if place <= length:
                stop = generator.length.logits(states[0, place]).sigmoid()  # type: ignore[operator]
                nats -= math.log(stop if place == length else 1 - stop)
        if mode == "prefix":
            chances = generator.length.logits(states[:, 0]).log_softmax(1)  # type: ignore[operator]
            nats -= float(chances[0, SPACE.budgets.index(length)])
    loss = generator.loss(tokens, labels, torch.Generator())
    assert float(loss.metrics["nll"]) == pytest.approx(nats / int(tokens.lengths.sum()), rel=1e-5)
    torch.testing.assert_close(loss.by_position, at, msg="what an end costs is of no position")
    assert float(loss.image_metrics["bits"]) == pytest.approx(nats / 8 / math.log(2), rel=1e-5)


def test_a_new_generator_knows_nothing() -> None:
    torch.manual_seed(0)
    generator = LlamaGenAR(None, 32, 2, 4, length_mode="none", space=SPACE)
    tokens, labels = sequences(torch.Generator())
    assert generator.loss(tokens, labels, torch.Generator()).losses["code"].item() == pytest.approx(math.log(40))


def test_labels_are_dropped_in_training_alone() -> None:
    generator = generator_of("hazard", label_dropout=1.0, input_dropout=0.0)
    tokens, labels = sequences(torch.Generator())
    others = (labels + 1) % 5
    generator.train()
    losses = [float(generator.loss(tokens, some, torch.Generator()).metrics["nll"]) for some in (labels, others)]
    assert losses[0] == losses[1]
    generator.eval()
    losses = [float(generator.loss(tokens, some, torch.Generator()).metrics["nll"]) for some in (labels, others)]
    assert losses[0] != losses[1]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["eos", "hazard", "prefix"])
def test_learns_codes_and_lengths_of_classes(mode: str) -> None:
    """Classes that each have one sequence are known by heart, with their lengths, after a few steps."""
    generator = generator_of(mode, input_dropout=0.0).train()
    codes = torch.randint(40, (5, 14), generator=torch.Generator().manual_seed(5))
    lengths = torch.tensor([3, 6, 9, 12, 6])
    tokens, labels = Tokens(torch.zeros(5, 14, 0), lengths, codes), torch.arange(5)
    optimizer = torch.optim.AdamW(generator.parameters(), 3e-3)
    noise = torch.Generator().manual_seed(0)
    for _ in range(300):
        optimizer.zero_grad()
        torch.stack(list(generator.loss(tokens, labels, noise).losses.values())).sum().backward()
        optimizer.step()
    generator.eval().sampling = Sampling(temperature=0)
    made = generator.generate(labels, seed=0, sample_ids=torch.arange(5), guidance=Guidance(1.5))
    assert torch.equal(made.lengths, lengths)
    assert made.codes is not None and torch.equal(made.codes[made.mask], codes[:, :12][made.mask])


def test_memory_can_be_saved_in_training() -> None:
    generator = generator_of()
    recompute_blocks(generator)
    assert generator.transformer.recompute


# Sizes and refusals


def test_sizes_are_the_published_ones() -> None:
    space = TokenSpace(256, 8, 16384, (256,), 1000)
    millions = {"B": 110.9, "L": 342.9, "XL": 774.7, "XXL": 1411, "3B": 3097}
    for name in SIZES:
        with torch.device("meta"):
            generator = LlamaGenAR(name, positions=["rope2d"], length_mode="none", space=space)  # type: ignore[arg-type]
        count = sum(parameter.numel() for parameter in generator.parameters())
        assert count / 1e6 == pytest.approx(millions[name], rel=1e-3)


def test_packed_weights_are_in_no_autocast() -> None:
    """Large matrices of float32 are packed on CPUs, and oneDNN takes them with float32 alone."""
    torch.manual_seed(0)
    generator = stirred(LlamaGenAR(None, 512, 1, 8, length_mode="hazard", space=SPACE)).eval()
    expected = decode(generator)
    with torch.autocast("cpu", torch.bfloat16):
        made = decode(generator)
    assert made.codes is not None and expected.codes is not None and torch.equal(made.codes, expected.codes)


def test_refusals() -> None:
    with pytest.raises(ValueError, match="continuous"):
        generator_of(space=TokenSpace(14, 3, None, (3,), 5))
    with pytest.raises(ValueError, match="at least 1 each"):
        LlamaGenAR(None, 32, 2, space=SPACE)
    with pytest.raises(ValueError, match="twice the heads"):
        generator_of(num_heads=5)
    for space, mode in ((SPACE, "none"), (TokenSpace(9, 3, 40, (9,), 5), "prefix")):
        with pytest.raises(ValueError, match="square grid"):
            generator_of(mode, space, positions=["rope2d"])
    with pytest.raises(ValueError, match="not both"):
        generator_of("none", TokenSpace(9, 3, 40, (9,), 5), positions=["rope1d", "rope2d"])
    with pytest.raises(ValueError, match="size B says width, .* given too, 32, 2 and 4: set either to null"):
        LlamaGenAR("B", 32, 2, 4, space=SPACE)
    with pytest.raises(ValueError, match="batch_size is 1 or more"):
        generator_of(batch_size=0)
    for share in (-1.0, 1.5):
        with pytest.raises(ValueError, match="label_dropout is a share"):
            generator_of(label_dropout=share)
    generator = generator_of()
    with pytest.raises(ValueError, match="static, compact or refill"):
        DecodeEngine(generator, 4, "fastest")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one sequence"):
        DecodeEngine(generator, 0)
    with pytest.raises(ValueError, match=r"call eval\(\) first"):
        DecodeEngine(generator_of().train(), 4)
    with pytest.raises(ValueError, match="from 0 to 4, got 5"):
        decode(generator, labels=LABELS + 1)
    with pytest.raises(ValueError, match="count from 0"):
        decode(generator, sample_ids=IDS - 9)
    with pytest.raises(ValueError, match="nearest is 6"):
        decode(generator, lengths=torch.full((11,), 7))
    with pytest.raises(ValueError, match="one length for each of 11"):
        decode(generator, lengths=torch.full((2,), 6))
    with pytest.raises(ValueError, match=r"\(b,\) each"):
        decode(generator, sample_ids=IDS[:4])
    with pytest.raises(ValueError, match="have none"):
        generator.loss(Tokens(torch.zeros(2, 14, 3), torch.tensor([3, 6])), LABELS[:2], torch.Generator())
    empty = decode(generator, labels=LABELS[:0], sample_ids=IDS[:0])
    assert len(empty) == 0
    assert F.pad(empty.lengths, (0, 1)).tolist() == [0]
