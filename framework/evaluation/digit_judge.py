"""A small classifier of digits that judges reconstructed and generated ones, where InceptionV3 has no say.

It is trained on labelled images when first asked for. Its accuracy says whether an image shows the class that it
should, and its 64 features how far a set lies from the training images and how varied it is within classes; pixels say
whether it copies them. The Frechet distance is in this judge's own features: ``fd_digit_judge``, never FID.

Shapes: i images, b images of a batch, c classes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from framework.data.interface import Batch, ImageData
from framework.data.stream import Sequential, Stream, subset
from framework.evaluation.distribution_metrics import FeatureStatistics, frechet_distance
from framework.evaluation.labels import labels_of
from framework.evaluation.rate_distortion import Progress, mean_intervals
from framework.runtime.files import write_bytes
from framework.runtime.rng import stable_seed
from framework.runtime.weights import weights_digest

FEATURES = 64
SAMPLE = 16
"""Images that tell data sets apart."""
NEAREST = 512
"""Images of a set whose nearest training image is looked for."""

DEFINITIONS = {
    "accuracy": "share of images that the judge takes for the class that they should show",
    "accuracy_interval": "95% bootstrap interval: 1000 resamples of groups, then of images within each, seed 0",
    "fd_digit_judge": "Frechet distance to the training images in the judge's 64 features; it is not FID, and it falls "
    "as a set grows: compare equal numbers of images only. It does not read labels",
    "diversity": "spread of the judge's features within classes (root of the mean variance over features and over "
    "images) as a share of that of the training images of the same class, mean over classes with two images or more; "
    "0 where all images of a class are the same",
    "nearest": "root mean squared difference of pixels in [0, 1] to the nearest training image: the quantile of 5% and "
    "the median over nearest_images images, a random subset. Far below held-out images means copies, or blur",
}


@dataclass(frozen=True)
class JudgeTraining:
    """How a judge is trained: AdamW, whose learning rate falls to 0 by a cosine.

    Args:
        steps: of training.
        batch_size: images a step.
        lr: learning rate at the start.
        seed: of the initial weights and of the order of images.
    """

    steps: int = 600
    batch_size: int = 128
    lr: float = 3e-3
    seed: int = 0


class DigitJudge(nn.Module):
    """Three convolutions of stride 2 and 16, 32 and 64 channels, 64 features, one linear layer; for small images.

    Args:
        num_classes: c.
        protocol: how it is trained, as plain JSON.
    """

    def __init__(self, num_classes: int, protocol: Mapping[str, Any]) -> None:
        super().__init__()
        self.protocol = protocol
        layers: list[nn.Module] = []
        for before, after in ((3, 16), (16, 32), (32, 64)):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        pooled = [nn.AdaptiveAvgPool2d(4), nn.Flatten()]
        self.body = nn.Sequential(*layers, *pooled, nn.Linear(64 * 4 * 4, FEATURES), nn.ReLU())
        self.head = nn.Linear(FEATURES, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Images ``(b, 3, h, w)`` in [0, 1] -> ``(b, 64)``, none below 0."""
        return self.body(2 * images.to(self.head.weight.device) - 1)

    def forward(self, images: Tensor) -> Tensor:
        """Images ``(b, 3, h, w)`` in [0, 1] -> logits ``(b, c)``."""
        return self.head(self.features(images))

    @classmethod
    def trained(
        cls,
        data: ImageData,
        cache: Path,
        training: JudgeTraining = JudgeTraining(),
        progress: Progress = lambda stage, done, total: None,
    ) -> DigitJudge:
        """A judge in eval mode, from a file in ``cache`` where it has been trained before, else trained and kept.

        It is trained on the CPU, where the same data and settings give the same judge. The file's name is a digest of
        the data's protocol, a few images, the settings and the layers; a damaged file is replaced.

        Raises:
            ValueError: if images have no labels.
        """
        num_classes = 1 + max(int(labels_of(batch, data.protocol()).max()) for batch in Sequential(data, 512))
        looks = weights_digest({"images": next(Sequential(data, SAMPLE, limit=SAMPLE)).images})
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(stable_seed(training.seed, "digit judge"))
            judge = cls(num_classes, {"data": data.protocol(), "looks": looks, "training": asdict(training)})
        described = json.dumps([judge.protocol, repr(judge)], sort_keys=True)
        path = cache / f"digit_judge_{hashlib.sha256(described.encode()).hexdigest()[:16]}.safetensors"
        if path.is_file():
            with suppress(safetensors.SafetensorError, TypeError, KeyError), safetensors.safe_open(path, "pt") as file:
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
                if weights_digest(state) == file.metadata()["sha256"]:
                    judge.load_state_dict(state)
                    return judge.eval()
        judge._fit(data, training, progress)
        state = judge.state_dict()
        write_bytes(path, safetensors.torch.save(state, {"sha256": weights_digest(state)}))
        return judge.eval()

    @torch.enable_grad()
    def _fit(self, data: ImageData, training: JudgeTraining, progress: Progress) -> None:
        optimizer = torch.optim.AdamW(self.parameters(), lr=training.lr, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.steps)
        stream = Stream(data, training.batch_size, stable_seed(training.seed, "digit judge order"))
        for step in range(training.steps):
            batch = next(stream)
            optimizer.zero_grad()
            cross_entropy(self(batch.images), labels_of(batch, data.protocol())).backward()
            optimizer.step()
            schedule.step()
            progress("training the judge", step + 1, training.steps)


@dataclass(frozen=True, eq=False)
class _Judged:
    """A set of images as the judge sees it: features ``(i, 64)``, labels, right or not, groups, and some images."""

    features: Tensor
    labels: Tensor
    right: Tensor
    groups: list[str]
    some: Tensor


@torch.no_grad()
def judge_images(
    judge: DigitJudge,
    sets: Mapping[str, Iterable[Batch]],
    train_data: ImageData,
    limit: int | None = None,
    progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Judge sets of images, such as held-out ones, their reconstructions, and generated ones.

    Args:
        judge: in eval mode.
        sets: by name; labels are the classes that images should show, and images lie in [0, 1]. Held-out images should
            be among them, since only beside theirs do the other numbers mean anything.
        train_data: what all are compared with: what the judge and, as a rule, the generator learned from.
        limit: compare with a fixed random subset of so many training images.
        progress: told the stage, and how much of it is done and in all.

    Returns:
        ``definitions``, ``protocol`` and, by name, ``sets``; plain JSON types only.

    Raises:
        ValueError: if the judge is in training mode, images have no labels or labels below 0, lie outside [0, 1], or a
            set has fewer than two.
    """
    if judge.training:
        raise ValueError("the judge is in training mode, which is another model: call judge.eval() first")
    judged = {}
    for done, (name, batches) in enumerate(sets.items(), 1):
        judged[name] = _judged(judge, batches, train_data.image_size, name)
        progress("judging", done, len(sets))
    nearest = {name: torch.full((len(seen.some),), torch.inf) for name, seen in judged.items()}
    features, labels, num_images = [], [], 0
    batches = Sequential(train_data, 512, limit)
    for batch in batches:
        features.append(judge.features(batch.images).cpu().double())
        labels.append(labels_of(batch, train_data.protocol()))
        for name, seen in judged.items():
            distances = torch.cdist(seen.some, batch.images.flatten(1)) / seen.some.shape[1] ** 0.5
            nearest[name] = torch.minimum(nearest[name], distances.amin(1))
        num_images += len(batch.keys)
        progress("comparing with training images", num_images, min(limit or len(train_data), len(train_data)))
    reference, classes = torch.cat(features), torch.cat(labels)
    statistics = FeatureStatistics.of(reference)
    return {
        "definitions": DEFINITIONS,
        "protocol": {
            "judge": {**judge.protocol, "sha256": weights_digest(judge.state_dict())},
            "compared_with": {"data": train_data.protocol(), "images": num_images, **batches.record()},
            "value_range": [0, 1],
        },
        "sets": {
            name: {
                "images": len(seen.labels),
                "groups": len(set(seen.groups)),
                "accuracy": seen.right.mean().item(),
                "accuracy_interval": mean_intervals(seen.right, seen.groups).tolist(),
                "fd_digit_judge": frechet_distance(statistics, FeatureStatistics.of(seen.features)).distance,
                "diversity": diversity(seen.features, seen.labels, reference, classes),
                "nearest": {str(share): nearest[name].quantile(share).item() for share in (0.05, 0.5)},
                "nearest_images": len(seen.some),
            }
            for name, seen in judged.items()
        },
    }


def judge_columns(numbers: Mapping[str, Any]) -> dict[str, str]:
    """Of one of ``sets``, by heading."""
    low, high = numbers["accuracy_interval"]
    return {
        "accuracy": f"{numbers['accuracy']:.1%}",
        "95% interval": f"{low:.1%} to {high:.1%}",
        "fd_digit_judge": f"{numbers['fd_digit_judge']:.4g}",
        "diversity": "none" if numbers["diversity"] is None else f"{numbers['diversity']:.3f}",
        "nearest training image, RMS": f"{numbers['nearest']['0.5']:.3f}",
    }


def diversity(features: Tensor, labels: Tensor, reference: Tensor, classes: Tensor) -> float | None:
    """Spread within classes as a share of the reference's, see ``DEFINITIONS``; ``None`` without a class of two."""
    shares = []
    for label in labels.unique():
        of_class, real = features[labels == label], reference[classes == label]
        if len(of_class) > 1 and len(real) > 1 and (varied := real.var(0).mean()) > 0:
            shares.append((of_class.var(0).mean() / varied).sqrt().item())
    return sum(shares) / len(shares) if shares else None


def _judged(judge: DigitJudge, batches: Iterable[Batch], size: int, name: str) -> _Judged:
    features, labels, right, images = [], [], [], []
    groups: list[str] = []
    for batch in batches:
        wanted, (low, high) = labels_of(batch, name), batch.images.aminmax()
        if not (low >= 0 and high <= 1) or batch.images.shape[1:] != (3, size, size):
            raise ValueError(
                f"{name}: images must be (b, 3, {size}, {size}) in [0, 1], as those of training, got "
                f"{tuple(batch.images.shape)} from {low:.4g} to {high:.4g}"
            )
        if wanted.min() < 0:
            raise ValueError(f"{name}: labels count from 0, got {wanted.min()}")
        seen = judge.features(batch.images)
        right.append((judge.head(seen).argmax(1).cpu() == wanted.cpu()).double())
        features.append(seen.cpu().double())
        labels.append(wanted.cpu())
        images.append(batch.images.cpu().flatten(1))
        groups += batch.groups
    if len(groups) < 2:
        raise ValueError(f"{name}: a spread needs at least two images, and there are {len(groups)}")
    rows = subset(len(groups), NEAREST)
    return _Judged(torch.cat(features), torch.cat(labels), torch.cat(right), groups, torch.cat(images)[rows].float())
