"""LlamaGen's class-conditional checkpoints, as ``read_official`` reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from framework.generators.interface import TokenSpace
from framework.interop.official import Imported, OfficialError, count, renamed

RULES = [
    (r"^layers\.", "transformer.blocks."),
    (r"\.attention\.wqkv\.", ".qkv."),
    (r"\.attention\.wo\.", ".out."),
    (r"\.feed_forward\.up\.", ".up."),
    (r"\.feed_forward\.w2\.", ".down."),
    (r"\.attention_norm\.", ".norm1."),
    (r"\.ffn_norm\.", ".norm2."),
    (r"^norm\.", "transformer.norm."),
    (r"^output\.", "head."),
    (r"^tok_embeddings\.weight$", "code_embedding"),
    (r"^cls_embedding\.embedding_table\.weight$", "class_embedding"),
]
NUM_TOKENS = 256
HEADS = {3200: 32, 4096: 32}
"""By width, where heads have not 64 channels: of 3B and 7B."""


def import_llamagen(
    state: Mapping[str, Tensor], num_tokens: int | None = None, dim: int = 8, num_heads: int | None = None
) -> Imported:
    """The generator of a checkpoint, for codes of a square grid.

    Args:
        state: by official names; ``freqs_cis``, the table of positions in old files, is left out.
        num_tokens: codes of an image; unless given as many as ``freqs_cis`` has, or 256, those of 16 rows. Weights fit
            any number.
        dim: channels of the tokenizer's codes; LlamaGen's has 8.
        num_heads: unless given, heads of 64 channels, or as in the released models.

    Raises:
        OfficialError: if this is no class-conditional checkpoint of LlamaGen.
    """
    if missing := [name for name in ("tok_embeddings.weight", "output.weight", "norm.weight") if name not in state]:
        raise OfficialError(f"this is no checkpoint of LlamaGen: it has no {', '.join(missing)}")
    merged = dict(state)
    depth = count(state, r"layers\.(\d+)\.")
    try:
        for layer in range(depth):
            gate, linear = (merged.pop(f"layers.{layer}.feed_forward.{name}.weight") for name in ("w1", "w3"))
            merged[f"layers.{layer}.feed_forward.up.weight"] = torch.cat([gate, linear])
        classes, (codes, width) = state["cls_embedding.embedding_table.weight"], state["tok_embeddings.weight"].shape
        hidden = state["layers.0.feed_forward.w2.weight"].shape[1]
    except KeyError as error:
        raise OfficialError(f"this is no class-conditional checkpoint of LlamaGen: it has no {error}") from error
    weights, dropped = renamed(merged, RULES, dropped=["freqs_cis"])
    if num_tokens is None:
        num_tokens = len(state["freqs_cis"]) - 1 if "freqs_cis" in state else NUM_TOKENS
    sizes = {"width": width, "depth": depth, "num_heads": num_heads or HEADS.get(width, max(1, width // 64))}
    node: dict[str, Any] = {"name": "LlamaGenAR", "size": None, **sizes, "mlp_ratio": hidden / width}
    node |= {"positions": ["rope2d"], "length_mode": "none"}
    space = TokenSpace(num_tokens, dim, codes, (num_tokens,), len(classes) - 1)
    return Imported("task.generator", node, weights, dropped, token_space=space)
