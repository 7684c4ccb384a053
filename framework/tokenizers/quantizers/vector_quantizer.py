"""Discrete tokens from a codebook that is learned.

Vector quantization (van den Oord et al. 2017), in the form of TiTok and ViT-VQGAN (Yu et al. 2022) where normalised.

Shapes: b batch, n tokens, d channels of a token, m = b * n latents, K codes.
"""

from __future__ import annotations

from math import gcd

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from framework.nn.between_steps import LearnsBetweenSteps
from framework.tokenizers.interface import QUANTIZERS, Quantized, Quantizer
from framework.tokenizers.quantizers.nearest_code import nearest_codes
from framework.tokenizers.quantizers.running_standardisation import RunningStandardisation
from framework.tokenizers.quantizers.usage import CodeUsage

RESTARTS_AFTER = 100
TINY = 1e-20


@QUANTIZERS.register()
class VectorQuantizer(Quantizer, LearnsBetweenSteps):
    """Each latent becomes its nearest code; gradients pass as if it did not.

    A codebook that only its loss trains, as TiTok's (``standardize: false, ema: null, kmeans_iterations: null,
    restart_dead: false``), is easily left unused for the most part. What fills it, beside latents that are standardised
    at each position, happens between steps: k-means places the codes among the latents, if wanted after a start
    without quantization (``kmeans_iterations``, ``warmup_steps``), codes follow their latents (``ema``), and codes that
    died start again.

    Latents that codes are placed on are those of one step of the main process, spread over its images and positions;
    if they are fewer than the codes, so many codes are placed. Nothing is drawn, so equal batches give equal codebooks.

    The initial codes are Gaussian, normalised where ``normalize``; TiTok has them uniform in [-1/K, 1/K], which
    normalised differs little. All is computed in float32, also under autocast.

    Args:
        num_codes: K.
        dim: d, channels of a token.
        standardize: first bring each channel at each position to zero mean and unit deviation, with running statistics
            in use. Tail positions, which training seldom keeps, otherwise give much the same latent for every image.
        normalize: bring latents and codes to unit length, so that the nearest code is that of the smallest angle.
        commitment: weight of the mean squared distance of a latent's channels from those of its code.
        ema: the codebook is no parameter but follows the means of its latents, with this decay of a step (van den
            Oord's appendix A.1; .99 is usual); ``null`` trains it by its own mean squared distance from the latents,
            of weight 1.
        warmup_steps: in so many first training steps latents pass as they are, normalised where ``normalize``, losses
            are zero and codes are not counted.
        kmeans_iterations: at the end of the warm-up, or of the first step where there is none, codes are placed on
            latents of that step, and then moved by so many of Lloyd's iterations; 0 leaves them on these latents,
            ``null`` leaves the initial codes.
        restart_dead: put codes that ``usage`` has dead on latents of the last step, first after 100 steps. A restarted
            code counts as if its share were equal, so it has some hundred steps to find latents.
        entropy: weight of minus KL(p || mean p) for each token, where p is the softmax over codes of the squared
            distances over ``-temperature``. Its mean over tokens is E[H(p)] - H(E[p]) (MAGVIT-2): each token is to be
            sure, and all together are to use all codes. The mean p is that of all tokens that this process sees at
            once, dropped ones too. Unless 0, it takes the memory of several numbers for each token and code.
        temperature: of ``entropy``.

    Raises:
        ValueError: if a number is out of its range.
    """

    vocabulary: int
    usage: CodeUsage
    codebook: Tensor
    steps: Tensor
    candidates: Tensor
    share: Tensor
    sums: Tensor

    def __init__(
        self,
        num_codes: int = 1024,
        dim: int = 12,
        standardize: bool = True,
        normalize: bool = True,
        commitment: float = 0.25,
        ema: float | None = 0.97,
        warmup_steps: int = 0,
        kmeans_iterations: int | None = 10,
        restart_dead: bool = True,
        entropy: float = 0.0,
        temperature: float = 0.1,
    ) -> None:
        super().__init__()
        for name, value, fits, valid in (
            ("num_codes", num_codes, num_codes >= 1, "at least 1"),
            ("dim", dim, dim >= 1 + normalize, "at least 1, and 2 where normalized"),
            ("commitment", commitment, commitment >= 0, "at least 0"),
            ("ema", ema, ema is None or 0 < ema < 1, "above 0 and below 1, or null to train the codebook by a loss"),
            ("warmup_steps", warmup_steps, warmup_steps >= 0, "at least 0"),
            ("kmeans_iterations", kmeans_iterations, (kmeans_iterations or 0) >= 0, "at least 0, or null"),
            ("entropy", entropy, entropy >= 0, "at least 0"),
            ("temperature", temperature, temperature > 0, "above 0"),
        ):
            if not fits:
                raise ValueError(f"{name} must be {valid}, got {value}")
        self.vocabulary, self.dim = num_codes, dim
        self.normalize = normalize
        self.commitment = commitment
        self.ema = ema
        self.warmup_steps, self.kmeans_iterations = warmup_steps, kmeans_iterations
        self.restart_dead = restart_dead
        self.entropy, self.temperature = entropy, temperature
        self.usage = CodeUsage(num_codes)
        self.standardise = RunningStandardisation(dim) if standardize else nn.Identity()
        codebook = self._normalized(torch.randn(num_codes, dim))
        if ema is None:
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)
            self.register_buffer("share", torch.full((num_codes,), 1 / num_codes))
            self.register_buffer("sums", torch.zeros(num_codes, dim), persistent=False)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("candidates", torch.zeros(0, dim), persistent=False)

    def set_num_tokens(self, num_tokens: int) -> None:
        """``standardize`` keeps statistics of each position."""
        if isinstance(self.standardise, RunningStandardisation):
            self.standardise.set_num_tokens(num_tokens)

    def forward(self, latents: Tensor, generator: torch.Generator | None = None) -> Quantized:
        """Latents ``(b, n, d)`` -> their codes in float32, losses, and the metric ``quantization_error``.

        Losses are ``commitment``, ``codebook`` without ``ema`` and ``entropy`` where it has a weight.
        """
        with torch.autocast(latents.device.type, enabled=False):
            latents = self._normalized(self.standardise(latents.float()))
            codebook = self._normalized(self.codebook)
            codes = self._nearest(latents, codebook)
            warming = self.training and self.warmup_steps > 0 and bool(self.steps < self.warmup_steps)
            if self.training and torch.is_grad_enabled():
                self._collect(latents.detach().flatten(0, 1), codes.flatten(), warming)
            chosen = latents.detach() if warming else F.embedding(codes, codebook)
            error = (latents - chosen.detach()).square().mean(-1)
            losses = {"commitment": self.commitment * error}
            if self.ema is None:
                losses["codebook"] = (chosen - latents.detach()).square().mean(-1)
            if self.entropy:
                losses["entropy"] = error * 0 if warming else self.entropy * self._entropy_penalty(latents, codebook)
            passed = chosen.detach() + (latents - latents.detach())
            return Quantized(passed, codes, losses, {"quantization_error": error.detach()})

    def codes_to_latents(self, codes: Tensor) -> Tensor:
        return F.embedding(codes, self._normalized(self.codebook))

    def latents_to_codes(self, latents: Tensor) -> Tensor:
        return self._nearest(latents, self._normalized(self.codebook))

    def averaged(self) -> list[Tensor]:
        return [] if self.ema is None else [self.sums]

    def shared(self) -> list[Tensor]:
        return [self.candidates] if len(self.candidates) else []

    @torch.no_grad()
    def learn(self) -> None:
        if self.ema is not None:
            self._follow(self.ema)
        if len(self.candidates):
            if self._places_next():
                self._place()
            elif self.restart_dead:
                self._restart()
        self.candidates = self.candidates[:0]
        self.steps += 1

    def _normalized(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1) if self.normalize else vectors

    def _nearest(self, latents: Tensor, codebook: Tensor) -> Tensor:
        return nearest_codes(latents.flatten(0, 1), codebook).view(latents.shape[:2])

    def _collect(self, latents: Tensor, codes: Tensor, warming: bool) -> None:
        if not warming:
            self.usage.collect(codes)
            if self.ema is not None:
                self.sums.index_add_(0, codes, latents)
        if self.restart_dead or self._places_next():
            self.candidates = torch.cat([self.candidates, latents])

    def _entropy_penalty(self, latents: Tensor, codebook: Tensor) -> Tensor:
        # |z|^2 is the same for all codes of a token.
        logits = (2 * latents @ codebook.T - codebook.square().sum(-1)) / self.temperature
        log_p = logits.log_softmax(-1)
        p = log_p.exp()
        # The mean of the cross entropies is lowest at this average, so that no gradient of it is lost here.
        average = p.detach().mean((0, 1)).clamp(min=TINY)
        return (p * (average.log() - log_p)).sum(-1)

    def _places_next(self) -> bool:
        """Whether the codes are placed at the end of this step."""
        return self.kmeans_iterations is not None and int(self.steps) + 1 == max(self.warmup_steps, 1)

    def _follow(self, decay: float) -> None:
        """Move each code by its latents' share of all that it has followed, which old steps leave with ``decay``."""
        counts = self.usage.pending  # averaged over ranks too, and taken in by the usage after this
        total = counts.sum()
        share = counts / total.clamp(min=TINY)
        rate = torch.where(total > 0, 1 - decay, 0.0)
        self.share.lerp_(share, rate)
        means = self.sums / counts.clamp(min=TINY)[:, None]
        weight = rate * share / self.share.clamp(min=TINY)
        self.codebook.copy_(self._normalized(self.codebook.lerp(means, weight[:, None])))
        self.sums.zero_()

    def _place(self) -> None:
        """Put codes on latents, as many as there are, and move them to the means of those that are nearest."""
        codebook = self._normalized(self.codebook.detach())
        picked = self._picks()
        codebook[: len(picked)] = picked
        for _ in range(self.kmeans_iterations or 0):
            codes = nearest_codes(self.candidates, codebook)
            sums = torch.zeros_like(codebook).index_add_(0, codes, self.candidates)
            counts = torch.zeros_like(codebook[:, 0]).index_add_(0, codes, torch.ones_like(self.candidates[:, 0]))
            means = sums / counts.clamp(min=1)[:, None]
            codebook = torch.where(counts[:, None] > 0, self._normalized(means), codebook)
        self.codebook.copy_(codebook)
        if self.ema is not None:
            self.share.fill_(1 / self.vocabulary)

    def _restart(self) -> None:
        """Put dead codes on latents, as many as there are, with an equal share."""
        picked = self._picks()
        dead = self.usage.dead & (self.usage.steps >= RESTARTS_AFTER)
        number = dead.cumsum(0) - 1
        dead &= number < len(picked)
        self.codebook.copy_(torch.where(dead[:, None], picked[number.clamp(0, len(picked) - 1)], self.codebook))
        shares = [self.usage.share] if self.ema is None else [self.usage.share, self.share]
        for share in shares:
            share.masked_fill_(dead, 1 / self.vocabulary)
            share /= share.sum()

    def _picks(self) -> Tensor:
        """At most K candidates, each once, in steps of about a golden section of them; others after every step."""
        total = len(self.candidates)
        stride = next(stride for stride in range(round(0.618 * total) or 1, total + 1) if gcd(stride, total) == 1)
        numbers = torch.arange(min(total, self.vocabulary), device=self.candidates.device)
        return self.candidates[(self.steps + numbers) * stride % total]
