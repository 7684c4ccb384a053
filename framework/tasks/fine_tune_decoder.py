"""Fine-tuning a decoder at the lengths that a policy chooses: the optional third stage of AdaTok.

Shapes: b batch.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from framework.allocation.adaptive_tokenizer import AdaptiveTokenizer, allocation_request
from framework.allocation.fidelity import Fidelity
from framework.allocation.rewards import Reward
from framework.config.registry import Factory
from framework.data.interface import Batch
from framework.evaluation.image_metrics import squared_error
from framework.losses.interface import Loss
from framework.tasks.allocation_task import AllocationTask
from framework.tasks.interface import TASKS, Context, StepOutput, Turn
from framework.tokenizers.interface import AllocationPolicy
from framework.tokenizers.tokenizer import Tokenizer


@TASKS.register()
class FineTuneDecoder(AllocationTask):
    """The decoder learns on at the policy's own lengths; encoder, quantizer and policy stay as they are.

    Stage one trains all lengths alike, for every image. Once a policy gives easy images few tokens and hard ones many,
    the decoder need only be good at these pairs.

    Args:
        policy: with the weights of the run that has trained it, ``weights: runs/adatok/discrete/ata_grpo``.
        losses: named losses on images, whose sum is minimised.
        reward: what the evaluation judges choices by; as the policy was trained for.
        policy_share: share of images that are decoded at the policy's lengths; the others at lengths that the
            tokenizer's masking schedule draws, so that other lengths stay usable.
        fidelity: what the reward reads; ``SquaredError`` unless given.
        tokenizer: with the weights of the run that has trained it, and not frozen as a whole.

    Raises:
        ValueError: if the tokenizer is frozen or encodes anew for each length, there are no losses, or
            ``policy_share`` is not above 0 and at most 1.
    """

    turns = (Turn("decoder", parameters=("*.decoder.*",)),)

    def __init__(
        self,
        policy: Factory[AllocationPolicy],
        losses: dict[str, Loss],
        reward: Reward,
        policy_share: float = 0.5,
        fidelity: Fidelity | None = None,
        *,
        tokenizer: Tokenizer,
    ) -> None:
        if getattr(tokenizer, "is_frozen", False):
            raise ValueError("the tokenizer's decoder is to be trained: set tokenizer.frozen=false")
        if tokenizer.contract != "truncate":
            raise ValueError(
                f"{type(tokenizer.encoder).__name__} encodes anew for each length, so that tokens do not stay as they "
                "are: only tokenizers whose contract is to truncate can be trained on so"
            )
        if not losses:
            raise ValueError("a task without losses trains nothing: set task.losses to {pixel: {name: PixelLoss}}")
        if not 0 < policy_share <= 1:
            raise ValueError(f"policy_share is a share of the images, above 0 and at most 1; got {policy_share}")
        chooses = policy(num_tokens=tokenizer.num_tokens, feature_dim=tokenizer.encoder.feature_dim)
        super().__init__(AdaptiveTokenizer(tokenizer, chooses), reward, fidelity)
        self.losses = nn.ModuleDict(losses)
        self.policy_share = policy_share
        for part in self._fixed:
            part.requires_grad_(False)

    @property
    def _fixed(self) -> tuple[nn.Module, ...]:
        return self.tokenizer.encoder, self.tokenizer.quantizer, self.policy

    def train(self, mode: bool = True) -> FineTuneDecoder:
        """Set the decoder's mode; what stays as it is stays in eval mode."""
        super().train(mode)
        self.tokenizer.decoder.train(mode)
        for part in self._fixed:
            part.eval()
        return self

    def forward(self, batch: Batch, turn: str, context: Context) -> StepOutput:
        """Losses at the policy's lengths, or at lengths drawn from the generator ``lengths``."""
        images, tokenizer = batch.images, self.tokenizer
        with torch.no_grad():
            tokens, request = allocation_request(tokenizer, images, batch.keys)
            chosen = self.policy(request).lengths
        drawn = tokenizer.draw_lengths(len(images), context.progress, context.generator("lengths"))
        own = torch.rand(len(images), generator=context.generator("share")) < self.policy_share
        lengths = torch.where(own.to(chosen.device), chosen, drawn.to(chosen.device))
        rebuilt = tokenizer.output_space.decode(tokenizer.decoder(tokens.with_lengths(lengths)))
        losses = {name: loss(rebuilt, images) for name, loss in self.losses.items()}
        return StepOutput(losses, {"mean_length": lengths.double().mean(), "policy_length": chosen.double().mean()})

    def validate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Mean length and squared error of the policy's choices, and the squared error at full length."""
        own: list[Tensor] = []
        full: list[Tensor] = []
        lengths: list[Tensor] = []
        for batch in batches:
            tokens, allocation = self.adaptive.allocate(batch.images, batch.keys)
            longest = torch.full_like(allocation.lengths, self.policy.budgets[-1])
            for errors, at in ((own, allocation.lengths), (full, longest)):
                errors.append(squared_error(batch.images, self.adaptive.decode(tokens.with_lengths(at))))
            lengths.append(allocation.lengths)
        means = (torch.cat(values).double().mean().item() for values in (own, full, lengths))
        return dict(zip(("mse", "mse_full", "length"), means, strict=True))
