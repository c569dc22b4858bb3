"""Rates of convergence where few elements are exchanged, on two problems with a known minimum.

    python examples/rates.py                # all ranks in this process, in ten minutes
    python examples/rates.py --plot rates.png

A quadratic function, and the logistic regression of scikit-learn's handwritten digits with an L2
penalty. Each of 8 ranks has a function of its own: the digits are sorted by label, so a rank sees
one or two of the ten. These gradients are full ones, so what remains of the distance is the
compressor's doing. A third table has the logistic regression again with stochastic gradients, of 16
digits of each rank in each step. ``hvd_gqsgd/docs/THEORY.md`` has the rates that theorems promise.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

from hvd_gqsgd.bench.figure import STYLES, figure_file, new_figure, save
from hvd_gqsgd.bench.figure import draw as draw_line
from hvd_gqsgd.bench.table import show_table
from hvd_gqsgd.options import Options
from hvd_gqsgd.simulation import SimulatedRanks

RANKS = 8
MARINA: dict[str, Any] = {"keep": 1 / 8, "select": "permutation", "error_feedback": "marina"}
SETTINGS: dict[str, dict[str, Any] | None] = {
    "float64": None,
    "8 bits": {},
    "8 bits, EF21": {"error_feedback": "ef21"},
    "3 bits, EF21": {"bits": 3, "error_feedback": "ef21"},
    "2 bits to nearest, EF21": {"bits": 2, "rounding": "nearest", "error_feedback": "ef21"},
    "4 bits": {"bits": 4},
    "4 bits to nearest, residual": {"bits": 4, "rounding": "nearest", "error_feedback": "residual"},
    "1/8 at random": {"keep": 1 / 8},
    "1/8 as a permutation": {"keep": 1 / 8, "select": "permutation"},
    "1/8 in turn": {"keep": 1 / 8, "error_feedback": "residual"},
    "1/8 in turn, EF21": {"keep": 1 / 8, "error_feedback": "ef21"},
    "1/8 in turn, 2 bits to nearest, EF21": {
        "keep": 1 / 8,
        "bits": 2,
        "rounding": "nearest",
        "error_feedback": "ef21",
    },
    "1/8 in turn, EControl": {"keep": 1 / 8, "error_feedback": "econtrol"},
    "1/8 at random, MARINA": {"keep": 1 / 8, "error_feedback": "marina"},
    "1/8 as a permutation, MARINA": MARINA,
    "1/16 by a leader": {"keep": 1 / 16, "select": "leader"},
    "1/16 by a leader, EF21": {"keep": 1 / 16, "select": "leader", "error_feedback": "ef21"},
}
NOT_DRAWN = {
    *(name for name in SETTINGS if "3 bits" in name or "4 bits" in name or "nearest" in name),
    "1/8 in turn", "1/8 in turn, EControl", "1/8 at random, MARINA", "1/16 by a leader",
}  # fmt: skip
DRAWN = [name for name in SETTINGS if name not in NOT_DRAWN]


class Problem(NamedTuple):
    """The mean of the functions of all ranks."""

    name: str
    begin: Tensor
    gradients: Callable[[Tensor], list[Tensor]]
    """Of each rank's function."""
    rate: float
    """The learning rate."""
    stochastic: Callable[[Tensor, int], list[Tensor]] | None = None
    """Of some samples of each rank, in the step of this number; None: full gradients are taken."""


def quadratic(numel: int = 2048) -> Problem:
    """Curvatures from 0.1 to 1, the same on all ranks; each rank has a minimum of its own."""
    generator = torch.Generator().manual_seed(0)
    curvatures = torch.logspace(-1, 0, numel, dtype=torch.float64)[
        torch.randperm(numel, generator=generator)
    ]
    minima = torch.randn(RANKS, numel, generator=generator, dtype=torch.float64)

    def gradients(x: Tensor) -> list[Tensor]:
        return list(curvatures * (x - minima))

    return Problem("quadratic", torch.zeros(numel, dtype=torch.float64), gradients, 0.1)


def logistic(penalty: float = 0.1, batch: int | None = None) -> Problem:
    """The digits, sorted by label, a part for each rank; ``batch``: samples of a rank in a step."""
    digits = load_digits()
    order = torch.tensor(digits.target).argsort(stable=True)
    images = torch.tensor(digits.data, dtype=torch.float64)[order] / 16
    parts = list(
        zip(images.chunk(RANKS), torch.tensor(digits.target)[order].chunk(RANKS), strict=True)
    )

    def gradient(x: Tensor, own: Tensor, labels: Tensor) -> Tensor:
        leaf = x.view(10, 64).clone().requires_grad_()
        loss = F.cross_entropy(own @ leaf.T, labels) + penalty / 2 * leaf.square().sum()
        return torch.autograd.grad(loss, leaf)[0].view(-1)

    def gradients(x: Tensor) -> list[Tensor]:
        return [gradient(x, *part) for part in parts]

    def stochastic(x: Tensor, step: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(step)
        chosen = [torch.randint(len(own), (batch or 0,), generator=generator) for own, _ in parts]
        return [
            gradient(x, own[samples], labels[samples])
            for (own, labels), samples in zip(parts, chosen, strict=True)
        ]

    begin = torch.zeros(640, dtype=torch.float64)
    if batch is None:
        return Problem("logistic", begin, gradients, 0.1)
    return Problem(f"logistic, {batch} samples a rank", begin, gradients, 0.1, stochastic)


def descend(problem: Problem, setting: dict[str, Any] | None, steps: int) -> tuple[Tensor, float]:
    """Returns the norms of the mean gradient in all steps, relative to the first one, and the
    bytes of a step on the wire."""
    world = None if setting is None else SimulatedRanks(RANKS, Options(**setting))
    x, norms = problem.begin.clone(), []
    for step in range(steps):
        gradients = problem.gradients(x)
        mean = torch.stack(gradients).mean(0)
        norms.append(mean.norm())
        if problem.stochastic is not None:
            gradients = problem.stochastic(x, step)
            mean = torch.stack(gradients).mean(0)
        if world is not None:
            (mean,) = world.means([[("x", own.contiguous())] for own in gradients])
        x = x - problem.rate * mean
    sent = 8.0 * x.numel() if world is None else world.stats.compressed_bytes_on_wire / steps
    return torch.stack(norms) / norms[0], sent


def main() -> None:
    """Prints a table for each problem, and draws its curves."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=1600, help="(default: %(default)s)")
    parser.add_argument("--plot", type=figure_file, help="a figure, as .png, .pdf or .svg")
    args = parser.parse_args()
    torch.set_num_threads(1)
    problems = [quadratic(), logistic(), logistic(batch=16)]
    found = {
        (problem.name, name): descend(problem, setting, args.steps)
        for problem in problems for name, setting in SETTINGS.items()
    }  # fmt: skip
    marks = [args.steps // 8, args.steps // 4, args.steps // 2, args.steps]
    for problem in problems:
        rows = []
        for name in SETTINGS:
            norms, sent = found[problem.name, name]
            rows.append([name, f"{sent:.0f}", *(f"{norms[mark - 1]:.1e}" for mark in marks)])
        header = ["", "bytes a step", *(f"step {mark}" for mark in marks)]
        show_table(header, rows, title=f"{problem.name}: norm of the gradient, to the first one")
    if args.plot is not None:
        draw(problems[:2], found, args.plot)


def draw(
    problems: list[Problem], found: dict[tuple[str, str], tuple[Tensor, float]], file: Path
) -> None:
    """Norms of the gradient over steps, and over bytes, with a row of panels for each problem."""
    figure, panels = new_figure(6.5, len(problems), 2, share_x="col")
    for number, axes in enumerate(panels):
        problem, over_bytes = problems[number // 2], number % 2
        for name, style in zip(DRAWN, STYLES, strict=True):
            norms, sent = found[problem.name, name]
            steps = range(1, len(norms) + 1)
            draw_line(
                axes, [n * (sent if over_bytes else 1) for n in steps], norms.tolist(), style, name
            )
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_title(problem.name)
        if number >= 2:
            axes.set_xlabel("bytes" if over_bytes else "steps")
    panels[0].set_ylabel("norm of the gradient, to the first one")
    panels[1].legend(fontsize="x-small")
    save(figure, file)


if __name__ == "__main__":
    main()
