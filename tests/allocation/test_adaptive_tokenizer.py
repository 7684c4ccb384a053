from __future__ import annotations

import pytest
import torch

from framework.allocation.adaptive_tokenizer import AdaptiveTokenizer, allocation_request
from framework.allocation.rules import FixedLength
from framework.allocation.search import BinarySearch, LinearSearch
from framework.tokenizers.interface import Allocation, AllocationPolicy, AllocationRequest
from framework.tokenizers.tokenizer import Tokenizer
from tests.allocation.curves import first_below
from tests.tokenizers.build import small_tokenizer

IMAGES = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))
ENCODERS = ["SuffixTokenViT", "PatchEncoder"]  # truncates, length-conditioned


class Counted(AllocationPolicy):
    """The lengths it is given; keeps the request."""

    budgets = (1, 2, 3, 4, 5, 6)

    def __init__(self, lengths: list[int]) -> None:
        super().__init__()
        self.lengths = lengths
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, request: AllocationRequest) -> Allocation:
        self.request = request
        return Allocation(torch.tensor(self.lengths))


def passes(tokenizer: Tokenizer) -> dict[str, list[int]]:
    """Batch sizes of the encoder's and the decoder's calls from now on."""
    calls: dict[str, list[int]] = {"encoder": [], "decoder": []}
    tokenizer.encoder.register_forward_hook(lambda module, given, result: calls["encoder"].append(len(given[0])))
    tokenizer.decoder.register_forward_hook(lambda module, given, result: calls["decoder"].append(len(given[0])))
    return calls


def test_encode_with_features_is_encode() -> None:
    for name in ENCODERS:
        tokenizer = small_tokenizer(encoder_name=name)
        tokens, features = tokenizer.encode_with_features(IMAGES, [1, 2, 3, 4, 5])
        assert torch.equal(tokens.latents, tokenizer.encode(IMAGES, [1, 2, 3, 4, 5]).latents)
        assert tokens.lengths.tolist() == [1, 2, 3, 4, 5]
        assert features.shape == (5, tokenizer.encoder.feature_dim)


def test_a_plain_tokenizer_says_what_auto_takes() -> None:
    with pytest.raises(ValueError, match=r"got 'auto'\. Only AdaptiveTokenizer\(.*an allocation policy chooses"):
        small_tokenizer().encode(IMAGES, "auto")  # type: ignore[arg-type]
    adaptive = AdaptiveTokenizer(small_tokenizer(), Counted([1]))
    with pytest.raises(ValueError, match="length must be integers, got 'Auto'"):
        adaptive.encode(IMAGES, "Auto")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_auto_keeps_what_the_policy_chooses_and_any_other_length_is_the_tokenizers(name: str) -> None:
    tokenizer = small_tokenizer(encoder_name=name).eval()
    n = tokenizer.num_tokens
    policy = Counted([1, 4, 2, 6, 3])
    adaptive = AdaptiveTokenizer(tokenizer, policy)
    tokens = adaptive.encode(IMAGES, keys=list("abcde"))
    expected = tokenizer.encode(IMAGES, [1, 4, 2, 6, 3])
    assert tokens.lengths.tolist() == [1, 4, 2, 6, 3]
    assert torch.equal(tokens.latents, expected.latents)
    assert torch.equal(adaptive.decode(tokens), tokenizer.decode(expected))
    assert policy.request.keys == list("abcde")
    for length in (2, [1, 2, 3, 4, 5], torch.tensor([5, 4, 3, 2, 1]), None):
        assert torch.equal(adaptive.encode(IMAGES, length).latents, tokenizer.encode(IMAGES, length).latents)
        assert torch.equal(adaptive.encode(IMAGES, length).lengths, tokenizer.encode(IMAGES, length).lengths)
    assert (adaptive.num_tokens, adaptive.token_dim, adaptive.contract) == (n, 5, tokenizer.contract)
    assert (adaptive.image_size, adaptive.size) == (16, (16, 16))


@pytest.mark.parametrize(("name", "trial_passes", "encodings"), [("SuffixTokenViT", 0, 1), ("PatchEncoder", 1, 2)])
@torch.no_grad()
def test_passes_are_counted_exactly(name: str, trial_passes: int, encodings: int) -> None:
    tokenizer = small_tokenizer(encoder_name=name)
    n, features = tokenizer.num_tokens, tokenizer.encoder.feature_dim
    errors = [((tokenizer.decode(tokenizer.encode(IMAGES, k)) - IMAGES) ** 2).mean((1, 2, 3)) for k in range(1, n + 1)]
    threshold = torch.stack(errors).median().item()
    for search in (BinarySearch, LinearSearch):
        adaptive = AdaptiveTokenizer(tokenizer, search(threshold, num_tokens=n, feature_dim=features))
        calls = passes(tokenizer)
        tokens, allocation = adaptive.allocate(IMAGES)
        decodings = sum(calls["decoder"]) / 5
        assert allocation.decoder_passes == decodings > 0
        assert allocation.encoder_passes == trial_passes * decodings
        assert sum(calls["encoder"]) / 5 == encodings + allocation.encoder_passes
        assert torch.equal(tokens.lengths, allocation.lengths)
    exact = first_below(torch.stack(errors, dim=1), adaptive.policy.budgets, threshold)
    assert allocation.lengths.tolist() == exact and len(set(exact)) > 1  # of the linear search
    fixed = AdaptiveTokenizer(tokenizer, FixedLength(2, num_tokens=n, feature_dim=features))
    calls = passes(tokenizer)
    fixed.encode(IMAGES)
    assert (len(calls["encoder"]), len(calls["decoder"])) == (encodings, 0)


@pytest.mark.parametrize("name", ENCODERS)
@torch.no_grad()
def test_trials_are_what_encoding_and_decoding_at_that_length_give(name: str) -> None:
    tokenizer = small_tokenizer(encoder_name=name)
    tokens, request = allocation_request(tokenizer, IMAGES)
    rows, lengths = torch.tensor([4, 0, 2]), torch.tensor([1, 6, 3])
    expected = tokenizer.decode(tokenizer.encode(IMAGES[rows], lengths))
    assert torch.allclose(request.reconstruct(rows, lengths), expected, atol=1e-6)
    assert tokens.lengths.tolist() == [tokenizer.num_tokens] * 5
    assert torch.equal(request.features, tokenizer.encode_with_features(IMAGES)[1])


def test_the_tokenizer_stays_in_eval_mode_bit_identical_and_without_gradients() -> None:
    tokenizer = small_tokenizer()
    before = {name: value.clone() for name, value in tokenizer.state_dict().items()}
    adaptive = AdaptiveTokenizer(tokenizer, BinarySearch(0.1, num_tokens=6, feature_dim=96))
    assert not tokenizer.training
    assert adaptive.train() is adaptive and adaptive.policy.training
    assert not any(module.training for module in tokenizer.modules())
    tokens, _ = adaptive.allocate(IMAGES)
    assert not tokens.latents.requires_grad
    after = tokenizer.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_policy_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="the policy chooses up to 8 tokens, and the tokenizer has 6"):
        AdaptiveTokenizer(small_tokenizer(), FixedLength(8, num_tokens=8, feature_dim=4))
    with pytest.raises(ValueError, match=r"Counted chose \{7\}, but its budgets are \(1, 2, 3, 4, 5, 6\)"):
        AdaptiveTokenizer(small_tokenizer(), Counted([1, 7, 1, 1, 1])).encode(IMAGES)


def test_codes_are_the_tokenizers_business() -> None:
    with pytest.raises(TypeError, match="Identity has no codes"):
        adaptive = AdaptiveTokenizer(small_tokenizer(), Counted([1]))
        adaptive.codes_to_tokens(torch.zeros(1, 6, dtype=torch.int64), torch.tensor([6]))
