"""What a space says of all images, on disk: the same as computed anew, whole or not believed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from framework.data.interface import Batch
from framework.data.photos import Photos
from framework.data.stream import Stream
from framework.tokenizers import target_cache
from framework.tokenizers.autoencoders.autoencoder_kl import AutoencoderKL
from framework.tokenizers.autoencoders.vqgan import MaskGITVQGAN
from framework.tokenizers.interface import ImageSpace
from framework.tokenizers.target_cache import UNREADABLE, CachedTargets
from tests.stir import stirred

PHOTOS = Photos("train", num_crops=70, image_size=16, training=True, seed=0)


def space(latent_channels: int = 4) -> ImageSpace:
    made = AutoencoderKL(32, (1, 2), 1, (), latent_channels, 16)
    return stirred(made).eval()


def vqgan() -> ImageSpace:
    return stirred(MaskGITVQGAN(32, (1, 2), 1, num_codes=64, dim=8)).eval()


class Damaged(Photos):
    """Photographs of which two cannot be read."""

    def read(self, indices: Sequence[int], epoch: int) -> Batch:
        good = [index for index in indices if index not in (3, 68)]
        batch = super().read(good, epoch)
        broken = {self.key(index): "torn" for index in indices if index not in good}
        return Batch(batch.images, batch.keys, batch.groups, broken=broken)


@torch.no_grad()
@pytest.mark.parametrize("make", [space, vqgan])
def test_a_batch_brings_what_the_space_says_of_the_same_look(make: type[ImageSpace], tmp_path: Path) -> None:
    model, told = make(), []
    cached = CachedTargets.cached(tmp_path, model, PHOTOS, 2, True, lambda *state: told.append(state))
    assert told[-1] == (140, 140) and len(list(tmp_path.iterdir())) == 1
    rows = [5, 0, 69, 33]
    for epoch in range(4):
        batch, plain = cached.fetch(rows, epoch), PHOTOS.fetch(rows, epoch % 2)
        assert torch.equal(batch.images, plain.images) and batch.keys == plain.keys
        assert batch.target is not None
        expected = model.target(plain.images)
        assert batch.target.dtype == expected.dtype
        torch.testing.assert_close(batch.target, expected, rtol=2e-3, atol=2e-3)
    assert not torch.equal(cached.fetch(rows, 0).images, cached.fetch(rows, 1).images)
    blind = CachedTargets.cached(tmp_path, model, PHOTOS, 2, False).fetch(rows, 1)
    assert blind.images.shape == (4, 3, 0, 0) and blind.keys == [PHOTOS.key(row) for row in rows]
    assert blind.target is not None and torch.equal(blind.target, cached.fetch(rows, 1).target)  # type: ignore[arg-type]
    in_order, in_stream = next(Stream(PHOTOS, 8, seed=1)), next(Stream(cached, 8, seed=1))
    assert in_order.keys == in_stream.keys and in_stream.target is not None and len(in_stream.target) == 8


def test_a_file_is_found_again_and_one_of_something_else_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = space()
    first = CachedTargets.cached(tmp_path, model, PHOTOS, 1, False).file
    written = first.stat().st_mtime_ns
    computed: list[int] = []
    compute = target_cache._compute
    monkeypatch.setattr(target_cache, "_compute", lambda *given: (computed.append(1), compute(*given)))
    assert CachedTargets.cached(tmp_path, model, PHOTOS, 1, True).file == first
    assert not computed and first.stat().st_mtime_ns == written
    other = stirred(space())
    other.get_parameter("encoder.conv_out.bias").data += 1
    assert CachedTargets.cached(tmp_path, other, PHOTOS, 1, False).file != first
    assert CachedTargets.cached(tmp_path, model, PHOTOS, 2, False).file != first
    fewer = Photos("train", num_crops=69, image_size=16, training=True, seed=0)
    assert CachedTargets.cached(tmp_path, model, fewer, 1, False).file != first
    assert len(computed) == 3


@pytest.mark.parametrize("damage", ["cut", "zeros", "empty", "text"])
def test_a_damaged_file_is_computed_anew(damage: str, tmp_path: Path) -> None:
    model = space()
    cached = CachedTargets.cached(tmp_path, model, PHOTOS, 1, False)
    whole = cached.file.read_bytes()
    content = {"cut": whole[:-1000], "zeros": whole[:128] + bytes(len(whole) - 128), "empty": b"", "text": b"no array"}
    cached.file.write_bytes(content[damage])
    again = CachedTargets.cached(tmp_path, model, PHOTOS, 1, False)
    assert again.file.read_bytes() == whole


def test_a_stopped_computation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = space()
    whole = CachedTargets.cached(tmp_path / "whole", model, PHOTOS, 2, False).file.read_bytes()

    def stop(done: int, total: int) -> None:
        if done >= 70:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        CachedTargets.cached(tmp_path, model, PHOTOS, 2, False, stop)
    (partial,) = tmp_path.glob("*.partial")
    partial.write_bytes(partial.read_bytes()[:-7])  # a row was half written
    told: list[int] = []
    again = CachedTargets.cached(tmp_path, model, PHOTOS, 2, False, lambda done, total: told.append(done))
    assert told[0] > 64 and again.file.read_bytes() == whole and not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("with_images", [True, False])
def test_images_that_cannot_be_read_are_left_out_by_name(with_images: bool, tmp_path: Path) -> None:
    data = Damaged("train", num_crops=70, image_size=16, training=True, seed=0)
    data.max_broken = 0.2
    cached = CachedTargets.cached(tmp_path, space(), data, 1, with_images)
    assert cached.max_broken == 0.2
    batch = cached.fetch([2, 3, 4, 68], epoch=0)
    assert batch.keys == [data.key(2), data.key(4)]
    assert batch.broken == {data.key(row): "torn" if with_images else UNREADABLE for row in (3, 68)}
    assert batch.target is not None and len(batch.target) == 2 and batch.target.isfinite().all()


def test_values_that_float16_cannot_hold_are_refused(tmp_path: Path) -> None:
    model = space()
    model.get_parameter("encoder.quant_conv.bias").data[0] = 1e6
    with pytest.raises(ValueError, match="not finite or beyond 65,504, first .*@.*: has the space been trained"):
        CachedTargets.cached(tmp_path, model, PHOTOS, 1, False)


def test_the_file_is_mapped_and_holds_half_floats(tmp_path: Path) -> None:
    cached = CachedTargets.cached(tmp_path, space(), PHOTOS, 1, False)
    assert isinstance(cached.targets, np.memmap) and cached.targets.dtype == np.float16
    assert cached.targets.shape == (1, 70, 4, 8, 8)
