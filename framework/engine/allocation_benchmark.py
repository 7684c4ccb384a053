"""What choosing lengths costs: a learned policy against binary search, on the same images and the same tokenizer.

Both sides take turns; see ``framework/engine/benchmark.py``. AdaTok's Table 2 has 4.3 ms for its policy and 70.2 ms for
the search, without saying what they contain, so each stage stands here by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch

from framework.allocation.adaptive_tokenizer import AdaptiveTokenizer, allocation_request
from framework.allocation.fidelity import SquaredError
from framework.allocation.learned_policy import LearnedPolicy
from framework.allocation.search import BinarySearch
from framework.engine.benchmark import Times, machine, take_turns
from framework.engine.experiment import Experiment
from framework.tokenizers.tokenizer import Tokenizer

IMAGES = 8
"""Images of a round where a batch is smaller, so that the search takes different paths."""


class Costs(NamedTuple):
    """Times of the two sides by stage, of so many images a round; trials of the search, of an image on average."""

    stages: Mapping[str, Times]
    images: int
    trials: float

    def table(self, batch_size: int) -> str:
        """A line a stage, where every time is that of one image."""
        rounds = len(next(iter(self.stages.values())).rounds["policy"])
        lines = [
            f"batch {batch_size}: medians of {rounds} alternating rounds of {self.images} images; "
            f"the search decodes an image {self.trials:.2f} times",
            f"{'ms an image':26}{'policy':>10}{'search':>10}{'search / policy':>18}{'in CPU time':>13}",
        ]
        for stage, times in self.stages.items():
            policy, search = (1e3 * times.seconds(side).wall / self.images for side in ("policy", "search"))
            ratio = times.ratio("search")
            lines.append(f"{stage:26}{policy:10.3f}{search:10.3f}{ratio.wall:18.1f}{ratio.cpu:13.1f}")
        return "\n".join(lines)


@torch.inference_mode()
def time_allocation(tokenizer: Tokenizer, batch_size: int, shortest: int, rounds: int, device: torch.device) -> Costs:
    """Time deciding with features and tokens at hand, encoding and deciding, and these two with the final decoding.

    The candidates are all lengths from ``shortest`` to n. Half of the random images meet the search's threshold at its
    first trial. With untrained weights these meet it everywhere and the others nowhere, but the trials are on average
    as long as if the lengths found were spread evenly. The final decoding is at the search's lengths on both sides, so
    that they differ by the decision only.

    Raises:
        ValueError: if there is no length from ``shortest`` to n.
    """
    n = tokenizer.to(device).eval().num_tokens
    budgets = [*range(shortest, n), max(shortest, n)]
    feature_dim = tokenizer.encoder.feature_dim
    learned = LearnedPolicy(budgets, num_tokens=n, feature_dim=feature_dim).eval()
    shape = (max(IMAGES // batch_size, 1), batch_size, 3, *tokenizer.size)
    batches = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(device)
    requests = [allocation_request(tokenizer, images)[1] for images in batches]
    rows = torch.arange(batch_size, device=device)
    lengths = torch.full_like(rows, budgets[(len(budgets) - 1) // 2])
    errors = [SquaredError()(request.reconstruct(rows, lengths), request.images) for request in requests]
    search = BinarySearch(torch.cat(errors).median().item(), budgets, num_tokens=n, feature_dim=feature_dim)
    found = [search(request) for request in requests]

    def decide(adaptive: AdaptiveTokenizer) -> None:
        for request in requests:
            adaptive.policy(request)

    def encode(adaptive: AdaptiveTokenizer) -> None:
        for images in batches:
            adaptive.allocate(images)

    def reconstruct(adaptive: AdaptiveTokenizer) -> None:
        for images, allocation in zip(batches, found, strict=True):
            adaptive.decode(adaptive.allocate(images)[0].with_lengths(allocation.lengths))

    sides = {"policy": AdaptiveTokenizer(tokenizer, learned), "search": AdaptiveTokenizer(tokenizer, search)}
    stages: dict[str, Callable[[AdaptiveTokenizer], None]] = {
        "decide": decide, "encode and decide": encode, "encode, decide and decode": reconstruct
    }  # fmt: skip
    times = {
        stage: take_turns({name: partial(run, side.to(device)) for name, side in sides.items()}, rounds, device)
        for stage, run in stages.items()
    }
    trials = sum(allocation.decoder_passes for allocation in found) / len(found)
    return Costs(times, shape[0] * batch_size, trials)


def allocation_lines(experiment: Experiment, rounds: int, batch_sizes: Sequence[int], shortest: int) -> Iterator[str]:
    """What ``time_allocation`` finds with the experiment's tokenizer: a table for each batch size.

    Raises:
        TypeError: if the experiment's model is no tokenizer.
    """
    model, device = experiment.task.model, experiment.run.torch_device()
    tokenizer = model.tokenizer if isinstance(model, AdaptiveTokenizer) else model
    if not isinstance(tokenizer, Tokenizer):
        raise TypeError(f"only a tokenizer has lengths to choose, and this model is {type(tokenizer).__name__}")
    yield f"{machine(device)}, float32, random images; candidate lengths: {shortest} to {tokenizer.num_tokens}"
    for batch_size in batch_sizes:
        yield time_allocation(tokenizer, batch_size, shortest, rounds, device).table(batch_size)
