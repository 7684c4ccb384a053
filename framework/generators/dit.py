"""A diffusion transformer (Peebles and Xie 2023) over 1D continuous tokens, as many as were decided before.

Shapes: b batch, n tokens, d channels of a token, w width.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from framework.config.registry import Factory
from framework.data.token_file import TokenFile
from framework.generators.diffusion_objectives import DiffusionObjective, Velocity
from framework.generators.guidance import Guidance, guided
from framework.generators.interface import GENERATORS, GeneratorLoss, TokenSpace
from framework.generators.latent_scale import LatentScale
from framework.generators.length_first import LengthFirst
from framework.generators.length_prior import LengthPrior, equal_lengths
from framework.generators.samplers import DDIM, Euler, Sampler
from framework.generators.sizes import Size, size_of
from framework.nn.adaptive_transformer import AdaptiveTransformer, TimeEmbedding
from framework.nn.attention import mask_to_bias
from framework.nn.transformer import Activation, BlockOptions, init_linear
from framework.runtime.hashing import hashed, normals, purpose_key
from framework.tokens import Tokens

SIZES = {"S": Size(384, 12, 6), "B": Size(768, 12, 12), "L": Size(1024, 24, 16), "XL": Size(1152, 28, 16)}


@GENERATORS.register()
class DiT(LengthFirst):
    """All tokens of a sequence out of noise together, given the class and the length.

    Rows with and without class are told the same length, so that guidance never acts on it.

    Args:
        size: one of DiT's, or null for ``width``, ``depth`` and ``num_heads``.
        width: w.
        depth: blocks.
        num_heads: heads of a block.
        mlp_ratio: hidden channels of the MLP over w.
        mlp: its activation.
        qk_norm: normalise queries and keys of each head; without it bfloat16 diverges late in long runs.
        positions: ``learned`` adds a table; ``rope1d`` turns with the position in the sequence; both may stand.
        rope_base: of the slowest pair's period, ``2 pi rope_base`` positions.
        objective: what is predicted; null for ``Velocity``.
        sampler: of the objective's; null for ``Euler``, and for ``DDIM`` where the objective is ``DDPM``.
        length_prior: where lengths come from that nobody asks for; null for ``EmpiricalLengthPrior``.
        shrinkage: of the scale of latents, see ``LatentScale``.
        label_dropout: share of training sequences without class, for guidance.
        mixed_lengths: how a training batch of several lengths is computed: in ``groups`` of equal length, or at once
            with a mask over ``key_padding``. Gradients are equal, and groups take half the time where there are few
            lengths, and no more where there are sixteen; only very small models wait for their many operations.
        guided_channels: so many of a token's first channels are guided; null for all. Official weights guide three of
            four latent channels.
        batch_size: sequences of the longest length at a time when generating; of shorter ones, as many tokens.
        space: which sequences there are, given by the task.

    Raises:
        ValueError: if tokens are codes, or numbers do not fit.
    """

    def __init__(
        self,
        size: Literal["S", "B", "L", "XL"] | None = "B",
        width: int | None = None,
        depth: int | None = None,
        num_heads: int | None = None,
        mlp_ratio: float = 4.0,
        mlp: Activation = "gelu_tanh",
        qk_norm: bool = True,
        positions: list[Literal["learned", "rope1d"]] | None = None,
        rope_base: float = 10_000.0,
        objective: DiffusionObjective | None = None,
        sampler: Sampler | None = None,
        length_prior: Factory[LengthPrior] | None = None,
        shrinkage: float = 16.0,
        label_dropout: float = 0.1,
        mixed_lengths: Literal["groups", "key_padding"] = "groups",
        guided_channels: int | None = None,
        batch_size: int = 64,
        *,
        space: TokenSpace,
    ) -> None:
        super().__init__(space, label_dropout, length_prior, batch_size)
        if space.vocabulary is not None:
            raise ValueError("a DiT makes continuous tokens, and this tokenizer has codes: take LlamaGenAR or MaskGIT")
        self.mixed_lengths = mixed_lengths
        self.guided_channels = space.dim if guided_channels is None else guided_channels
        if not 1 <= self.guided_channels <= space.dim:
            raise ValueError(f"guided_channels are from 1 to {space.dim}, got {guided_channels}")
        self.objective = Velocity() if objective is None else objective
        self.sampler = sampler or (Euler() if isinstance(self.objective, Velocity) else DDIM())
        self.sampler.check(self.objective)
        width, depth, num_heads = size_of(SIZES, size, width, depth, num_heads)
        kinds = set(positions or ["learned"])
        self.embed = nn.Linear(space.dim, width)
        self.positions = nn.Parameter(torch.randn(space.longest, width) / 2) if "learned" in kinds else None
        self.time = TimeEmbedding(width)
        self.class_embedding = nn.Parameter(torch.randn(space.num_classes + 1, width) / 2)
        lengths = len(space.budgets)
        self.length_embedding = nn.Parameter(torch.zeros(lengths, width)) if lengths > 1 else None
        options = BlockOptions(
            mlp=mlp, mlp_ratio=mlp_ratio, qk_norm=qk_norm, rope_base=rope_base if "rope1d" in kinds else None
        )
        self.transformer = AdaptiveTransformer(width, depth, num_heads, options)
        self.head = nn.Linear(width, space.dim * self.objective.outputs)
        init_linear(self.embed)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.scale = LatentScale(space, shrinkage)

    def learn_from(self, file: TokenFile) -> None:
        """Lengths of each class, and the scale of latents."""
        if file.statistics is None:
            raise ValueError(f"{file.path} holds codes, and a DiT learns from latents")
        super().learn_from(file)
        self.scale.learn(file.statistics)

    def condition(self, times: Tensor, labels: Tensor, lengths: Tensor) -> Tensor:
        """What all blocks read, ``(b, w)``; times as the network is told them."""
        condition = self.time(times) + F.embedding(labels, self.class_embedding)
        if self.length_embedding is None:
            return condition
        return condition + self.length_embedding[self.prior.places(lengths)]

    def forward(
        self, x: Tensor, times: Tensor, labels: Tensor, lengths: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """Noised tokens at unit scale ``(b, n, d)`` -> the objective's outputs ``(b, n, outputs d)`` float32.

        Args:
            times: ``(b,)``, or ``(1,)`` for all, from 0 to 1000.
            labels: ``(b,)``; ``num_classes`` stands for none.
            lengths: ``(b,)``.
            mask: where tokens count, ``(b, n)``; ``None`` for everywhere.
        """
        hidden = self.embed(x.to(self.embed.weight.dtype))
        if self.positions is not None:
            hidden = hidden + self.positions[: x.shape[1]]
        bias = None if mask is None else mask_to_bias(mask)[:, None, None]
        hidden = self.transformer(hidden, self.condition(times, labels, lengths), bias)
        outputs: Tensor = self.head(hidden).float()
        return outputs

    def token_loss(self, tokens: Tokens, labels: Tensor, generator: torch.Generator) -> GeneratorLoss:
        """The objective's losses, means over the channels of every kept token."""
        tokens = tokens.truncate(int(tokens.lengths.max()))
        mask, device = tokens.mask, labels.device
        dropped = torch.rand(len(labels), generator=generator) < self.label_dropout
        if self.training:
            labels = labels.masked_fill(dropped.to(device), self.space.num_classes)
        times = self.objective.draw_times(len(labels), generator).to(device)
        clean = self.scale.normalise(tokens.latents).masked_fill(~mask[..., None], 0)
        noise = torch.zeros_like(clean)
        # As many numbers as tokens are kept, so that padding does not shift the draws.
        count = mask.sum()
        noise[mask] = torch.randn(int(count), self.space.dim, generator=generator).to(device)
        sums: dict[str, Tensor] = {}  # at each position
        for rows, length, kept in self._parts(tokens.lengths, mask):
            real, drawn, at = clean[rows, :length], noise[rows, :length], times[rows]
            x = self.objective.noised(real, drawn, at)
            output = self(x, self.objective.network_times(at), labels[rows], tokens.lengths[rows], kept)
            for name, each in self.objective.losses(output, x, real, drawn, at).items():
                total = (each if kept is None else each.masked_fill(~kept, 0)).sum(0)
                sums[name] = sums.get(name, 0) + F.pad(total, (0, self.space.longest - length))
        by_position = next(iter(sums.values())).detach()
        return GeneratorLoss({name: each.sum() / count for name, each in sums.items()}, count, {}, by_position)

    def _parts(self, lengths: Tensor, mask: Tensor) -> Iterator[tuple[slice | Tensor, int, Tensor | None]]:
        """Rows that are computed together, the length they are padded to, and where their tokens count."""
        if bool(mask.all()):
            yield slice(None), mask.shape[1], None
        elif self.mixed_lengths == "key_padding":
            yield slice(None), mask.shape[1], mask
        else:
            yield from ((rows, length, None) for length, rows in equal_lengths(lengths, mask.numel()))

    def make(self, labels: Tensor, length: int, seed: int, sample_ids: Tensor, guidance: Guidance) -> Tensor:
        """Latents ``(b, n, d)`` of sequences of one length."""
        noise = partial(self._noise, hashed(purpose_key(seed, "noise"), sample_ids), length)
        predict = partial(self._predict, labels, torch.full_like(labels, length), guidance)
        return self.scale.denormalise(self.sampler.sample(predict, noise, self.objective))

    def _noise(self, keys: Tensor, length: int, step: int) -> Tensor:
        keys = hashed(keys, torch.full_like(keys, step))
        return normals(keys, length * self.space.dim).view(len(keys), length, self.space.dim)

    def _predict(
        self, labels: Tensor, lengths: Tensor, guidance: Guidance, x: Tensor, time: Tensor, progress: float
    ) -> Tensor:
        """Guided outputs; where guidance is 1, rows without class are not computed."""
        scale, time = guidance.scale_at(progress), self.objective.network_times(time)
        if scale == 1:
            outputs: Tensor = self(x, time, labels, lengths)
            return outputs
        every = torch.cat([labels, torch.full_like(labels, self.space.num_classes)])
        both = self(torch.cat([x, x]), time, every, torch.cat([lengths, lengths]))
        conditional, unconditional = both.chunk(2)
        split = [self.guided_channels, conditional.shape[-1] - self.guided_channels]
        (mixed, kept), (without, _) = conditional.split(split, dim=-1), unconditional.split(split, dim=-1)
        return torch.cat([guided(mixed, without, scale), kept], dim=-1)
