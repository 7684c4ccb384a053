"""Training a policy that chooses how many tokens each image keeps, for a tokenizer that stays as it is.

Shapes: b batch, g candidate budgets, k budgets of each image that an objective wants tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from framework.allocation.adaptive_tokenizer import AdaptiveTokenizer, allocation_request
from framework.allocation.error_table import ErrorTable
from framework.allocation.fidelity import Fidelity
from framework.allocation.learned_policy import LearnedPolicy
from framework.allocation.objectives import PolicyObjective, RewardsAt
from framework.allocation.rewards import Reward
from framework.allocation.search import Trials
from framework.config.registry import Factory
from framework.data.interface import Batch, ImageData
from framework.tasks.allocation_task import AllocationTask
from framework.tasks.interface import TASKS, Context, StepOutput, Turn, check_frozen
from framework.tokenizers.interface import AllocationPolicy, AllocationRequest
from framework.tokenizers.tokenizer import Tokenizer


class Outlook(NamedTuple):
    """What a policy learns from a batch, kept over several updates on it.

    Args:
        features: ``(b, f)``.
        rewards_at: budgets of each image, by number, ``(b, k)`` -> their rewards ``(b, k)``.
        log_probabilities: of the policy before the first update, ``(b, g)``.
    """

    features: Tensor
    rewards_at: RewardsAt
    log_probabilities: Tensor | None = None


@TASKS.register()
class TrainAllocation(AllocationTask):
    """A policy learns from what budgets are worth (AdaTok, stage two); a rule learns nothing and is only evaluated.

    Args:
        policy: what chooses. With a rule or a search, which have nothing to train, ``train.max_steps`` may be 1: the
            run then evaluates it, and loads as one model with it.
        reward: what a budget is worth.
        objective: how a learned policy learns from that; ``null`` for rules.
        fidelity: how a reconstruction is measured; ``SquaredError`` unless given.
        distortions: ``table`` measures every training image at every budget, as it looks in the first epoch, before
            training and once for all runs, so that training takes seconds. ``online`` measures what the objective asks
            for in each step, as images look then. Without augmentation both give the same losses.
        tokenizer: frozen.

    Raises:
        ValueError: if the tokenizer is not frozen, or objective and policy do not belong together.
    """

    budgets: Tensor

    def __init__(
        self,
        policy: Factory[AllocationPolicy],
        reward: Reward,
        objective: PolicyObjective | None = None,
        fidelity: Fidelity | None = None,
        distortions: Literal["table", "online"] = "table",
        *,
        tokenizer: Tokenizer,
    ) -> None:
        check_frozen(tokenizer, "tokenizer", "tokenizer", learner="policy")
        chooses = policy(num_tokens=tokenizer.num_tokens, feature_dim=tokenizer.encoder.feature_dim)
        if isinstance(chooses, LearnedPolicy) != (objective is not None):
            kind = "learns nothing: set task.objective=null" if objective else "learns: set task.objective"
            raise ValueError(f"the policy {type(chooses).__name__} {kind}")
        super().__init__(AdaptiveTokenizer(tokenizer, chooses), reward, fidelity)
        self.objective = objective
        self.distortions = distortions
        self.turns = () if objective is None else (Turn("policy", updates=objective.updates),)
        self.table: ErrorTable | None = None
        self.register_buffer("budgets", torch.tensor(chooses.budgets), persistent=False)
        self._validated: dict[tuple[str, ...], ErrorTable] = {}
        self._outlooks: dict[tuple[str, ...], Outlook] = {}  # of a step's micro-batches

    def prepare(self, data: ImageData, cache: Path, progress: Callable[[str, int, int], None]) -> ImageData:
        """Make the error table of the training images, or find it in ``cache``."""
        if self.objective is None or self.distortions == "online":
            return data

        def tell(done: int) -> None:
            progress("error table", done, len(data))

        self.table = ErrorTable.cached(cache, self.tokenizer, data, self.adaptive.policy.budgets, self.fidelity, tell)
        return data

    def forward(self, batch: Batch, turn: str, context: Context) -> StepOutput:
        """The objective's losses, with draws from the generator ``budgets``."""
        policy, objective = self.adaptive.policy, self.objective
        assert isinstance(policy, LearnedPolicy) and objective is not None, "rules have no turn"
        name = tuple(batch.keys)
        outlook = self._outlooks.pop(name) if context.update else self._outlook(batch)
        output = objective.loss(
            policy.logits(outlook.features),
            outlook.rewards_at,
            self.budgets,
            context.progress,
            context.generator("budgets"),
            outlook.log_probabilities,
        )
        if context.update < objective.updates - 1:
            old = output.log_probabilities if outlook.log_probabilities is None else outlook.log_probabilities
            self._outlooks[name] = outlook._replace(log_probabilities=old)
        learned = {key: torch.tensor(value) for key, value in self.reward.metrics().items()}
        return StepOutput(output.losses, output.metrics | learned)

    @torch.no_grad()
    def _outlook(self, batch: Batch) -> Outlook:
        """From the table where there is one, else with the tokenizer."""
        device = self.budgets.device
        if self.table is None:
            _, request = allocation_request(self.tokenizer, batch.images, batch.keys)
            trials = Trials(request, self.fidelity)
            return Outlook(request.features, self._rewards_at(lambda chosen: trials.table(self.budgets[chosen])))
        rows = self.table.rows(batch.keys)
        distortions = self.table.distortions[rows].to(device)
        return Outlook(
            self.table.features[rows].to(device), self._rewards_at(lambda chosen: distortions.gather(1, chosen))
        )

    def _rewards_at(self, distortions_at: Callable[[Tensor], Tensor]) -> RewardsAt:
        """Rewards by way of distortions; once for the same budgets, since a weighting learns from each call."""
        computed: list[tuple[Tensor, Tensor]] = []

        @torch.no_grad()
        def rewards_at(chosen: Tensor) -> Tensor:
            if not computed or not torch.equal(computed[-1][0], chosen):
                rewards = self.reward(distortions_at(chosen), self.budgets[chosen], self.tokenizer.num_tokens)
                computed.append((chosen, rewards))
            return computed[-1][1]

        return rewards_at

    def validate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Mean reward, distortion and length of the policy's choices; rewards of the best fixed length and the best."""
        rewards, chosen, distortions = [], [], []
        for batch in batches:
            table = self._held_out(batch)
            rows = table.rows(batch.keys)
            if self.objective is None:
                allocation = self.adaptive.allocate(batch.images, batch.keys)[1]
            else:
                features = table.features[rows].to(self.budgets.device)
                allocation = self.adaptive.policy(AllocationRequest(features, batch.images, _not_tried, 0, batch.keys))
            chosen.append(torch.searchsorted(self.budgets, allocation.lengths)[:, None])
            distortions.append(table.distortions[rows].to(self.budgets.device))
            rewards.append(self.reward(distortions[-1], self.budgets, self.tokenizer.num_tokens).double())
        every, own = torch.cat(rewards), torch.cat(chosen)
        return {
            "reward": every.gather(1, own).mean().item(),
            "distortion": torch.cat(distortions).double().gather(1, own).mean().item(),
            "length": self.budgets[own].double().mean().item(),
            "reward_fixed": every.mean(0).max().item(),
            "reward_oracle": every.max(1).values.mean().item(),
        }

    def _held_out(self, batch: Batch) -> ErrorTable:
        """Measured at the first validation; the others look at the same images."""
        name = tuple(batch.keys)
        if name not in self._validated:
            tokenizer, budgets = self.tokenizer, self.adaptive.policy.budgets
            self._validated[name] = ErrorTable.compute(tokenizer, [batch], budgets, self.fidelity, "", {})
        return self._validated[name]


def _not_tried(rows: Tensor, lengths: Tensor) -> Tensor:
    raise TypeError("a learned policy chooses from features alone")
