"""Autoregressive generation of continuous tokens, each from a diffusion head (MAR's; Semanticist, Wen et al. 2025).

Shapes: b batch, n tokens of the longest sequence, t tokens that are there, d channels of a token, w width.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from framework.config.registry import Factory
from framework.data.token_file import TokenFile
from framework.generators.autoregressive import SIZES
from framework.generators.diffusion_head import DiffusionHead
from framework.generators.diffusion_objectives import DiffusionObjective
from framework.generators.guidance import Guidance
from framework.generators.interface import GENERATORS, GeneratorLoss, TokenSpace
from framework.generators.key_value_cache import KeyValueCache, Step, attend_in
from framework.generators.latent_scale import LatentScale
from framework.generators.length_first import LengthFirst
from framework.generators.length_prior import LengthPrior
from framework.generators.samplers import Sampler
from framework.generators.sizes import size_of
from framework.nn.causal_transformer import CausalTransformer
from framework.nn.transformer import init_linear
from framework.runtime.hashing import hashed, purpose_key
from framework.tokens import Tokens


@GENERATORS.register()
class ContinuousAR(LengthFirst):
    """LlamaGen's transformer over latents: each is drawn by a ``DiffusionHead`` from the state of those before it.

    The length is told at the start together with the class; rows without class have the same.

    Args:
        size: one of LlamaGen's, or null for ``width``, ``depth`` and ``num_heads``.
        width: w.
        depth: blocks.
        num_heads: heads of a block.
        mlp_ratio: hidden channels of the MLP, which has three matrices, over w.
        qk_norm: normalise queries and keys of each head.
        head_width: of the diffusion head.
        head_depth: its layers.
        draws: of noise for each training token.
        objective: of the head; null for ``Velocity``.
        sampler: of the head; null for ``Euler`` in 25 steps, or ``DDIM``.
        length_prior: where lengths come from that nobody asks for; null for ``EmpiricalLengthPrior``.
        shrinkage: of the scale of latents, see ``LatentScale``.
        label_dropout: share of training sequences without class, for guidance.
        batch_size: sequences of the longest length at a time when generating; of shorter ones, as many tokens.
        space: which sequences there are, given by the task.

    Raises:
        ValueError: if tokens are codes, or numbers do not fit.
    """

    def __init__(
        self,
        size: Literal["B", "L", "XL", "XXL", "3B"] | None = "B",
        width: int | None = None,
        depth: int | None = None,
        num_heads: int | None = None,
        mlp_ratio: float = 8 / 3,
        qk_norm: bool = True,
        head_width: int = 1024,
        head_depth: int = 3,
        draws: int = 4,
        objective: DiffusionObjective | None = None,
        sampler: Sampler | None = None,
        length_prior: Factory[LengthPrior] | None = None,
        shrinkage: float = 16.0,
        label_dropout: float = 0.1,
        batch_size: int = 64,
        *,
        space: TokenSpace,
    ) -> None:
        super().__init__(space, label_dropout, length_prior, batch_size)
        if space.vocabulary is not None:
            raise ValueError("ContinuousAR makes latents, and this tokenizer has codes: take LlamaGenAR")
        self.size = size_of(SIZES, size, width, depth, num_heads)
        width = self.size.width
        self.class_embedding = nn.Parameter(torch.randn(space.num_classes + 1, width) / 2)
        self.length_embedding = nn.Parameter(torch.zeros(len(space.budgets), width))
        self.embed = nn.Linear(space.dim, width)
        self.positions = nn.Parameter(torch.randn(space.longest, width) / 2)
        self.transformer = CausalTransformer(width, *self.size[1:], round(width * mlp_ratio), qk_norm)
        self.head = DiffusionHead(space.dim, width, head_width, head_depth, objective, sampler, draws)
        init_linear(self.embed)
        self.scale = LatentScale(space, shrinkage)

    @property
    def sampler(self) -> Sampler:
        """Of the head."""
        return self.head.sampler

    def learn_from(self, file: TokenFile) -> None:
        """Lengths of each class, and the scale of latents."""
        if file.statistics is None:
            raise ValueError(f"{file.path} holds codes, and ContinuousAR learns from latents")
        super().learn_from(file)
        self.scale.learn(file.statistics)

    def inputs(self, latents: Tensor, labels: Tensor, lengths: Tensor) -> Tensor:
        """The transformer's inputs: the start, and latents at unit scale ``(b, t, d)``; ``(b, 1 + t, w)``."""
        start = F.embedding(labels, self.class_embedding)
        start = start + F.embedding(self.prior.places(lengths), self.length_embedding)
        tokens = self.embed(latents.to(self.embed.weight.dtype))
        return torch.cat([start[:, None], tokens], dim=1) + self.positions[: 1 + latents.shape[1]]

    def states(self, latents: Tensor, labels: Tensor, lengths: Tensor) -> Tensor:
        """States before each token, ``(b, t, w)``, of latents at unit scale ``(b, t, d)``; the last is not read."""
        states: Tensor = self.transformer(self.inputs(latents[:, :-1], labels, lengths), None)
        return states

    def token_loss(self, tokens: Tokens, labels: Tensor, generator: torch.Generator) -> GeneratorLoss:
        """The head's losses, means over the channels of every kept token."""
        tokens = tokens.truncate(int(tokens.lengths.max()))
        kept, count = tokens.mask, tokens.lengths.sum()
        dropped = torch.rand(len(labels), generator=generator).to(labels.device) < self.label_dropout
        if self.training:
            labels = labels.masked_fill(dropped, self.space.num_classes)
        # Padding is in no kept token's past; as zeros it cannot make a number that is none.
        clean = self.scale.normalise(tokens.latents).masked_fill(~kept[..., None], 0)
        states = self.states(clean, labels, tokens.lengths)
        losses = self.head.losses(states[kept], clean[kept], generator)
        own = next(iter(losses.values())).detach()
        by_position = own.new_zeros(self.space.longest).index_add(0, kept.nonzero()[:, 1], own)
        return GeneratorLoss({name: each.sum() / count for name, each in losses.items()}, count, {}, by_position)

    def make(self, labels: Tensor, length: int, seed: int, sample_ids: Tensor, guidance: Guidance) -> Tensor:
        """Latents ``(b, t, d)`` of sequences of one length.

        Rows without class stand behind the others. They are computed from where guidance begins, with what they have
        missed at once, to where it ends.
        """
        count, keys = len(labels), hashed(purpose_key(seed, "noise"), sample_ids)
        every = torch.cat([labels, torch.full_like(labels, self.space.num_classes)])
        both = torch.full_like(every, length)
        width, depth, heads = self.size
        cache = KeyValueCache((depth, 2 * count, heads, length, width // heads), keys.device, self.embed.weight.dtype)
        latents = torch.zeros(2 * count, length, self.space.dim, device=labels.device)
        reached = 0  # positions that rows without class have in the cache
        for place in range(length):
            scale, so_far = guidance.scale_at(place / self.space.longest), latents[:, :place]
            joined = scale != 1 and reached == place
            rows = slice(2 * count if joined else count)
            x = self.inputs(so_far[rows], every[rows], both[rows])[:, -1:]
            step = Step(cache, [place] * len(x))
            states = self.transformer(x, None, attend_in([step], depth))[:, 0]
            without = states[count:] if joined else None
            if scale != 1 and not joined:
                x = self.inputs(so_far[count:], every[count:], both[count:])
                without = self.transformer(x, None, cache.prefill(count, count, place + 1))[:, -1]
            if scale != 1:
                reached = place + 1
            made = self.head.sample(states[:count], hashed(keys, torch.full_like(keys, place)), without, scale)
            latents[:, place] = made.repeat(2, 1)
        return self.scale.denormalise(latents[:count])
