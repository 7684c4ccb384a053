"""LlamaGen's numbers from LlamaGen's weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from framework.config import ConfigError
from framework.generators.autoregressive import LlamaGenAR
from framework.generators.guidance import Guidance, guided
from framework.generators.sampling import Sampling
from framework.interop import dit
from framework.interop.llamagen import import_llamagen
from framework.interop.official import OfficialError, read_official
from framework.tokens import Tokens
from tests.interop.golden import assert_near, read

NUM_TOKENS, HEADS = 16, 4


def built(state: dict[str, Tensor], num_tokens: int | None = NUM_TOKENS) -> LlamaGenAR:
    generator = import_llamagen(state, num_tokens, num_heads=HEADS).build().eval()
    assert isinstance(generator, LlamaGenAR)
    return generator


def generator_of() -> tuple[LlamaGenAR, dict[str, Tensor]]:
    state, golden = read("llamagen_ar")
    return built(state), golden


@torch.no_grad()
def test_golden_logits() -> None:
    generator, golden = generator_of()
    assert generator.rotation is not None
    assert_near(generator.rotation, golden["mid/freqs_cis"])
    assert not generator.rotation[0].any()
    assert_near(generator(golden["in/idx"], golden["in/cond"]), golden["out/eval_full_logits"])
    dropped = golden["in/cond"].masked_fill(golden["mid/class_dropped_seed0"], generator.space.num_classes)
    logits = generator(golden["in/idx"][:, :-1], dropped)
    assert_near(logits, golden["out/train_logits"])
    assert_near(F.cross_entropy(logits.flatten(0, 1), golden["in/idx"].flatten()), golden["out/train_loss"])


@torch.no_grad()
def test_golden_loss() -> None:
    generator, golden = generator_of()
    tokens = Tokens(torch.zeros(3, NUM_TOKENS, 0), torch.full((3,), NUM_TOKENS), golden["in/idx"])
    labels = golden["in/cond"].masked_fill(golden["mid/class_dropped_seed0"], generator.space.num_classes)
    loss = generator.loss(tokens, labels, torch.Generator())
    assert_near(loss.losses["code"], golden["out/train_loss"])
    assert int(loss.count) == 3 * NUM_TOKENS


# LlamaGen's interval of 5 guides the first code and those of steps 0 to 5: seven, at progress 0 to 6/16.
@pytest.mark.parametrize(
    ("name", "guidance"),
    [
        ("cfg1", Guidance(1.0)),
        ("cfg4", Guidance(4.0)),
        ("cfg4_interval5", Guidance(4.0, (0.0, 6 / NUM_TOKENS))),
    ],
)
@torch.no_grad()
def test_golden_greedy_decoding(name: str, guidance: Guidance) -> None:
    generator, golden = generator_of()
    generator.sampling = Sampling(temperature=0)
    labels, expected = golden["in/cond"], golden[f"out/greedy_tokens_{name}"]
    tokens = generator.generate(labels, seed=0, sample_ids=torch.arange(3), guidance=guidance)
    assert tokens.codes is not None
    assert torch.equal(tokens.codes, expected)
    assert tokens.lengths.tolist() == [NUM_TOKENS] * 3
    nothing = torch.full_like(labels, generator.space.num_classes)
    scales = torch.tensor([guidance.scale_at(t / NUM_TOKENS) for t in range(NUM_TOKENS)])
    logits = guided(generator(expected[:, :-1], labels), generator(expected[:, :-1], nothing), scales[:, None])
    assert_near(logits, golden[f"out/greedy_logits_{name}"])


@pytest.mark.parametrize(
    ("name", "sampling"),
    [("k5", Sampling(top_k=5)), ("p07", Sampling(top_p=0.7)), ("k8p09", Sampling(top_k=8, top_p=0.9))],
)
def test_golden_filters(name: str, sampling: Sampling) -> None:
    _, golden = read("llamagen_ar")
    ours, official = sampling.filtered(golden["in/filter_logits"]), golden[f"out/filtered_{name}"]
    assert torch.equal(ours.isinf(), official.isinf()) and ours.isinf().any()
    assert torch.equal(ours[~ours.isinf()], official[~official.isinf()])


@pytest.mark.parametrize("wrapper", ["model", "module", "state_dict", None])
def test_wrappers_of_checkpoints(wrapper: str | None, tmp_path: Path) -> None:
    state, golden = read("llamagen_ar")
    state["freqs_cis"] = golden["mid/freqs_cis"]
    file = tmp_path / "c2i.pt"
    torch.save(state if wrapper is None else {wrapper: state, "steps": 300}, file)
    generator = built(read_official([file]), None)  # as many as there are positions in the file
    assert generator.space.num_tokens == NUM_TOKENS
    assert torch.equal(generator.code_embedding, state["tok_embeddings.weight"])


def test_averaged_weights_are_taken_where_the_family_samples_with_them(tmp_path: Path) -> None:
    file = tmp_path / "both.pt"
    torch.save({"model": {"x": torch.zeros(1)}, "ema": {"x": torch.ones(1)}, "opt": {}}, file)
    assert read_official([file])["x"] == 0 and read_official([file], dit.PREFERRED)["x"] == 1


def test_checkpoints_of_something_else() -> None:
    state, _ = read("llamagen_ar")
    with pytest.raises(OfficialError, match="has no tok_embeddings"):
        import_llamagen({"encoder.weight": torch.zeros(2)}, NUM_TOKENS)
    with pytest.raises(OfficialError, match="no class-conditional"):
        import_llamagen({n: v for n, v in state.items() if not n.startswith("cls")}, NUM_TOKENS)
    with pytest.raises(OfficialError, match="extra"):
        built(state | {"extra": torch.zeros(2)})
    with pytest.raises(ConfigError, match="square grid"):
        built(state, 15)
