"""Exact attention in its fastest form for the device, dtype and size.

Two forms compute the same thing: ``explicit`` (matrix product, softmax, matrix product) and torch's fused
``scaled_dot_product_attention``. On CUDA the fused kernels win. On the CPU it depends on whether gradients are needed.
Milliseconds on one AMX core, head size 64, with a key-padding mask; ``tools/benchmark.py attention`` prints this table
for any machine:

    batch x heads x length      forward + backward: explicit / fused      forward only: explicit / fused
    32 x 2 x 32    bfloat16       0.85 /  4.6                               0.27 / 0.21
     8 x 3 x 256   bfloat16       5.5  / 13.1                               2.4  / 1.6
     2 x 8 x 512   bfloat16      18.8  / 26.0                               7.7  / 3.9
     1 x 8 x 1024  bfloat16      47.0  / 41.4                              39.6  / 8.5
    32 x 2 x 32    float32        1.09 /  1.27                              0.32 / 0.28
     8 x 4 x 96    float32        2.9  /  3.5                               1.0  / 0.9
     8 x 3 x 256   float32       14.3  / 14.7                               4.9  / 3.9
     2 x 8 x 512   float32       39.3  / 35.3                              15.0  / 10.0

Shapes: b batch, h heads, q queries, k keys, d channels of a head.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

# The longest key sequence for which the explicit form's backward was the faster one on a CPU.
_EXPLICIT_UP_TO = {torch.bfloat16: 512, torch.float16: 512, torch.float32: 256}


def mask_to_bias(mask: Tensor) -> Tensor:
    """A bool mask (True may be attended) as the float32 bias that is added to scores: 0 or minus infinity."""
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, float("-inf"))


def choose_attention(
    device: torch.device, dtype: torch.dtype, num_keys: int, needs_grad: bool
) -> Literal["explicit", "fused"]:
    """The faster of the two exact forms, by the measurements above; a fixed rule, so that runs repeat bit for bit."""
    if device.type != "cpu" or not needs_grad:
        return "fused"
    return "explicit" if num_keys <= _EXPLICIT_UP_TO.get(dtype, 0) else "fused"


def explicit_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """Matrix product, softmax, matrix product; shapes as in ``attention``."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    if bias is not None:
        scores = scores + bias.to(scores.dtype)
    return scores.softmax(dim=-1) @ value


def fused_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
    """Torch's own kernel; shapes as in ``attention``."""
    mask = None if bias is None else bias.to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


FORMS = {"explicit": explicit_attention, "fused": fused_attention}


def attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """Softmax attention scaled by d^-0.5.

    Args:
        query: ``(b, h, q, d)``.
        key: ``(b, h, k, d)``.
        value: ``(b, h, k, d)``.
        bias: added to the scores, broadcastable to ``(b, h, q, k)``; a key at minus infinity has a weight of exactly 0.
            Every query needs at least one key that is not.
    """
    needs_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    form = choose_attention(query.device, query.dtype, key.shape[-2], needs_grad)
    return FORMS[form](query, key, value, bias)


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """``attention`` of a sequence ``(b, h, n, d)`` to itself, each position to those before it and to itself.

    What pads a sequence on its right is in no other position's past, so that it needs no mask.
    """
    needs_grad = torch.is_grad_enabled() and query.requires_grad
    length = query.shape[-2]
    if choose_attention(query.device, query.dtype, length, needs_grad) == "fused":
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    past = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
    return explicit_attention(query, key, value, mask_to_bias(past))
