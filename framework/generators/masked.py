"""MaskGIT (Chang et al. 2022) over codes of 1D sequences of any length: all at once, and again where it was unsure.

Shapes: b batch, n tokens, v codes, w width, r masked tokens of a batch, row by row.
"""

from __future__ import annotations

from math import acos, pi

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from framework.config.registry import Factory
from framework.generators.guidance import Guidance, guided
from framework.generators.interface import GENERATORS, GeneratorLoss, TokenSpace
from framework.generators.length_first import LengthFirst
from framework.generators.length_prior import LengthPrior, equal_lengths
from framework.generators.sampling import Sampling
from framework.nn.attention import mask_to_bias
from framework.nn.transformer import BlockOptions, Transformer
from framework.runtime.hashing import hashed, purpose_key, unit_of
from framework.tokens import Tokens


@GENERATORS.register()
class MaskGIT(LengthFirst):
    """Learns codes that are hidden from those that are not, and makes them in steps, the surest first.

    The length stands with the class before the codes; rows without class have the same. How many codes are hidden is
    each row's own share of its own length.

    Args:
        width: w; the defaults are MaskGIT's.
        depth: blocks.
        num_heads: heads of a block.
        blocks: their switches.
        steps: passes that make a sequence; shorter sequences take one for each token.
        noise: of confidences, in nats at the start, falling to 0 at the end: above 0 the order is drawn.
        sampling: how codes are drawn in each step.
        length_prior: where lengths come from that nobody asks for; null for ``EmpiricalLengthPrior``.
        label_dropout: share of training sequences without class, for guidance.
        input_dropout: share of channels of the embedded inputs that training sets to 0.
        label_smoothing: share of the target that training spreads over all codes.
        batch_size: sequences of the longest length at a time when generating; of shorter ones, as many tokens.
        space: which sequences there are, given by the task.

    Raises:
        ValueError: if tokens are continuous, or numbers do not fit.
    """

    def __init__(
        self,
        width: int = 768,
        depth: int = 24,
        num_heads: int = 16,
        blocks: BlockOptions | None = None,
        steps: int = 8,
        noise: float = 4.5,
        sampling: Sampling | None = None,
        length_prior: Factory[LengthPrior] | None = None,
        label_dropout: float = 0.1,
        input_dropout: float = 0.1,
        label_smoothing: float = 0.1,
        batch_size: int = 64,
        *,
        space: TokenSpace,
    ) -> None:
        super().__init__(space, label_dropout, length_prior, batch_size)
        if space.vocabulary is None:
            raise ValueError("MaskGIT makes codes, and this tokenizer's tokens are continuous: take a DiT")
        if steps < 1 or not 0 <= noise < float("inf") or not 0 <= label_smoothing <= 1:
            raise ValueError(
                f"steps are 1 or more, noise is at least 0 and label_smoothing a share from 0 to 1; got {steps}, "
                f"{noise} and {label_smoothing}"
            )
        options = blocks or BlockOptions()
        if options.registers and options.rope_base is not None:
            raise ValueError(
                "registers stand behind the padding, and rotary positions would tell them how much of it there is: "
                "take either registers or rope_base"
            )
        self.steps, self.noise = steps, noise
        self.sampling = sampling or Sampling()
        self.label_smoothing = label_smoothing
        self.code_embedding = nn.Parameter(torch.randn(space.vocabulary + 1, width) / 2)  # the last one is hidden
        self.class_embedding = nn.Parameter(torch.randn(space.num_classes + 1, width) / 2)
        self.length_embedding = nn.Parameter(torch.zeros(len(space.budgets), width))
        self.positions = nn.Parameter(torch.randn(space.longest, width) / 2)
        self.input_dropout = nn.Dropout(input_dropout)
        self.transformer = Transformer(width, depth, num_heads, options)
        self.head = nn.Linear(width, space.vocabulary)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def states(self, codes: Tensor, labels: Tensor, lengths: Tensor) -> Tensor:
        """Codes ``(b, n)``, v where they are hidden, with labels and lengths ``(b,)`` -> states ``(b, n, w)``.

        What stands behind a length is not attended to.
        """
        start = F.embedding(labels, self.class_embedding)
        start = start + F.embedding(self.prior.places(lengths), self.length_embedding)
        x = F.embedding(codes, self.code_embedding) + self.positions[: codes.shape[1]]
        seen = torch.arange(-1, codes.shape[1], device=codes.device) < lengths[:, None]
        bias = None if bool(seen.all()) else mask_to_bias(seen)[:, None, None]
        states: Tensor = self.transformer(self.input_dropout(torch.cat([start[:, None], x], dim=1)), bias)
        return states[:, 1:]

    def forward(self, codes: Tensor, labels: Tensor, lengths: Tensor) -> Tensor:
        """Logits ``(b, n, v)`` float32 of what every code is, hidden or not; see ``states``."""
        logits: Tensor = self.head(self.states(codes, labels, lengths)).float()
        return logits

    def token_loss(self, tokens: Tokens, labels: Tensor, generator: torch.Generator) -> GeneratorLoss:
        """Cross entropy of hidden codes, over their number, which is the count.

        The hidden share is arccos(u) 2 / pi, u uniform, as in TiTok; at least one code is. ``nll`` and ``accuracy`` are
        without smoothing.
        """
        if tokens.codes is None:
            raise ValueError("MaskGIT learns from codes, and these tokens have none")
        tokens = tokens.truncate(int(tokens.lengths.max()))
        assert tokens.codes is not None
        lengths, kept, device = tokens.lengths, tokens.mask, labels.device
        draws = torch.rand(2, len(labels), generator=generator).to(device)
        if self.training:
            labels = labels.masked_fill(draws[0] < self.label_dropout, self.space.num_classes)
        # As many numbers as tokens are kept, so that padding does not shift the draws.
        order = torch.full(kept.shape, 2.0, device=device)
        order[kept] = torch.rand(int(kept.sum()), generator=generator).to(device)
        share = draws[1].acos() * 2 / pi
        hidden = _smallest(order, (share * lengths).round().long().clamp(min=1))
        shown, parts = tokens.codes.masked_fill(hidden, len(self.code_embedding) - 1), []
        for length, rows in equal_lengths(lengths, kept.numel()):
            asked, states = hidden[rows, :length], self.states(shown[rows, :length], labels[rows], lengths[rows])
            parts.append((states[asked], tokens.codes[rows, :length][asked]))
        states, targets = (torch.cat(values) for values in zip(*parts, strict=True))
        logits, count = self.head(states).float(), hidden.sum()
        loss = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=self.label_smoothing) / count
        with torch.no_grad():
            right = (logits.argmax(1) == targets).float()
            metrics = {"nll": F.cross_entropy(logits, targets), "accuracy": right.mean()}
        return GeneratorLoss({"code": loss}, count, metrics)

    def make(self, labels: Tensor, length: int, seed: int, sample_ids: Tensor, guidance: Guidance) -> Tensor:
        """Codes ``(b, n)`` of sequences of one length."""
        return self.decode(labels, torch.full_like(labels, length), seed, sample_ids, guidance)

    @torch.no_grad()
    def decode(self, labels: Tensor, lengths: Tensor, seed: int, sample_ids: Tensor, guidance: Guidance) -> Tensor:
        """Codes ``(b, n)`` of one batch, padded with 0 to its longest sequence.

        Args:
            labels: ``(b,)``.
            lengths: ``(b,)``, which may differ.
            seed: of all samples.
            sample_ids: ``(b,)``.
            guidance: its progress is the share of steps before this one.
        """
        places = torch.arange(int(lengths.max()), device=labels.device)
        kept, unknown = places < lengths[:, None], len(self.code_embedding) - 1
        codes = torch.full(kept.shape, unknown, device=labels.device).masked_fill(~kept, 0)
        code_keys, order_keys = (hashed(purpose_key(seed, name), sample_ids) for name in ("code", "order"))
        for step in range(self.steps):
            hidden = codes == unknown
            rows, at = hidden.nonzero(as_tuple=True)
            if not len(rows):
                break
            number = at * self.steps + step
            logits = self._guided(codes, hidden, labels, lengths, guidance.scale_at(step / self.steps))
            drawn = self.sampling.draw(logits, hashed(code_keys[rows], number))
            uniform = unit_of(hashed(order_keys[rows], number)) + 2.0**-54
            gumbel = -(-uniform.log()).log()
            sure = logits.log_softmax(dim=1).gather(1, drawn[:, None])[:, 0]
            doubt = torch.full(kept.shape, torch.inf, dtype=torch.float64, device=labels.device)
            doubt[hidden] = -(sure + self.noise * (1 - (step + 1) / self.steps) * gumbel)
            left = self.left(step + 1, lengths, hidden.sum(1))
            proposed = codes.masked_scatter(hidden, drawn)
            codes = torch.where(_smallest(doubt, hidden.sum(1) - left), proposed, codes)
        return codes

    def left(self, step: int, lengths: Tensor, hidden: Tensor) -> Tensor:
        """How many codes each row ``(b,)`` still hides after so many steps, given how many it hid before.

        At least one is revealed in each step, and all are in the last.
        """
        share = acos(step / self.steps) * 2 / pi
        return torch.minimum((share * lengths).long(), hidden - 1).clamp(min=0)

    def _guided(self, codes: Tensor, hidden: Tensor, labels: Tensor, lengths: Tensor, scale: float) -> Tensor:
        """Logits ``(r, v)`` of hidden codes; both kinds of rows in one pass, and without guidance one kind."""
        if scale == 1:
            return self.head(self.states(codes, labels, lengths)[hidden]).float()
        every = torch.cat([labels, torch.full_like(labels, self.space.num_classes)])
        states = self.states(torch.cat([codes, codes]), every, torch.cat([lengths, lengths]))
        conditional, unconditional = self.head(states[torch.cat([hidden, hidden])]).float().chunk(2)
        return guided(conditional, unconditional, scale)


def _smallest(values: Tensor, counts: Tensor) -> Tensor:
    """Where each row of ``(b, n)`` has its ``counts (b,)`` smallest values."""
    return values.argsort(dim=1, stable=True).argsort(dim=1) < counts[:, None]
