"""A policy's choices beside all others on one table of errors: fixed lengths, chance, file sizes, a search, the oracle.

Every way to choose is a matrix of shares: which share of an image goes to which budget. A rule gives each image one
budget; chance, and a fixed length that lies between two budgets, give shares, and their numbers are exact expectations.

Shapes: i images, g budgets.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from framework.allocation.adaptive_tokenizer import AdaptiveTokenizer
from framework.allocation.fidelity import Fidelity, SquaredError
from framework.allocation.rewards import Reward, ThresholdReward, is_unimodal
from framework.allocation.rules import png_bytes
from framework.allocation.search import BinarySearch
from framework.data.interface import ImageData
from framework.data.stream import Sequential
from framework.evaluation.image_metrics import THRESHOLDS, psnr
from framework.evaluation.rate_distortion import (
    Progress,
    RateDistortion,
    default_lengths,
    mean_intervals,
    measure,
    reconstructions,
    rows_by_kind,
)
from framework.tokenizers.interface import Allocation, AllocationRequest

DEFINITIONS = {
    "policies": {
        "policy": "the model's own choice",
        "fixed_at_mean": "one length for all, the policy's mean, where rewards, errors and pass rates are interpolated "
        "linearly between the two budgets beside it",
        "best_fixed": "the budget with the highest mean reward on these images, chosen in hindsight",
        "full": "the longest budget for all",
        "shuffled": "the policy's lengths handed to images by chance: the expectation over all permutations",
        "png": "the policy's lengths handed out in the order of the images' PNG bytes",
        "binary_search": "searches the true errors for search_threshold: the reward's own, or that of 101 quantiles of "
        "all errors with the highest mean reward on these images, which favours the search",
        "oracle": "the best budget of each image, after trying all",
    },
    "length, reward, mse": "means over images; mse is the squared error, a mean over pixels and channels in [0, 1]; "
    "_std is the standard deviation over images, and over budgets where a length is interpolated or left to chance",
    "rqpr": "share of images with a squared error at or below the threshold",
    "passes": "of each image on average, spent on the decision alone, without the encoding and decoding of any choice",
    "differences": "policy minus the other; 95% bootstrap intervals, 1000 resamples of groups, then images, seed 0",
    "gap": "share of the oracle's gain in reward over that fixed length which the policy recovers; null without a gain",
    "rank_correlation": "Spearman's, of the policy's lengths with the squared error at the shortest budget, and with "
    "bytes as PNG; ties at their mean rank; null where either is constant",
    "unimodal": "share of images whose reward never rises after a fall, from budget to budget; _hard: with tau 0",
    "falling": "share of steps from budget to budget, over all images, at which the fidelity's distortion falls",
    "systems": "the same model twice: full keeps the longest budget of every image, adaptive what the policy chooses",
    "bits": "per image, null where tokens are continuous: mean tokens x log2 of the number of codes and, unless all "
    "images have one length, log2 of the number of budgets for the length. Ideal codes of both take that at most",
    "psnr": "dB, mean over images of each image's PSNR",
    "kinds": "the policy's choices over the images of one kind; count: how many there are",
}


@dataclass(frozen=True, eq=False)
class Choice:
    """A way to choose: shares ``(i, g)`` float64 of each image's budgets, and the passes that deciding took."""

    shares: Tensor
    encoder_passes: float = 0.0
    decoder_passes: float = 0.0

    def per_image(self, values: Tensor) -> Tensor:
        """What each image may expect of values ``(i, g)`` or ``(g,)``: ``(i,)``."""
        return (self.shares * values).sum(dim=1)

    def mean(self, values: Tensor) -> float:
        """Over images, of values ``(i, g)`` or ``(g,)``."""
        return self.per_image(values).mean().item()

    def std(self, values: Tensor) -> float:
        """The standard deviation over images and shares of values ``(i, g)`` or ``(g,)``."""
        return self.mean((values - self.mean(values)).square()) ** 0.5


@dataclass(frozen=True, eq=False)
class AllocationStudy:
    """A policy's choices on held-out images, and the errors of these images at every budget.

    Args:
        distortions: by the fidelity that rewards and searches read, ``(i, g)`` float32.
        squared_errors: ``(i, g)`` float64.
        budgets: g lengths, increasing, the policy's among them.
        num_tokens: n of the tokenizer.
        reward: in eval mode.
        allocation: the policy's lengths ``(i,)`` and what they cost.
        encoder_passes_per_trial: as in ``AllocationRequest``.
        png_bytes: ``(i,)``.
        keys: one name per image.
        groups: the photograph that each image was cut from.
        protocol: how all this was measured.
        bits_per_token: log2 of the number of codes; ``None`` where tokens are continuous.
        kinds: what sort of image each one is, where the data set tells.
        thresholds: squared errors at which the quality pass rate is reported.
    """

    distortions: Tensor
    squared_errors: Tensor
    budgets: tuple[int, ...]
    num_tokens: int
    reward: Reward
    allocation: Allocation
    encoder_passes_per_trial: int
    png_bytes: Tensor
    keys: tuple[str, ...]
    groups: tuple[str, ...]
    protocol: Mapping[str, object]
    bits_per_token: float | None = None
    kinds: tuple[str, ...] | None = None
    thresholds: tuple[float, ...] = THRESHOLDS

    @property
    def lengths(self) -> Tensor:
        """The policy's, ``(i,)`` int64."""
        return self.allocation.lengths

    @cached_property
    def rewards(self) -> Tensor:
        """Of every image at every budget, ``(i, g)`` float64."""
        return self._rewards(self.reward)

    @cached_property
    def search_threshold(self) -> float:
        """The distortion that the search asks for; see ``DEFINITIONS``."""
        if isinstance(self.reward, ThresholdReward):
            return self.reward.threshold
        grid = np.quantile(self.distortions.numpy(), np.linspace(0, 1, 101)).tolist()
        return max(grid, key=lambda threshold: self._choice(self.search(threshold)).mean(self.rewards))

    @cached_property
    def choices(self) -> dict[str, Choice]:
        """By the names that ``DEFINITIONS`` explains."""
        budgets, lengths, num_budgets = torch.tensor(self.budgets), self.lengths, len(self.budgets)
        place = np.interp(lengths.double().mean().item(), self.budgets, range(num_budgets))
        fixed_at_mean = (1 - (torch.arange(num_budgets) - place).abs()).clamp(min=0).expand(len(lengths), -1)
        by_size = torch.empty_like(lengths)
        by_size[self.png_bytes.argsort(stable=True)] = lengths.sort().values
        policy = self._choice(self.allocation)
        best_fixed, best = self.rewards.mean(0).argmax(), self.rewards.argmax(dim=1)
        tried = Allocation(budgets[best], num_budgets * self.encoder_passes_per_trial, num_budgets)
        return {
            "policy": policy,
            "fixed_at_mean": Choice(fixed_at_mean),
            "best_fixed": self._choice(Allocation(budgets[best_fixed].repeat(len(lengths)))),
            "full": self._choice(Allocation(budgets[-1].repeat(len(lengths)))),
            "shuffled": Choice(policy.shares.mean(0).expand(len(lengths), -1)),
            "png": self._choice(Allocation(by_size)),
            "binary_search": self._choice(self.search(self.search_threshold)),
            "oracle": self._choice(tried),
        }

    def search(self, threshold: float) -> Allocation:
        """``BinarySearch``, with errors looked up where it would have reconstructed."""

        def look_up(rows: Tensor, lengths: Tensor) -> Tensor:
            return self.distortions[rows, self._columns(lengths)]

        budgets = list(self.budgets)
        searching = BinarySearch(threshold, budgets, _LookedUp(), num_tokens=self.num_tokens, feature_dim=0)
        table = self.distortions
        allocation: Allocation = searching(AllocationRequest(table, table, look_up, self.encoder_passes_per_trial))
        return allocation

    @cached_property
    def tables(self) -> dict[str, Tensor]:
        """What choices are averaged over: ``length (g,)``, ``reward (i, g)`` and ``mse (i, g)``."""
        lengths = torch.tensor(self.budgets, dtype=torch.float64)
        return {"length": lengths, "reward": self.rewards, "mse": self.squared_errors}

    @cached_property
    def rank_correlation(self) -> dict[str, float | None]:
        """Of the policy's lengths, with ``error_at_shortest`` and with ``png_bytes``."""
        others = {"error_at_shortest": self.squared_errors[:, 0], "png_bytes": self.png_bytes}
        return {name: rank_correlation(self.lengths, other) for name, other in others.items()}

    def summary(self) -> dict[str, Any]:
        """The protocol and every number that ``DEFINITIONS`` explains; plain JSON types only."""
        policies = {name: self._numbers(choice) for name, choice in self.choices.items()}
        rewards = {"unimodal": self.rewards}
        if isinstance(self.reward, ThresholdReward):
            rewards["unimodal_hard"] = self._rewards(ThresholdReward(self.reward.threshold, self.reward.gamma, tau=0))
        policy, oracle = policies["policy"]["reward"], policies["oracle"]["reward"]
        fixed = {name: policies[name]["reward"] for name in ("fixed_at_mean", "best_fixed")}
        return {
            "protocol": dict(self.protocol),
            "policies": policies,
            "differences": {name: self._difference(other) for name, other in self.choices.items() if name != "policy"},
            # Rounding alone may put a gain of nothing a little away from zero.
            "gap": {name: (policy - r) / (oracle - r) if oracle - r > 1e-12 else None for name, r in fixed.items()},
            "rank_correlation": self.rank_correlation,
            "search_threshold": self.search_threshold,
            **{name: is_unimodal(table).double().mean().item() for name, table in rewards.items()},
            "falling": (self.distortions.diff(dim=1) < 0).double().mean().item(),
        }

    def systems(self) -> dict[str, dict[str, Any]]:
        """``full`` and ``adaptive``, the paper's two rows: the numbers of these policies, ``psnr`` and ``bits``."""
        named = {"full": self.choices["full"], "adaptive": self.choices["policy"]}
        return {
            name: self._numbers(choice) | {"psnr": choice.mean(psnr(self.squared_errors)), "bits": self._bits(choice)}
            for name, choice in named.items()
        }

    def _bits(self, choice: Choice) -> float | None:
        if self.bits_per_token is None:
            return None
        lengths = self.tables["length"]
        return choice.mean(lengths) * self.bits_per_token + (math.log2(len(lengths)) if choice.std(lengths) else 0)

    def by_kind(self) -> dict[str, dict[str, Any]]:
        """``count`` and the policy's mean length, reward and error of each kind of image; empty without kinds."""
        chosen = {metric: self.choices["policy"].per_image(table) for metric, table in self.tables.items()}
        return {
            kind: {"count": len(rows), **{metric: values[rows].mean().item() for metric, values in chosen.items()}}
            for kind, rows in rows_by_kind(self.kinds).items()
        }

    def _numbers(self, choice: Choice) -> dict[str, Any]:
        return {
            **{metric: choice.mean(table) for metric, table in self.tables.items()},
            **{f"{metric}_std": choice.std(table) for metric, table in self.tables.items()},
            "rqpr": {str(most): choice.mean((self.squared_errors <= most).double()) for most in self.thresholds},
            "encoder_passes": choice.encoder_passes,
            "decoder_passes": choice.decoder_passes,
        }

    def _difference(self, choice: Choice) -> dict[str, object]:
        policy = self.choices["policy"]
        tables = (self.rewards, self.squared_errors)
        gains = torch.stack([policy.per_image(table) - choice.per_image(table) for table in tables], dim=1)
        reward, mse = gains.mean(0).tolist()
        reward_interval, mse_interval = mean_intervals(gains, self.groups).T.tolist()
        return {"reward": reward, "reward_interval": reward_interval, "mse": mse, "mse_interval": mse_interval}

    def spread(self, number: int) -> list[int]:
        """Rows of at most ``number`` images, evenly spaced from the shortest of the policy's lengths to the longest."""
        places = torch.linspace(0, len(self.lengths) - 1, min(number, len(self.lengths))).round().long()
        return self.lengths.argsort(stable=True)[places].tolist()

    @torch.no_grad()
    def _rewards(self, reward: Reward) -> Tensor:
        rewards: Tensor = reward(self.distortions.double(), torch.tensor(self.budgets), self.num_tokens)
        return rewards

    def _columns(self, lengths: Tensor) -> Tensor:
        return torch.searchsorted(torch.tensor(self.budgets), lengths)

    def _choice(self, allocation: Allocation) -> Choice:
        shares = one_hot(self._columns(allocation.lengths), len(self.budgets)).double()
        return Choice(shares, allocation.encoder_passes, allocation.decoder_passes)


class _LookedUp(Fidelity):
    """Of a request whose reconstructions are the distortions themselves."""

    def forward(self, reconstructions: Tensor, images: Tensor) -> Tensor:
        return reconstructions


@torch.no_grad()
def study_allocation(
    model: AdaptiveTokenizer,
    reward: Reward,
    fidelity: Fidelity,
    data: ImageData,
    record: Mapping[str, object],
    limit: int | None = None,
    progress: Progress | None = None,
) -> AllocationStudy:
    """Measure images at every budget of the policy; with the default lengths where it has one only.

    Args:
        model: in eval mode, with any policy.
        reward: in eval mode; what a choice is worth.
        fidelity: what the reward reads.
        data: images that were not trained on.
        record: which weights these are; goes into the protocol.
        limit: measure a fixed random subset of so many images.
        progress: told how far the measuring is.

    Raises:
        ValueError, TooManyBroken: see ``measure``.
    """
    tokenizer, policy = model.tokenizer, model.policy
    device = next(tokenizer.parameters()).device
    budgets = policy.budgets if len(policy.budgets) > 1 else {*policy.budgets, *default_lengths(model.num_tokens)}

    def table(name: str, fidelity: Fidelity) -> RateDistortion:
        def distortions(images: Tensor, lengths: Sequence[int]) -> Tensor:
            images = images.to(device)
            rebuilt = reconstructions(tokenizer, images, lengths)
            return torch.stack([fidelity(reconstruction, images) for reconstruction in rebuilt], dim=1)

        return measure(name, distortions, data, sorted(budgets), limit, record=record, progress=progress)

    errors = table("errors", fidelity)
    squared = errors if type(fidelity) is SquaredError else table("squared errors", SquaredError())
    lengths: list[Tensor] = []
    sizes: list[Tensor] = []
    passes = torch.zeros(2, dtype=torch.float64)
    for batch in Sequential(data, 64, limit):
        allocation = model.allocate(batch.images.to(device), batch.keys)[1]
        lengths.append(allocation.lengths.cpu())
        sizes.append(png_bytes(batch.images))
        passes += len(batch.keys) * torch.tensor([allocation.encoder_passes, allocation.decoder_passes])
    setting = {"policy": type(policy).__name__, "reward": describe(reward), "fidelity": repr(fidelity)}
    return AllocationStudy(
        errors.errors.float(),
        squared.errors,
        errors.lengths,
        model.num_tokens,
        reward,
        Allocation(torch.cat(lengths), *(passes / len(errors.keys)).tolist()),
        0 if model.contract == "truncate" else 1,
        torch.cat(sizes),
        errors.keys,
        errors.groups,
        {**errors.protocol, "num_tokens": model.num_tokens, **setting},
        None if (vocabulary := tokenizer.quantizer.vocabulary) is None else math.log2(vocabulary),
        errors.kinds,
    )


def describe(module: nn.Module) -> dict[str, object]:
    """A module's class, the numbers that it was made with and what it has learned, as plain JSON; parts likewise."""
    numbers = {name: value for name, value in vars(module).items() if type(value) in (int, float)}
    learned = {name: value.tolist() for name, value in module.named_buffers(recurse=False)}
    parts = {name: describe(part) for name, part in module.named_children()}
    return {"name": type(module).__name__, **numbers, **learned, **parts}


def rank_correlation(first: Tensor, second: Tensor) -> float | None:
    """Spearman's correlation of two ``(i,)``, ties at their mean rank; ``None`` where one of them is constant."""
    ranks = torch.stack([_mean_ranks(first), _mean_ranks(second)])
    return torch.corrcoef(ranks)[0, 1].item() if (ranks.amax(1) > ranks.amin(1)).all() else None


def _mean_ranks(values: Tensor) -> Tensor:
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1) / 2).double()[place]
