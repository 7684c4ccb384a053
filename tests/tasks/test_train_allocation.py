from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import framework
from framework import runs
from framework.allocation.adaptive_tokenizer import AdaptiveTokenizer
from framework.allocation.error_table import ErrorTable
from framework.allocation.learned_policy import LearnedPolicy
from framework.allocation.objectives import DeterministicGroupGRPO, PolicyObjective, Reinforce
from framework.allocation.rewards import ContinuousReward, Reward, WeightedReward
from framework.allocation.search import BinarySearch
from framework.allocation.weighting import DynamicParetoWeighting
from framework.data.interface import Batch
from framework.data.photos import Photos
from framework.engine.checkpoint import CheckpointError, latest_checkpoint
from framework.runtime.weights import weights_digest
from framework.tasks.interface import Context
from framework.tasks.train_allocation import TrainAllocation
from framework.tokenizers.interface import AllocationPolicy
from framework.tokenizers.tokenizer import Tokenizer
from tests.test_runs import stop_at
from tests.tiny_run import ROOT, files_of, run_tool, tiny_policy_config
from tests.tokenizers.build import small_tokenizer

PHOTOS = Photos(
    "train", num_crops=40, min_crop=16, flip=0, permute_channels=0, image_size=16, training=True, seed=0
)


def train_ata(folder: Path, tokenizer: Path, *overrides: str, config: str = "ata") -> str:
    said: list[str] = []
    runs.train(tiny_policy_config(folder, tokenizer, *overrides, config=config), said.append)
    return "\n".join(said)


def frozen_tokenizer(**options: Any) -> Tokenizer:
    tokenizer = small_tokenizer(**options).requires_grad_(False).eval()
    tokenizer.is_frozen = True  # type: ignore[assignment]
    return tokenizer


def make_task(
    objective: PolicyObjective | None,
    reward: Reward | None = None,
    policy: type[AllocationPolicy] | partial[AllocationPolicy] = LearnedPolicy,
) -> TrainAllocation:
    return TrainAllocation(policy, reward or ContinuousReward(), objective, tokenizer=frozen_tokenizer())


def context(step: int = 0, update: int = 0, seed: int = 3) -> Context:
    generator = torch.Generator().manual_seed(seed)
    return Context(step, 0.25, lambda purpose: generator, update)


def batch(*indices: int) -> Batch:
    return PHOTOS.fetch(indices or range(5), epoch=0)


def prepared(task: TrainAllocation, cache: Path) -> TrainAllocation:
    task.prepare(PHOTOS, cache, lambda stage, done, total: None)
    return task


def lines(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def count_rows(task: TrainAllocation) -> dict[str, int]:
    """Images that the encoder and the decoder are given from now on."""
    rows = {"encoder": 0, "decoder": 0}
    for name in rows:

        def count(module: object, given: tuple[Any, ...], result: object, name: str = name) -> None:
            rows[name] += len(given[0])

        getattr(task.tokenizer, name).register_forward_hook(count)
    return rows


OBJECTIVES: list[PolicyObjective] = [
    Reinforce(),
    Reinforce("expected_reward"),
    DeterministicGroupGRPO(),
    DeterministicGroupGRPO(budgets=3),
    DeterministicGroupGRPO(clip=0.2, updates=3),
]


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: str(vars(objective)))
def test_a_table_gives_the_losses_and_gradients_of_measuring_online(objective: PolicyObjective, tmp_path: Path) -> None:
    found = []
    for task in (make_task(objective), prepared(make_task(objective), tmp_path)):
        torch.nn.init.normal_(task.adaptive.policy.network[-1].weight, generator=torch.Generator().manual_seed(1))  # type: ignore
        for update in range(objective.updates):
            output = task(batch(), "policy", context(update=update))
            torch.stack(list(output.losses.values())).sum().backward()
        gradients = torch.cat([p.grad.flatten() for p in task.adaptive.policy.parameters() if p.grad is not None])
        found.append((output.losses, output.metrics, gradients))
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", ["ata", "ata_grpo"])
def test_a_run_with_a_table_ends_like_one_that_measures_online(
    config: str, tiny_run: Path, tmp_path: Path, quick_report: None
) -> None:
    images = PHOTOS.fetch(range(40), epoch=0).images
    lengths, logged = [], []
    for distortions in ("table", "online"):
        changes = [f"task.distortions={distortions}", "train.max_steps=30", "train.schedule.warmup_steps=1"]
        changes += ["data.train.flip=0", "data.train.permute_channels=0"]
        train_ata(tmp_path / distortions, tiny_run, *changes, "train.batch_size=16", config=config)
        model = framework.load(tmp_path / distortions)
        assert isinstance(model, AdaptiveTokenizer)
        lengths.append(model.encode(images).lengths)
        logged.append(lines(tmp_path / distortions))
    assert torch.equal(*lengths)
    assert any("policy/policy" in line for line in logged[0])
    for one, other in zip(*logged, strict=True):
        assert one == pytest.approx(other, abs=1e-5)


def test_what_a_run_leaves_is_one_model_with_its_tokenizer_untouched(
    tiny_run: Path, tmp_path: Path, quick_report: None
) -> None:
    before = files_of(tiny_run)
    train_ata(tmp_path / "ata", tiny_run)
    assert files_of(tiny_run) == before
    model, tokenizer = framework.load(tmp_path / "ata"), framework.load(tiny_run)
    assert isinstance(model, AdaptiveTokenizer) and isinstance(tokenizer, Tokenizer)
    assert weights_digest(model.tokenizer.state_dict()) == weights_digest(tokenizer.state_dict())
    checkpoint = latest_checkpoint(tmp_path / "ata/checkpoints")
    assert checkpoint is not None
    stored = load_file(checkpoint.folder / "model.safetensors")
    assert stored and all(name.startswith("adaptive.policy.") for name in stored)
    checkpoint.check_frozen({"adaptive.tokenizer": weights_digest(tokenizer.state_dict())})
    with pytest.raises(CheckpointError, match="adaptive.tokenizer"):
        checkpoint.check_frozen({"adaptive.tokenizer": weights_digest({"a": torch.zeros(1)})})
    images = batch().images
    tokens = model.encode(images, length="auto")
    assert torch.equal(tokens.lengths, model.allocate(images)[1].lengths)
    with torch.no_grad():
        assert torch.equal(tokens.latents, tokenizer.encode(images).latents)
    assert model.encode(images, length=[1, 2, 3, 4, 5]).lengths.tolist() == [1, 2, 3, 4, 5]


def test_a_stopped_run_ends_like_one_that_was_not(tiny_run: Path, tmp_path: Path, quick_report: None) -> None:
    changes = ["task.reward={name: WeightedReward, weighting: {name: DynamicParetoWeighting}}", "train.accumulate=2"]
    changes += ["task.objective={name: DeterministicGroupGRPO, clip: 0.2, updates: 2}"]
    train_ata(tmp_path / "a/ata", tiny_run, *changes)
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 2, TrainAllocation)
        assert "stopped and saved at step 3" in train_ata(tmp_path / "b/ata", tiny_run, *changes)
    train_ata(tmp_path / "b/ata", tiny_run, *changes)
    whole, halves = (tmp_path / part / "ata" for part in "ab")
    assert lines(whole) == lines(halves)
    ends = [latest_checkpoint(run / "checkpoints") for run in (whole, halves)]
    weights = [end.weights("model") for end in ends if end is not None]
    assert weights[0].keys() == weights[1].keys() and "reward.weighting.gains" in weights[0]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert weights[0]["reward.weighting.batches"] == 12  # 6 steps of 2 micro-batches, however many updates


def test_a_line_that_a_kill_has_torn_does_not_stop_the_evaluation(tiny_policy: Path, tmp_path: Path) -> None:
    run = shutil.copytree(tiny_policy, tmp_path / "policy")
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 7, "policy/ent')
    out = runs.evaluate(run, lambda text: None, limit=8)
    assert (out / "training.png").read_bytes().startswith(b"\x89PNG")


def test_a_missing_tokenizer_says_what_makes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_tool(monkeypatch, "train_net", "--config", "projects/adatok/ata.yaml") == 2
    said = capsys.readouterr().err
    assert "runs/adatok/ntm holds no run" in said
    command = said.partition("with: ")[2].split()
    assert command[:3] == ["python", "tools/train_net.py", "--config"]
    assert (tmp_path / command[3]).resolve() == ROOT / "projects/adatok/ntm.yaml"
    with pytest.raises(runs.RunError, match=r"Train it first, or check the path"):
        runs.load(tmp_path / "some/other")


def test_online_measures_only_what_the_objective_asks_for() -> None:
    wanted = [(Reinforce(), 2), (Reinforce("expected_reward"), 7), (DeterministicGroupGRPO(budgets=3), 3)]
    for objective, passes in [*wanted, (DeterministicGroupGRPO(clip=0.2, updates=3), 6)]:
        task = make_task(objective)
        rows = count_rows(task)
        for update in range(objective.updates):
            task(batch(), "policy", context(update=update))
        assert rows == {"encoder": 5, "decoder": 5 * passes}, objective
        assert task._outlooks == {}


def test_later_updates_are_held_against_the_policy_before_the_first() -> None:
    objective = DeterministicGroupGRPO(clip=0.2, updates=2, entropy=0)
    task = make_task(objective)
    (turn,) = task.turns
    assert turn.updates == 2
    loss = [task(batch(), "policy", context()).losses["policy"]]
    with torch.no_grad():  # far away, so that the clip acts
        task.adaptive.policy.network[-1].bias.copy_(torch.linspace(-9, 9, 6))  # type: ignore[union-attr, index, operator]
    loss.append(task(batch(), "policy", context(update=1)).losses["policy"])
    fresh = task(batch(), "policy", context()).losses["policy"]
    assert not torch.isclose(loss[1], fresh, atol=1e-3)


def test_a_weighting_learns_in_training_and_not_in_validation() -> None:
    weighting = DynamicParetoWeighting()
    task = make_task(DeterministicGroupGRPO(), WeightedReward(weighting))
    output = task(batch(), "policy", context())
    assert weighting.batches == 1 and 0 < output.metrics["weight_fidelity"] < 1
    task.eval()
    with torch.no_grad():
        task.validate([batch()])
    assert weighting.batches == 1


@torch.no_grad()
def test_validation_by_hand() -> None:
    reward = ContinuousReward(alpha=3, beta=0.2)
    task = make_task(DeterministicGroupGRPO(), reward).eval()
    task.adaptive.policy.network[-1].bias[3] = 1  # type: ignore[union-attr, index, operator]
    rows = count_rows(task)
    numbers = task.validate([batch(), batch(5, 6)])
    assert rows == {"encoder": 7, "decoder": 42}
    assert task.validate([batch(), batch(5, 6)]) == numbers and rows == {"encoder": 7, "decoder": 42}
    images = batch(*range(7)).images
    errors = torch.stack([_errors(task.tokenizer, images, length) for length in range(1, 7)], dim=1)
    rewards = -3 * errors - 0.2 * torch.arange(1, 7) / 6
    assert numbers == pytest.approx(
        {
            "reward": rewards[:, 3].mean().item(),
            "distortion": errors[:, 3].mean().item(),
            "length": 4.0,
            "reward_fixed": rewards.mean(0).max().item(),
            "reward_oracle": rewards.amax(1).mean().item(),
        },
        rel=1e-4,
    )


def _errors(tokenizer: Tokenizer, images: Tensor, length: int) -> Tensor:
    return (tokenizer.decode(tokenizer.encode(images, length)) - images).square().mean((1, 2, 3))


def test_a_rule_trains_nothing_and_is_evaluated(tiny_run: Path, tmp_path: Path, quick_report: None) -> None:
    changes = ["task.policy={name: BinarySearch, threshold: 0.02}", "task.objective=null", "train.max_steps=1"]
    train_ata(tmp_path / "search", tiny_run, *changes)
    model = framework.load(tmp_path / "search")
    assert isinstance(model, AdaptiveTokenizer) and isinstance(model.policy, BinarySearch)
    (line,) = [line for line in lines(tmp_path / "search") if "validation/reward" in line]
    task = make_task(None, policy=partial(BinarySearch, threshold=0.02)).eval()
    with torch.no_grad():
        lengths = task.adaptive.allocate(batch().images)[1].lengths
        assert task.validate([batch()])["length"] == lengths.double().mean()
    assert 1 <= line["validation/length"] <= 16


def test_tables_are_computed_once_and_anew_when_they_are_wrong(tmp_path: Path) -> None:
    task = prepared(make_task(DeterministicGroupGRPO()), tmp_path)
    (file,) = tmp_path.iterdir()
    assert task.table is not None and len(task.table.keys) == 40
    good = file.read_bytes()

    def measured(content: bytes, policy: Any = LearnedPolicy) -> int:
        file.write_bytes(content)
        again = make_task(DeterministicGroupGRPO(), policy=policy)
        rows = count_rows(again)
        prepared(again, tmp_path)
        assert again.table is not None and task.table is not None
        if policy is LearnedPolicy:
            assert torch.equal(again.table.distortions, task.table.distortions)
            assert file.read_bytes() == good
        return rows["encoder"]

    assert measured(good) == 16  # a sample, to see that the file still agrees
    assert measured(good[:-8]) == 56
    other = ErrorTable(task.table.features, 2 * task.table.distortions, *_rest(task.table))
    other.save(tmp_path / "other")
    assert measured((tmp_path / "other").read_bytes()) == 56
    assert measured(good, partial(LearnedPolicy, budgets=[1, 3])) == 40  # a table of its own


def _rest(table: ErrorTable) -> Any:
    return table.budgets, table.keys, table.digest, table.protocol


@pytest.mark.parametrize(
    ("objective", "policy", "message"),
    [
        (None, LearnedPolicy, "LearnedPolicy learns: set task.objective"),
        (Reinforce(), partial(BinarySearch, threshold=0.1), "BinarySearch learns nothing: set task.objective=null"),
    ],
)
def test_objective_and_policy_belong_together(objective: PolicyObjective | None, policy: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_task(objective, policy=policy)


def test_a_tokenizer_that_could_change_is_refused(tiny_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"set tokenizer.frozen=true and tokenizer.weights"):
        TrainAllocation(LearnedPolicy, ContinuousReward(), Reinforce(), tokenizer=small_tokenizer())
    with pytest.raises(framework.config.ConfigError, match=r"task: .*set tokenizer.frozen=true"):
        train_ata(tmp_path / "ata", tiny_run, "tokenizer.frozen=false")


def test_a_table_holds_images_as_they_look_in_the_first_epoch(tmp_path: Path) -> None:
    tables = []
    for seed in (0, 1):
        task = make_task(DeterministicGroupGRPO())
        data = Photos("train", num_crops=20, min_crop=16, flip=1, image_size=16, training=True, seed=seed)
        task.prepare(data, tmp_path, lambda stage, done, total: None)
        assert task.table is not None
        errors = _errors(task.tokenizer, data.fetch(range(20), epoch=0).images, 4)
        torch.testing.assert_close(task.table.distortions[:, 3], errors)
        tables.append(task.table.distortions)
    assert not torch.equal(*tables) and len(list(tmp_path.iterdir())) == 2
