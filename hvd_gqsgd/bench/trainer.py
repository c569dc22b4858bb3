"""Trains with all ranks in one process: ``hvd-gqsgd bench frontier --train``.

The gradients of the ranks are computed one after the other, and averaged by simulated ranks with
the bits of the real exchange. Eight ranks take the time of one rank with eight times the batch.

A script defines its training by two functions: ``parse_args(arguments)``, whose result has a
``seed``, and ``make_training(args, ranks)``, which returns a :class:`Training`. With
``args.record``, a path, the gradients of the last step in float32 are saved there.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hvd_gqsgd.bench.rivals import PowerSgd
from hvd_gqsgd.bench.table import show_table
from hvd_gqsgd.codecs.bit_schedule import DynamicBits
from hvd_gqsgd.codecs.block_bits import BlockBits
from hvd_gqsgd.options import Options
from hvd_gqsgd.simulation import SimulatedRanks

__all__ = ["FP32", "POWER_SGD", "SETTINGS", "Outcome", "Training", "compare", "show", "train"]

FP32 = "fp32"
IN_TURN: dict[str, Any] = {"keep": 1 / 8, "error_feedback": "residual"}
LED: dict[str, Any] = {"keep": 1 / 16, "select": "leader"}
EF21 = {"error_feedback": "ef21", "exchange": "allreduce"}
ECONTROL = {"error_feedback": "econtrol", "exchange": "allreduce"}
MARINA = {"error_feedback": "marina", "exchange": "allreduce"}
SETTINGS: dict[str, Callable[[int], dict[str, Any]] | None] = {
    FP32: None,
    "8 bits": lambda steps: {"bits": 8},
    "4 bits": lambda steps: {"bits": 4},
    "4 bits per block": lambda steps: {"bits": BlockBits(4)},
    "3 bits per block": lambda steps: {"bits": BlockBits(3)},
    "2.5 bits per block": lambda steps: {"bits": BlockBits(2.5)},
    "4 bits per step": lambda steps: {"bits": DynamicBits(4, total_steps=steps)},
    "4 bits per step, power 0.5": lambda steps: {
        "bits": DynamicBits(4, total_steps=steps, power=0.5)
    },
    "4 bits per block and step": lambda steps: {
        "bits": BlockBits(DynamicBits(4, total_steps=steps))
    },
    "5 bits": lambda steps: {"bits": 5},
    "5 bits per block": lambda steps: {"bits": BlockBits(5)},
    "5 bits per step": lambda steps: {"bits": DynamicBits(5, total_steps=steps)},
    "6 bits": lambda steps: {"bits": 6},
    "6 bits per step": lambda steps: {"bits": DynamicBits(6, total_steps=steps)},
    "1/4 at random, 4 bits": lambda steps: {"keep": 1 / 4, "bits": 4},
    "1/8 at random": lambda steps: {"keep": 1 / 8},
    "1/8 at random, 4 bits": lambda steps: {"keep": 1 / 8, "bits": 4},
    "1/8 in turn": lambda steps: IN_TURN,
    "1/8 in turn, 4 bits": lambda steps: IN_TURN | {"bits": 4},
    "1/8 in turn, EF21": lambda steps: IN_TURN | EF21,
    "1/8 in turn, EControl": lambda steps: IN_TURN | ECONTROL,
    "1/8 at random, MARINA": lambda steps: {"keep": 1 / 8} | MARINA,
    "1/64 in turn": lambda steps: IN_TURN | {"keep": 1 / 64},
    "1/16 by a leader, EF21": lambda steps: LED | EF21,
    "1/16 by a leader, EControl": lambda steps: LED | ECONTROL,
    "1/32 at random, 4 bits": lambda steps: {"keep": 1 / 32, "bits": 4},
    "1/64 at random": lambda steps: {"keep": 1 / 64},
    "1/16 by a leader": lambda steps: LED,
    "1/24 by a leader": lambda steps: LED | {"keep": 1 / 24},
    "1/24 by a leader, EF21": lambda steps: LED | EF21 | {"keep": 1 / 24},
    "1/64 by a leader": lambda steps: LED | {"keep": 1 / 64},
    "1/64 by a leader, EF21": lambda steps: LED | EF21 | {"keep": 1 / 64},
    "1/128 by a leader": lambda steps: LED | {"keep": 1 / 128},
    "1/64 by a leader, low pass": lambda steps: LED | {"keep": 1 / 64, "low_pass": 0.1},
}
"""Options by name, given the number of steps; in two phases, where they have no exchange. None is
float32."""
POWER_SGD = {f"PowerSGD, rank {rank}": rank for rank in (1, 4)}
"""Ranks of PowerSGD with error feedback, to compare with; it leaves vectors uncompressed."""


@dataclass
class Training:
    """A model, and the loss of each rank in each step."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    steps: int
    loss: Callable[[int, int], Tensor]
    """Returns the loss of a step and a rank; it may draw random numbers."""
    metric: str
    """The name of the metric."""
    evaluate: Callable[[], float]
    """Returns the metric of the model."""


@dataclass(frozen=True)
class Outcome:
    """A run with one setting and one seed."""

    task: str
    setting: str
    seed: int
    ranks: int
    steps: int
    metric: str
    value: float
    bits: float
    """Bits on the wire per element of the compressed tensors, norms and headers included."""
    error: float
    """Squared error of the means of all steps, over the square of the means."""


def train(
    training: Training, ranks: int, options: Options | None, record: Path | None = None,
    power: int | None = None,
) -> tuple[float, float]:  # fmt: skip
    """Trains a model to the end.

    Args:
        training: the model.
        ranks: number of ranks; 2 or more.
        options: of the exchange; None for float32.
        record: a file for the gradients of the last step, for ``hvd-gqsgd bench frontier``.
        power: the rank of PowerSGD, in place of options.

    Returns:
        Bits on the wire and squared error, as in :class:`Outcome`.
    """
    # The backward pass computes gradients in reverse order, and they are exchanged in that order.
    named = list(training.model.named_parameters())[::-1]
    parameters = [parameter for _, parameter in named]
    world = SimulatedRanks(ranks, options) if options else None
    rivals = {} if power is None else {
        i: PowerSgd((len(p), p[0].numel()), power, feedback=True)
        for i, p in enumerate(parameters) if p.dim() > 1
    }  # fmt: skip
    off = square = sent = 0.0
    training.model.train()
    for step in range(training.steps):
        gradients = _gradients(training, step, ranks, parameters)
        if record is not None and step == training.steps - 1:
            torch.save([torch.stack(rows) for rows in zip(*gradients, strict=True)], record)
        means = [torch.stack(rows).mean(0) for rows in zip(*gradients, strict=True)]
        coded: dict[int, Tensor] = {}
        if world and options:
            large = [i for i, p in enumerate(parameters) if p.numel() >= options.min_numel]
            found = world.means([[(named[i][0], own[i]) for i in large] for own in gradients])
            coded = dict(zip(large, found, strict=True))
        for i, rival in rivals.items():
            estimate = rival(means[i][None])
            coded[i] = estimate.mean.view_as(means[i])
            sent += estimate.bits * means[i].numel()
        for i, mean in coded.items():
            off += float((mean - means[i]).double().square().sum())
            square += float(means[i].double().square().sum())
            means[i] = mean
        for parameter, mean in zip(parameters, means, strict=True):
            parameter.grad = mean
        training.optimizer.step()
        training.schedule.step()
    if rivals:
        elements = sum(parameters[i].numel() for i in rivals)
        return sent / elements / training.steps, off / square
    if world is None:
        return 32.0, 0.0
    return 8 * world.stats.compressed_bytes_on_wire / world.stats.elements, off / square


def _gradients(
    training: Training, step: int, ranks: int, parameters: Sequence[Tensor]
) -> list[list[Tensor]]:
    """The gradients of each rank. The model keeps the buffers of rank 0, such as running means."""
    gradients, buffers = [], []
    for rank in range(ranks):
        own = torch.autograd.grad(training.loss(step, rank), parameters)
        gradients.append([gradient.contiguous() for gradient in own])
        if rank == 0:
            buffers = [buffer.clone() for buffer in training.model.buffers()]
    for buffer, kept in zip(training.model.buffers(), buffers, strict=True):
        buffer.copy_(kept)
    return gradients


def compare(
    tasks: Sequence[str],
    settings: Sequence[str],
    seeds: Sequence[int],
    ranks: int,
    results: Path | None = None,
) -> list[Outcome]:
    """Trains all tasks with all settings and seeds.

    Args:
        tasks: scripts with their arguments, as on a command line, without ``--seed``.
        settings: of ``SETTINGS`` and ``POWER_SGD``.
        seeds: of the model, the data and the dither.
        ranks: number of ranks.
        results: a file of JSON lines to which each run is appended; its runs are not repeated.
    """
    outcomes = []
    if results is not None and results.exists():
        outcomes = [Outcome(**json.loads(line)) for line in results.read_text().splitlines()]
    asked = [(t, setting, seed, ranks) for seed in seeds for t in tasks for setting in settings]
    found = {(o.task, o.setting, o.seed, o.ranks): o for o in outcomes}
    for key in asked:
        if key not in found:
            found[key] = outcome = _run(*key)
            print(json.dumps(dataclasses.asdict(outcome)), file=sys.stderr, flush=True)
            if results is not None:
                with results.open("a") as file:
                    file.write(json.dumps(dataclasses.asdict(outcome)) + "\n")
    return [found[key] for key in asked]


def _run(task: str, setting: str, seed: int, ranks: int) -> Outcome:
    script, *arguments = shlex.split(task)
    path = Path(script)
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    torch.set_num_threads(1)  # results do not depend on the number of cores
    module = importlib.import_module(path.stem)
    args = module.parse_args([*arguments, "--seed", str(seed)])
    training: Training = module.make_training(args, ranks)
    options = SETTINGS.get(setting)
    chosen = None
    if options:
        chosen = Options(seed=seed, **({"exchange": "two_phase"} | options(training.steps)))
    record = getattr(args, "record", None) if setting == FP32 else None
    bits, error = train(training, ranks, chosen, record, POWER_SGD.get(setting))
    return Outcome(
        task, setting, seed, ranks, training.steps, training.metric, training.evaluate(), bits,
        error,
    )  # fmt: skip


def show(outcomes: Sequence[Outcome], markdown: bool) -> None:
    """Prints a table for each task, with differences to float32 seed by seed."""
    for task in dict.fromkeys(outcome.task for outcome in outcomes):
        here = [outcome for outcome in outcomes if outcome.task == task]
        exact = {outcome.seed: outcome.value for outcome in here if outcome.setting == FP32}
        rows = []
        for setting in dict.fromkeys(outcome.setting for outcome in here):
            runs = [outcome for outcome in here if outcome.setting == setting]
            apart = [run.value - exact[run.seed] for run in runs if run.seed in exact]
            rows.append([
                setting,
                f"{statistics.fmean(run.bits for run in runs):.2f}",
                _mean_and_deviation([run.value for run in runs], ".4f"),
                _mean_and_deviation(apart, "+.4f") if apart else "",
                f"{statistics.fmean(run.error for run in runs):.1e}",
            ])  # fmt: skip
        first = here[0]
        show_table(
            ["", "bits an element", first.metric, "to fp32, seed by seed", "squared error"],
            rows,
            title=f"{task}: {first.ranks} ranks, {first.steps} steps, "
            f"{len({outcome.seed for outcome in here})} seeds",
            markdown=markdown,
        )


def _mean_and_deviation(numbers: Sequence[float], style: str) -> str:
    """The mean, with the sample's standard deviation if there are several seeds."""
    mean = format(statistics.fmean(numbers), style)
    return f"{mean} ± {statistics.stdev(numbers):{style[-3:]}}" if len(numbers) > 1 else mean
