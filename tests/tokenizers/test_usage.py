from __future__ import annotations

import torch

from framework.tokenizers.quantizers.usage import CodeUsage


def after(steps: list[list[int]], vocabulary: int = 8) -> CodeUsage:
    usage = CodeUsage(vocabulary)
    for codes in steps:
        usage.collect(torch.tensor(codes)[None])
        usage.learn()
    return usage


def test_shares_are_means_over_the_first_steps_then_follow() -> None:
    usage = after([[0, 0, 1, 1], [0, 0, 0, 0]])
    torch.testing.assert_close(usage.share, torch.tensor([0.75, 0.25, 0, 0, 0, 0, 0, 0]))
    usage = after([[0]] * 400 + [[1]] * 100)
    assert 0.3 < usage.share[0] < 0.4 and abs(usage.share.sum() - 1) < 1e-5


def test_numbers_of_a_known_codebook() -> None:
    metrics = after([[0, 1, 2, 3]]).metrics()
    assert metrics["usage"] == 0.5 and metrics["dead_codes"] == 4
    torch.testing.assert_close(metrics["perplexity"], torch.tensor(4.0))
    assert torch.equal(after([[0, 1, 2, 3]]).dead, torch.arange(8) > 3)


def test_a_step_without_codes_changes_nothing() -> None:
    usage = after([[0, 1]])
    before = usage.share.clone()
    usage.learn()
    assert torch.equal(usage.share, before) and usage.steps == 1


def test_a_collapse_is_told_after_the_first_steps_only() -> None:
    assert after([[3]] * 99, 20).alarm() is None
    assert after([list(range(20))] * 150, 20).alarm() is None
    alarm = after([[3]] * 101, 20).alarm()
    assert alarm is not None and alarm.startswith(
        "the codebook has collapsed: tokens use it as if it had 1.0 of its 20 codes, and 19 are dead. If it does not"
    )


def test_micro_batches_count_as_one_step() -> None:
    whole, parts = CodeUsage(4), CodeUsage(4)
    whole.collect(torch.tensor([0, 1, 1, 3]))
    parts.collect(torch.tensor([0, 1]))
    parts.collect(torch.tensor([1, 3]))
    for usage in (whole, parts):
        usage.learn()
    assert torch.equal(whole.share, parts.share) and parts.steps == 1
