"""Frechet distances (rFID and its stand-ins) of a tokenizer's reconstructions, at each length and at each image's own.

Shapes: b images of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from framework.allocation.adaptive_tokenizer import AdaptiveTokenizer
from framework.data.interface import Batch, ImageData
from framework.data.stream import Sequential, subset
from framework.evaluation.distribution_features import DistributionFeatures
from framework.evaluation.distribution_metrics import DEFINITIONS, MAX_KEPT, FeatureCollector, distances, scores
from framework.evaluation.image_metrics import UINT8_RULE, to_uint8
from framework.evaluation.rate_distortion import Progress, default_lengths, reconstructions
from framework.evaluation.reference_statistics import Reference
from framework.tokenizers.tokenizer import Tokenizer

ORIGINALS = "originals"

OwnLengths = Callable[[Tensor, Sequence[str]], Tensor]
"""Images ``(b, 3, h, w)`` and their keys -> kept tokens of each ``(b,)`` int64."""


def policy_lengths(adaptive: AdaptiveTokenizer) -> OwnLengths:
    """The lengths that an adaptive tokenizer chooses."""
    return lambda images, keys: adaptive.allocate(images, keys)[1].lengths


def table_lengths(table: Mapping[str, int]) -> OwnLengths:
    """Lengths looked up by key."""
    return lambda images, keys: torch.tensor([table[key] for key in keys], device=images.device)


def data_reference(
    data: ImageData,
    features: DistributionFeatures,
    limit: int | None = None,
    batch_size: int = 64,
    progress: Progress | None = None,
) -> Reference:
    """Statistics of a data set's images, or of a fixed random subset of ``limit``: what ``write_reference`` writes.

    Raises:
        ValueError: if there are fewer than two images.
        TooManyBroken: if more images cannot be read than ``data.max_broken`` allows; fewer are left out and recorded.
    """
    total = len(data) if limit is None else min(limit, len(data))
    collector = FeatureCollector(features, set(subset(total, MAX_KEPT)))
    batches, images = Sequential(data, batch_size, limit), 0
    for batch in batches:
        collector.add(to_uint8(batch.images))
        images += len(batch.keys)
        if progress is not None:
            progress("reference", images + len(batches.broken), total)
    if images < 2:
        raise ValueError(f"a covariance needs at least two images, and there are {images}")
    return Reference(collector.collected(), _images_protocol(data, batches, images))


@torch.no_grad()
def reconstruction_distances(
    tokenizer: Tokenizer,
    data: ImageData,
    features: DistributionFeatures,
    lengths: Sequence[int] | None = None,
    own_lengths: Mapping[str, OwnLengths] | None = None,
    reference: Reference | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    record: Mapping[str, object] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """How far the reconstructions of a data set's images lie from the images, or from another reference.

    Args:
        tokenizer: in eval mode.
        data: images that were not trained on.
        features: on the device where they shall run.
        lengths: kept tokens, the same of all images; ``default_lengths`` unless given.
        own_lengths: by name, lengths that differ from image to image: ``{"policy": policy_lengths(adaptive)}``.
        reference: what to compare with instead of the very images that are rebuilt, cropped as they are. Numbers
            against different references are not comparable.
        limit: measure a fixed random subset of so many images.
        record: which weights these are; goes into the protocol.
        progress: told how far the measuring is.

    Returns:
        ``definitions``, ``protocol``, ``per_length`` and ``own_lengths``, with the numbers of ``distances`` at each,
        and of the images themselves under ``originals`` (where these are the reference, only scores); plain JSON types.

    Raises:
        ValueError: if there are fewer than two images, a length is wrong, or reconstructions are not finite.
        TooManyBroken: see ``data_reference``.
    """
    lengths = default_lengths(tokenizer.num_tokens) if lengths is None else lengths
    if len(set(lengths)) < len(lengths):
        raise ValueError(f"each length can be measured once, got {list(lengths)}; try {sorted(set(lengths))}")
    total = len(data) if limit is None else min(limit, len(data))
    own_lengths = own_lengths or {}
    names: list[int | str] = [ORIGINALS, *lengths, *own_lengths]
    collectors = {name: FeatureCollector(features, set(subset(total, MAX_KEPT))) for name in names}
    tokens: dict[str, list[int]] = {name: [] for name in own_lengths}
    batches, images = Sequential(data, batch_size, limit), 0
    for batch in batches:
        for name, pictures, kept in _versions(tokenizer, batch, lengths, own_lengths):
            if not pictures.isfinite().all():
                raise ValueError(
                    f"images at length {name} are not finite, among {', '.join(batch.keys[:3])} and the rest of their "
                    "batch: the weights have probably diverged, use an earlier checkpoint"
                )
            collectors[name].add(to_uint8(pictures))
            if isinstance(name, str) and kept is not None:
                tokens[name] += kept.tolist()
        images += len(batch.keys)
        if progress is not None:
            progress(features.metric, images + len(batches.broken), total)
    sets = {name: collector.collected() for name, collector in collectors.items()}
    originals = sets.pop(ORIGINALS)
    compared = Reference(originals, {"images": ORIGINALS}) if reference is None else reference
    numbers = {name: distances(features, compared.images, found) for name, found in sets.items()}
    return {
        "definitions": DEFINITIONS,
        "protocol": {
            "reference": dict(compared.protocol),
            **_images_protocol(data, batches, images),
            "features": features.protocol(),
            "lengths": list(lengths),
            "weights": dict(record or {}),
        },
        ORIGINALS: scores(originals) if reference is None else distances(features, reference.images, originals),
        "per_length": [{"length": length, **numbers[length]} for length in lengths],
        "own_lengths": {
            name: {"mean_length": sum(found) / len(found), **numbers[name]} for name, found in tokens.items()
        },
    }


def _versions(
    tokenizer: Tokenizer, batch: Batch, lengths: Sequence[int], own_lengths: Mapping[str, OwnLengths]
) -> Iterator[tuple[int | str, Tensor, Tensor | None]]:
    """The originals, and each reconstruction of them, with the lengths ``(b,)`` where they differ."""
    images = batch.images.to(next(tokenizer.parameters()).device)
    yield ORIGINALS, images, None
    for length, rebuilt in zip(lengths, reconstructions(tokenizer, images, lengths), strict=True):
        yield length, rebuilt, None
    for name, choose in own_lengths.items():
        kept = choose(images, batch.keys)
        yield name, tokenizer.decode(tokenizer.encode(images, kept)), kept


def _images_protocol(data: ImageData, batches: Sequential, images: int) -> dict[str, object]:
    protocol = {"data": data.protocol(), "images": images, "of": len(data), "image_size": data.image_size}
    return {**protocol, **batches.record(), "uint8": UINT8_RULE}
