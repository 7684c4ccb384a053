from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import Parameter

from framework.engine.optimizers import OPTIMIZERS, AdamW, Muon, Optimizer, decays


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embedding = nn.Linear(4, 4)
        self.blocks = nn.ModuleList([nn.ModuleDict({"norm": nn.LayerNorm(4), "up": nn.Linear(4, 8)})])
        self.table = nn.Embedding(3, 4)
        self.stem = nn.Conv2d(3, 4, 2)
        self.head = nn.Linear(8, 3)
        self.latent_tokens = nn.Parameter(torch.randn(2, 4))

    def fill_gradients(self) -> None:
        for parameter in self.parameters():
            parameter.grad = torch.ones_like(parameter)


def groups(optimizer: Optimizer) -> Iterator[tuple[str, float, set[str]]]:
    for part in optimizer.parts:
        for group in part.param_groups:
            yield type(part).__name__, group["weight_decay"], set(group["param_names"])


ADAMW_STILL = {"patch_embedding.bias", "blocks.0.norm.weight", "blocks.0.norm.bias", "blocks.0.up.bias", "stem.bias"}
ADAMW_STILL |= {"head.bias", "latent_tokens", "patch_embedding.weight"}


def test_adamw_decays_matrices_and_kernels_only() -> None:
    optimizer = AdamW(1e-3, weight_decay=0.2, parameters=Model().named_parameters())
    assert list(groups(optimizer)) == [
        ("AdamW", 0.2, {"blocks.0.up.weight", "table.weight", "stem.weight", "head.weight"}),
        ("AdamW", 0.0, ADAMW_STILL),
    ]
    assert optimizer.parts[0].param_groups[0]["fused"] is True


def test_muon_takes_the_blocks_matrices_and_adamw_the_rest() -> None:
    optimizer = Muon(1e-2, weight_decay=0.2, adamw_lr=1e-3, parameters=Model().named_parameters())
    assert list(groups(optimizer)) == [
        ("Muon", 0.2, {"blocks.0.up.weight"}),
        ("AdamW", 0.2, {"table.weight", "stem.weight", "head.weight"}),
        ("AdamW", 0.0, ADAMW_STILL),
    ]
    assert optimizer.parts[0].param_groups[0]["adjust_lr_fn"] == "match_rms_adamw"
    assert [group["lr"] for part in optimizer.parts for group in part.param_groups] == [1e-2, 1e-3, 1e-3]
    only = Muon(1e-2, parameters=[("blocks.0.weight", Parameter(torch.randn(2, 2)))])
    assert [kind for kind, _, _ in groups(only)] == ["Muon"]


def test_muon_without_matrices_says_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"no name matches \['\*layers\*'\]; the matrices here are: latent_tokens, "):
        Muon(1e-2, matrices=("*layers*",), parameters=Model().named_parameters())


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("encoder.blocks.0.mlp.up.weight", (4, 4), True),
        ("attention.in_proj_weight", (4, 4), True),
        ("stem.weight", (4, 3, 2, 2), True),
        ("norm.weight", (4,), False),
        ("class_embedding.weight", (10, 4), False),
        ("quantizer.codebook.weight", (10, 4), False),
        ("positions", (9, 4), False),
    ],
)
def test_what_decays(name: str, shape: tuple[int, ...], expected: bool) -> None:
    assert decays(name, torch.zeros(shape)) is expected


@pytest.mark.parametrize("kind", [cls for _, cls in OPTIMIZERS])
def test_every_optimizer_scales_its_peak_and_goes_on_exactly(kind: type[Optimizer]) -> None:
    model, copy = Model(), Model()
    copy.load_state_dict(model.state_dict())
    optimizer = kind(lr=0.01, parameters=model.named_parameters())  # type: ignore[call-arg]
    still = {name: value.clone() for name, value in model.state_dict().items()}
    model.fill_gradients()
    optimizer.scale_lr(0.0)
    optimizer.step()
    assert all(torch.equal(value, still[name]) for name, value in model.state_dict().items())

    optimizer.scale_lr(0.5)
    assert optimizer.lr == 0.005
    optimizer.step()
    assert not any(torch.equal(value, still[name]) for name, value in model.state_dict().items())

    copy.load_state_dict(model.state_dict())
    resumed = kind(lr=0.01, parameters=copy.named_parameters())  # type: ignore[call-arg]
    resumed.load_state_dict(deepcopy(optimizer.state_dict()))  # as from a file: torch would share the tensors
    for each, owner in ((optimizer, model), (resumed, copy)):
        owner.fill_gradients()
        each.scale_lr(1.0)
        each.step()
        assert each.lr == 0.01
    assert all(torch.equal(value, copy.state_dict()[name]) for name, value in model.state_dict().items())
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_state_of_another_model_is_refused() -> None:
    state = AdamW(1e-3, parameters=[("weight", Parameter(torch.ones(2, 2)))]).state_dict()
    with pytest.raises(ValueError, match="group"):
        AdamW(1e-3, parameters=Model().named_parameters()).load_state_dict(state)
