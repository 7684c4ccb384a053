"""Mutated configurations: each is accepted, and then resolves to itself, or refused with a place; none crashes."""

from __future__ import annotations

import os
import random
import shutil
import string
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from framework.config import ConfigError, check, dump_yaml, load_config, resolve
from framework.engine.experiment import Experiment

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(path.relative_to(ROOT) for path in (ROOT / "projects").rglob("*.yaml"))

DUMPER = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
SCALARS = [
    None, True, False, 0, 1, -1, 16, 10**400, -(2**63), 0.5, -0.0, 1e-400, 1e308, float("inf"), float("nan"), "", " ",
    "on", "1e-4", "null", "~", "0x10", "0o9", "é", "\u2028", "😀", "\ufeff", "a" * 100_000, "name", "auto", "a: b",
    "# no", "@", "`", "$", "$$", "$$a", "$.", "$a", "$data.image_size", "$run", "$train.optimizer.lr", "$env:",
    "$env:HOME", "$env:NO_SUCH_1", "$env:NO_SUCH_1|7", "$env:NO_SUCH_1|$a", "$tokenizer", "$0", "../../etc",
    "ntm.yaml", "mutated.yaml", "\t", "a\nb", "%",
]  # fmt: skip
SNIPPETS = [
    "&a ", "*a", "<<: *a", "<<: {a: 1}", "!!python/object/apply:os.system [ls]", "!!int ", "!!binary ", "!x ", "? ",
    "- ", "---\n", "...\n", "%YAML 1.1\n", "%TAG ! x\n", "|\n", ">+9\n", "|-\n ", "\t", "\r", "\r\n", "\x00", "\x07",
    "\x85", "\ufeff", "'", '"', "\\", '"\\x', '"\\U00110000"', "{", "}", "[", "]", ",", ":", ": ", "#", " #",
    "name: ", "name: Muon", "- - - ", "_base_: ", "_base_: [a, [b]]", "imports: 3", "imports: [no.such.module]",
    "imports: ['']", "imports: [..]", "0x", "0b1", "1" * 5000, "1_000", "9" * 400, "1e999", ".nan", "-.inf",
    "2001-01-01", "=", "1:30", "[" * 500, "{a: " * 400, "\ud800",
]  # fmt: skip


class Case(NamedTuple):
    """What is given to ``load_config``."""

    file: Path
    content: bytes
    overrides: list[str]


# Of the tree


def nodes(tree: Any, keys: tuple[Any, ...] = ()) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in a tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(items):
        yield tree, key
        yield from nodes(value)


def any_value(rng: random.Random, tree: Any) -> Any:
    kind = rng.randrange(5)
    if kind < 3:
        return rng.choice(SCALARS)
    container, key = rng.choice(list(nodes(tree)))
    if kind == 3:
        return copied(container[key])
    return rng.choice([{}, [], [[]], [None], {"name": None}, {"name": "Muon"}, {"a": {}}])


def mutate_tree(rng: random.Random, tree: Any) -> None:
    container, key = rng.choice(list(nodes(tree)))
    other, other_key = rng.choice(list(nodes(tree)))
    match rng.randrange(8):
        case 0:
            del container[key]
        case 1 if isinstance(container, dict):  # a key that is nearly right, or not at all
            word = list(str(key))
            word.insert(rng.randrange(len(word) + 1), rng.choice(string.ascii_letters + "._ é"))
            container["".join(word)] = container.pop(key)
        case 2 | 3:
            container[key] = any_value(rng, tree)
        case 4:
            container[key], other[other_key] = copied(other[other_key]), copied(container[key])
        case 5:
            container[key] = rng.choice([[container[key]], {rng.choice(["name", "a", str(key)]): container[key]}])
        case 6:
            for _ in range(rng.choice([3, 30, 60])):
                container[key] = rng.choice([[container[key]], {"a": container[key]}])
        case 7 if isinstance(container, dict):
            another = rng.choice(["name", "weights", "frozen", "_base_", "imports", "", "a.b", "1"])
            container[another] = any_value(rng, tree)


def copied(value: Any) -> Any:
    """A copy, so that a part that is moved into itself makes no endless tree."""
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return [copied(item) for item in value] if isinstance(value, list) else value


# Of the text


def mutate_text(rng: random.Random, text: str) -> str:
    place = rng.randrange(len(text) + 1)
    lines = text.split("\n")
    one, two = rng.randrange(len(lines)), rng.randrange(len(lines))
    match rng.randrange(8):
        case 0 | 1:
            return text[:place] + rng.choice(SNIPPETS) + text[place:]
        case 2:
            return text[:place] + text[place + rng.randint(1, 9) :]
        case 3:
            lines[one], lines[two] = lines[two], lines[one]
        case 4:
            lines.insert(one, lines[two])  # a key that comes twice
        case 5:
            lines[one] = " " * rng.randrange(9) + lines[one].lstrip()
        case 6:
            lines[one] = lines[one].partition(":")[0] + ": " + rng.choice([*SNIPPETS, *map(str, SCALARS)])
        case 7:
            return text[:place]
    return "\n".join(lines)


def override(rng: random.Random, tree: Any) -> str:
    words = [rng.choice(["train", "tokenizer", "run", "data", "0", "9", "-1", "name", "optimizer", "", "é"])]
    node = tree
    words = [] if rng.random() < 0.8 else words
    while isinstance(node, dict | list) and node and rng.random() < 0.8:
        key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
        words.append(str(key))
        node = node[key]
    value = rng.choice([*SNIPPETS, *map(str, SCALARS), "{name: AdamW, lr: 1e-3}", "[1, 2]", "{a: {b: c}}", "null"])
    return ".".join(words) + rng.choice(["=", "=", "=", "=", "==", ":", ""]) + value


def cases(seed: int, folder: Path) -> Iterator[Case]:
    """Endlessly many mutations of the shipped configurations, whose copies lie in the folder."""
    rng = random.Random(seed)
    texts = {path: (folder / path).read_text() for path in CONFIGS}
    whole = Path("projects/adatok/whole.yaml")  # in which every argument stands
    texts[whole] = dump_yaml(resolve(load_config(ROOT / "projects/adatok/ntm.yaml"), Experiment))
    trees = {path: yaml.safe_load(text) for path, text in texts.items()}
    while True:
        path = whole if rng.random() < 0.3 else rng.choice(CONFIGS)
        text, tree = texts[path], copied(trees[path])
        if rng.random() < 0.5:
            for _ in range(rng.choice([1, 1, 2, 5])):
                if list(nodes(tree)):
                    mutate_tree(rng, tree)
            text = yaml.dump(tree, Dumper=DUMPER, allow_unicode=rng.random() < 0.5, sort_keys=False)
        if rng.random() < 0.6:
            for _ in range(rng.choice([1, 1, 2, 5])):
                text = mutate_text(rng, text)
        content = text.encode(errors="surrogatepass")
        if rng.random() < 0.05:
            content = content[: len(content) // 2] + rng.randbytes(3) + content[len(content) // 2 :]
        overrides = [override(rng, tree) for _ in range(rng.choice([0, 0, 1, 3]))]
        yield Case(folder / path.with_name("mutated.yaml"), content, overrides)


def verdict(case: Case) -> str:
    """``accepted`` or ``refused``; anything else is an error in the configuration system."""
    case.file.write_bytes(case.content)
    try:
        config = load_config(case.file, case.overrides)
        check(config, Experiment)
    except ConfigError as error:
        assert error.problems and len(str(error)) < 100_000
        for problem in error.problems:
            assert problem.message and str(problem).startswith(str(problem.source))
            has_place = problem.source.line > 0 or problem.source.file.startswith("command line")
            assert has_place or "cannot be read" in problem.message, problem
        return "refused"
    tree = resolve(config, Experiment)
    text = dump_yaml(tree)
    again = case.file.with_name("again.yaml")
    again.write_text(text)
    assert dump_yaml(resolve(load_config(again), Experiment)) == text
    return "accepted"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "projects", tmp_path / "projects", ignore=shutil.ignore_patterns("*.py", "*.md", "*.png"))
    return tmp_path


def test_a_thousand_mutated_configurations(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_SUCH_1", raising=False)
    found: Counter[str] = Counter()
    for number, case in zip(range(int(os.environ.get("FUZZ_COUNT", 1000))), cases(0, folder), strict=False):
        try:
            found[verdict(case)] += 1
        except Exception as error:
            kept = Path(os.environ.get("FUZZ_KEEP", folder)) / f"{number}.yaml"
            kept.write_bytes(case.content)
            raise AssertionError(f"{kept} with {case.overrides}: {type(error).__name__}: {error}") from error
    assert found["accepted"] > 0.05 * found["refused"] > 0
