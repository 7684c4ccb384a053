"""What a system is, beside what it measures: the first columns of a table that compares tokenizers."""

from __future__ import annotations

from typing import Any

from framework.allocation.adaptive_tokenizer import AdaptiveTokenizer
from framework.tokenizers.interface import ImageSpace
from framework.tokenizers.masking import DelayedStart, FullLength
from framework.tokenizers.tokenizer import Tokenizer


def system_facts(model: Tokenizer | AdaptiveTokenizer | ImageSpace, image_size: int | None = None) -> dict[str, Any]:
    """Facts in plain JSON.

    ``tokenizer`` names the classes; ``layout`` is ``1d``, or ``2d`` where tokens stand on the grid of an autoencoder;
    ``parameters`` are all, frozen ones and those of the spaces too; ``codebook`` is the number of codes, null where
    tokens are continuous; ``tokens`` the most that an image takes; ``token_dim`` channels of one; ``elastic`` whether
    it was trained to be read at several lengths.

    Args:
        model: in eval mode.
        image_size: side of images in pixels, for an autoencoder, which does not know it.
    """
    facts: dict[str, Any] = {"parameters": sum(parameter.numel() for parameter in model.parameters())}
    if isinstance(model, AdaptiveTokenizer):
        own = system_facts(model.tokenizer)
        return {**own, **facts, "tokenizer": f"{own['tokenizer']}, {type(model.policy).__name__}"}
    if isinstance(model, ImageSpace):
        assert image_size is not None, "an autoencoder takes images of any size"
        quantizer = getattr(model, "quantizer", None)
        return facts | {
            "tokenizer": type(model).__name__,
            "layout": "2d",
            "codebook": None if quantizer is None else quantizer.vocabulary,
            "tokens": (image_size // model.downsampling) ** 2,
            "token_dim": model.channels if quantizer is None else quantizer.dim,
            "elastic": False,
        }
    masking = model.masking.schedule if isinstance(model.masking, DelayedStart) else model.masking
    parts = (type(part).__name__ for part in (model.encoder, model.quantizer, masking, model.decoder))
    return facts | {
        "tokenizer": ", ".join(parts),
        "layout": "1d",
        "codebook": model.quantizer.vocabulary,
        "tokens": model.num_tokens,
        "token_dim": model.token_dim,
        "elastic": not isinstance(masking, FullLength),
    }
