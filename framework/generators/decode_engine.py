"""Decoding many sequences of different lengths at once, so that short ones cost less.

Rows of two kinds stand in caches of their own: every sequence has one with its class, and while there is guidance one
without. A step feeds each row one token, whatever its position, so that a row that has finished can begin another
sequence in the next step. Samples do not depend on who their neighbours are: all random numbers are counted.

Shapes: b sequences, r rows of a step, d width, h heads, c channels of a head, t tokens that a sequence has, m of the
longest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from framework.generators.guidance import Guidance, guided
from framework.generators.key_value_cache import KeyValueCache, Step, attend_in
from framework.generators.length_modes import LengthPrefix
from framework.generators.sampling import Sampling, race
from framework.nn.packed_linear import can_pack, packed
from framework.runtime.hashing import hashed, purpose_key, unit_of
from framework.tokens import Tokens

if TYPE_CHECKING:
    from framework.generators.autoregressive import LlamaGenAR

Policy = Literal["static", "compact", "refill"]


@dataclass
class DecodeStatistics:
    """What decoding cost, counted.

    Args:
        steps: passes of the transformer that draw codes.
        rows: rows with their class in these passes, over all of them; finished ones that stay in a batch count too.
        unconditional_rows: rows without class, likewise.
        prefilled: positions computed apart from steps: classes of the mode ``prefix``, and what rows without class have
            to catch up with where guidance begins late.
        tokens: of all sequences.
    """

    steps: int = 0
    rows: int = 0
    unconditional_rows: int = 0
    prefilled: int = 0
    tokens: int = 0


@dataclass(eq=False)
class _Request:
    """A sequence in work.

    Args:
        number: in the call.
        limit: at so many tokens it ends at the latest.
        tokens: drawn so far; of a finished one that stays in its batch, also what is drawn in vain.
        length: of a finished one.
    """

    number: int
    limit: int
    tokens: int = 0
    length: int | None = None


class DecodeEngine:
    """Decodes with a model's weights as they are when it is made; its caches serve all calls.

    Args:
        model: in eval mode.
        batch_size: sequences at a time.
        policy: of ``batch_size`` sequences that are begun together, ``static`` runs all until the last one has
            finished, and ``compact`` goes on without those that have. ``refill`` begins the next sequence in the row of
            one that has finished. Sequences whose lengths are known are begun in the order of their lengths.
        sampling: how codes are drawn.

    Attributes:
        statistics: of the last call.

    Raises:
        ValueError: if there is no such policy, ``batch_size`` is below 1, or the model is in training mode.
    """

    def __init__(
        self, model: LlamaGenAR, batch_size: int, policy: Policy = "refill", sampling: Sampling | None = None
    ) -> None:
        if policy not in ("static", "compact", "refill"):
            raise ValueError(f"a policy is static, compact or refill; got '{policy}'")
        if batch_size < 1:
            raise ValueError(f"an engine decodes at least one sequence at a time, got {batch_size}")
        if model.training:
            raise ValueError("the generator is in training mode, which is another model: call eval() first")
        self.model = model
        self.batch_size = batch_size
        self.policy = policy
        self.sampling = sampling or Sampling()
        weight, size = model.head.weight, model.size
        self.transformer, self.head = model.transformer, model.head
        self.is_packed = can_pack(weight.device, weight.dtype)
        if self.is_packed:
            self.transformer, self.head = packed(self.transformer, 2 * batch_size), packed(self.head, 2 * batch_size)
        positions = model.length.starts - 1 + model.space.longest
        form = (size.depth, batch_size, size.num_heads, positions, size.width // size.num_heads)
        self.conditional, self.unconditional = (KeyValueCache(form, weight.device, weight.dtype) for _ in range(2))
        self.statistics = DecodeStatistics()

    @torch.no_grad()
    def generate(
        self, labels: Tensor, *, seed: int, sample_ids: Tensor, guidance: Guidance, lengths: Tensor | None = None
    ) -> Tokens:
        """As ``Generator.generate``; ``statistics`` then says what it took."""
        space, device = self.model.space, self.model.head.weight.device
        labels, sample_ids, lengths = space.checked(labels, sample_ids, lengths, device)
        # Packed weights are multiplied in their own precision only.
        with torch.autocast(device.type, enabled=torch.is_autocast_enabled(device.type) and not self.is_packed):
            call = _Call(self, labels, seed, sample_ids, guidance, lengths)
            codes, found = call.run()
        self.statistics = call.statistics
        return Tokens(torch.zeros(*codes.shape, 0, device=device), found, codes)


class _Call:
    """One call of ``generate``: which requests wait, and which are in work in which row."""

    def __init__(
        self,
        engine: DecodeEngine,
        labels: Tensor,
        seed: int,
        sample_ids: Tensor,
        guidance: Guidance,
        lengths: Tensor | None,
    ) -> None:
        self.engine, self.model, self.length = engine, engine.model, engine.model.length
        self.labels = labels
        self.statistics = DecodeStatistics()
        longest = self.model.space.longest
        self.scales = [guidance.scale_at(tokens / longest) for tokens in range(longest)]
        guided_at = [tokens for tokens, scale in enumerate(self.scales) if scale != 1]
        self.guided_from, self.guided_to = (guided_at[0], guided_at[-1]) if guided_at else (longest, -1)
        if self.guided_from == 1:  # of schedules that rise from 1: to catch up would be a pass more
            self.guided_from = 0
        self.code_keys, self.stop_keys, length_keys = (
            hashed(purpose_key(seed, purpose), sample_ids) for purpose in ("code", "stop", "length")
        )
        stops = self.length.stops if lengths is None else torch.zeros_like(self.length.stops)
        self.stops, self.may_stop = stops, stops.tolist()
        self.class_entries: list[Tensor] = []
        if isinstance(self.length, LengthPrefix) and len(labels):
            drawn = self._classes_first(self.length, length_keys)
            lengths = drawn if lengths is None else lengths
        self.limits = torch.full_like(labels, longest) if lengths is None else lengths
        self.codes = labels.new_zeros(len(labels), longest)
        limits = self.limits.tolist()
        # Rows that end together waste nothing, and long sequences that are begun last would end alone.
        self.waiting = [_Request(at, limits[at]) for at in sorted(range(len(limits)), key=limits.__getitem__)]
        if len(set(limits)) < 2:
            self.waiting.reverse()
        self.rows: list[_Request] = []  # of the cache with classes, in order
        self.without: list[_Request] = []  # of that without, likewise

    def run(self) -> tuple[Tensor, Tensor]:
        """Decode everything; returns codes ``(b, m)`` and lengths ``(b,)``."""
        engine, lengths = self.engine, self.limits.tolist()
        while self.waiting or self.rows:
            if not self.rows:
                for _ in range(min(engine.batch_size, len(self.waiting))):
                    self._begin(self.waiting.pop())
            self._guide()
            self._step()
            done = [request for request in self.rows if request.length is not None]
            if engine.policy == "static" and len(done) < len(self.rows):
                continue
            for request in done:
                lengths[request.number] = request.length
                if engine.policy == "refill" and self.waiting:
                    self._begin(self.waiting.pop(), request)
                else:
                    self._remove(self.rows, request, engine.conditional)
                    self._remove(self.without, request, engine.unconditional)
        found = torch.tensor(lengths, dtype=torch.int64, device=self.labels.device)
        self.statistics.tokens = sum(lengths)
        kept = torch.arange(self.codes.shape[1], device=found.device) < found[:, None]
        return self.codes * kept, found

    def _classes_first(self, mode: LengthPrefix, keys: Tensor) -> Tensor:
        """Run each class once, alone: the lengths that follow are drawn, and its keys and values kept for all rows."""
        classes, which = self.labels.unique(return_inverse=True)
        if self.guided_to >= 0:
            classes = F.pad(classes, (0, 1), value=self.model.space.num_classes)
        logits, entries = [], []
        for some in classes.split(self.engine.batch_size):
            states = self._prefill(self.engine.conditional, 0, F.embedding(some, self.model.class_embedding)[:, None])
            logits.append(mode.logits(states[:, 0]))
            entries.append(self.engine.conditional.at(len(some), 0))
        of_class = list(torch.cat(entries, dim=2).unbind(2))
        self.class_entries = [of_class[at] for at in which.tolist()] + of_class[-1:]
        return mode.budgets[race(torch.cat(logits)[which], keys)]

    def _begin(self, request: _Request, old: _Request | None = None) -> None:
        """Give a request the rows of one that has finished, or the next ones."""
        self._place(self.rows, request, old, self.engine.conditional, request.number)
        if self.guided_from == 0:
            self._place(self.without, request, old, self.engine.unconditional, -1)
        else:
            self._remove(self.without, old, self.engine.unconditional)

    def _place(
        self, rows: list[_Request], request: _Request, old: _Request | None, cache: KeyValueCache, entries: int
    ) -> None:
        row = rows.index(old) if old in rows else len(rows)
        rows[row : row + 1] = [request]
        if self.class_entries:
            cache.put(row, 0, self.class_entries[entries])

    def _remove(self, rows: list[_Request], request: _Request | None, cache: KeyValueCache) -> None:
        """Take a request's row away, if it has one; the last row comes to its place."""
        if request in rows:
            row, last = rows.index(request), rows.pop()
            if last is not request:
                rows[row] = last
                cache.move(len(rows), row, self._position(last))

    def _guide(self) -> None:
        """Let requests leave guidance behind its interval, and enter it where it does not begin with the sequence."""
        cache = self.engine.unconditional
        for request in [request for request in self.without if request.tokens > self.guided_to]:
            self._remove(self.without, request, cache)
        entering = [request for request in self.rows if request.tokens == self.guided_from > 0]
        if entering:
            numbers, _ = self._numbers(entering)
            classes = self.model.class_embedding[-1].expand(len(entering), -1)
            codes = F.embedding(self.codes[numbers, : self.guided_from - 1], self.model.code_embedding)
            so_far = torch.cat([self.length.start(classes, self.limits[numbers]), codes], dim=1)
            self._prefill(cache, len(self.without), so_far)
            self.without += entering

    def _prefill(self, cache: KeyValueCache, row: int, x: Tensor) -> Tensor:
        """Feed ``(r, s, d)`` embedded positions to new rows; returns their states."""
        count, length = x.shape[:2]
        x = x if self.model.positions is None else x + self.model.positions[:length]
        rotation = None if self.model.rotation is None else self.model.rotation[:length]
        self.statistics.prefilled += count * length
        states: Tensor = self.engine.transformer(x, rotation, cache.prefill(row, count, length))
        return states

    def _step(self) -> None:
        """Feed every row its last token, draw the next one, and see which sequences have ended."""
        engine, model, rows, without = self.engine, self.model, self.rows, self.without
        every = rows + without
        numbers, tokens = self._numbers(every)
        positions = tokens + (model.length.starts - 1)
        x = F.embedding(self.codes[numbers, (tokens - 1).clamp(min=0)], model.code_embedding)
        if beginning := [at for at, request in enumerate(every) if request.tokens == 0]:
            x[beginning] = self._starts(numbers[beginning], [at >= len(rows) for at in beginning])
        x = x if model.positions is None else x + model.positions[positions]
        rotation = None if model.rotation is None else model.rotation[positions][:, None]
        parts = [(engine.conditional, rows), (engine.unconditional, without)]
        steps = [Step(cache, [self._position(request) for request in some]) for cache, some in parts if some]
        states = engine.transformer(x[:, None], rotation, attend_in(steps, model.size.depth))[:, 0]
        logits = engine.head(states).float()
        if without:
            logits = self._guided(logits)
        numbers, tokens = numbers[: len(rows)], tokens[: len(rows)]
        logits = self.length.mask(logits, tokens * self.stops[tokens])  # state 0 never stops
        drawn = engine.sampling.draw(logits, hashed(self.code_keys[numbers], tokens))
        ended = self._ended(states[: len(rows)], numbers, tokens, drawn)
        self.codes[numbers, tokens] = drawn.clamp(max=len(model.code_embedding) - 1)
        for request, ends in zip(rows, ended, strict=True):
            if request.length is None and ends:
                request.length = request.tokens
            request.tokens += 1
            if request.length is None and request.tokens == request.limit:
                request.length = request.limit
        self.statistics.steps += 1
        self.statistics.rows += len(rows)
        self.statistics.unconditional_rows += len(without)

    def _numbers(self, requests: list[_Request]) -> tuple[Tensor, Tensor]:
        """Of each request its number and its tokens, on the device."""
        pairs = [[request.number for request in requests], [request.tokens for request in requests]]
        numbers, tokens = torch.tensor(pairs, device=self.labels.device)
        return numbers, tokens

    def _position(self, request: _Request) -> int:
        """Of what is fed to get a request's next token."""
        return self.length.starts - 1 + request.tokens

    def _starts(self, numbers: Tensor, are_without: list[bool]) -> Tensor:
        """What rows begin with: the class, or the length behind a class that the cache has already."""
        if isinstance(self.length, LengthPrefix):
            return self.length.embedded(self.limits[numbers])
        nothing = torch.tensor(are_without, device=numbers.device)
        labels = self.labels[numbers].masked_fill(nothing, self.model.space.num_classes)
        return F.embedding(labels, self.model.class_embedding)

    def _guided(self, logits: Tensor) -> Tensor:
        """Logits of all rows -> those of the rows with class, guided where they have a row without."""
        row_of = {request.number: row for row, request in enumerate(self.rows)}
        rows = torch.tensor([row_of[request.number] for request in self.without], device=logits.device)
        scales = logits.new_tensor([self.scales[request.tokens] for request in self.without])
        conditional, unconditional = logits.split([len(self.rows), len(self.without)])
        mixed = guided(conditional[rows], unconditional, scales[:, None])
        return conditional.index_copy(0, rows, mixed)

    def _ended(self, states: Tensor, numbers: Tensor, tokens: Tensor, drawn: Tensor) -> list[bool]:
        """Which rows end before what was drawn for them; the device is asked only where one may."""
        allowed = [self.may_stop[request.tokens] for request in self.rows]
        if not any(allowed):
            return allowed
        ended = self.length.ended(states, drawn, unit_of(hashed(self.stop_keys[numbers], tokens)))
        return [False] * len(allowed) if ended is None else (ended & self.stops[tokens]).tolist()
