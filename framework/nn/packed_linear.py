"""Linear layers for a few rows at a time, with weights laid out once for the CPU's matrix product.

A decoding step multiplies every weight with a handful of rows, and laying the weights out anew for each product then
takes longer than the product. Milliseconds for all matrices of LlamaGen B on one core without AVX-512, float32, one
after the other so that they come from memory:

    rows    nn.Linear    packed
       8       75          46
      16       96          74
"""

from __future__ import annotations

from copy import deepcopy
from typing import TypeVar

import torch
from torch import Tensor, nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)

MIN_WEIGHTS = 2**17
"""Of a matrix that is packed: a call of oneDNN takes 50 microseconds, in which torch has multiplied smaller ones."""


class PackedLinear(nn.Module):
    """A linear layer's results, to the last digits, from a copy of its weights in oneDNN's order; it is not trained."""

    def __init__(self, linear: nn.Linear, num_rows: int) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), num_rows)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return y


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``packed`` is possible here: it is for float32 on CPUs for which torch has oneDNN."""
    there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    return there and device.type == "cpu" and dtype == torch.float32


def packed(module: ModuleT, num_rows: int) -> ModuleT:
    """A copy for about ``num_rows`` rows at a time whose large linear layers are packed; all else is shared."""
    shared = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    copy = deepcopy(module, shared)
    if isinstance(copy, nn.Linear):
        return PackedLinear(copy, num_rows) if copy.weight.numel() >= MIN_WEIGHTS else copy  # type: ignore[return-value]
    for name, part in list(copy.named_modules()):
        if isinstance(part, nn.Linear) and part.weight.numel() >= MIN_WEIGHTS:
            copy.set_submodule(name, PackedLinear(part, num_rows))
    return copy
