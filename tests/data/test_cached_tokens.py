"""Batches of tokens from a file, in place of images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from framework.data.cached_tokens import CachedTokens
from framework.data.interface import Batch, ImageData
from framework.data.stream import Stream
from framework.data.token_file import TokenFile
from framework.data.token_writer import TokenWriter
from framework.tokens import Tokens
from tests.data.token_sets import header, some_tokens, written


class Named(ImageData):
    """Images that nobody should read, under the names of ``written``."""

    image_size, max_broken = 16, 0.5

    def __len__(self) -> int:
        return 12

    def key(self, index: int) -> str:
        return f"image {index} ü"

    def fetch(self, indices: Sequence[int], epoch: int) -> Batch:
        raise AssertionError("images are not read")

    def whole(self, group: str) -> torch.Tensor:
        raise NotImplementedError

    def protocol(self) -> dict[str, object]:
        return {"source": "a test"}


def test_batches_have_the_rows_of_their_images(tmp_path: Path) -> None:
    tokens, labels = some_tokens(12), torch.arange(12) % 5
    data = CachedTokens(Named(), TokenFile(written(tmp_path / "t", tokens, header(), labels=labels)))
    batch = data.fetch([7, 2, 9], 0)
    assert batch.tokens is not None and batch.tokens.codes is not None and tokens.codes is not None
    assert batch.keys == ["image 7 ü", "image 2 ü", "image 9 ü"] and batch.images.shape == (3, 3, 0, 0)
    assert batch.labels is not None and batch.labels.tolist() == [2, 2, 4]
    assert torch.equal(batch.tokens.lengths, tokens.lengths[[7, 2, 9]])
    assert batch.tokens.codes.shape[1] == batch.tokens.lengths.max()
    for row, index in enumerate((7, 2, 9)):
        length = int(tokens.lengths[index])
        assert torch.equal(batch.tokens.codes[row, :length], tokens.codes[index, :length])
    picked = batch.select([1]).to(torch.device("cpu"))
    assert picked.tokens is not None and torch.equal(picked.tokens.lengths, tokens.lengths[[2]])


def test_batches_over_an_epochs_end_are_joined(tmp_path: Path) -> None:
    """Looks take turns; an image that has no row in a look is broken there, and another comes in its place."""
    tokens, labels = some_tokens(12), torch.arange(12)
    writer = TokenWriter(tmp_path / "t", header(crops=2), 0, 1)
    names = [f"image {index} ü" for index in range(12)]
    writer.add(tokens, names, labels, 0)
    kept = [index for index in range(12) if index != 4]
    writer.add(
        tokens.select(torch.tensor(kept)).with_lengths(torch.full((11,), 3)), [names[i] for i in kept], labels[kept], 1
    )
    writer.write({names[4]: "cut off"}, 0)
    data = CachedTokens(Named(), TokenFile(tmp_path / "t"))
    assert data.fetch([4, 5], 1).broken == {names[4]: "it could not be read when it was encoded"}
    assert data.fetch([4, 5], 2).broken == {}
    stream = Stream(data, 8, seed=0)
    first, second, third = (next(stream) for _ in range(3))
    assert second.tokens is not None and third.tokens is not None and first.tokens is not None
    assert len(second.tokens) == len(second.keys) == 8  # four of each epoch
    assert second.tokens.lengths[4:].tolist() == [3] * 4 == third.tokens.lengths[:4].tolist()
    for batch in (first, second, third):
        assert batch.labels is not None
        assert batch.keys == [names[label] for label in batch.labels.tolist()]


def test_files_without_labels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no labels"):
        CachedTokens(Named(), TokenFile(written(tmp_path / "t", some_tokens(12), header())))


def test_joined_tokens_are_padded() -> None:
    tokens = some_tokens(5)
    parts = [tokens.select(torch.tensor([row])).truncate(int(tokens.lengths[row])) for row in range(5)]
    joined = Tokens.join(parts)
    assert joined.codes is not None and tokens.codes is not None
    longest = int(tokens.lengths.max())
    assert joined.codes.shape == (5, longest) and torch.equal(joined.lengths, tokens.lengths)
    assert torch.equal(joined.codes, tokens.codes[:, :longest].masked_fill(~joined.mask, 0))
    assert torch.equal(joined.latents[joined.mask], tokens.latents[:, :longest][joined.mask])
