"""Frozen parts: modules that a run reads and never changes, marked by the builder with ``is_frozen = True``.

They stay in eval mode, outside optimizers, averages and checkpoints; a checkpoint records their digests instead.
"""

from __future__ import annotations

from torch import Tensor, nn

from framework.runtime.weights import weights_digest


def frozen_modules(module: nn.Module) -> dict[str, nn.Module]:
    """The outermost frozen modules inside ``module``, by name."""
    found: dict[str, nn.Module] = {}
    # With duplicates, since a part that stands at two places has its state under both names.
    for name, child in module.named_modules(remove_duplicate=False):
        inside = any(name.startswith(f"{outer}." if outer else "") for outer in found)
        if getattr(child, "is_frozen", False) and not inside:
            found[name] = child
    return found


def live_state(module: nn.Module) -> dict[str, Tensor]:
    """``module.state_dict()`` without the frozen parts: what training changes and checkpoints hold."""
    prefixes = tuple(f"{name}." if name else "" for name in frozen_modules(module))
    return {name: value for name, value in module.state_dict().items() if not name.startswith(prefixes)}


def train_mode(module: nn.Module) -> None:
    """Training mode everywhere but in the frozen parts."""
    module.train()
    for frozen in frozen_modules(module).values():
        frozen.eval()


def frozen_digests(module: nn.Module) -> dict[str, str]:
    """The SHA-256 of each frozen part's names, types, shapes and values, by the part's name."""
    return {name: weights_digest(frozen.state_dict()) for name, frozen in frozen_modules(module).items()}


def remove_unread(module: nn.Module) -> list[str]:
    """Take out the outermost parts that the builder marked ``is_unread``, which only training needs; their names."""
    marked = [name for name, part in module.named_modules() if getattr(part, "is_unread", False)]
    outermost = [name for name in marked if not any(name.startswith(f"{other}.") for other in marked)]
    for name in outermost:
        module.set_submodule(name, nn.Identity())
    return outermost
