"""Small tokenizers for tests."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch

from framework.tokenizers.decoders.mask_token_vit import MaskTokenViT
from framework.tokenizers.heads import PixelShuffleHead
from framework.tokenizers.interface import ENCODERS, MaskingSchedule, Quantizer
from framework.tokenizers.masking import NestedTailMasking
from framework.tokenizers.quantizers.identity import Identity
from framework.tokenizers.spaces import PixelSpace
from framework.tokenizers.tokenizer import Tokenizer
from tests.stir import stirred


def small_tokenizer(
    *,
    seed: int = 0,
    num_tokens: int = 6,
    encoder_name: str = "SuffixTokenViT",
    encoder: dict[str, Any] | None = None,
    decoder: dict[str, Any] | None = None,
    quantizer: Quantizer | None = None,
    masking: MaskingSchedule | None = None,
) -> Tokenizer:
    """A tokenizer of 16x16 images, patches of 4, 32 channels, tokens of 5 floats."""
    torch.manual_seed(seed)
    size = {"width": 32, "depth": 1, "num_heads": 2}
    encoder_class = ENCODERS.get(encoder_name)
    taken = inspect.signature(encoder_class).parameters
    small = {"num_tokens": num_tokens, "patch_size": 4} | size
    tokenizer = Tokenizer(
        PixelSpace(),
        partial(encoder_class, **({key: small[key] for key in small if key in taken} | (encoder or {}))),
        quantizer or Identity(5),
        masking or NestedTailMasking(),
        partial(MaskTokenViT, **({"head": PixelShuffleHead} | size | (decoder or {}))),
        image_size=16,
    )
    return stirred(tokenizer)
