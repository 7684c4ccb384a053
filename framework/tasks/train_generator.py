"""Training a generator on the tokens of a frozen tokenizer, at the lengths that a policy has chosen.

Shapes: b batch, n tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from framework.allocation.adaptive_tokenizer import AdaptiveTokenizer
from framework.config.registry import Factory
from framework.data.cached_tokens import CachedTokens
from framework.data.interface import Batch, ImageData
from framework.data.stream import Sequential
from framework.evaluation.generated_images import RealImages
from framework.evaluation.generator_report import HeldOut, evaluate_generator
from framework.evaluation.labels import labels_of
from framework.evaluation.token_coding import encode_images
from framework.generators.guidance import Guidance
from framework.generators.image_generator import ImageGenerator, token_space
from framework.generators.interface import Generator
from framework.runtime.weights import part_digest, weights_digest
from framework.tasks.interface import TASKS, Context, Report, StepOutput, Task, Turn, check_frozen
from framework.tokenizers.interface import AllocationPolicy
from framework.tokenizers.tokenizer import Tokenizer
from framework.tokens import Tokens

LOOKED_AT = 16
"""Images that tell data sets apart."""


@TASKS.register()
class TrainGenerator(Task):
    """A generator learns the tokens of labelled images, which are encoded once before training.

    Args:
        generator: what is trained.
        num_classes: of the images' labels, from 0.
        policy: chooses each image's length, with the weights of the run that has trained it, ``weights:
            runs/adatok/discrete/ata_grpo``, and ``frozen: true``; ``null`` keeps all tokens of every image.
        looks: how often each training image is encoded, every time in another draw of its augmentation; these looks
            take turns from epoch to epoch.
        guidance: what evaluations sample with, beside none at all.
        samples: how many an evaluation draws with either.
        tokenizer: frozen.

    Raises:
        ValueError: if tokenizer or policy are not frozen, or a number is below 1.
    """

    turns = (Turn("generator"),)

    def __init__(
        self,
        generator: Factory[Generator],
        num_classes: int,
        policy: Factory[AllocationPolicy] | None = None,
        looks: int = 1,
        guidance: Guidance | None = None,
        samples: int = 2048,
        *,
        tokenizer: Tokenizer,
    ) -> None:
        super().__init__()
        check_frozen(tokenizer, "tokenizer", "tokenizer", learner="generator")
        if min(num_classes, looks, samples) < 1:
            raise ValueError(f"num_classes, looks and samples are 1 or more, got {num_classes}, {looks} and {samples}")
        self.policy: AllocationPolicy | None = None
        if policy is not None:
            self.policy = policy(num_tokens=tokenizer.num_tokens, feature_dim=tokenizer.encoder.feature_dim)
            if any(True for _ in self.policy.parameters()):
                check_frozen(self.policy, "policy", "task.policy", learner="generator")
        budgets = (tokenizer.num_tokens,) if self.policy is None else self.policy.budgets
        space = token_space(tokenizer, budgets, num_classes)
        self.images = ImageGenerator(generator(space=space), tokenizer)
        self.looks = looks
        self.guidance = guidance or Guidance(1.5)
        self.samples = samples
        self._validated: dict[tuple[str, ...], Tokens] = {}

    @property
    def model(self) -> ImageGenerator:
        """The generator with its tokenizer."""
        return self.images

    @property
    def generator(self) -> Generator:
        """The generator alone."""
        return self.images.generator

    @property
    def coder(self) -> Tokenizer | AdaptiveTokenizer:
        """The tokenizer, with the policy if there is one."""
        tokenizer = self.images.tokenizer
        return tokenizer if self.policy is None else AdaptiveTokenizer(tokenizer, self.policy).eval()

    def prepare(self, data: ImageData, cache: Path, progress: Callable[[str, int, int], None]) -> ImageData:
        """Encode the training images, or find their tokens in ``cache``."""
        some = next(Sequential(data, LOOKED_AT, limit=LOOKED_AT))
        self._check_labels(some, data)
        described = {
            "tokenizer": part_digest(self.images.tokenizer),
            "policy": None if self.policy is None else part_digest(self.policy),
            "data": [data.protocol(), len(data), self.looks],
            "images": weights_digest({"images": some.images}),
        }
        name = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:16]
        file = encode_images(
            self.coder,
            data,
            cache / f"generator_{name}.tokens",
            length=self.generator.space.num_tokens if self.policy is None else "auto",
            crops=self.looks,
            progress=progress,
        )
        cached = CachedTokens(data, file)
        assert file.labels is not None
        self.generator.space.check_labels(file.labels)
        self.generator.learn_from(file)
        return cached

    def forward(self, batch: Batch, turn: str, context: Context) -> StepOutput:
        """The generator's losses; a mean over all kept tokens of a step."""
        tokens = self._encoded(batch) if batch.tokens is None else batch.tokens
        labels = labels_of(batch, "the training images")
        loss = self.generator.loss(tokens, labels, context.generator("noise"))
        by_image = {"mean_length": tokens.lengths.double().mean()}
        return StepOutput(loss.losses, loss.metrics, loss.count, loss.image_metrics | by_image)

    def validate(self, batches: Iterable[Batch]) -> dict[str, float]:
        """Means over all kept tokens of held-out images, with the same noise every time; and their mean length."""
        return self._held_out(batches, self._encoded_once).means()

    def report(self, wanted: Report) -> None:
        """Losses by position, lengths beside the data's, samples of every class, and how these compare with images."""
        if wanted.measures.lengths is not None or wanted.measures.distances:
            raise ValueError(
                "a generator chooses its own lengths and has no original to compare with: leave out --lengths, "
                "--distances, evaluation.lengths and evaluation.distances"
            )
        batches = Sequential(wanted.data, 64, wanted.limit)
        held_out = self._held_out(batches, self._encoded)
        about = {"data": wanted.data.protocol(), "of": len(wanted.data), "image_size": wanted.data.image_size}
        protocol = {**wanted.record, **about, **batches.record()}
        real = None
        if wanted.train_data is not None:
            real = RealImages(wanted.data, wanted.train_data, self._rebuilt, wanted.measures, wanted.cache)
        evaluate_generator(
            self.images, held_out, self.guidance, self.samples, wanted.folder, protocol, wanted.progress, real
        )

    @torch.no_grad()
    def _held_out(self, batches: Iterable[Batch], encode: Callable[[Batch], Tokens]) -> HeldOut:
        held_out, noise = HeldOut(self.generator.space.longest), torch.Generator().manual_seed(0)
        device = next(self.generator.parameters()).device
        for batch in batches:
            self._check_labels(batch, "the held-out images")
            labels, tokens = labels_of(batch, "").to(device), encode(batch.to(device))
            held_out.add(self.generator.loss(tokens, labels, noise), tokens.lengths)
        return held_out

    def _encoded_once(self, batch: Batch) -> Tokens:
        """The same few images are asked for at every validation."""
        name = tuple(batch.keys)
        if name not in self._validated:
            self._validated[name] = self._encoded(batch)
        return self._validated[name]

    @torch.no_grad()
    def _encoded(self, batch: Batch) -> Tokens:
        coder, images = self.coder, batch.images
        tokens = coder.allocate(images, batch.keys)[0] if isinstance(coder, AdaptiveTokenizer) else coder.encode(images)
        return tokens.truncate(int(tokens.lengths.max()))

    @torch.no_grad()
    def _rebuilt(self, batch: Batch) -> Tensor:
        device = next(self.generator.parameters()).device
        return self.images.decode(self._encoded(batch.to(device)))

    def _check_labels(self, batch: Batch, data: object) -> None:
        self.generator.space.check_labels(labels_of(batch, data))
