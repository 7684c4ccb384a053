"""Checking: the exact words for everything that can be wrong, all at once."""

from __future__ import annotations

import copy
import random
import sys
from pathlib import Path
from typing import Any

import pytest

from framework.config import Config, ConfigError, Registry, SchemaError, Source, check, dump_yaml, load_config, resolve
from tests.config.parts import Experiment, Loss, Quantizer, Schedule

GOOD = """
model:
  encoder: {name: ViT, width: 64}
  quantizer: {name: VQ, dim: 6}
train:
  max_steps: 10
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv("DATA_ROOT", raising=False)
    return tmp_path


def errors(text: str, *overrides: str) -> list[str]:
    Path("a.yaml").write_text(text)
    with pytest.raises(ConfigError) as error:
        check(load_config("a.yaml", overrides), Experiment)
    header, *lines = str(error.value).splitlines()
    count = "1 error" if len(lines) == 1 else f"{len(lines)} errors"
    assert header == f"{count} in the configuration:"
    return lines


@pytest.mark.parametrize(
    ("override", "message"),
    [
        # unknown keys
        ("train.lrr=3", "train.lrr: unknown key 'lrr': did you mean 'lr'? "
         "Valid for Training: max_steps, lr, amp, precision, schedule, lengths"),
        ("model.encoder.WIDTH=3", "model.encoder.WIDTH: unknown key 'WIDTH': did you mean 'width'? "
         "Valid for ViT: width, depth, norm"),
        ("train.width=3", "train.width: unknown key 'width'. "
         "Valid for Training: max_steps, lr, amp, precision, schedule, lengths"),
        ("trian.lr=3", "trian: unknown key 'trian': did you mean 'train'? "
         "Valid for Experiment: model, train, losses, extras, folder, title"),
        ("model.quantizer={name: Identity, x: 1}", "model.quantizer.x: unknown key 'x'. Identity takes none"),
        ("model.quantizer.weigths=x", "model.quantizer.weigths: unknown key 'weigths': did you mean 'weights'? "
         "Valid for VQ: dim, codebook_size, decay"),
        # components
        ("model.quantizer.name=vqq", "model.quantizer.name: unknown quantizer 'vqq': did you mean 'VQ'? "
         "Valid: FSQ, Identity, NeedsParent, VQ"),
        ("model.quantizer={name: Nothing, dim: x}", "model.quantizer.name: unknown quantizer 'Nothing'. "
         "Valid: FSQ, Identity, NeedsParent, VQ"),
        ("model.quantizer.name=3", "model.quantizer.name: expected the name of a quantizer, got the number 3"),
        ("losses={pixel: {weight: 1}}", "losses.pixel: missing name: say which loss. Valid: PixelLoss"),
        ("model.quantizer.name=FSQ", "model.quantizer: missing argument 'levels' of FSQ: a list"),
        ("model.quantizer=FSQ", "model.quantizer: expected a quantizer or null, got the string 'FSQ': "
         "write quantizer: {name: FSQ}"),
        ("model.encoder=vitt", "model.encoder: expected an encoder, got the string 'vitt': write encoder: {name: ViT}"),
        ("model.encoder=3e4x",
         "model.encoder: expected an encoder, got the string '3e4x': write encoder: {name: ...} with Stubborn or ViT"),
        ("model.encoder=null", "model.encoder: expected an encoder, got null"),
        ("extras=[PixelLoss]", "extras.0: expected a loss, got the string 'PixelLoss': write {name: PixelLoss}"),
        ("losses=[{name: PixelLoss}]", "losses: expected a mapping or null, got a list"),
        # the parent's arguments
        ("model.encoder.out_dim=3", "model.encoder.out_dim: out_dim of ViT is given by Model, not by YAML: remove it"),
        ("model.quantizer.name=NeedsParent", "model.quantizer: NeedsParent needs 'vocabulary' from Model, "
         "which does not give it: a mistake in the code. Annotate the argument Factory[Quantizer], "
         "or give 'vocabulary' a default"),
        # scalars
        ("train.max_steps=1.0", "train.max_steps: expected an integer, got the number 1.0"),
        ("train.max_steps=true", "train.max_steps: expected an integer, got true"),
        ("train.max_steps=null", "train.max_steps: expected an integer, got null"),
        ("train.max_steps='1'", "train.max_steps: expected an integer, got the string '1': remove the quotes"),
        ("train.lr=true", "train.lr: expected a number, got true"),
        ("train.lr='1e-4'", "train.lr: expected a number, got the string '1e-4': remove the quotes"),
        ("train.lr=high", "train.lr: expected a number, got the string 'high'"),
        ("train.amp=on", "train.amp: expected true or false, got the string 'on'"),
        ("train.amp=1", "train.amp: expected true or false, got the number 1"),
        ("title=12", "title: expected a string or null, got the number 12"),
        ("folder=false", "folder: expected a path, got false"),
        ("train.precision=.inf", "train.precision: expected an integer or 'auto', got the number .inf"),
        ("train.precision=atuo", "train.precision: expected an integer or 'auto', got the string 'atuo': "
         "did you mean 'auto'?"),
        ("model.encoder.norm=1", "model.encoder.norm: expected 'layer' or 'rms', got the number 1"),
        # shapes of values
        ("train=3", "train: expected a mapping of arguments of Training, got the number 3"),
        ("train.lengths=3", "train.lengths: expected a list, got the number 3: write lengths: [3]"),
        ("train.lengths=[1, x]", "train.lengths.1: expected an integer, got the string 'x'"),
        ("train.lengths={a: 1}", "train.lengths: expected a list, got a mapping"),
        ("train.schedule.betas=[0.9]", "train.schedule.betas: expected a list of 2 values, got 1"),
        ("train.schedule.betas.5=0.9", "train.schedule.betas: expected a list of 2 values, got a mapping"),
        ("train.max_steps=[1]", "train.max_steps: expected an integer, got a list"),
        ("train.max_steps.x=1", "train.max_steps: expected an integer, got a mapping"),
        # weights and freezing
        ("model.quantizer.frozen=1", "model.quantizer.frozen: expected true or false, got the number 1"),
        ("losses={pixel: {name: PixelLoss, weights: x}}",
         "losses.pixel.weights: PixelLoss is not a torch module and cannot have 'weights': remove it"),
        # loading
        ("train.lr", "an override is dotted.path=value, such as train.max_steps=20"),
        ("=3", "an override is dotted.path=value, such as train.max_steps=20"),
        ("train..lr=3", "an override is dotted.path=value, such as train.max_steps=20"),
        ("train.lr=[1", "not valid YAML: expected ',' or ']', but got '<stream end>', while parsing a flow sequence"),
        ("train={lr: 1, lr: 2}", "train.lr: duplicate key 'lr', first at command line: train={lr: 1, lr: 2}: "
         "remove one"),
        ("train.lr=!!int x", "train.lr: 'x' cannot be read as !!int"),
        ("train.lr=$train.max_step", "train.lr: dangling reference '$train.max_step': "
         "did you mean '$train.max_steps'?"),
        ("train.lr=$", "train.lr: dangling reference '$': name a written value ($$ starts a plain string)"),
        ("train.lr=$model.encoder", "train.lr: '$model.encoder' is a mapping: "
         "a reference copies one value or a list of values"),
        ("title=$env:DATA_ROOT", "title: the environment variable DATA_ROOT is not set: "
         "set it (export DATA_ROOT=...) or override title=..."),
        ("title=$env:1", "title: '$env:1' is not a reference: write $env:NAME or $env:NAME|default"),
        ("imports=numpy", "imports: expected a list of module names, such as [projects.adatok]"),
        ("imports=[no.such]", "imports.0: cannot import 'no.such': ModuleNotFoundError: No module named 'no'; "
         "it must be installed, on PYTHONPATH, or in the current folder"),
    ],
)  # fmt: skip
def test_message(override: str, message: str) -> None:
    assert errors(GOOD, override) == [f"command line: {override}: {message}"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {encoder: {name: ViT}}",
         "a.yaml:1: missing argument 'train' of Experiment: a mapping of arguments of Training"),
        ("train: {max_steps: 1}\nmodel:\n  quantizer: null",
         "a.yaml:2: model: missing argument 'encoder' of Model: an encoder"),
        (GOOD + "  max_steps: 3",
         "a.yaml:7: train.max_steps: duplicate key 'max_steps', first at a.yaml:6: remove one"),
        (GOOD + "  12: 3", "a.yaml:7: train: the key 12 is not a string: put it in quotes"),
        (GOOD + "  lengths:\n  - 1\n  - [2]", "a.yaml:9: train.lengths.1: expected an integer, got a list"),
        (GOOD + "_base_: {a: b}", "a.yaml:7: _base_: expected a path or a list of paths, relative to this file"),
        (GOOD + "  lr: $train.amp\n  amp: $title\ntitle: $train.lr",
         "a.yaml:9: title: the references go in a circle: title -> train.lr -> train.amp -> title"),
        (GOOD + "  lengths:\n  - $train.lengths",
         "a.yaml:8: train.lengths.0: the references go in a circle: train.lengths.0 -> train.lengths.0"),
        (GOOD + "  lr: $title\ntitle: $titel", "a.yaml:8: title: dangling reference '$titel': did you mean '$title'?"),
        (GOOD + "extras: [{name: PixelLoss}, 3]", "a.yaml:7: extras.1: expected a loss, got the number 3"),
    ],
)  # fmt: skip
def test_message_in_a_file(text: str, message: str) -> None:
    assert errors(text) == [message]


def test_all_errors_come_at_once_in_order_of_lines() -> None:
    text = """\
model:
  encoder: {name: ViTT, widht: 3}
  quantizer: {name: VQ, codebook: 9}
train:
  lr: fast
  lr: 3
  amp: $amp
losses: {pixel: PixelLoss}
"""
    assert errors(text, "train.lrr=1", "nonsense") == [
        "a.yaml:2: model.encoder.name: unknown encoder 'ViTT': did you mean 'ViT'? Valid: Stubborn, ViT",
        "a.yaml:3: model.quantizer: missing argument 'dim' of VQ: an integer",
        "a.yaml:3: model.quantizer.codebook: unknown key 'codebook': did you mean 'codebook_size'? "
        "Valid for VQ: dim, codebook_size, decay",
        "a.yaml:4: train: missing argument 'max_steps' of Training: an integer",
        "a.yaml:5: train.lr: expected a number, got the string 'fast'",
        "a.yaml:6: train.lr: duplicate key 'lr', first at a.yaml:5: remove one",
        "a.yaml:7: train.amp: dangling reference '$amp': name a written value ($$ starts a plain string)",
        "a.yaml:8: losses.pixel: expected a loss, got the string 'PixelLoss': write pixel: {name: PixelLoss}",
        "command line: nonsense: an override is dotted.path=value, such as train.max_steps=20",
        "command line: train.lrr=1: train.lrr: unknown key 'lrr': did you mean 'lr'? "
        "Valid for Training: max_steps, lr, amp, precision, schedule, lengths",
    ]


def test_an_index_outside_a_list() -> None:
    override = "train.lengths.2=1"
    assert errors(GOOD + "  lengths: [1, 2]", override) == [
        f"command line: {override}: train.lengths: '2' is not an element of this list: write an index from 0 to 1"
    ]


def project(name: str, component: str, base: str = "Quantizer") -> None:
    Path(f"{name}.py").write_text(
        f"from tests.config.parts import QUANTIZERS, {base}\n"
        f"@QUANTIZERS.register()\nclass {component}({base}):\n    '''Mine.'''\n"
    )


def test_imports_register_components(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Quantizer.registry, "_obj_map", dict(Quantizer.registry._obj_map))  # type: ignore[attr-defined]
    project("mine_a", "Mine")
    project("mine_b", "Mine")
    project("mine_c", "PixelLoss", base="Loss")
    Path("mine_d.py").write_text("import math\nmath.nothing\n")
    Path("a.yaml").write_text(GOOD + "imports: [mine_a]")
    config = load_config("a.yaml", ["model.quantizer={name: Mine}"])
    assert "mine_a" not in sys.modules, "loading runs no code"
    tree = resolve(config, Experiment)
    assert tree["imports"] == ["mine_a"] and tree["model"]["quantizer"] == {"name": "Mine"}
    assert errors(GOOD + "imports:\n- mine_a\n- mine_b\n- mine_c\n- mine_d") == [
        "a.yaml:9: imports.1: cannot import 'mine_b': "
        "two projects register the quantizer 'Mine': mine_a and mine_b; rename one",
        "a.yaml:10: imports.2: cannot import 'mine_c': "
        "'PixelLoss' cannot be a quantizer: it is not a subclass of Quantizer",
        "a.yaml:11: imports.3: cannot import 'mine_d': AttributeError: module 'math' has no attribute 'nothing'",
    ]


class Bare:
    def __init__(self, value: object) -> None: ...


class BadDefault:
    def __init__(self, value: list[int] = (1, "x")) -> None: ...  # type: ignore[assignment]


class ObjectDefault:
    def __init__(self, value: Loss | None = Loss()) -> None: ...  # noqa: B008


class ChangedPart:
    def __init__(self, value: Schedule = Schedule(warmup=5)) -> None: ...  # noqa: B008


class Untyped:
    def __init__(self, value) -> None: ...  # type: ignore[no-untyped-def]


class Unknown:
    def __init__(self, value: NoSuchClass) -> None: ...  # type: ignore[name-defined]  # noqa: F821


@pytest.mark.parametrize(
    ("root", "message"),
    [
        (Bare, "YAML cannot fill the annotation object: use int, float, bool, str, Path, Literal, list[T], "
         "tuple[T, ...], dict[str, T], a base with a registry, Factory[Base], a plain class or a union"),
        (BadDefault,
         "the default of 'value' of BadDefault does not fit its annotation: expected an integer, got the string 'x'"),
        (ObjectDefault, "Loss as default of 'value: Loss | None': YAML cannot write it; "
         "use None, a number, a string, a list or an unnamed part"),
        (ChangedPart, "the default of 'value: Schedule' must be plain Schedule()"),
        (Untyped, "argument 'value' of Untyped: without an annotation YAML values cannot be checked; add its type"),
        (Unknown, "annotations of Unknown: name 'NoSuchClass' is not defined; import it at run time, at module level"),
    ],
)  # fmt: skip
def test_mistakes_in_code_are_called_so(root: type, message: str) -> None:
    tree = {"value": 1} if root is Bare else {}
    with pytest.raises(SchemaError) as error:
        check(Config(tree, {(): Source("a.yaml", 1)}), root)
    assert str(error.value) == message


def test_the_registry_refuses() -> None:
    class Base:
        pass

    registry = Registry("thing", Base)

    class Greedy(Base):
        def __init__(self, **options: int) -> None: ...

    class Named(Base):
        def __init__(self, name: str) -> None: ...

    for cls, words in [
        (Greedy, "argument '**options: 'int'' of"), (Named, "'name' picks the class"), (int, "'int' cannot be a thing")
    ]:  # fmt: skip
        with pytest.raises(SchemaError, match="|".join([words.replace("*", r"\*")])):
            registry.register(cls)
    with pytest.raises(LookupError) as error:
        registry.get("Greedy")
    assert str(error.value) == "unknown thing 'Greedy'. None is registered: list its module under imports"


def test_registering_the_same_class_again_is_a_reload() -> None:
    class Base:
        pass

    registry = Registry("thing", Base)
    versions = [type("Same", (Base,), {"__module__": "m", "__qualname__": "Same"}) for _ in range(2)]
    for version in versions:
        registry.register(version)
    assert registry.get("Same") is versions[1]
    assert list(registry) == [("Same", versions[1])]


JUNK: list[Any] = [None, True, 0, -1, 1.5, float("nan"), 10**400, "", "VQ", "$train.lr", "$", "$$", "$env:X", "é", []]
JUNK += [{}, [[]], {"name": "VQ"}, {"name": None}, {"name": ["VQ"]}, [{"name": "PixelLoss"}], {"frozen": 1}]
WORDS = ["name", "width", "lr", "weights", "frozen", "out_dim", "imports", "_base_", "x.y", ""]


def mutate(tree: Any, rng: random.Random) -> Any:
    """Replaces, removes, adds or copies one value somewhere."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])

    walk(tree)
    node, key = rng.choice(places)
    action = rng.choice(["replace", "remove", "add", "copy"])
    if action == "replace":
        node[key] = copy.deepcopy(rng.choice(JUNK))
    elif action == "remove":
        del node[key]
    elif action == "copy":
        source, at = rng.choice(places)
        node[key] = copy.deepcopy(source[at])
    elif isinstance(node, dict):
        node[rng.choice(WORDS)] = copy.deepcopy(rng.choice(JUNK))
    else:
        node.append(copy.deepcopy(rng.choice(JUNK)))
    return tree


def test_mutated_trees_are_accepted_or_refused_in_words() -> None:
    lists = "  lengths: [1, 2]\nlosses: {p: {name: PixelLoss}}\nextras: [{name: PixelLoss}]"
    Path("good.yaml").write_text(GOOD + lists)
    good = resolve(load_config("good.yaml"), Experiment)
    rng = random.Random(0)
    refused = 0
    for _ in range(150):
        tree = copy.deepcopy(good)
        for _ in range(rng.randint(1, 4)):
            tree = mutate(tree, rng) if tree else tree
        text = dump_yaml(tree).replace("$$", "$")
        Path("a.yaml").write_text(text, encoding="utf-8")
        try:
            config = load_config("a.yaml")
            again = resolve(config, Experiment)
        except ConfigError as error:
            refused += 1
            assert all(str(problem).startswith("a.yaml:") and problem.message for problem in error.problems), text
        else:
            Path("again.yaml").write_text(dump_yaml(again), encoding="utf-8")
            assert repr(load_config("again.yaml").tree) == repr(again), text
    assert 50 < refused < 150
