"""The labels of image sets, where an evaluation needs classes."""

from __future__ import annotations

from itertools import zip_longest

from torch import Tensor

from framework.data.interface import Batch, ImageData


def labels_of(batch: Batch, source: object) -> Tensor:
    """The labels ``(b,)`` int64 of a batch.

    Args:
        source: where it comes from, for messages: a name, or a data set's protocol.

    Raises:
        ValueError: if there are none, naming sets that have them.
    """
    if batch.labels is None:
        raise ValueError(
            "what is measured here needs classes, and these images have no labels. Sets that have them: Digits, "
            "DigitScenes, FashionMNIST, and ImageFolder or Shards with a subfolder for each class. Without labels: "
            f"{source}"
        )
    return batch.labels


def refuse_other_classes(train_data: ImageData, test_data: ImageData) -> None:
    """Raise a ``ValueError`` if two sets number their classes differently, where they have names for them."""
    train, test = (list(getattr(data, "classes", ())) for data in (train_data, test_data))
    if train and test and train != test:
        at, first, second = next((at, a, b) for at, (a, b) in enumerate(zip_longest(train, test)) if a != b)
        raise ValueError(
            f"the two sets number their classes differently: class {at} is {first!r} of {len(train)} in training, and "
            f"{second!r} of {len(test)} in the other. Give both the same list with classes: FILE"
        )
