"""Small exported models that no run has trained, and what is done to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from framework.allocation.adaptive_tokenizer import AdaptiveTokenizer
from framework.config import Config, Source, build
from framework.models.exported import Exported, write_exported
from framework.tokens import Tokens

BLOCKS = {"width": 32, "depth": 1}
TREE: dict[str, Any] = {
    "tokenizer": {
        "name": "Tokenizer",
        "input_space": {"name": "PixelSpace"},
        "encoder": {"name": "SuffixTokenViT", "num_tokens": 4, "patch_size": 4, **BLOCKS},
        "quantizer": {"name": "Identity", "dim": 4},
        "masking": {"name": "NestedTailMasking"},
        "decoder": {"name": "MaskTokenViT", "head": {"name": "PixelShuffleHead"}, **BLOCKS},
    },
    "image_size": 8,
}
SPACE: dict[str, Any] = {
    "name": "AutoencoderKL",
    "width": 32,
    "multipliers": [1, 2],
    "num_res_blocks": 1,
    "attention_resolutions": [],
    "latent_channels": 4,
    "resolution": 8,
}


def exported(folder: Path, tree: dict[str, Any]) -> nn.Module:
    """Write the model of a configuration, with weights of its own, and return it."""
    made = build(Config(tree, {(): Source("a test")}), Exported, lambda module, source, path: None)
    for value in made.model.state_dict().values():
        if value.is_floating_point():
            value.copy_(torch.randn(value.shape) * 0.2)
    write_exported(folder, tree, made.model, {"run": "a test", "step": 0}, "# A test\n")
    return made.model.eval()


@torch.no_grad()
def uses(model: nn.Module) -> list[Tensor]:
    """What a model does with fixed images: tokens at several lengths or of its choice, and what they decode to."""
    side = getattr(model, "image_size", 16)
    images = torch.rand(3, 3, side, side, generator=torch.Generator().manual_seed(0))
    results: list[Tensor] = []
    for length in ([1, model.num_tokens, 2], None) if hasattr(model, "num_tokens") else ():
        results += parts_of(model.encode(images, length), model)
    if isinstance(model, AdaptiveTokenizer):
        results += parts_of(model.encode(images, "auto"), model)
    if not results:
        values = model.encode(images)
        results += [values, model.decode(values)]
    return results


def parts_of(tokens: Tokens, model: nn.Module) -> list[Tensor]:
    codes = [] if tokens.codes is None else [tokens.codes]
    return [tokens.latents, tokens.lengths, *codes, model.decode(tokens)]


def assert_same_uses(first: list[Tensor], second: list[Tensor]) -> None:
    assert len(first) == len(second) > 1
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
