"""Our DiT beside that of its authors' repository, with the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt
from pathlib import Path

import torch
from torch import Tensor, nn

from framework.engine.benchmark import machine, take_turns
from framework.engine.official_checkout import Repository
from framework.generators.dit import DiT
from framework.generators.guidance import Guidance
from framework.generators.samplers import Ancestral
from framework.interop.dit import import_dit, latents_of, patches_of

DIT = Repository("facebookresearch/DiT", ("models.py", "diffusion/__init__.py"), ("models", "diffusion"))
CHANNELS, SIDE, CLASSES = 4, 32, 1000
"""Of latents of an image of 256x256, and of ImageNet."""
INTERVAL = (0.2, 0.8)


class OfficialDiT:
    """A DiT of its authors with random weights, and its sampler.

    Args:
        checkout: of its repository.
        size: such as ``S/2``.
        steps: of DDPM.
        device: where it computes.

    Raises:
        FileNotFoundError: if this is no checkout.
        ValueError: if it has no such size.
    """

    def __init__(self, checkout: Path, size: str, steps: int, device: torch.device) -> None:
        models, diffusion = DIT.modules(checkout)
        if (name := f"DiT-{size}") not in models.DiT_models:
            raise ValueError(f"there is no {name}; there are {', '.join(models.DiT_models)}")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            self.model: nn.Module = models.DiT_models[name](input_size=SIDE, num_classes=CLASSES)
            for weights in self.model.parameters():
                if not weights.any():  # as at the start of training, where blocks do nothing
                    nn.init.normal_(weights, std=0.02)
        self.num_heads: int = self.model.num_heads
        self.model.to(device).eval()
        self.diffusion = diffusion.create_diffusion(str(steps))

    @torch.no_grad()
    def __call__(self, labels: Tensor, scale: float) -> Tensor:
        """Latents ``(b, 4, 32, 32)`` of classes ``(b,)``, sampled as its ``sample.py`` does."""
        count, device = len(labels), labels.device
        noise = torch.randn(count, CHANNELS, SIDE, SIDE, device=device).repeat(2, 1, 1, 1)
        both = torch.cat([labels, torch.full_like(labels, CLASSES)])
        made: Tensor = self.diffusion.p_sample_loop(
            self.model.forward_with_cfg, noise.shape, noise, clip_denoised=False,
            model_kwargs={"y": both, "cfg_scale": scale}, progress=False, device=device,
        )  # fmt: skip
        return made[:count]


def dit_lines(
    checkout: Path, batch_size: int, guidance: float, rounds: int, size: str = "S/2", steps: int = 10
) -> Iterator[str]:
    """How far the two networks' outputs are apart, and times in which they make latents; what our side can do beyond,
    guidance in an interval only and bfloat16, stands apart.

    Raises:
        FileNotFoundError, ValueError: as ``OfficialDiT``, or if sampling has too few steps.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    official = OfficialDiT(checkout, size, steps, device)
    ours = import_dit(official.model.state_dict(), official.num_heads).build().to(device).eval()
    assert isinstance(ours, DiT)
    ours.sampler = Ancestral(steps)
    labels, numbers = torch.arange(batch_size) * 97 % CLASSES, torch.arange(batch_size)
    labels = labels.to(device)

    def make(dtype: torch.dtype = torch.float32, interval: tuple[float, float] = (0.0, 1.0)) -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            asked = Guidance(guidance, interval)
            return ours.generate(labels, seed=0, sample_ids=numbers, guidance=asked).latents

    yield (
        f"{machine(device)}, float32; DiT-{size} with random weights, guidance {guidance:g} of three channels, "
        f"{batch_size} latents of {CHANNELS}x{SIDE}x{SIDE}, {steps} steps of DDPM"
    )
    yield f"outputs of the networks: {_difference(official.model, ours, labels):.1e} apart, of the largest"
    cases = {"official": lambda: official(labels, guidance), "ours": make}
    cases |= {"interval": lambda: make(interval=INTERVAL), "bfloat16": lambda: make(torch.bfloat16)}
    times = take_turns(cases, rounds, device)
    yield times.table(batch_size)
    beyond = f"apart from that: guidance only from {INTERVAL[0]:g} to {INTERVAL[1]:g}"
    for case, words in {"ours": "ours", "interval": beyond, "bfloat16": "autocast to bfloat16"}.items():
        ratio = times.ratio(case)
        yield f"{words} is {1 / ratio.wall:.2f} times as fast, {1 / ratio.cpu:.2f} in CPU time"


@torch.no_grad()
def _difference(official: nn.Module, ours: DiT, labels: Tensor) -> float:
    """The largest difference of outputs halfway through the noise, over the largest output."""
    generator = torch.Generator().manual_seed(0)
    noised = torch.randn(len(labels), CHANNELS, SIDE, SIDE, generator=generator).to(labels.device)
    side = isqrt(ours.space.dim // CHANNELS)
    times, patches = torch.full_like(labels, 500), patches_of(noised, side)
    outputs = ours(patches, times, labels, torch.full_like(labels, patches.shape[1]))
    images = torch.cat([latents_of(half, side) for half in outputs.chunk(2, dim=-1)], dim=1)
    theirs = official(noised, times, labels)
    return float((images - theirs).abs().max() / theirs.abs().max())
