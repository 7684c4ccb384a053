from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from framework.allocation.error_table import ErrorTable
from framework.allocation.fidelity import SquaredError
from framework.data.interface import Batch
from tests.tokenizers.build import small_tokenizer

IMAGES = torch.rand(7, 3, 16, 16, generator=torch.Generator().manual_seed(1))
KEYS = [f"photo@{place},0,16" for place in range(7)]
BUDGETS = (1, 3, 6)
PROTOCOL = {"data": {"source": "noise", "count": 7, "size": (16, 16)}, "fidelity": "SquaredError"}


def batches(size: int) -> list[Batch]:
    return [Batch(IMAGES[i : i + size], KEYS[i : i + size], KEYS[i : i + size]) for i in range(0, 7, size)]


def compute(name: str = "SuffixTokenViT", size: int = 3) -> ErrorTable:
    tokenizer = small_tokenizer(encoder_name=name).eval()
    return ErrorTable.compute(tokenizer, batches(size), BUDGETS, SquaredError(), "abc", PROTOCOL)


@pytest.mark.parametrize(("name", "encodings"), [("SuffixTokenViT", 1), ("PatchEncoder", 1 + len(BUDGETS))])
@torch.no_grad()
def test_table_holds_each_images_error_at_each_budget(name: str, encodings: int) -> None:
    tokenizer = small_tokenizer(encoder_name=name).eval()
    calls = {"encoder": 0, "decoder": 0}
    for part in calls:

        def count(module: object, given: tuple[object, ...], result: object, part: str = part) -> None:
            calls[part] += 1

        getattr(tokenizer, part).register_forward_hook(count)
    done: list[int] = []
    table = ErrorTable.compute(tokenizer, batches(3), BUDGETS, SquaredError(), "abc", PROTOCOL, done.append)
    assert done == [3, 6, 7]
    assert calls == {"encoder": 3 * encodings, "decoder": 3 * len(BUDGETS)}
    for column, budget in enumerate(BUDGETS):
        errors = (tokenizer.decode(tokenizer.encode(IMAGES, budget)) - IMAGES).square().mean((1, 2, 3))
        assert torch.allclose(table.distortions[:, column], errors, atol=1e-6)
    assert torch.allclose(table.features, tokenizer.encode_with_features(IMAGES)[1], atol=1e-5)
    assert table.keys == tuple(KEYS) and table.budgets == BUDGETS


def test_rows_are_looked_up_by_key() -> None:
    table = compute()
    assert not table.features.requires_grad and not table.distortions.requires_grad
    assert table.rows([KEYS[5], KEYS[0], KEYS[5]]).tolist() == [5, 0, 5]
    with pytest.raises(LookupError, match=r"lacks 1 of 2 images, first \['cat'\]"):
        table.rows([KEYS[0], "cat"])


def test_batches_do_not_matter() -> None:
    assert torch.allclose(compute(size=1).distortions, compute(size=7).distortions, atol=1e-6)


def test_saving_and_loading_is_the_identity(tmp_path: Path) -> None:
    table, path = compute(), tmp_path / "new" / "table.safetensors"
    table.save(path)
    for keys in (None, KEYS):
        loaded = ErrorTable.load(path, "abc", BUDGETS, PROTOCOL, keys)
        assert torch.equal(loaded.features, table.features) and torch.equal(loaded.distortions, table.distortions)
        assert (loaded.keys, loaded.budgets, loaded.digest) == (table.keys, table.budgets, "abc")
    loaded.save(path)
    assert ErrorTable.load(path, "abc", list(BUDGETS), PROTOCOL, KEYS).keys == table.keys
    assert [child.name for child in path.parent.iterdir()] == ["table.safetensors"]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"digest": "xyz"}, "with other digest: abc instead of xyz"),
        ({"budgets": (1, 2, 6)}, "with other budgets: at place 1, 3 instead of 2"),
        ({"budgets": (1, 3)}, "with other budgets: at place 2, 6 instead of None"),
        ({"protocol": {"data": {}}}, "with other protocol: .*noise.* instead of .*Ask for what it holds, or remove it"),
        ({"keys": KEYS[::-1]}, "with other keys: at place 0, 'photo@0,0,16' instead of 'photo@6,0,16'"),
        ({"keys": [*KEYS, "cat"]}, "with other keys: at place 7, None instead of 'cat'"),
    ],
)
def test_a_table_of_something_else_is_refused(tmp_path: Path, other: dict[str, object], message: str) -> None:
    path = tmp_path / "table.safetensors"
    compute().save(path)
    asked = {"digest": "abc", "budgets": BUDGETS, "protocol": PROTOCOL, "keys": KEYS} | other
    with pytest.raises(ValueError, match=message):
        ErrorTable.load(path, **asked)  # type: ignore[arg-type]


def test_a_damaged_file_and_a_file_of_other_tensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "table.safetensors"
    compute().save(path)
    whole = path.read_bytes()
    for length in (0, 4, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"table.safetensors is damaged or no error table .*remove it"):
            ErrorTable.load(path, "abc", BUDGETS, PROTOCOL)
    save_file({"features": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="is damaged or no error table"):
        ErrorTable.load(path, "abc", BUDGETS, PROTOCOL)
    with pytest.raises(FileNotFoundError):
        ErrorTable.load(tmp_path / "none.safetensors", "abc", BUDGETS, PROTOCOL)


def test_what_cannot_be_measured_is_refused() -> None:
    tokenizer = small_tokenizer()
    with pytest.raises(ValueError, match="in training mode"):
        ErrorTable.compute(tokenizer, batches(3), BUDGETS, SquaredError(), "abc", PROTOCOL)
    tokenizer.eval()
    with pytest.raises(ValueError, match="no images"):
        ErrorTable.compute(tokenizer, [], BUDGETS, SquaredError(), "abc", PROTOCOL)
    with pytest.raises(ValueError, match="budgets must increase"):
        ErrorTable.compute(tokenizer, batches(3), (3, 1), SquaredError(), "abc", PROTOCOL)
    dict(tokenizer.decoder.named_parameters())["head.to_patch.bias"].data[:] = float("nan")
    with pytest.raises(ValueError, match=r"of 3 of 3 images are not finite, first photo@0,0,16, photo@1,0,16, photo@2"):
        ErrorTable.compute(tokenizer, batches(3), BUDGETS, SquaredError(), "abc", PROTOCOL)
