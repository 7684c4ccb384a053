"""Multi-Head LoRA: a decoder's own low-rank correction for each range of kept lengths."""

from __future__ import annotations

from fnmatch import fnmatchcase

from torch import nn

from framework.config.errors import did_you_mean
from framework.nn.lora import LowRankHeads
from framework.nn.transformer import Linear


class MultiHeadLoRA:
    """One token means something else among 4 than among 16; so each range of lengths has a head of its own (AdaTok-D).

    The paper's equations are not public: ranges, hard routing by kept length and the layers are this framework's.

    Args:
        ranges: how many equal ranges the lengths 1 to n are cut into; or the increasing last lengths of each, up to n.
        rank: of the corrections.
        alpha: their scale, over the rank.
        targets: globs over the names of linear layers in the transformer and the head that are corrected:
            ``*attention.qkv``, ``*attention.out``, ``*mlp.up``, ``*mlp.down``, and the head's, such as ``to_patch``.

    Raises:
        ValueError: if there is no rank or no target.
    """

    def __init__(
        self, ranges: int | list[int] = 4, rank: int = 8, alpha: float = 8.0, targets: tuple[str, ...] = ("*",)
    ) -> None:
        if rank < 1 or not targets:
            raise ValueError(f"lora needs a rank of at least 1 and targets, got rank {rank}, targets {list(targets)}")
        self.ranges = ranges
        self.rank = rank
        self.alpha = alpha
        self.targets = targets

    def last_lengths(self, num_tokens: int) -> list[int]:
        """The last length of each range.

        Raises:
            ValueError: if the ranges do not cut 1 to ``num_tokens`` up.
        """
        count = self.ranges
        lasts = [num_tokens * i // count for i in range(1, count + 1)] if isinstance(count, int) else count
        if not lasts or lasts[-1] != num_tokens or any(a >= b for a, b in zip([0, *lasts], lasts, strict=False)):
            raise ValueError(
                f"lora.ranges must be from 1 to {num_tokens} equal ranges, or the increasing last lengths of each, "
                f"up to {num_tokens}, got {self.ranges}"
            )
        return lasts

    def adapt(self, parts: list[nn.Module], num_heads: int) -> None:
        """Give the targets among the parts' linear layers their adapters.

        Raises:
            ValueError: if a target matches no layer.
        """
        layers = [(name, m) for part in parts for name, m in part.named_modules() if isinstance(m, Linear)]
        names = [name for name, _ in layers]
        for glob in self.targets:
            if not any(fnmatchcase(name, glob) for name in names):
                near = did_you_mean(glob, names) or f": the layers are {', '.join(names)}"
                raise ValueError(f"lora.targets: '{glob}' matches nothing{near}")
        for name, layer in layers:
            if any(fnmatchcase(name, glob) for glob in self.targets):
                layer.adapter = LowRankHeads(layer.in_features, layer.out_features, num_heads, self.rank, self.alpha)
