"""What the framework costs: its trainer against a plain loop, decoding by length, the two forms of attention.

What is compared takes turns in one process, so that whatever else the machine does hits all sides alike, and ratios are
medians over the rounds of the ratio within a round. The first round warms up and is not counted.

Shapes: b batch, h heads, n sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy, deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter, process_time
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from framework.data.interface import Batch, ImageData
from framework.engine.between_steps import learn_between_steps
from framework.engine.experiment import Experiment
from framework.engine.frozen import train_mode
from framework.engine.step_cost import step_cost_lines
from framework.engine.trainer import Trainer
from framework.engine.training import Training
from framework.engine.turns import share_parameters
from framework.nn.attention import FORMS, choose_attention, mask_to_bias
from framework.runtime.ranks import Ranks
from framework.runtime.records import JsonLines, LogFile, Records
from framework.runtime.rng import Generators
from framework.tasks.interface import Context, Task
from framework.tokenizers.tokenizer import Tokenizer
from framework.tokens import Tokens

Shape = tuple[int, int, int]
ATTENTION_SHAPES: tuple[Shape, ...] = ((32, 2, 32), (8, 4, 96), (8, 3, 256), (2, 8, 512), (1, 8, 1024))
ATTENTION_CALLS = 5


class Time(NamedTuple):
    """Seconds on the wall, and seconds that the process's threads computed."""

    wall: float
    cpu: float


class Clock:
    """Tells the time since it was last asked, after the device has finished."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._last = self._now()

    def lap(self) -> Time:
        now, last = self._now(), self._last
        self._last = now
        return Time(now.wall - last.wall, now.cpu - last.cpu)

    def _now(self) -> Time:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return Time(perf_counter(), process_time())


@dataclass(frozen=True)
class Times:
    """The times of several cases, one a round; the first case is what the others are compared to."""

    rounds: Mapping[str, Sequence[Time]]

    def seconds(self, case: str) -> Time:
        """Medians of a case."""
        return _medians(self.rounds[case])

    def ratio(self, case: str) -> Time:
        """Medians over the rounds of a case's times over the first case's."""
        first = next(iter(self.rounds.values()))
        return _medians([Time(a.wall / b.wall, a.cpu / b.cpu) for a, b in zip(self.rounds[case], first, strict=True)])

    def table(self, images: int) -> str:
        """A line a case, where every time is that of so many images."""
        rounds = len(next(iter(self.rounds.values())))
        lines = [
            f"medians of {rounds} alternating rounds of {images} images; ratios are of times, to the first line's",
            f"{'':14}{'ms':>10}{'images/s':>10}{'ratio':>8}{'CPU ms':>10}{'images/CPU s':>14}{'CPU ratio':>11}",
        ]
        for case in self.rounds:
            (wall, cpu), ratio = self.seconds(case), self.ratio(case)
            lines.append(
                f"{case:14}{1e3 * wall:10.2f}{images / wall:10.1f}{ratio.wall:8.3f}"
                f"{1e3 * cpu:10.2f}{images / cpu:14.1f}{ratio.cpu:11.3f}"
            )
        return "\n".join(lines)


def _medians(times: Sequence[Time]) -> Time:
    return Time(median(time.wall for time in times), median(time.cpu for time in times))


def take_turns(
    cases: Mapping[str, Callable[[], object]], rounds: int, device: torch.device, warm_up: int = 1
) -> Times:
    """Time each case once a round, after so many rounds that are not counted."""
    times: dict[str, list[Time]] = {name: [] for name in cases}
    for _ in range(warm_up + rounds):
        for name, run in cases.items():
            clock = Clock(device)
            run()
            times[name].append(clock.lap())
    return Times({name: laps[warm_up:] for name, laps in times.items()})


def _without_first(times: Mapping[str, Sequence[Time]]) -> Times:
    return Times({name: laps[1:] for name, laps in times.items()})


def machine(device: torch.device) -> str:
    """One line on what the times were taken with."""
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else f"CPU with {torch.backends.cpu.get_cpu_capability()}"
    return f"{name}, torch {torch.__version__}, threads: {torch.get_num_threads()}"


class PlainLoop:
    """The loop that one would write for this task with torch alone: the yardstick for the trainer.

    The same optimizers and schedule, autocast, clipping and moving average, turn by turn. Its one check is that the
    losses, read every step, are finite; it logs nothing.

    Args:
        task: what both loops train, in a copy of its own; moves to ``device``.
        batches: endless.
        options: the settings of ``train:``.
        seed: of the task's generators.
        device: where the models are.

    Raises:
        ValueError: if the task takes several updates on a batch.
    """

    def __init__(
        self, task: Task, batches: Iterator[Batch], options: Training, seed: int, device: torch.device
    ) -> None:
        if any(turn.updates > 1 for turn in task.turns):
            raise ValueError(f"the plain loop takes one update on a batch, and not those of {type(task).__name__}")
        self.task, self.batches, self.options, self.device = task.to(device), batches, options, device
        self.dtype = options.dtype(device)
        self.generators = Generators(seed)
        self.named = share_parameters(task)
        self.optimizers = {
            name: options.turn_optimizers.get(name, options.optimizer)(parameters=named).parts
            for name, named in self.named.items()
        }
        parts = [part for optimizer in self.optimizers.values() for part in optimizer]
        self.peaks = [(group, group["lr"]) for part in parts for group in part.param_groups]
        self.schedule = options.schedule(max_steps=options.max_steps)
        self.followed: list[Tensor] = [parameter for parameter in task.model.parameters() if parameter.requires_grad]
        self.average = [parameter.detach().clone() for parameter in self.followed]
        train_mode(task)

    def step(self, step: int) -> None:
        """Take one step, counted from 0."""
        options, batch = self.options, next(self.batches).to(self.device)
        for group, peak in self.peaks:
            group["lr"] = peak * self.schedule(step)
        for turn in self.task.turns:
            if turn.is_due(step):
                self._take(turn.name, batch, Context(step, step / options.max_steps, self.generators))
        learn_between_steps(self.task, Ranks())
        if options.ema_decay is not None:
            decay = min(options.ema_decay, (1 + step) / (10 + step))
            with torch.no_grad():
                torch._foreach_lerp_(self.average, self.followed, 1 - decay)

    def _take(self, turn: str, batch: Batch, context: Context) -> None:
        for name, named in self.named.items():
            for _, parameter in named:
                parameter.requires_grad_(name == turn)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            output = self.task(batch, turn, context)
        loss = torch.stack(list(output.losses.values())).sum()
        loss.backward()
        if not math.isfinite(loss.item()):
            raise RuntimeError(f"step {context.step}, {turn}: the loss is {loss.item()}")
        if self.options.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_([parameter for _, parameter in self.named[turn]], self.options.clip_norm)
        for optimizer in self.optimizers[turn]:
            optimizer.step()
            optimizer.zero_grad()


def shuffled(data: ImageData, batch_size: int, steps: int, num_workers: int) -> Iterator[Batch]:
    """So many random batches from torch's own loader, which fetches each as a whole."""
    indices = range(len(data))
    sampler = RandomSampler(indices, num_samples=steps * batch_size, generator=torch.Generator())
    fetch = partial(data.fetch, epoch=0)
    return iter(DataLoader(indices, batch_size, sampler=sampler, num_workers=num_workers, collate_fn=fetch))  # type: ignore[arg-type]


def compare_training(experiment: Experiment, rounds: int, steps: int) -> Times:
    """Time a plain loop and ``Trainer.fit`` on equal models, in turns of ``steps`` steps.

    The trainer does all that it does in a run, with files in a temporary folder, but for validating and saving, which
    another loop would do too.

    Raises:
        ValueError: if ``train:`` or the task asks for what the plain loop does not do.
    """
    options = copy(experiment.train)
    if options.accumulate > 1 or options.recompute or options.compile or options.freeze:
        raise ValueError(
            "the plain loop does not accumulate, recompute, compile or freeze, so there would be nothing to compare: "
            "leave train.accumulate, train.recompute, train.compile and train.freeze at their defaults"
        )
    options.max_steps = (rounds + 1) * steps
    device, seed, data = experiment.run.torch_device(), experiment.run.seed, experiment.data
    batches = shuffled(data.train, options.batch_size, options.max_steps, data.num_workers)
    plain = PlainLoop(deepcopy(experiment.task), batches, options, seed, device)
    times: dict[str, list[Time]] = {"plain loop": [], "Trainer": []}

    def catch_up(step: int) -> None:
        times["Trainer"].append(clock.lap())
        for i in range(step - steps, step):
            plain.step(i)
        times["plain loop"].append(clock.lap())

    with TemporaryDirectory() as name:
        folder = Path(name)
        lines = (JsonLines(folder / "metrics.jsonl", "values"), JsonLines(folder / "timing.jsonl", "timings"))
        records = Records([*lines, LogFile(folder / "log.txt")])
        sets = (data.train, data.train)  # validation does not come
        trainer = Trainer(
            experiment.task, *sets, options, seed, folder, num_workers=data.num_workers, device=device, records=records
        )
        trainer.periodic = [(options.log_every, trainer._log), (steps, catch_up)]
        clock = Clock(device)
        if trainer.fit().status != "finished":
            raise KeyboardInterrupt
    return _without_first(times)


def training_lines(
    experiment: Experiment, rounds: int, steps: int | None, ranks: Ranks | None = None
) -> Iterator[str]:
    """What a step costs and, of one process alone, what ``compare_training`` finds.

    Args:
        steps: of a round; ``train.log_every`` unless given.
        ranks: the processes that train together.
    """
    yield machine(experiment.run.torch_device())
    steps, ranks = steps or experiment.train.log_every, ranks or Ranks()
    yield from step_cost_lines(experiment, steps, ranks)
    if ranks.size == 1:
        times = compare_training(experiment, rounds, steps)
        dtype = str(experiment.train.dtype(experiment.run.torch_device())).removeprefix("torch.")
        yield f"{dtype}, {steps} steps of each loop a round"
        yield times.table(steps * experiment.train.batch_size)


def decoding_cases(tokenizer: Tokenizer, batch_size: int) -> dict[str, Tokens]:
    """Random tokens at the full, half and quarter length and at 1, and with lengths drawn uniformly."""
    generator, n = torch.Generator().manual_seed(0), tokenizer.num_tokens
    latents = torch.randn(batch_size, n, tokenizer.token_dim, generator=generator)
    lengths = {f"length {k}": torch.full((batch_size,), k) for k in (n, max(n // 2, 1), max(n // 4, 1), 1)}
    lengths[f"lengths 1-{n}"] = torch.randint(1, n + 1, (batch_size,), generator=generator)
    return {name: Tokens(latents, length) for name, length in lengths.items()}


def time_decoding(experiment: Experiment, batch_size: int, rounds: int) -> Times:
    """Time decoding a batch at several lengths, without autocast.

    Raises:
        TypeError: if the experiment's model is no tokenizer.
    """
    tokenizer, device = experiment.task.model, experiment.run.torch_device()
    if not isinstance(tokenizer, Tokenizer):
        raise TypeError(f"only a tokenizer decodes, and this configuration's model is {type(tokenizer).__name__}")
    tokenizer.to(device).eval()
    with torch.inference_mode():
        cases = {
            name: partial(tokenizer.decode, Tokens(tokens.latents.to(device), tokens.lengths.to(device)))
            for name, tokens in decoding_cases(tokenizer, batch_size).items()
        }
        return take_turns(cases, rounds, device)


def decoding_lines(experiment: Experiment, rounds: int, batch_size: int) -> Iterator[str]:
    """What ``time_decoding`` finds."""
    yield machine(experiment.run.torch_device())
    yield time_decoding(experiment, batch_size, rounds).table(batch_size)


def time_attention(shape: Shape, dtype: torch.dtype, backward: bool, rounds: int, device: torch.device) -> Times:
    """Time both forms, ``ATTENTION_CALLS`` calls a round, at ``(b, h, n)`` with 64 channels a head and padded keys."""
    query, key, value = torch.randn(3, *shape, 64, device=device, dtype=dtype, requires_grad=backward)
    shortest = torch.linspace(shape[2] // 2, shape[2], shape[0], device=device)
    bias = mask_to_bias(torch.arange(shape[2], device=device) < shortest[:, None])[:, None, None]

    def run(form: str) -> None:
        with torch.set_grad_enabled(backward):
            for _ in range(ATTENTION_CALLS):
                mixed = FORMS[form](query, key, value, bias)
                if backward:
                    torch.autograd.grad(mixed, (query, key, value), mixed.detach())

    return take_turns({form: partial(run, form) for form in FORMS}, rounds, device)


def attention_table(rounds: int, device: torch.device, shapes: Sequence[Shape] = ATTENTION_SHAPES) -> Iterator[str]:
    """The table of ``nn/attention.py`` for this machine, line by line, and which form that module takes."""
    yield f"ms a call, medians of {rounds} alternating rounds of {ATTENTION_CALLS} calls; heads of 64, padded keys"
    yield f"{'batch x heads x length':24}{'dtype':10}{'backward':10}{'explicit':>10}{'fused':>10}  chosen"
    for dtype in (torch.bfloat16, torch.float32):
        for shape in shapes:
            for backward in (True, False):
                times = time_attention(shape, dtype, backward, rounds, device)
                explicit, fused = (1e3 * times.seconds(form).wall / ATTENTION_CALLS for form in times.rounds)
                size, kind = " x ".join(map(str, shape)), str(dtype).removeprefix("torch.")
                chosen = choose_attention(device, dtype, shape[2], backward)
                yield f"{size:24}{kind:10}{'yes' if backward else 'no':10}{explicit:10.2f}{fused:10.2f}  {chosen}"


def attention_lines(rounds: int) -> Iterator[str]:
    """The table for the device that is used unless another is asked for."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    yield machine(device)
    yield from attention_table(rounds, device)
