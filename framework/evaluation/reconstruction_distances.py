"""Frechet distances (rFID and its stand-ins) of a tokenizer's reconstructions, at each length and at each image's own.

Shapes: b images of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
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
from framework.tokenizers.interface import ImageSpace
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


Version = tuple[int | str, Tensor, Tensor | None]
"""What images become: a length or a name, ``(b, 3, h, w)`` in [0, 1], and kept tokens ``(b,)`` where they vary."""


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
    own_lengths, device = own_lengths or {}, next(tokenizer.parameters()).device

    def versions(batch: Batch) -> Iterator[Version]:
        images = batch.images.to(device)
        for length, rebuilt in zip(lengths, reconstructions(tokenizer, images, lengths), strict=True):
            yield length, rebuilt, None
        for name, choose in own_lengths.items():
            kept = choose(images, batch.keys)
            yield name, tokenizer.decode(tokenizer.encode(images, kept)), kept

    names: list[int | str] = [*lengths, *own_lengths]
    return _distances_of(versions, names, data, features, reference, limit, batch_size, record, progress)


@torch.no_grad()
def space_distances(
    space: ImageSpace,
    data: ImageData,
    features: DistributionFeatures,
    reference: Reference | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    record: Mapping[str, object] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The same of images that only go through a space and back; its one length is the number of positions."""
    device, positions = next(space.parameters()).device, (data.image_size // space.downsampling) ** 2

    def versions(batch: Batch) -> Iterator[Version]:
        yield positions, space.decode(space.encode(batch.images.to(device))).clamp(0, 1), None

    return _distances_of(versions, [positions], data, features, reference, limit, batch_size, record, progress)


def _distances_of(
    versions: Callable[[Batch], Iterator[Version]],
    names: Sequence[int | str],
    data: ImageData,
    features: DistributionFeatures,
    reference: Reference | None,
    limit: int | None,
    batch_size: int,
    record: Mapping[str, object] | None,
    progress: Progress | None,
) -> dict[str, Any]:
    total = len(data) if limit is None else min(limit, len(data))
    kept = set(subset(total, MAX_KEPT))
    collectors = {name: FeatureCollector(features, kept) for name in [ORIGINALS, *names]}
    tokens: dict[str, list[int]] = {name: [] for name in names if isinstance(name, str)}
    batches, images = Sequential(data, batch_size, limit), 0
    for batch in batches:
        for name, pictures, own in chain([(ORIGINALS, batch.images, None)], versions(batch)):
            if not pictures.isfinite().all():
                raise ValueError(
                    f"images at length {name} are not finite, among {', '.join(batch.keys[:3])} and the rest of their "
                    "batch: the weights have probably diverged, use an earlier checkpoint"
                )
            collectors[name].add(to_uint8(pictures))
            if own is not None:
                tokens[str(name)] += own.tolist()
        images += len(batch.keys)
        if progress is not None:
            progress(features.metric, images + len(batches.broken), total)
    sets = {name: collector.collected() for name, collector in collectors.items()}
    originals = sets.pop(ORIGINALS)
    compared = Reference(originals, {"images": ORIGINALS}) if reference is None else reference
    numbers = {name: distances(features, compared.images, found) for name, found in sets.items()}
    lengths = [name for name in names if isinstance(name, int)]
    return {
        "definitions": DEFINITIONS,
        "protocol": {
            "reference": dict(compared.protocol),
            **_images_protocol(data, batches, images),
            "features": features.protocol(),
            "lengths": lengths,
            "weights": dict(record or {}),
        },
        ORIGINALS: scores(originals) if reference is None else distances(features, reference.images, originals),
        "per_length": [{"length": length, **numbers[length]} for length in lengths],
        "own_lengths": {
            name: {"mean_length": sum(found) / len(found), **numbers[name]} for name, found in tokens.items()
        },
    }


def distances_text(metric: str, found: Mapping[str, Any]) -> str:
    """What stands below a table with a column of ``metric``: against what, in whose features, and what to beware of."""
    own = found["own_lengths"]
    every = [*found["per_length"], *own.values()]
    listed = [f"{at[metric]:.4g} at {at['length']}" for at in found["per_length"]]
    listed += [f"{at[metric]:.4g} at the {name}'s own, {at['mean_length']:.2f} on average" for name, at in own.items()]
    numbers = f" By tokens: {', '.join(listed)}." if own else ""
    notes = "".join(f" Note: {note}." for note in dict.fromkeys(note for at in every for note in at["notes"]))
    images = found["protocol"]["images"]
    return f"{heading(metric)}: {images:,} reconstructions {against_text(found['protocol'])}{numbers}{notes}\n"


def against_text(protocol: Mapping[str, Any]) -> str:
    """What a Frechet distance is to, and in whose features; ``metrics.json`` has the whole of it."""
    reference, network = protocol["reference"], protocol["features"]
    if reference == {"images": ORIGINALS}:
        against = "these images themselves"
    else:
        data = reference.get("data", {})
        own = f"the {data['split']} split" if "split" in data else data.get("source", "another set")
        file = f"{reference['file']} (sha256 {reference['sha256'][:12]})" if "file" in reference else own
        against = f"{reference['images']:,} images of {file}"
    return f"against {against}, in {network['network']}, {network['resize']}, weights {network['weights_sha256'][:12]}."


def heading(metric: str) -> str:
    """What a table of reconstructions calls a Frechet distance: the field's rFID where it is one."""
    return "rFID" if metric == "fid" else metric


def _images_protocol(data: ImageData, batches: Sequential, images: int) -> dict[str, object]:
    protocol = {"data": data.protocol(), "images": images, "of": len(data), "image_size": data.image_size}
    return {**protocol, **batches.record(), "uint8": UINT8_RULE}
