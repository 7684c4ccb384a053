"""TiTok's recipe: a VQGAN is the teacher of the first stage, and its decoder learns on in the second."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import framework
from framework import runs
from framework.config import Config, load_config
from framework.tokenizers.autoencoders.vqgan import MaskGITVQGAN
from framework.tokenizers.tokenizer import Tokenizer
from tests.tasks.test_latent_path import SMALL, vae_config
from tests.tiny_run import ROOT

SHAPE = "width: 32, multipliers: [1, 2], num_res_blocks: 1, num_codes: 16, dim: 4"


def stage_config(folder: Path, stage: int, vqgan: Path, *overrides: str) -> Config:
    """TiTok's own file, made tiny, on photographs."""
    photos = [f"data.{s}={{name: Photos, split: {s}, num_crops: 60}}" for s in ("train", "validation", "test")]
    frozen = "true" if stage == 1 else "false"
    space = f"{{name: MaskGITVQGAN, {SHAPE}, weights: {vqgan}, frozen: {frozen}}}"
    tiny = ["encoder.num_tokens=4", "encoder.patch_size=8", "quantizer.num_codes=32"]
    tiny += [f"{side}.{size}" for side in ("encoder", "decoder") for size in ("width=32", "depth=1", "num_heads=2")]
    own = [f"run.dir={folder}", *photos, f"tokenizer.output_space={space}", *(f"tokenizer.{text}" for text in tiny)]
    small = [text for text in SMALL if "num_crops" not in text]
    return load_config(ROOT / f"projects/titok/stage{stage}.yaml", [*own, *small, "data.num_workers=0", *overrides])


@pytest.mark.parametrize("looks", [0, 2])
def test_titoks_two_stages(looks: int, tmp_path: Path, quick_report: None) -> None:
    vqgan, first, second = tmp_path / "vqgan", tmp_path / "first", tmp_path / "second"
    runs.train(vae_config(vqgan, f"task.autoencoder={{name: MaskGITVQGAN, {SHAPE}}}"), lambda text: None)
    teacher = framework.load(vqgan)
    assert isinstance(teacher, MaskGITVQGAN)

    cache = [f"task.cache_looks={looks}", f"run.cache={tmp_path / 'cache'}"]
    runs.train(stage_config(first, 1, vqgan, *cache), lambda text: None)
    lines = [json.loads(line) for line in (first / "metrics.jsonl").read_text().splitlines()]
    nats = [line["tokenizer/codes"] for line in lines if "tokenizer/codes" in line]
    assert 1 < nats[0] < 8  # log 16 is 2.8
    start = framework.load(first)
    assert isinstance(start, Tokenizer) and not start.output_space.is_lossless
    images = torch.rand(2, 3, 16, 16)
    assert torch.equal(start.output_space.target(images), teacher.codes(images))

    overrides = [f"train.init_from.run={first}", "task.losses.perceptual=null", "task.adversarial.start=1"]
    overrides += ["task.adversarial.discriminator={name: BlurPatchDiscriminator, width: 32, depth: 1}"]
    runs.train(stage_config(second, 2, vqgan, *overrides, "train.ema_decay=null"), lambda text: None)
    before, after = (dict(tokenizer.named_parameters()) for tokenizer in (start, framework.load(second)))
    moved = {".".join(name.split(".")[:2]) for name in after if not torch.equal(after[name], before[name])}
    assert moved == {
        *("decoder.token_embedding", "decoder.mask_token", "decoder.token_positions", "decoder.patch_positions"),
        *("decoder.transformer", "decoder.head", "output_space.decoder", "output_space.quantizer"),
    }
    told = (second / "metrics.jsonl").read_text()
    assert "discriminator/hinge" in told and "tokenizer/pixel" in told and "tokenizer/codes" not in told
