"""A decoder with a low-rank head for each range of kept lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from framework import runs
from framework.config import ConfigError
from framework.engine.checkpoint import latest_checkpoint
from framework.engine.optimizers import Muon
from framework.nn.lora import LowRankHeads
from framework.tokenizers.decoders.dropping import DROP_MODES, DropMode
from framework.tokenizers.decoders.mask_token_vit import MaskTokenViT
from framework.tokenizers.decoders.multi_head_lora import MultiHeadLoRA
from framework.tokenizers.heads import PixelShuffleHead
from framework.tokenizers.interface import Decoder, Head
from framework.tokens import Tokens
from tests.stir import stirred
from tests.tiny_run import tiny_config, train_tiny
from tests.tokenizers.build import small_tokenizer

HEADS = {1: 0, 2: 0, 3: 1, 4: 1, 5: 2, 6: 2}  # three equal ranges of six lengths
LENGTHS = torch.tensor(list(HEADS))
TOKENS = Tokens(torch.rand(6, 6, 5, generator=torch.Generator().manual_seed(0)), LENGTHS)
IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def decoder(
    lora: MultiHeadLoRA | None, mode: DropMode = "key_padding", head: type[Head] = PixelShuffleHead
) -> MaskTokenViT:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"token_dim": 5, "num_tokens": 6, "positions": (4, 4), "out_channels": 3, "patch_size": 2}
    return MaskTokenViT(head, 32, 1, 2, mode, lora=lora, **sizes)


def adapters(model: Decoder) -> dict[str, LowRankHeads]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRankHeads)}


def settings(**other: Any) -> MultiHeadLoRA:
    return MultiHeadLoRA(**{"ranges": 3, "rank": 2} | other)


@pytest.mark.parametrize("mode", DROP_MODES)
def test_at_the_start_it_is_the_decoder_without(mode: DropMode) -> None:
    plain, routed = decoder(None, mode), decoder(settings(), mode)
    own, other = plain.state_dict(), routed.state_dict()
    assert all(torch.equal(value, other[name]) for name, value in own.items())
    assert {name.rpartition(".adapter.")[2] for name in other.keys() - own.keys()} == {"A", "B"}
    assert torch.equal(plain(TOKENS), routed(TOKENS))


@torch.no_grad()
@pytest.mark.parametrize("mode", DROP_MODES)
@pytest.mark.parametrize("target", ["*", "*attention.qkv", "*attention.out", "*mlp.up", "*mlp.down", "to_patch"])
def test_a_sample_hangs_on_the_head_of_its_length_alone(mode: DropMode, target: str) -> None:
    model = stirred(decoder(settings(targets=[target]), mode))
    shuffled = torch.tensor([3, 0, 5, 1, 4, 2])
    tokens = Tokens(TOKENS.latents, LENGTHS[shuffled])
    before = model(tokens)
    for head in range(3):
        for adapter in adapters(model).values():
            adapter.B[head] += torch.linspace(-2, 3, adapter.B[head].numel()).view_as(adapter.B[head]) ** 2
        after = model(tokens)
        moved = (after - before).flatten(1).abs().amax(1) > 1e-4
        assert moved.tolist() == [HEADS[length] == head for length in tokens.lengths.tolist()]
        assert torch.equal(after[~moved], before[~moved])
        before = after


@pytest.mark.parametrize("mode", DROP_MODES)
def test_gradients_reach_only_heads_that_were_routed(mode: DropMode) -> None:
    model = stirred(decoder(settings(), mode))
    model(Tokens(TOKENS.latents[:3], torch.tensor([6, 1, 5]))).square().sum().backward()
    for name, adapter in adapters(model).items():
        for parameter in adapter.parameters():
            assert parameter.grad is not None
            assert (parameter.grad.flatten(1).abs().sum(1) > 0).tolist() == [True, False, True], name


@torch.no_grad()
@pytest.mark.parametrize("mode", DROP_MODES)
def test_a_merged_decoder_is_the_same_function_of_its_range(mode: DropMode) -> None:
    model = stirred(decoder(settings(alpha=3.0), mode))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    whole = model(TOKENS)
    for length in HEADS:
        merged = model.merged(length)
        assert not adapters(merged) and merged.state_dict().keys() == decoder(None, mode).state_dict().keys()
        own = torch.tensor([HEADS[other] == HEADS[length] for other in HEADS])
        values = merged(Tokens(TOKENS.latents[own], LENGTHS[own]))
        torch.testing.assert_close(values, whole[own], rtol=0, atol=1e-5)
        assert not torch.allclose(whole[own], decoder_without_adapters(model)(TOKENS)[own], atol=1e-2)
        first = 2 * HEADS[length] + 1
        with pytest.raises(ValueError, match=f"merged for lengths from {first} to {first + 1}, got some from 1 to 6"):
            merged(TOKENS)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def decoder_without_adapters(model: MaskTokenViT) -> MaskTokenViT:
    plain = decoder(None)
    plain.load_state_dict(model.state_dict(), strict=False)
    return plain


@torch.no_grad()
def test_a_merged_tokenizer() -> None:
    tokenizer = small_tokenizer(decoder={"lora": settings()})
    merged = tokenizer.merged(4)
    assert not merged.training and not merged.decoder.training and tokenizer.training
    torch.testing.assert_close(
        merged.decode(merged.encode(IMAGES, [3, 4])), tokenizer.decode(tokenizer.encode(IMAGES, [3, 4]))
    )
    resized = merged.resized(24, 16)
    with pytest.raises(ValueError, match="merged for lengths from 3 to 4, got some from 6 to 6"):
        resized.decode(resized.encode(torch.rand(1, 3, 24, 16)))
    for length in (0, 7):
        with pytest.raises(ValueError, match=f"from 1 to 6 tokens, got {length}"):
            tokenizer.merged(length)
    for without in (merged, small_tokenizer()):
        with pytest.raises(TypeError, match="MaskTokenViT has no adapters to merge"):
            without.merged(4)


@pytest.mark.parametrize(
    ("ranges", "expected"),
    [(1, [6]), (2, [3, 6]), (4, [1, 3, 4, 6]), (6, [1, 2, 3, 4, 5, 6]), ([1, 6], [1, 6]), ([6], [6])],
)
def test_ranges(ranges: int | list[int], expected: list[int]) -> None:
    assert settings(ranges=ranges).last_lengths(6) == expected
    assert all(len(adapter.A) == len(expected) for adapter in adapters(decoder(settings(ranges=ranges))).values())


@pytest.mark.parametrize("ranges", [0, -1, 7, [], [3], [6, 6], [4, 2, 6], [0, 6], [3, 7]])
def test_ranges_that_do_not_cut_the_lengths_up(ranges: int | list[int]) -> None:
    with pytest.raises(ValueError, match=r"from 1 to 6 equal ranges, or the increasing last lengths .* up to 6, got"):
        decoder(settings(ranges=ranges))


def test_targets() -> None:
    assert len(adapters(decoder(settings()))) == 5
    assert list(adapters(decoder(settings(targets=["*qkv", "to_patch"])))) == [
        "transformer.blocks.0.attention.qkv.adapter",
        "head.to_patch.adapter",
    ]
    with pytest.raises(ValueError, match=r"'to_pach' matches nothing: did you mean 'to_patch'\?"):
        decoder(settings(targets=["*", "to_pach"]))
    with pytest.raises(ValueError, match=r"'z' matches nothing: the layers are blocks.0.attention.qkv, .*, to_patch"):
        decoder(settings(targets=["z"]))
    with pytest.raises(ValueError, match="a rank of at least 1 and targets, got rank 0"):
        settings(rank=0)
    with pytest.raises(ValueError, match=r"a rank of at least 1 and targets, got rank 2, targets \[\]"):
        settings(targets=[])


class PlainHead(Head):
    """Knows nothing of routes."""

    def __init__(self, *, width: int, out_channels: int, patch_size: int) -> None:
        super().__init__()

    def forward(self, states: Tensor, positions: tuple[int, int]) -> Tensor:  # type: ignore[override]
        return states.unflatten(1, positions).permute(0, 3, 1, 2)


def test_a_head_without_adapters_need_not_know_of_them() -> None:
    assert torch.equal(decoder(settings(), head=PlainHead)(TOKENS), decoder(None, head=PlainHead)(TOKENS))


def test_muon_leaves_adapters_to_adamw_without_decay() -> None:
    model = decoder(settings())
    muon, adamw = Muon(1e-3, matrices=("*",), parameters=model.named_parameters()).parts
    names = {name for name, _ in model.named_parameters() if ".adapter." in name}
    still = [set(group["param_names"]) for group in adamw.param_groups if group["weight_decay"] == 0]
    assert len(names) == 10 and names <= set.union(*still)


LORA = "tokenizer.decoder.lora={ranges: 4, rank: 2}"


def test_adapters_train_on_a_frozen_tokenizer(tmp_path: Path) -> None:
    train_tiny(tmp_path / "donor", "train.ema_decay=null")
    options = [
        LORA,
        f"train.init_from={{run: {tmp_path / 'donor'}, fresh: ['*.adapter.*']}}",
        "train.freeze=['*[!AB]']",
        "train.optimizer={name: AdamW, lr: 1e-2}",
    ]
    run = runs.experiment_from(tiny_config(tmp_path / "adapted", *options)).trainer()
    inheritance = run.take_over()
    assert inheritance is not None and "fresh: tokenizer.decoder.transformer.blocks.0" in inheritance.text
    before = {name: value.clone() for name, value in run.task.state_dict().items()}
    checkpoint = latest_checkpoint(tmp_path / "donor/checkpoints")
    assert checkpoint is not None
    assert all(torch.equal(value, before[name]) for name, value in checkpoint.weights("model").items())
    assert run.fit().status == "finished"
    moved = {name for name, value in run.task.state_dict().items() if not torch.equal(value, before[name])}
    adapters = {name for name in before if ".adapter." in name}
    assert len(adapters) == 10 and moved == adapters


def test_a_dry_run_counts_adapters(tmp_path: Path) -> None:
    plan = runs.dry_run(tiny_config(tmp_path / "run", LORA))
    model = runs.experiment_from(tiny_config(tmp_path / "run", LORA)).task.model
    count = sum(p.numel() for name, p in model.named_parameters() if ".adapter." in name)
    assert [line.split()[3] for line in plan.splitlines() if "of which adapters" in line] == [f"{count:,}"]
    assert "of which adapters" not in runs.dry_run(tiny_config(tmp_path / "run"))


def test_yaml_is_refused_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer\.decoder: .*lora\.ranges must be from 1 to 16"):
        runs.experiment_from(tiny_config(tmp_path / "run", "tokenizer.decoder.lora={ranges: 17}"))
