"""Our decoding engine beside the sampler of LlamaGen's own repository, with the same weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from framework.engine.benchmark import machine, take_turns
from framework.engine.official_checkout import Repository
from framework.generators.autoregressive import LlamaGenAR
from framework.generators.decode_engine import DecodeEngine
from framework.generators.guidance import Guidance
from framework.generators.sampling import Sampling
from framework.interop.llamagen import import_llamagen

LLAMAGEN = Repository(
    "FoundationVision/LlamaGen",
    ("autoregressive/models/gpt.py", "autoregressive/models/generate.py"),
    ("autoregressive", "utils"),
)
CODES, CLASSES = 16_384, 1000


class OfficialSampler:
    """LlamaGen's class-conditional model with random weights, and its sampler.

    Args:
        checkout: of its repository.
        size: such as ``B``.
        tokens: codes of an image, a square.

    Raises:
        FileNotFoundError: if this is no checkout.
        ValueError: if it has no such size.
    """

    def __init__(self, checkout: Path, size: str, tokens: int) -> None:
        gpt, self.generate = LLAMAGEN.modules(checkout)
        if (name := f"GPT-{size}") not in gpt.GPT_models:
            raise ValueError(f"LlamaGen has no {name}; there are {', '.join(gpt.GPT_models)}")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            self.model: nn.Module = gpt.GPT_models[name](vocab_size=CODES, block_size=tokens, num_classes=CLASSES)
            nn.init.normal_(self.model.output.weight, std=0.02)  # it starts at 0, where all codes are alike
        self.model.eval()
        self.tokens = tokens

    @torch.no_grad()
    def __call__(self, labels: Tensor, scale: float, greedy: bool = False) -> Tensor:
        """Codes ``(b, n)`` of classes ``(b,)``; drawn from all codes at temperature 1, or the likeliest."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of what it asks torch for
            drawn: Tensor = self.generate.generate(
                self.model, labels, self.tokens, cfg_scale=scale, temperature=1.0, top_k=0, top_p=1.0,
                sample_logits=not greedy,
            )  # fmt: skip
        return drawn


def llamagen_lines(
    checkout: Path, batch_size: int, guidance: float, rounds: int, size: str = "B", tokens: int = 256
) -> Iterator[str]:
    """Whether both sides take the same likeliest codes, and times in which they draw codes.

    Raises:
        FileNotFoundError, ValueError: as ``OfficialSampler``.
    """
    official = OfficialSampler(checkout, size, tokens)
    ours = import_llamagen(official.model.state_dict(), tokens).build().eval()
    assert isinstance(ours, LlamaGenAR)
    labels, numbers = torch.arange(batch_size) * 97 % CLASSES, torch.arange(batch_size)
    engine = DecodeEngine(ours, batch_size, "static")

    def decode(temperature: float) -> Tensor:
        engine.sampling = Sampling(temperature)
        drawn = engine.generate(labels, seed=0, sample_ids=numbers, guidance=Guidance(guidance)).codes
        assert drawn is not None
        return drawn

    yield (
        f"{machine(torch.device('cpu'))}, float32; LlamaGen {size} with random weights, guidance {guidance:g}, "
        f"{batch_size} x {tokens} tokens"
    )
    equal = decode(0.0) == official(labels, guidance, greedy=True)
    until = equal.long().cumprod(1).sum().item()
    yield f"greedy codes: {equal.sum().item()} of {equal.numel()} equal, {until} of them before a row's first other one"
    cases = {"official": partial(official, labels, guidance), "ours": partial(decode, 1.0)}
    times = take_turns(cases, rounds, torch.device("cpu"), warm_up=0)  # both sides have just run
    yield times.table(batch_size)
    ratio = times.ratio("ours")
    yield f"ours is {1 / ratio.wall:.2f} times as fast, {1 / ratio.cpu:.2f} in CPU time"
