"""What modules learn between steps without gradients, over all processes."""

from __future__ import annotations

import torch
from torch import nn

from framework.nn.between_steps import LearnsBetweenSteps
from framework.runtime.ranks import Ranks


@torch.no_grad()
def learn_between_steps(task: nn.Module, ranks: Ranks) -> None:
    """Let every module of ``task`` that is in training mode learn from what all ranks have collected.

    What such modules learn into parameters of their own is afterwards the main rank's on every rank; for buffers the
    trainer sees to that.
    """
    modules = [m for m in task.modules() if isinstance(m, LearnsBetweenSteps) and m.training]
    if not modules:
        return
    ranks.average([tensor for module in modules for tensor in module.averaged()])
    ranks.spread([tensor for module in modules for tensor in module.shared()])
    for module in modules:
        module.learn()
    ranks.spread([parameter.detach() for module in modules for parameter in module.parameters(recurse=False)])
