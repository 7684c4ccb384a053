"""Official models' numbers from official weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn
from yaml import safe_load as parse_yaml

from framework.config import Config, Factory, Source, build, load_config
from framework.engine.checkpoint import CheckpointError
from framework.engine.frozen import frozen_digests, live_state
from framework.generators.interface import Generator
from framework.interop.convolutional import import_ldm, import_maskgit_vqgan, import_taming_vqgan
from framework.interop.dit import import_dit
from framework.interop.llamagen import import_llamagen
from framework.interop.official import Imported, OfficialError, read_official, renamed
from framework.interop.titok import import_titok
from framework.runs import experiment_from, load_part
from framework.tokenizers.autoencoders.autoencoder_kl import AutoencoderKL
from framework.tokenizers.autoencoders.vqgan import MaskGITVQGAN, TamingVQGAN
from framework.tokenizers.tokenizer import Tokenizer
from tests.interop.golden import FOLDER, assert_near, read
from tests.stir import stirred
from tests.tiny_run import ROOT, run_tool, tiny_config


def unit(images: Tensor) -> Tensor:
    """From [-1, 1] to [0, 1]."""
    return (images + 1) / 2


def built(name: str, importer: Callable[..., Imported], kind: type, **arguments: Any) -> tuple[Any, dict[str, Tensor]]:
    state, golden = read(name)
    made = importer(state, **arguments).build().eval()
    assert isinstance(made, kind)
    return made, golden


# What the models compute


@torch.no_grad()
def test_golden_vavae(monkeypatch: pytest.MonkeyPatch) -> None:
    space, golden = built("vavae", import_ldm, AutoencoderKL)
    images = golden["in/image"]
    assert_near(space.encoder[:-1](images), golden["mid/h"])
    assert_near(space.encoder(images), golden["mid/moments"])
    posterior = space.posterior(unit(images))
    assert_near(posterior.mean, golden["mid/mean"])
    assert_near(posterior.log_variance, golden["mid/logvar"])
    assert_near(posterior.std, golden["mid/std"])
    assert_near(posterior.kl(), golden["out/kl"])
    assert_near(posterior.nll(posterior.mean), golden["out/nll_of_mean"])
    monkeypatch.setattr(torch, "randn", lambda *shape, **_: golden["in_noise/eps"])
    sample = posterior.sample(torch.Generator())
    assert_near(sample, golden["out/sample"])
    # Without statistics of latents, they are as they are.
    assert torch.equal(space.encode(unit(images)), posterior.mean)
    assert_near(space.decode(posterior.mean) * 2 - 1, golden["out/decode_mode"])
    decoded = space.decode(sample)
    assert_near(decoded * 2 - 1, golden["out/decode_sample"])
    assert torch.equal((decoded.clamp(0, 1) * 255).round().long(), golden["out/uint8_of_decode_sample"])


@torch.no_grad()
def test_golden_maskgit_vqgan() -> None:
    space, golden = built("maskgit_vqgan", import_maskgit_vqgan, MaskGITVQGAN)
    images = golden["in/image"]
    codes = space.codes(images)
    assert_near(space.encoder(images), golden["mid/h"])
    assert torch.equal(codes.flatten(1), golden["mid/codes"])
    latents = space.quantizer.codes_to_latents(codes)
    assert_near(rearrange(latents, "b h w d -> b d h w"), golden["mid/quantized"])
    assert torch.equal(golden["mid/entry"], golden["mid/quantized"])
    assert_near(space.decode_latents(golden["mid/quantized"]), golden["out/image"])
    assert_near(space.decode_codes(codes).clamp(0, 1), golden["out/decode_codes_clamped"])
    assert_near(space.decode(space.encode(images)), golden["out/image"])


def test_golden_taming_vqgan() -> None:
    space, golden = built("taming_vqgan", import_taming_vqgan, TamingVQGAN)
    images = golden["in/image"]
    latents = space.encoder(images)
    assert_near(space.encoder[:-1](images), golden["mid/h"])
    assert_near(latents, golden["mid/z"])
    codes = space.codes(unit(images))
    assert torch.equal(codes.flatten(), golden["mid/indices"])
    assert_near(space.decode(space.encode(unit(images))) * 2 - 1, golden["out/reconstruction"])
    assert_near(space.decode_codes(codes) * 2 - 1, golden["out/decode_code"])

    result = space.quantizer(rearrange(latents, "b d h w -> b (h w) d"))
    assert torch.equal(result.codes.flatten(), golden["mid/indices"])
    quantised = rearrange(result.latents, "b (h w) d -> b d h w", h=8)
    assert_near(quantised, golden["out/quantised"])
    assert_near(quantised, golden["mid/codebook_entry"])
    loss = sum(value.mean() for value in result.losses.values())
    assert_near(loss, golden["out/codebook_loss_fixed_beta"])
    assert_near(loss, golden["out/codebook_loss_legacy_beta"])  # which differs in its gradients alone
    total = loss + (space.decode_latents(quantised) * 2 - 1).square().mean()
    codebook, last = torch.autograd.grad(total, [space.quantizer.codebook, space.encoder.quant_conv.weight])
    assert_near(codebook, golden["grad/fixed_beta_quantize.embedding.weight"])
    assert_near(last, golden["grad/fixed_beta_quant_conv.weight"])


def with_pixel_decoder(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], MaskGITVQGAN]:
    """TiTok's state with a decoder of MaskGIT's VQGAN under its official names, and that VQGAN."""
    vqgan = stirred(MaskGITVQGAN(width=32, multipliers=(1, 1, 1, 2), num_res_blocks=1, dim=8, encodes=False))
    state = state | {"pixel_quantize.embedding.weight": vqgan.quantizer.codebook.detach()}
    for name, value in vqgan.decoder.state_dict().items():
        name = re.sub(r"\.block_(\d+)\.", r".block.\1.", name.replace("mid.block_", "mid."))
        name = name.replace("upsample.", "upsample_conv.").replace("shortcut", "nin_shortcut")
        state[f"pixel_decoder.{name}"] = value
    return state, vqgan


@torch.no_grad()
@pytest.mark.parametrize("name", ["titok_vq", "titok_vq_legacy_head"])
def test_golden_titok(name: str) -> None:
    state, golden = read(name)
    vqgan = None
    if name == "titok_vq_legacy_head":
        state, vqgan = with_pixel_decoder(state)
    imported = import_titok(state, num_heads=4, normalize=True)
    assert imported.image_size == 32 and imported.dropped == []
    tokenizer = imported.build().eval()
    assert isinstance(tokenizer, Tokenizer)
    images = golden["in/image"]
    latents = tokenizer.encoder(tokenizer.input_space.encode(images)).latents
    assert_near(rearrange(latents, "b n d -> b d 1 n"), golden["mid/z"])
    tokens = tokenizer.encode(images)
    assert tokens.codes is not None and torch.equal(tokens.codes, golden["mid/tokens"].squeeze(1))
    assert_near(rearrange(tokens.latents, "b n d -> b d 1 n"), golden["mid/z_quantized"])
    values = tokenizer.decoder(tokens)
    if vqgan is None:
        assert_near(tokenizer.output_space.decode(values), golden["out/decoded"])
    else:
        assert_near(values, golden["out/decoded"])
        assert_near(tokenizer.output_space.decode(values), vqgan.decode(golden["out/logits_or_image"]))
    again = tokenizer.codes_to_tokens(tokens.codes, tokens.lengths)
    assert_near(tokenizer.decoder(again), values)


def test_titoks_node_tells_what_its_tensors_do() -> None:
    state, _ = read("titok_vq")
    as_vae = {name: value for name, value in state.items() if not name.startswith("quantize.")}
    node = import_titok(as_vae, num_heads=4).node
    assert node["quantizer"] == {"name": "GaussianBottleneck", "dim": 2} and node["encoder"]["readout"] == "own"
    assert import_titok(state, num_heads=4).node["quantizer"]["normalize"] is False
    legacy = import_titok(with_pixel_decoder(read("titok_vq_legacy_head")[0])[0], num_heads=4).node
    assert legacy["encoder"]["readout"] == "interleaved" and legacy["quantizer"]["normalize"] is True
    with pytest.raises(OfficialError, match="first stage only"):
        import_titok(read("titok_vq_legacy_head")[0], num_heads=4)


# Every tensor has its place


NAMES: dict[str, Callable[[dict[str, Tensor]], Imported]] = {
    "vavae": import_ldm,
    "maskgit_vqgan": import_maskgit_vqgan,
    "taming_vqgan": import_taming_vqgan,
    "titok_vq": lambda state: import_titok(state, num_heads=4),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_too_many_too_few_or_of_another_shape_is_refused(name: str) -> None:
    state, _ = read(name)
    first = "decoder.conv_out.weight"
    for wrong, reason in (
        (state | {"decoder.nobody.weight": torch.zeros(1)}, 'Unexpected key.s. in state_dict: "decoder.nobody.weight'),
        (
            {key: value for key, value in state.items() if key != "decoder.conv_out.bias"},
            "Missing key.*conv_out.bias|^.decoder.conv_out.bias",
        ),
        (state | {first: state[first][:, :1]}, "size mismatch for .*conv|size mismatch for decoder.head.smooth.weight"),
    ):
        with pytest.raises((OfficialError, KeyError), match=reason):
            NAMES[name](wrong).build()


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_matters_to_what_is_imported(name: str) -> None:
    """No two official tensors are swapped unseen: each one changes its own weights, and no others."""
    state, _ = read(name)
    before = NAMES[name](state)
    used = state.keys() - set(before.dropped)
    owners: dict[str, int] = {}
    for key in used:
        after = NAMES[name](state | {key: state[key] + 1}).weights
        changed = [new for new in after if not torch.equal(after[new], before.weights[new])]
        assert changed, key
        owners |= {new: owners.get(new, 0) + 1 for new in changed}
    assert owners.keys() == before.weights.keys()


def test_what_belongs_to_training_is_dropped() -> None:
    state, _ = read("taming_vqgan")
    imported = import_taming_vqgan(state)
    assert imported.dropped == [name for name in state if name.startswith("loss.discriminator.")] != []
    more = {"loss.logvar": torch.zeros(()), "foundation_model.x": torch.ones(2), "linear_proj.weight": torch.ones(2)}
    assert sorted(import_ldm(read("vavae")[0] | more).dropped) == sorted(more)


def test_two_tensors_of_one_name_are_refused() -> None:
    one = torch.ones(1)
    with pytest.raises(OfficialError, match="b.x and another tensor would both be y.x"):
        renamed({"a.x": one, "b.x": one}, [("^[ab]", "y")])


# Files


def test_nested_flat_and_safe_files_and_statistics_beside_them(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    state, golden = read("vavae")
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "nested.ckpt")
    torch.save(state, tmp_path / "flat.pt")
    save_file(state, tmp_path / "flat.safetensors")
    for name in ("nested.ckpt", "flat.pt", "flat.safetensors"):
        held = read_official([tmp_path / name])
        assert held.keys() == state.keys() and all(torch.equal(held[key], state[key]) for key in state)
    mean, std = torch.arange(8.0).view(1, 8, 1, 1), torch.arange(1.0, 9.0).view(1, 8, 1, 1)
    torch.save({"mean": mean, "std": std}, tmp_path / "stats.pt")
    space = import_ldm(read_official([tmp_path / "flat.pt", tmp_path / "stats.pt"])).build()
    assert isinstance(space, AutoencoderKL)
    with torch.no_grad():
        assert_near(space.encode(unit(golden["in/image"])), (golden["mid/mean"] - mean) / std)
        assert_near(space.decode((golden["mid/mean"] - mean) / std) * 2 - 1, golden["out/decode_mode"])
    with pytest.raises(OfficialError, match="both hold conv|both hold decoder"):
        read_official([tmp_path / "flat.pt", tmp_path / "nested.ckpt"])


class Anything:
    """What a pickled file may hold beside tensors."""


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "file.pt"
    for content, reason in (
        ({"state_dict": {"a": torch.ones(1), "b": "text"}}, "other things beside them: b"),
        ({"epoch": 3}, "other things beside them: epoch"),
        ({}, "no tensors, or .* them. Save only"),
        ([torch.ones(1)], "them: a list"),
        ({"state_dict": {"a": Anything()}}, "could run code"),
    ):
        torch.save(content, path)
        with pytest.raises(OfficialError, match=reason):
            read_official([path])
    for junk in (b"no pickle", b"junk\n"):  # torch says UnpicklingError of one and KeyError of the other
        path.write_bytes(junk)
        with pytest.raises(OfficialError, match="cannot be read as tensors"):
            read_official([path])
    with pytest.raises(OfficialError, match="there is no file"):
        read_official([tmp_path / "none.pt"])


# tools/convert.py, and what loads its files


def save_state(name: str, path: Path) -> Path:
    torch.save({"state_dict": read(name)[0]}, path)
    return path


@pytest.mark.parametrize("family, name", [("ldm", "vavae"), ("maskgit_vqgan",) * 2, ("taming_vqgan",) * 2])
def test_convert_writes_what_weights_loads(
    family: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = save_state(name, tmp_path / "official.ckpt"), tmp_path / "out.safetensors"
    assert run_tool(monkeypatch, "convert", "import", family, source, out) == 0
    told, yaml = capsys.readouterr().out.split(":\n", 1)
    assert told.startswith("wrote ") and f"weights: {out}" in yaml
    assert (", without 22 of other parts" in told) == (name == "taming_vqgan")

    # The node that it prints stands in a configuration, frozen, whose checkpoints do not hold it.
    part = "output_space" if family == "maskgit_vqgan" else "input_space"
    lines = [f"tokenizer.{part}={{{', '.join(lines_of(yaml))}, frozen: true}}", "tokenizer.encoder.patch_size=4"]
    task = experiment_from(tiny_config(tmp_path / "run", *lines)).task
    space = task.get_submodule(f"tokenizer.{part}")
    imported = NAMES[name](read(name)[0]).build()
    assert all(torch.equal(value, imported.state_dict()[key]) for key, value in space.state_dict().items())
    assert not any("space" in key for key in live_state(task)) and f"tokenizer.{part}" in frozen_digests(task)
    with pytest.raises(CheckpointError, match="do not fit"):
        experiment_from(tiny_config(tmp_path / "run", *lines, f"tokenizer.{part}.num_res_blocks=2"))


class Holder:
    def __init__(self, generator: Factory[Generator]) -> None:
        self.generator = generator


@pytest.mark.parametrize("family, name", [("llamagen", "llamagen_ar"), ("dit", "dit")])
def test_convert_writes_generators(
    family: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At a run's ``task.generator``, where the tokenizer says the token space."""
    importer: Callable[..., Imported] = {"llamagen": import_llamagen, "dit": import_dit}[family]
    monkeypatch.setattr(f"framework.interop.{family}.HEADS", {32: 4})
    source, out = save_state(name, tmp_path / "official.pt"), tmp_path / "out.safetensors"
    assert run_tool(monkeypatch, "convert", "import", family, source, out) == 0
    told, yaml = capsys.readouterr().out.split(":\n", 1)
    assert told.endswith("at task.generator") and f"weights: {out}" in yaml and "num_heads: 4" in yaml
    imported = importer(read(name)[0])
    node = Config({"generator": parse_yaml(yaml)}, {(): Source("what convert printed")})
    generator = build(node, Holder, load_part).generator(space=imported.token_space)
    assert type(generator) is type(imported.build())
    assert_same_state(generator, imported.build())


def assert_same_state(first: nn.Module, second: nn.Module) -> None:
    one, other = first.state_dict(), second.state_dict()
    assert one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def lines_of(yaml: str) -> list[str]:
    return [line for line in yaml.splitlines() if line]


@torch.no_grad()
def test_a_converted_tokenizer_inherits_nothing_from_the_configuration_that_it_is_put_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    state, golden = read("titok_vq_legacy_head")
    state, vqgan = with_pixel_decoder(state)
    torch.save(state, tmp_path / "titok.bin")
    assert run_tool(monkeypatch, "convert", "import", "titok", tmp_path / "titok.bin", tmp_path / "t.safetensors") == 0
    told, yaml = capsys.readouterr().out.split(":\n", 1)
    assert told.endswith("at tokenizer, for data.image_size=32")
    nested = "".join(f"  {line}\n" for line in yaml.replace("num_heads: 1", "num_heads: 4").splitlines())
    (tmp_path / "config.yaml").write_text(f"_base_: {ROOT}/projects/adatok/ntm.yaml\ntokenizer:\n{nested}")
    tokenizer = experiment_from(load_config(tmp_path / "config.yaml")).task.model.eval()
    assert isinstance(tokenizer, Tokenizer)
    tokens = tokenizer.encode(golden["in/image"])
    assert tokens.codes is not None and torch.equal(tokens.codes, golden["mid/tokens"].squeeze(1))
    assert_near(tokenizer.decoder(tokens), golden["out/decoded"])
    images = tokenizer.output_space.decode(golden["out/decoded"])
    assert_near(images, vqgan.decode(golden["out/decoded"]))


def test_convert_says_what_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.safetensors"
    for family, source, reason in (
        ("titok", save_state("vavae", tmp_path / "vae.pt"), "this is no titok checkpoint, it has no tensor '"),
        ("ldm", FOLDER / "vavae.json", "cannot be read as tensors"),
        ("ldm", save_state("taming_vqgan", tmp_path / "vqgan.pt"), 'in state_dict: "quantizer.codebook"'),
    ):
        assert run_tool(monkeypatch, "convert", "import", family, source, out) == 2
        printed = capsys.readouterr()
        assert printed.out == "" and reason in printed.err and not out.exists()
    assert run_tool(monkeypatch, "convert", "import", "ldm", tmp_path / "vae.pt", tmp_path / "out.pt") == 2
    assert "OUT must end in .safetensors" in capsys.readouterr().err
