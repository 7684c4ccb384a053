"""The data of a run: three sets of one image size."""

from __future__ import annotations

from functools import cached_property

from framework.config.registry import Factory
from framework.data.interface import ImageData


class Data:
    """Training, validation and test images, each built when first asked for.

    Args:
        image_size: side of every image in pixels.
        train: what the model learns from, augmented.
        validation: what choices are made by.
        test: what is reported, once.
        num_workers: processes that fetch training batches ahead; 0 fetches in the main one.
        seed: of the augmentation, given by the run.
    """

    def __init__(
        self,
        image_size: int,
        train: Factory[ImageData],
        validation: Factory[ImageData],
        test: Factory[ImageData],
        num_workers: int = 0,
        *,
        seed: int,
    ) -> None:
        self.image_size = image_size
        self.num_workers = num_workers
        self._seed = seed
        self._train = train
        self._validation = validation
        self._test = test

    @cached_property
    def train(self) -> ImageData:
        return self._train(image_size=self.image_size, training=True, seed=self._seed)

    @cached_property
    def validation(self) -> ImageData:
        return self._validation(image_size=self.image_size, training=False, seed=self._seed)

    @cached_property
    def test(self) -> ImageData:
        return self._test(image_size=self.image_size, training=False, seed=self._seed)
