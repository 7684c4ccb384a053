"""LlamaGen's autoregressive generator (Sun et al. 2024) over ordered 1D tokens, which knows when to stop.

Shapes: b batch, n tokens of the longest sequence, t tokens that are there, d width, v codes.
"""

from __future__ import annotations

from math import ceil, isqrt
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from framework.generators.decode_engine import DecodeEngine, Policy
from framework.generators.guidance import Guidance
from framework.generators.interface import GENERATORS, Generator, GeneratorLoss, TokenSpace
from framework.generators.length_modes import LENGTH_MODES, LengthModeName
from framework.generators.sampling import Sampling
from framework.generators.sizes import Size, size_of
from framework.nn.causal_transformer import CausalTransformer
from framework.nn.positions import rotary_1d, rotary_2d
from framework.tokens import Tokens

SIZES = {
    "B": Size(768, 12, 12),
    "L": Size(1024, 24, 16),
    "XL": Size(1280, 36, 20),
    "XXL": Size(1536, 48, 24),
    "3B": Size(3200, 24, 32),
}


@GENERATORS.register()
class LlamaGenAR(Generator):
    """Codes one after the other, each from the class and all codes before it.

    Args:
        size: one of LlamaGen's, or null for ``width``, ``depth`` and ``num_heads``.
        width: d.
        depth: blocks.
        num_heads: heads of a block.
        mlp_ratio: hidden channels of the MLP over d; null for 8/3, rounded up to a multiple of 256, as in LlamaGen.
        qk_norm: normalise queries and keys of each head.
        positions: ``rope1d`` turns with the position in the sequence; ``learned`` adds a table; both together may
            stand; ``rope2d`` is LlamaGen's own for codes of a square grid, with a row of zeros for the class, which all
            positions then see alike.
        rope_base: of the slowest pair's period, ``2 pi rope_base`` positions.
        length_mode: ``none``, ``eos``, ``hazard`` or ``prefix``; see ``length_modes``.
        label_dropout: share of training sequences without class, for guidance.
        input_dropout: share of channels of the embedded inputs that training sets to 0.
        sampling: how codes are drawn unless an engine is told otherwise.
        policy: of the engine that ``generate`` makes, see ``DecodeEngine``.
        batch_size: of that engine.
        space: which sequences there are, given by the task.

    Raises:
        ValueError: if tokens are continuous, or sizes or positions do not fit.
    """

    rotation: Tensor | None

    def __init__(
        self,
        size: Literal["B", "L", "XL", "XXL", "3B"] | None = "B",
        width: int | None = None,
        depth: int | None = None,
        num_heads: int | None = None,
        mlp_ratio: float | None = None,
        qk_norm: bool = False,
        positions: list[Literal["rope1d", "rope2d", "learned"]] | None = None,
        rope_base: float = 10_000.0,
        length_mode: LengthModeName = "hazard",
        label_dropout: float = 0.1,
        input_dropout: float = 0.1,
        sampling: Sampling | None = None,
        policy: Policy = "refill",
        batch_size: int = 32,
        *,
        space: TokenSpace,
    ) -> None:
        super().__init__(space, label_dropout)
        if space.vocabulary is None:
            raise ValueError(
                "LlamaGenAR draws codes, and this tokenizer's tokens are continuous: take a DiT or ContinuousAR"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size is 1 or more, got {batch_size}")
        width, depth, num_heads = chosen = size_of(SIZES, size, width, depth, num_heads)
        self.size = chosen
        hidden = 256 * ceil(8 * width / 3 / 256) if mlp_ratio is None else round(width * mlp_ratio)
        self.sampling, self.policy, self.batch_size = sampling or Sampling(), policy, batch_size
        self.length = LENGTH_MODES[length_mode](space, width)
        self.class_embedding = nn.Parameter(torch.randn(space.num_classes + 1, width) / 2)
        self.code_embedding = nn.Parameter(torch.randn(space.vocabulary, width) / 2)
        kinds = set(positions or ["rope1d"])
        count = self.length.starts + space.longest
        self.positions = nn.Parameter(torch.randn(count, width) / 2) if "learned" in kinds else None
        table = _rotation(kinds - {"learned"}, count, space.longest, width // num_heads, rope_base)
        self.register_buffer("rotation", table, persistent=False)
        self.input_dropout = nn.Dropout(input_dropout)
        self.transformer = CausalTransformer(width, depth, num_heads, hidden, qk_norm)
        self.head = nn.Linear(width, space.vocabulary + self.length.entries, bias=False)
        nn.init.zeros_(self.head.weight)

    def states(self, codes: Tensor, labels: Tensor, lengths: Tensor) -> Tensor:
        """Codes ``(b, t)`` behind their class ``(b,)`` -> the last layer's states ``(b, starts + t, d)``.

        Args:
            labels: ``num_classes`` stands for none.
            lengths: ``(b,)``, which only the mode ``prefix`` reads.
        """
        start = self.length.start(F.embedding(labels, self.class_embedding), lengths)
        x = torch.cat([start, F.embedding(codes, self.code_embedding)], dim=1)
        length = x.shape[1]
        if self.positions is not None:
            x = x + self.positions[:length]
        rotation = None if self.rotation is None else self.rotation[:length]
        states: Tensor = self.transformer(self.input_dropout(x), rotation)
        return states

    def forward(self, codes: Tensor, labels: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Logits of every next entry: of codes ``(b, t)``, for t from 0 on, ``(b, 1 + t, v + entries)`` float32."""
        lengths = labels.new_full((len(labels),), self.space.longest) if lengths is None else lengths
        states = self.states(codes, labels, lengths)[:, self.length.starts - 1 :]
        places = torch.arange(states.shape[1], device=states.device).expand(len(states), -1)
        logits = self.length.mask(self.head(states).float().flatten(0, 1), places.flatten())
        return logits.unflatten(0, places.shape)

    def loss(self, tokens: Tokens, labels: Tensor, generator: torch.Generator) -> GeneratorLoss:
        """Cross entropy of codes, and of what the length mode predicts: together the likelihood of the sequence.

        Both are over the number of kept tokens, and so are ``nll`` and ``bits``: nats of a token with its share of
        what the length takes, and bits of an image.
        """
        if tokens.codes is None:
            raise ValueError("an autoregressive generator learns from codes, and these tokens have none")
        tokens, longest = tokens.truncate(int(tokens.lengths.max())), self.space.longest
        assert tokens.codes is not None
        codes, lengths = tokens.codes * tokens.mask, tokens.lengths
        dropped = torch.rand(len(labels), generator=generator).to(labels.device) < self.label_dropout
        if self.training:
            labels = labels.masked_fill(dropped, self.space.num_classes)
        every = self.states(codes[:, : longest - 1], labels, lengths)
        states = every[:, self.length.starts - 1 :]
        places = torch.arange(states.shape[1], device=labels.device).expand(len(states), -1)
        targets = F.pad(codes, (0, 1))[:, : states.shape[1]]
        predicted = places < lengths[:, None]
        if self.length.entries:
            ends = (places == lengths[:, None]) & self.length.stops[places]
            targets, predicted = targets.masked_fill(ends, self.head.out_features - 1), predicted | ends
        logits = self.length.mask(self.head(states[predicted]).float(), places[predicted])
        count = lengths.sum()
        each = F.cross_entropy(logits, targets[predicted], reduction="none")
        own = each.detach().masked_fill((places >= lengths[:, None])[predicted], 0)  # of codes, not of ends
        by_position = each.new_zeros(longest).index_add(0, places[predicted], own)
        sums = {"code": each.sum()}
        sums |= self.length.losses(states, every[:, 0], lengths)
        losses = {name: value / count for name, value in sums.items()}
        nll = torch.stack(list(losses.values())).sum().detach()
        bits = nll * count / len(labels) / torch.log(torch.tensor(2.0))
        return GeneratorLoss(losses, count, {"nll": nll}, by_position, {"bits": bits})

    def engine(self, batch_size: int | None = None, policy: Policy | None = None) -> DecodeEngine:
        """An engine for the present weights; they are read when it is made."""
        return DecodeEngine(self, batch_size or self.batch_size, policy or self.policy, self.sampling)

    @torch.no_grad()
    def generate(
        self,
        labels: Tensor,
        *,
        seed: int,
        sample_ids: Tensor,
        guidance: Guidance,
        lengths: Tensor | None = None,
    ) -> Tokens:
        engine = self.engine(max(1, min(self.batch_size, len(labels))))
        return engine.generate(labels, seed=seed, sample_ids=sample_ids, guidance=guidance, lengths=lengths)


def _rotation(kinds: set[str], count: int, longest: int, width: int, base: float) -> Tensor | None:
    """The table of ``rotate_pairs`` of all positions."""
    if len(kinds) > 1:
        raise ValueError("positions are rope1d or rope2d, not both; either may have learned beside it")
    if kinds != {"rope2d"}:
        return rotary_1d(count, width, base) if kinds else None
    side = isqrt(longest)
    if side * side != longest or count != longest + 1:
        raise ValueError(
            f"rope2d is for the codes of a square grid behind a class, got {longest} codes behind {count - longest}: "
            "take rope1d"
        )
    return torch.cat([torch.zeros(1, width // 2, 2), rotary_2d(side, width, base)])
