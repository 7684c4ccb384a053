"""Optimizers: torch's, put together for transformers.

Which parameters decay is one rule for all: matrices and kernels named ``weight``. Vectors (biases, norms), embeddings,
codebooks and bare parameters (positions, queries, mask tokens) do not, since pulling them to zero says nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from framework.config.registry import Registry
from framework.engine import muon

NamedParameters = Sequence[tuple[str, Parameter]]


class Optimizer:
    """What the loop needs of an optimizer: one or more of torch's, each over its own parameters.

    Args:
        parts: their learning rates at this moment are the peaks that a schedule multiplies.
    """

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = parts
        self._peaks = [(group, float(group["lr"])) for part in parts for group in part.param_groups]

    @property
    def lr(self) -> float:
        """The learning rate of the first group now, for logs."""
        return float(self.parts[0].param_groups[0]["lr"])

    def scale_lr(self, factor: float) -> None:
        """Set every learning rate to its peak times ``factor``."""
        for group, peak in self._peaks:
            group["lr"] = peak * factor

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for part in self.parts:
            part.zero_grad()

    def step(self) -> None:
        """Move the weights."""
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain containers only."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where ``state`` was taken.

        Raises:
            ValueError: if the state has other groups of parameters than this optimizer.
        """
        for part, value in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(value)
        peaks = [peak for _, peak in self._peaks]  # torch replaces the groups when it loads
        groups = [group for part in self.parts for group in part.param_groups]
        self._peaks = list(zip(groups, peaks, strict=True))


OPTIMIZERS = Registry("optimizer", Optimizer)


@OPTIMIZERS.register()
class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019), fused where torch can.

    Args:
        lr: peak learning rate.
        weight_decay: of matrices and kernels; everything else does not decay.
        betas: decay rates of the first and second moment.
        eps: added to the root of the second moment.
        parameters: what to train, by name.
    """

    def __init__(
        self,
        lr: float,
        weight_decay: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        *,
        parameters: Iterable[tuple[str, Parameter]],
    ) -> None:
        super().__init__([_adamw(list(parameters), lr, weight_decay, betas, eps)])


@OPTIMIZERS.register()
class Muon(Optimizer):
    """Orthogonalised momentum for the blocks' matrices (Jordan 2024), AdamW for the rest.

    The updates' root mean square is matched to AdamW's (Moonshot, arXiv:2502.16982), so learning rate and weight
    decay carry over.

    Args:
        lr: peak learning rate.
        weight_decay: of matrices and kernels.
        momentum: of Muon's matrices.
        adamw_lr: peak learning rate of the rest; ``null`` takes ``lr``.
        betas: AdamW's decay rates.
        matrices: globs over parameter names; those of two dimensions go to Muon.
        parameters: what to train, by name.

    Raises:
        ValueError: if no matrix matches.
    """

    def __init__(
        self,
        lr: float,
        weight_decay: float = 0.05,
        momentum: float = 0.95,
        adamw_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        matrices: tuple[str, ...] = ("*blocks*.weight",),
        *,
        parameters: Iterable[tuple[str, Parameter]],
    ) -> None:
        named = list(parameters)
        chosen = [(n, p) for n, p in named if p.ndim == 2 and any(fnmatchcase(n, glob) for glob in matrices)]
        if not chosen:
            some = ", ".join(name for name, parameter in named if parameter.ndim == 2) or "none"
            raise ValueError(
                f"Muon trains matrices, and no name matches {list(matrices)}; the matrices here are: {some[:300]}. "
                "Set the optimizer's matrices, or take AdamW"
            )
        orthogonalised = muon.Muon(
            chosen, lr=lr, weight_decay=weight_decay, momentum=momentum, adjust_lr_fn="match_rms_adamw"
        )
        names = {name for name, _ in chosen}
        rest = [(name, parameter) for name, parameter in named if name not in names]
        adamw = [_adamw(rest, lr if adamw_lr is None else adamw_lr, weight_decay, betas)] if rest else []
        super().__init__([orthogonalised, *adamw])


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay makes sense for a parameter: see the module's rule."""
    is_table = any(word in name for word in ("embed", "codebook"))
    return parameter.ndim >= 2 and name.endswith("weight") and not is_table


def _adamw(
    named: NamedParameters, lr: float, weight_decay: float, betas: tuple[float, float], eps: float = 1e-8
) -> torch.optim.AdamW:
    groups = [
        {"params": [(n, p) for n, p in named if decays(n, p)], "weight_decay": weight_decay},
        {"params": [(n, p) for n, p in named if not decays(n, p)], "weight_decay": 0.0},
    ]
    fused = all(parameter.device.type in ("cpu", "cuda") for _, parameter in named)
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, eps=eps, fused=fused)
