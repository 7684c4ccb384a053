"""LlamaGen's class-conditional checkpoints, as ``read_official`` reads them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from framework.generators.autoregressive import LlamaGenAR
from framework.generators.interface import TokenSpace
from framework.interop.official import OfficialError, count, renamed

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
HEADS = {3200: 32, 4096: 32}
"""By width, where heads have not 64 channels: of 3B and 7B."""


def import_llamagen(
    state: Mapping[str, Tensor], num_tokens: int, dim: int = 8, num_heads: int | None = None
) -> LlamaGenAR:
    """The generator of a checkpoint, in eval mode, for codes of a square grid.

    Args:
        state: by official names; ``freqs_cis`` of old files is left out.
        num_tokens: codes of an image, which no tensor tells: 256 for 16 rows of 16.
        dim: channels of the tokenizer's codes; LlamaGen's has 8.
        num_heads: unless given, heads of 64 channels, or as in the released models.

    Raises:
        OfficialError: if tensors are missing, left over or of another shape.
        ValueError: if ``num_tokens`` is no square.
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
    weights, _ = renamed(merged, RULES, dropped=["freqs_cis"])
    space = TokenSpace(num_tokens, dim, codes, (num_tokens,), len(classes) - 1)
    generator = LlamaGenAR(
        None, width, depth, num_heads or HEADS.get(width, max(1, width // 64)), mlp_ratio=hidden / width,
        positions=["rope2d"], length_mode="none", space=space,
    )  # fmt: skip
    try:
        generator.load_state_dict(weights)
    except RuntimeError as error:  # torch tells all that is missing, unexpected or of another shape
        raise OfficialError(f"not all tensors have their place: {error}") from error
    return generator.eval()
