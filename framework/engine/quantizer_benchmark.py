"""What vector quantization costs: ours, TiTok's formulation, and vector-quantize-pytorch.

All sides quantize the same latents to the same unit codes and pass gradients back, in turns; see
``framework/engine/benchmark.py``.

Shapes: b batch, n tokens, d channels, K codes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from framework.engine.benchmark import machine, take_turns
from framework.tokenizers.quantizers.vector_quantizer import VectorQuantizer

Quantization = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]
"""Latents ``(b, n, d)`` -> what the decoder reads, codes ``(b, n)``, and the loss."""

COMMITMENT = 0.25
TITOK: dict[str, Any] = {"standardize": False, "ema": None, "kmeans_iterations": None, "restart_dead": False}


def quantizer_lines(codes: int, dim: int, tokens: int, batch_size: int, rounds: int) -> Iterator[str]:
    """Times of forward and backward, the most memory that a pass takes, and whether the codes are equal."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    latents, gradient = torch.randn(2, batch_size, tokens, dim, device=device)
    latents.requires_grad_()
    sides = quantizations(codes, dim, device)
    cases = {name: _pass(quantize, latents, gradient) for name, quantize in sides.items()}
    yield f"{machine(device)}, float32; {batch_size} x {tokens} tokens, {codes} codes of dimension {dim}"
    if "vq-pytorch" in sides:
        yield f"vq-pytorch: vector-quantize-pytorch {version('vector-quantize-pytorch')}; its cosine codebook is fixed"
    else:
        yield "vector-quantize-pytorch is left out; to compare with it: pip install vector-quantize-pytorch"
    yield take_turns(cases, rounds, device).table(batch_size)
    expected = sides["ours"](latents)[1]
    yield f"{'':14}{'peak MiB':>10}{'codes equal to ours':>22}"
    for name, quantize in sides.items():
        equal = (quantize(latents)[1] == expected).double().mean().item()
        yield f"{name:14}{peak_memory(cases[name]) / 2**20:10.1f}{equal:22.4%}"


def quantizations(codes: int, dim: int, device: torch.device) -> dict[str, Quantization]:
    """The sides by name, with one codebook; the last only where vector-quantize-pytorch is installed.

    Its codebook can be normalised or trained by a loss, not both, so it has no gradient here and does less. Its means
    of latents and its rotation trick are off.
    """
    ours = VectorQuantizer(codes, dim, **TITOK, commitment=COMMITMENT).to(device)

    def quantize(latents: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        quantized = ours(latents)
        assert quantized.codes is not None
        losses = quantized.losses
        return quantized.latents, quantized.codes, losses["commitment"].mean() + losses["codebook"].mean()

    sides: dict[str, Quantization] = {
        "ours": quantize,
        "TiTok's form": lambda latents: full_distances(latents, ours.codebook),
    }
    try:
        from vector_quantize_pytorch import VectorQuantize
    except ImportError:
        return sides
    off = {"ema_update": False, "rotation_trick": False}
    theirs = VectorQuantize(dim, codes, use_cosine_sim=True, commitment_weight=COMMITMENT, **off).to(device)
    theirs.codebook = ours.codebook.detach()
    return sides | {"vq-pytorch": theirs}


def full_distances(latents: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Vector quantization as TiTok has it: all distances at once, in one matrix of every latent and every code."""
    latents, table = F.normalize(latents, dim=-1), F.normalize(codebook, dim=-1)
    flat = latents.flatten(0, 1)
    squares = flat.square().sum(1, keepdim=True) + table.square().sum(1)
    codes = (squares - 2 * flat @ table.T).argmin(1).view(latents.shape[:2])
    chosen = F.normalize(F.embedding(codes, codebook), dim=-1)
    loss = COMMITMENT * F.mse_loss(chosen.detach(), latents) + F.mse_loss(chosen, latents.detach())
    return latents + (chosen - latents).detach(), codes, loss


def _pass(quantize: Quantization, latents: Tensor, gradient: Tensor) -> Callable[[], None]:
    """Forward and backward, to the latents and to all that the quantizer trains."""

    def run() -> None:
        passed, _, loss = quantize(latents)
        torch.autograd.backward([passed, loss], [gradient, torch.ones_like(loss)])
        latents.grad = None

    return run


def peak_memory(run: Callable[[], object]) -> int:
    """The most bytes that torch has allocated at once while it runs, beyond those before, from torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    return max(accumulate(size for _, size in changes), default=0)
