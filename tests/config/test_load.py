"""Loading: scalars, inheritance, overrides and references."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from framework.config import ConfigError, dump_yaml, load_config


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, text: str) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text, encoding="utf-8")
    return name


def load(text: str, *overrides: str) -> dict[str, Any]:
    config = load_config(write("a.yaml", text), overrides)
    assert not config.problems
    return config.tree


def messages(error: pytest.ExceptionInfo[ConfigError]) -> list[str]:
    return str(error.value).splitlines()


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1.", 1.0), (".5", 0.5), ("-.inf", -math.inf), ("012", 12), ("0o17", 15), ("0x1F", 31),
        ("+3", 3), ("on", "on"), ("yes", "yes"), ("No", "No"), ("true", True), ("FALSE", False), ("~", None),
        ("", None), ("null", None), ("12:30:00", "12:30:00"), ("2024-01-01", "2024-01-01"), ("1_000", "1_000"),
        ("0b1", "0b1"), ("=", "="), ("'1'", "1"), ('"1e-4"', "1e-4"), ("!!str 1", "1"), ("1e", "1e"), ("e5", "e5"),
    ],
)  # fmt: skip
def test_scalars_follow_the_core_schema(folder: Path, text: str, value: Any) -> None:
    found = load(f"x: {text}")["x"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("base", "child", "merged"),
    [
        ("a: {b: 1, c: 2}", "a: {c: 3, d: 4}", {"a": {"b": 1, "c": 3, "d": 4}}),
        ("a: [1, 2, 3]", "a: [4]", {"a": [4]}),
        ("a: {b: 1}", "a: null", {"a": None}),
        ("a: null", "a: {b: 1}", {"a": {"b": 1}}),
        ("a: {name: X, b: 1, n: {c: 1}}", "a: {name: Y, d: 2}", {"a": {"name": "Y", "d": 2}}),
        ("a: {name: X, b: 1}", "a: {name: X, d: 2}", {"a": {"name": "X", "b": 1, "d": 2}}),
        ("a: {b: 1}", "a: {name: X}", {"a": {"b": 1, "name": "X"}}),
        ("a: {n: {name: X, b: 1}}", "a: {n: {name: Y}}", {"a": {"n": {"name": "Y"}}}),
        ("imports: [p, q]", "imports: [q, r]", {"imports": ["p", "q", "r"]}),
    ],
)
def test_merging_a_base(folder: Path, base: str, child: str, merged: dict[str, Any]) -> None:
    write("_base_/b.yaml", base)
    assert load(f"_base_: _base_/b.yaml\n{child}") == merged


def test_bases_are_relative_and_later_ones_win(folder: Path) -> None:
    write("one/b.yaml", "_base_: ../two/c.yaml\nx: b\ny: b")
    write("two/c.yaml", "x: c\ny: c\nz: c")
    write("two/d.yaml", "y: d")
    assert load("_base_: [one/b.yaml, two/d.yaml]\nw: a") == {"x": "b", "y": "d", "z": "c", "w": "a"}


def test_a_base_reached_twice_is_no_circle(folder: Path) -> None:
    write("b.yaml", "x: 1")
    write("c.yaml", "_base_: b.yaml")
    assert load("_base_: [b.yaml, c.yaml]") == {"x": 1}


def test_every_value_knows_its_line(folder: Path) -> None:
    write("b.yaml", "a:\n  x: 1\n  y: 2")
    file = write("a.yaml", "_base_: b.yaml\na:\n  y: 3\n  l:\n  - 1\n  - {z: 1}")
    config = load_config(file, ["a.w=1", "n.m={k: 1}"])
    places = [("a",), ("a", "x"), ("a", "y"), ("a", "l", 1, "z"), ("a", "w"), ("n",), ("n", "m", "k"), ("a", "absent")]
    assert [str(config.source(place)) for place in places] == [
        "a.yaml:2", "b.yaml:2", "a.yaml:3", "a.yaml:6", "command line: a.w=1", "command line: n.m={k: 1}",
        "command line: n.m={k: 1}", "a.yaml:2",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("overrides", "tree"),
    [
        (["a.b=2"], {"a": {"name": "X", "b": 2}, "l": [{"v": 1}, 5]}),
        (["a.b=1e-3", "a.b=on"], {"a": {"name": "X", "b": "on"}, "l": [{"v": 1}, 5]}),
        (["a.b=x=y"], {"a": {"name": "X", "b": "x=y"}, "l": [{"v": 1}, 5]}),
        (["a.b="], {"a": {"name": "X", "b": None}, "l": [{"v": 1}, 5]}),
        (["a.c.d={e: 1}"], {"a": {"name": "X", "b": 1, "c": {"d": {"e": 1}}}, "l": [{"v": 1}, 5]}),
        (["a.c=3", "a.name=Y"], {"a": {"name": "Y", "c": 3}, "l": [{"v": 1}, 5]}),
        (["a.c=3", "a={name: Y}"], {"a": {"name": "Y", "c": 3}, "l": [{"v": 1}, 5]}),
        (["a.n.x=1", "a.n.name=Z", "a.name=Y"], {"a": {"name": "Y", "n": {"name": "Z", "x": 1}}, "l": [{"v": 1}, 5]}),
        (["a.name=X", "a.c=3"], {"a": {"name": "X", "b": 1, "c": 3}, "l": [{"v": 1}, 5]}),
        (["a=null"], {"a": None, "l": [{"v": 1}, 5]}),
        (["l.0.w=2", "l.1=6"], {"a": {"name": "X", "b": 1}, "l": [{"v": 1, "w": 2}, 6]}),
        (["l=[]"], {"a": {"name": "X", "b": 1}, "l": []}),
    ],
)
def test_overrides(folder: Path, overrides: list[str], tree: dict[str, Any]) -> None:
    assert load("a: {name: X, b: 1}\nl: [{v: 1}, 5]", *overrides) == tree


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("$a.b", 32), ("'$a.b'", 32), ("$chain", 32), ("$list", [1, 32]), ("$list.1", 32), ("$$a.b", "$a.b"),
        ("$$", "$"), ("$env:SIZE", 64), ("$env:SIZE|8", 64), ("$env:UNSET_SIZE|8", 8), ("$env:UNSET_SIZE|on", "on"),
        ("$env:EMPTY|x", "x"), ("$env:UNSET_SIZE|", None), ("$env:PLAIN", "[1, 2]"), ("a $a.b", "a $a.b"),
        ("[$a.b, 2]", [32, 2]),
    ],
)  # fmt: skip
def test_references(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str, value: Any) -> None:
    monkeypatch.setenv("SIZE", "64")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.setenv("PLAIN", "[1, 2]")
    monkeypatch.delenv("UNSET_SIZE", raising=False)
    assert load(f"x: {text}\na: {{b: 32}}\nchain: $list.1\nlist: [1, $a.b]")["x"] == value


def test_references_see_the_overrides(folder: Path) -> None:
    assert load("size: 32\nx: $size", "size=64") == {"size": 64, "x": 64}


STRINGS = ["on", "1e-4", "null", "", "012", "true", "~", "$a", "$$", "$env:X", "é 漢字 🙂", "a: b", "# x", " pad "]
STRINGS += ["- x", "two\nlines\n", "{", "'", '"', "1:30", "\t", "=", "<<", "x" * 300, "many words " * 30, "*a", "!"]


def test_dumping_and_loading_is_the_identity(folder: Path) -> None:
    tree = {
        "strings": STRINGS,
        "keys": {text: index for index, text in enumerate(STRINGS)},
        "floats": [1e-4, 1e-5, 1e16, 0.1, 1.0, -0.0, math.inf, 1 / 3, 5e-324],
        "others": [1, -1, 10**30, True, False, None, [], {}, [[1], {"a": [{"b": None}]}]],
    }
    loaded = load(dump_yaml(tree))
    assert loaded == tree
    assert repr(loaded) == repr(tree)  # 1.0 and 1 and True are equal, but not the same


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1",
         "a.yaml:1: not valid YAML: expected ',' or ']', but got '<stream end>', while parsing a flow sequence"),
        ("a: 1\nb: c: 2", "a.yaml:2: not valid YAML: mapping values are not allowed here"),
        ("a: &x 1\nb: *x", "a.yaml:2: not valid YAML: aliases are not supported: write a reference such as $a.b"),
        ("- 1", "a.yaml:1: the top level must be a mapping, such as `train: {lr: 3e-4}`"),
        ("", "a.yaml:1: the top level must be a mapping, such as `train: {lr: 3e-4}`"),
        ("x: 1\ny: \x01", "a.yaml:2: not valid YAML: the character '\\x01' is not allowed"),
        ("x: 1\n_base_: bse.yaml", "a.yaml:2: _base_: bse.yaml: no such file, did you mean 'base.yaml'?"),
        ("_base_: loop/b.yaml", "loop/c.yaml:2: _base_: the files inherit in a circle: "
         "a.yaml -> loop/b.yaml -> loop/c.yaml -> a.yaml"),
        ("_base_: a.yaml", "a.yaml:1: _base_: the files inherit in a circle: a.yaml -> a.yaml"),
        (f"_base_: {'9' * 300}/b.yaml", f"a.yaml:1: _base_: {'9' * 300}/b.yaml: no such file"),  # no name is so long
    ],
)  # fmt: skip
def test_what_is_no_tree_is_refused(folder: Path, text: str, message: str) -> None:
    write("base.yaml", "x: 1")
    write("loop/b.yaml", "_base_: c.yaml")
    write("loop/c.yaml", "x: 1\n_base_: ../a.yaml")
    with pytest.raises(ConfigError) as error:
        load_config(write("a.yaml", text))
    assert messages(error) == ["1 error in the configuration:", message]


def test_missing_file_and_all_missing_bases(folder: Path) -> None:
    write("ntm.yaml", "_base_: [lost.txt, gone.txt]")
    with pytest.raises(ConfigError) as error:
        load_config("ntn.yaml")
    assert messages(error)[1:] == ["ntn.yaml: no such file, did you mean 'ntm.yaml'?"]
    with pytest.raises(ConfigError) as error:
        load_config("ntm.yaml")
    assert messages(error) == [
        "2 errors in the configuration:",
        "ntm.yaml:1: _base_: lost.txt: no such file",
        "ntm.yaml:1: _base_: gone.txt: no such file",
    ]
