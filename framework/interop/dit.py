"""Official DiT checkpoints (Peebles and Xie 2023), as ``read_official`` reads them.

DiT cuts a 2D latent into square patches. Here each patch is a token, so that weights are read in another order and
nothing else of the model differs: its patch embedding is a linear layer of tokens, its sine-cosine table a table of
positions, and what it guides, three latent channels, are the first of a token's.

Shapes: b batch, c channels of a latent, n patches, p side of a patch, d = c p p.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt

from einops import rearrange
from torch import Tensor

from framework.generators.diffusion_objectives import DDPM
from framework.generators.dit import SIZES, DiT
from framework.generators.interface import TokenSpace
from framework.generators.samplers import Ancestral
from framework.interop.official import OfficialError, count, renamed

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


def import_dit(state: Mapping[str, Tensor], num_heads: int | None = None) -> DiT:
    """The generator of a checkpoint, in eval mode; its samples are patches of scaled latents, for ``latents_of``.

    Args:
        state: by official names.
        num_heads: unless given, as in the released model of this width.

    Raises:
        OfficialError: if tensors are missing, left over or of another shape.
    """
    weights, _ = renamed(state, RULES)
    try:
        width, channels, side, _ = weights["embed.weight"].shape
        positions, hidden = weights["positions"], weights["transformer.blocks.0.mlp.up.weight"]
        classes, outputs = weights["class_embedding"], len(weights["head.bias"]) // (channels * side * side)
        heads = num_heads or HEADS[width]
        weights["embed.weight"] = weights["embed.weight"].flatten(1)
        weights["positions"] = positions[0]
        for name in ("head.weight", "head.bias"):
            weights[name] = rearrange(
                weights[name], "(p q two c) ... -> (two c p q) ...", p=side, q=side, two=outputs
            ).contiguous()
    except KeyError as error:
        raise OfficialError(f"this is no checkpoint of DiT, or of an unusual width: there is no {error}") from error
    num_tokens, dim = positions.shape[1], channels * side * side
    generator = DiT(
        None, width, count(state, r"blocks\.(\d+)\."), heads, mlp_ratio=len(hidden) / width, qk_norm=False,
        objective=DDPM(learned_range=outputs == 2), sampler=Ancestral(), guided_channels=GUIDED * side * side,
        space=TokenSpace(num_tokens, dim, None, (num_tokens,), len(classes) - 1),
    )  # fmt: skip
    own = {name: value for name, value in generator.state_dict().items() if name.startswith(("prior.", "scale."))}
    try:
        generator.load_state_dict(own | weights)
    except RuntimeError as error:  # torch tells all that is missing, unexpected or of another shape
        raise OfficialError(f"not all tensors have their place: {error}") from error
    assert generator.positions is not None
    generator.positions.requires_grad_(False)  # a table of sines and cosines, which is not trained
    return generator.eval()


def patches_of(latents: Tensor, side: int = 2) -> Tensor:
    """Latents ``(b, c, h, w)`` -> tokens ``(b, n, c p p)``, row by row."""
    return rearrange(latents, "b c (h p) (w q) -> b (h w) (c p q)", p=side, q=side)


def latents_of(patches: Tensor, side: int = 2) -> Tensor:
    """The way back, to a square ``(b, c, h, w)``."""
    return rearrange(patches, "b (h w) (c p q) -> b c (h p) (w q)", h=isqrt(patches.shape[1]), p=side, q=side)
