"""MAR's diffusion head (Li et al. 2024): a small network that makes one continuous token out of noise, given a state.

Shapes: r tokens, d channels of a token, s channels of a state, w width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from framework.generators.diffusion_objectives import DiffusionObjective, Velocity
from framework.generators.guidance import guided
from framework.generators.samplers import DDIM, Euler, Sampler
from framework.nn.adaptive_transformer import AdaptiveNorm, TimeEmbedding
from framework.nn.transformer import init_linear
from framework.runtime.hashing import hashed, normals


class AdaptiveLayer(nn.Module):
    """A residual MLP whose norm is shifted and scaled, and whose result is gated, by a condition."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = AdaptiveNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.modulation = nn.Linear(width, 3 * width)
        self.apply(init_linear)
        nn.init.zeros_(self.modulation.weight)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """``(r, 1, w)`` and a condition ``(r, 1, w)`` behind its activation -> ``(r, 1, w)``."""
        shift, scale, gate = self.modulation(condition).chunk(3, dim=-1)
        return torch.addcmul(x, gate, self.mlp(self.norm(x, shift, scale)))


class DiffusionHead(nn.Module):
    """The distribution of a token given a state, learned and drawn from by any objective and its samplers.

    Args:
        dim: d.
        state_dim: s.
        width: w.
        depth: layers.
        objective: what is predicted; ``None`` for ``Velocity``.
        sampler: of the objective's; ``None`` for ``Euler`` in 25 steps, and for ``DDIM`` where the objective is
            ``DDPM``.
        draws: of time and noise for each token of a training batch: the head is small beside what makes its states.

    Raises:
        ValueError: if the sampler is of another objective, or a number is below 1.
    """

    def __init__(
        self,
        dim: int,
        state_dim: int,
        width: int = 1024,
        depth: int = 3,
        objective: DiffusionObjective | None = None,
        sampler: Sampler | None = None,
        draws: int = 4,
    ) -> None:
        super().__init__()
        if min(width, depth, draws) < 1:
            raise ValueError(f"a diffusion head has width, depth and draws of 1 or more, got {width}, {depth}, {draws}")
        self.dim, self.draws = dim, draws
        self.objective = objective or Velocity()
        self.sampler = sampler or (Euler(25) if isinstance(self.objective, Velocity) else DDIM())
        self.sampler.check(self.objective)
        self.embed = nn.Linear(dim, width)
        self.time = TimeEmbedding(width)
        self.condition = nn.Linear(state_dim, width)
        self.blocks = nn.ModuleList(AdaptiveLayer(width) for _ in range(depth))
        self.norm = AdaptiveNorm(width)
        self.modulation = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, dim * self.objective.outputs)
        for layer in (self.embed, self.condition):
            init_linear(layer)
        for layer in (self.modulation, self.head):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, times: Tensor, states: Tensor) -> Tensor:
        """Noised tokens ``(r, 1, d)``, times ``(r,)`` or ``(1,)``, states ``(r, s)`` -> ``(r, 1, outputs d)``."""
        condition = nn.functional.silu(self.time(times) + self.condition(states))[:, None]
        hidden = self.embed(x.to(self.embed.weight.dtype))
        for block in self.blocks:
            hidden = block(hidden, condition)
        outputs: Tensor = self.head(self.norm(hidden, *self.modulation(condition).chunk(2, dim=-1))).float()
        return outputs

    def losses(self, states: Tensor, clean: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Of tokens ``(r, d)`` with states ``(r, s)``: named, each a mean over channels and draws, ``(r,)``."""
        count = len(clean)
        clean, states = clean.repeat(self.draws, 1)[:, None], states.repeat(self.draws, 1)
        times = self.objective.draw_times(len(clean), generator).to(clean.device)
        noise = torch.randn(clean.shape, generator=generator).to(clean.device)
        x = self.objective.noised(clean, noise, times)
        output = self(x, self.objective.network_times(times), states)
        losses = self.objective.losses(output, x, clean, noise, times)
        return {name: each.view(self.draws, count).mean(0) for name, each in losses.items()}

    def sample(self, states: Tensor, keys: Tensor, without: Tensor | None = None, scale: float = 1.0) -> Tensor:
        """One token for each state ``(r, s)``: ``(r, d)``, a function of ``keys (r,)``, see ``normals``.

        Args:
            without: states of the same sequences without class, ``(r, s)``, where there is guidance.
            scale: of guidance.
        """

        def predict(x: Tensor, time: Tensor, progress: float) -> Tensor:
            time = self.objective.network_times(time)
            if without is None:
                outputs: Tensor = self(x, time, states)
                return outputs
            conditional, unconditional = self(torch.cat([x, x]), time, torch.cat([states, without])).chunk(2)
            mixed = guided(conditional[..., : self.dim], unconditional[..., : self.dim], scale)
            return torch.cat([mixed, conditional[..., self.dim :]], dim=-1)

        def noise(step: int) -> Tensor:
            return normals(hashed(keys, torch.full_like(keys, step)), self.dim)[:, None]

        return self.sampler.sample(predict, noise, self.objective)[:, 0]
