"""A tokenizer that budgets itself: a frozen tokenizer and the policy that chooses how many tokens each image keeps.

Shapes: b batch, r rows of it, h and w pixels, n tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from framework.tokenizers.interface import Allocation, AllocationPolicy, AllocationRequest, Contract
from framework.tokenizers.tokenizer import Tokenizer
from framework.tokens import Tokens


def allocation_request(
    tokenizer: Tokenizer, images: Tensor, keys: Sequence[str] | None = None
) -> tuple[Tokens, AllocationRequest]:
    """Encode images ``(b, 3, h, w)`` at full length, and say what a policy may know of them.

    Trials decode that encoding where the contract is to truncate, and one of their own length otherwise.
    """
    tokens, features = tokenizer.encode_with_features(images)
    truncates = tokenizer.contract == "truncate"

    def reconstruct(rows: Tensor, lengths: Tensor) -> Tensor:
        if truncates:
            return tokenizer.decode(tokens.select(rows).with_lengths(lengths))
        return tokenizer.decode(tokenizer.encode(images[rows], lengths))

    return tokens, AllocationRequest(features, images, reconstruct, 0 if truncates else 1, keys)


class AdaptiveTokenizer(nn.Module):
    """Used as its tokenizer is, but ``length="auto"`` keeps as many tokens of each image as the policy chooses.

    Args:
        tokenizer: stays as it is, and in eval mode whatever mode the policy is in.
        policy: made for this tokenizer's ``num_tokens`` and features.

    Raises:
        ValueError: if the policy's longest budget is more than the tokenizer's tokens.
    """

    def __init__(self, tokenizer: Tokenizer, policy: AllocationPolicy) -> None:
        super().__init__()
        if policy.budgets[-1] > tokenizer.num_tokens:
            raise ValueError(
                f"the policy chooses up to {policy.budgets[-1]} tokens, and the tokenizer has {tokenizer.num_tokens}: "
                "build the policy with the tokenizer's num_tokens"
            )
        self.tokenizer = tokenizer.eval()
        self.policy = policy

    @property
    def num_tokens(self) -> int:
        """n, the longest token sequence."""
        return self.tokenizer.num_tokens

    @property
    def token_dim(self) -> int:
        """d, channels of a token."""
        return self.tokenizer.token_dim

    @property
    def contract(self) -> Contract:
        """What serves another length; see ``Encoder.contract``."""
        return self.tokenizer.contract

    @property
    def image_size(self) -> int:
        """Side of the images that the tokenizer was built for, in pixels."""
        return self.tokenizer.image_size

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        return self.tokenizer.size

    def train(self, mode: bool = True) -> AdaptiveTokenizer:
        """Set the policy's mode; the tokenizer stays in eval mode."""
        super().train(mode)
        self.tokenizer.eval()
        return self

    @torch.no_grad()
    def allocate(self, images: Tensor, keys: Sequence[str] | None = None) -> tuple[Tokens, Allocation]:
        """Encode images ``(b, 3, h, w)`` in [0, 1] at lengths of the policy's choice; no gradient passes.

        Args:
            keys: the images' names, for policies that look them up.

        Returns:
            The tokens, and the choice with what it cost. Images are encoded once where the contract is to truncate,
            otherwise once more at the chosen lengths.

        Raises:
            ValueError: if the images do not fit the tokenizer, or a length is not one of the policy's budgets.
        """
        tokens, request = allocation_request(self.tokenizer, images, keys)
        allocation = self.policy(request)
        if strange := set(allocation.lengths.tolist()) - set(self.policy.budgets):
            raise ValueError(f"{type(self.policy).__name__} chose {strange}, but its budgets are {self.policy.budgets}")
        if self.contract == "truncate":
            return tokens.with_lengths(allocation.lengths), allocation
        return self.tokenizer.encode(images, allocation.lengths), allocation

    def encode(
        self,
        images: Tensor,
        length: int | Sequence[int] | Tensor | Literal["auto"] | None = "auto",
        keys: Sequence[str] | None = None,
    ) -> Tokens:
        """Images to tokens: at lengths of the policy's choice, or at a ``length`` as in ``Tokenizer.encode``."""
        if isinstance(length, str) and length == "auto":
            return self.allocate(images, keys)[0]
        return self.tokenizer.encode(images, length)

    def decode(self, tokens: Tokens) -> Tensor:
        """Tokens to images ``(b, 3, h, w)`` in [0, 1], from each sample's kept tokens only."""
        return self.tokenizer.decode(tokens)

    def codes_to_tokens(self, codes: Tensor, lengths: Tensor) -> Tokens:
        """Codes ``(b, n)`` of a discrete tokenizer, with lengths ``(b,)``, as tokens ready to decode."""
        return self.tokenizer.codes_to_tokens(codes, lengths)
