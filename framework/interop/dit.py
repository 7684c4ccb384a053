"""Official DiT checkpoints (Peebles and Xie 2023), as ``read_official`` reads them.

DiT cuts a 2D latent into square patches. Here each patch is a token, so that weights are read in another order and
nothing else of the model differs: its patch embedding is a linear layer of tokens, its sine-cosine table a table of
positions, and what it guides, three latent channels, are the first of a token's.

Shapes: b batch, c channels of a latent, n patches, p side of a patch, d = c p p.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import Any

from einops import rearrange
from torch import Tensor

from framework.generators.dit import SIZES
from framework.generators.interface import TokenSpace
from framework.interop.official import Imported, OfficialError, count, renamed

RULES = [
    (r"^x_embedder\.proj\.", "embed."),
    (r"^pos_embed$", "positions"),
    (r"^t_embedder\.", "time."),
    (r"^y_embedder\.embedding_table\.weight$", "class_embedding"),
    (r"^blocks\.", "transformer.blocks."),
    (r"^final_layer\.linear\.", "head."),
    (r"^final_layer\.adaLN_modulation\.1\.", "transformer.modulation."),
    (r"\.adaLN_modulation\.1\.", ".modulation."),
    (r"\.attn\.qkv\.", ".attention.qkv."),
    (r"\.attn\.proj\.", ".attention.out."),
    (r"\.mlp\.fc1\.", ".mlp.up."),
    (r"\.mlp\.fc2\.", ".mlp.down."),
]
HEADS = {size.width: size.num_heads for size in SIZES.values()}
GUIDED = 3
PREFERRED = ("ema",)
"""DiT's training keeps averaged weights beside the others, and samples with them."""


def import_dit(state: Mapping[str, Tensor], num_heads: int | None = None) -> Imported:
    """The generator of a checkpoint; its samples are patches of scaled latents, for ``latents_of``.

    Its table of sines and cosines becomes a learned one: whoever trains it further, trains it too.

    Args:
        state: by official names.
        num_heads: unless given, as in the released model of this width.

    Raises:
        OfficialError: if this is no checkpoint of DiT.
    """
    weights, dropped = renamed(state, RULES)
    try:
        width, channels, side, _ = weights["embed.weight"].shape
        positions, hidden = weights["positions"], weights["transformer.blocks.0.mlp.up.weight"]
        classes, outputs = weights["class_embedding"], len(weights["head.bias"]) // (channels * side * side)
        if num_heads is None and width not in HEADS:
            raise OfficialError(
                f"this DiT has width {width}, and the number of heads is known of {', '.join(map(str, HEADS))} alone: "
                "call import_dit(state, num_heads)"
            )
        heads = num_heads or HEADS[width]
        weights["embed.weight"] = weights["embed.weight"].flatten(1)
        weights["positions"] = positions[0]
        for name in ("head.weight", "head.bias"):
            weights[name] = rearrange(
                weights[name], "(p q two c) ... -> (two c p q) ...", p=side, q=side, two=outputs
            ).contiguous()
    except KeyError as error:
        raise OfficialError(f"this is no checkpoint of DiT: it has nothing for {error}") from error
    num_tokens, dim = positions.shape[1], channels * side * side
    sizes = {"width": width, "depth": count(state, r"blocks\.(\d+)\."), "num_heads": heads}
    node: dict[str, Any] = {"name": "DiT", "size": None, **sizes, "mlp_ratio": len(hidden) / width, "qk_norm": False}
    node |= {"objective": {"name": "DDPM", "learned_range": outputs == 2}, "sampler": {"name": "Ancestral"}}
    node |= {"guided_channels": GUIDED * side * side}
    space = TokenSpace(num_tokens, dim, None, (num_tokens,), len(classes) - 1)
    return Imported("task.generator", node, weights, dropped, token_space=space)


def patches_of(latents: Tensor, side: int = 2) -> Tensor:
    """Latents ``(b, c, h, w)`` -> tokens ``(b, n, c p p)``, row by row."""
    return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=side, q=side)


def latents_of(patches: Tensor, side: int = 2) -> Tensor:
    """The way back, to a square ``(b, c, h, w)``."""
    return rearrange(patches, "b (h w) (c p q) -> b c (h p) (w q)", h=isqrt(patches.shape[1]), p=side, q=side)
