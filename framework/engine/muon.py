"""Muon: momentum whose matrices are orthogonalised (Jordan 2024, https://kellerjordan.github.io/posts/muon/).

It is torch's own (``torch.optim.Muon``), with the same state and hyperparameters, but for two things. Products are
computed in bfloat16 only where the machine is fast in that: torch always does, which on a CPU without such instructions
takes 60 times as long. And matrices of one shape are orthogonalised together.

Shapes: k matrices of one shape, r rows, c columns.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from framework.runtime.precision import has_fast_bfloat16


class Muon(torch.optim.Muon):
    """See the module."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Move every matrix that has a gradient; a closure is not called."""
        for group in self.param_groups:
            alike: defaultdict[tuple[torch.Size, torch.device], list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[parameter.shape, parameter.device].append(parameter)
            for parameters in alike.values():
                self._move(parameters, group)

    def _move(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Matrices of one shape."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, buffers, group["momentum"]) if group["nesterov"] else buffers
        moves = orthogonalised(torch.stack(list(ahead)), group["ns_coefficients"], group["ns_steps"], group["eps"])
        rows, columns = parameters[0].shape
        scale = 0.2 * max(rows, columns) ** 0.5  # of updates whose root mean square is AdamW's (arXiv:2502.16982)
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, list(moves), alpha=-group["lr"] * scale)


def orthogonalised(
    matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """Matrices ``(k, r, c)`` with about the same singular vectors and singular values near 1, from about .7 to 1.2.

    Args:
        matrices: float32.
        coefficients: of the Newton-Schulz iteration's odd polynomial of degree five.
        steps: iterations.
        eps: the smallest norm that matrices are divided by.
    """
    a, b, c = coefficients
    x = matrices.bfloat16() if has_fast_bfloat16(matrices.device) else matrices
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)
