"""What tasks around a policy have in common: the tokenizer that budgets itself, and how its choices are judged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from framework.allocation.adaptive_tokenizer import AdaptiveTokenizer
from framework.allocation.fidelity import Fidelity, SquaredError
from framework.allocation.rewards import Reward
from framework.evaluation.allocation_report import compare_allocations, evaluate_allocation
from framework.tasks.interface import Report, Task
from framework.tokenizers.interface import AllocationPolicy
from framework.tokenizers.tokenizer import Tokenizer


class AllocationTask(Task):
    """A tokenizer with its policy, which evaluations judge by a reward.

    Args:
        adaptive: the tokenizer with its policy.
        reward: what a choice is worth.
        fidelity: how a reconstruction is measured; ``SquaredError`` unless given.
    """

    def __init__(self, adaptive: AdaptiveTokenizer, reward: Reward, fidelity: Fidelity | None) -> None:
        super().__init__()
        self.adaptive = adaptive
        self.reward = reward
        self.fidelity = fidelity or SquaredError()

    @property
    def model(self) -> AdaptiveTokenizer:
        """The tokenizer with its policy."""
        return self.adaptive

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer alone."""
        return self.adaptive.tokenizer

    @property
    def policy(self) -> AllocationPolicy:
        """The policy alone."""
        return self.adaptive.policy

    def report(self, wanted: Report) -> None:
        """The study of allocation: the policy beside fixed lengths, rules, a search and the best choice."""
        _refuse(wanted)
        (history,) = wanted.histories.values()
        evaluate_allocation(
            self.adaptive,
            self.reward,
            self.fidelity,
            wanted.data,
            wanted.folder,
            wanted.record,
            history,
            wanted.measures,
            wanted.limit,
            wanted.progress,
        )

    @classmethod
    def compare(cls, tasks: Mapping[str, Any], wanted: Report) -> None:
        """Rewards and lengths, and how training went."""
        _refuse(wanted)
        models = {
            name: (task.adaptive, task.reward, task.fidelity, wanted.histories[name]) for name, task in tasks.items()
        }
        compare_allocations(models, wanted.data, wanted.folder, wanted.measures, wanted.limit, wanted.progress)


def _refuse(wanted: Report) -> None:
    if wanted.measures.lengths is not None:
        raise ValueError("the policy chooses the lengths: leave out --lengths and evaluation.lengths")
    if wanted.measures.distances:
        raise ValueError(
            "a policy is judged by its reward: measure distances on the run that has trained its tokenizer, and leave "
            "out --distances and evaluation.distances here"
        )
