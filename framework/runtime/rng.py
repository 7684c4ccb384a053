"""Random numbers: one generator per purpose, so that drawing more for one never shifts another."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor


def stable_seed(seed: int, *names: str | int) -> int:
    """A seed for one purpose, the same in every process and Python version, from 0 to 2^63 - 1."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


class Generators:
    """CPU generators by purpose ("lengths", "noise"), made when first asked for.

    Args:
        seed: of the run.
        rank: of the process; ranks draw different numbers.
    """

    def __init__(self, seed: int, rank: int = 0) -> None:
        self.seed = seed
        self.rank = rank
        self._generators: dict[str, torch.Generator] = {}

    def __call__(self, purpose: str) -> torch.Generator:
        """The generator of one purpose; its state goes on from call to call."""
        if purpose not in self._generators:
            generator = torch.Generator()
            generator.manual_seed(stable_seed(self.seed, purpose, self.rank))
            self._generators[purpose] = generator
        return self._generators[purpose]

    def seed_global(self) -> None:
        """Seed torch's own generators, for dropout and other people's components."""
        torch.manual_seed(stable_seed(self.seed, "global", self.rank))

    def state_dict(self) -> dict[str, Tensor]:
        """The state of every generator in use, by purpose."""
        return {purpose: generator.get_state() for purpose, generator in self._generators.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue exactly where ``state`` was taken; purposes that it lacks start from their seeds."""
        self._generators.clear()
        for purpose, value in state.items():
            self(purpose).set_state(value)


def global_state() -> dict[str, Tensor]:
    """The states of torch's own generators by device."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_global_state(states: Mapping[str, Tensor]) -> None:
    """Put torch's own generators back; a state for a device that is not here is left out."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
