"""Trains with ``bits="auto"`` beside each of its settings, fixed: ``hvd-gqsgd bench auto``.

In each round every arm trains one step, so that all arms have the same link and the same other
load. The clock of ``bits="auto"`` stops during the steps of other arms.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from hvd_gqsgd.bench.gradients import MODELS, shapes_of
from hvd_gqsgd.bench.hosts import HOSTS, INTERFACE, add_arguments, is_rank, relaunch
from hvd_gqsgd.bench.operators import AUTO, FLAT_OF_AUTO, FP32, OF_AUTO
from hvd_gqsgd.bench.step import chosen as arms_of_words
from hvd_gqsgd.bench.table import show_table

__all__ = ["main", "show", "summary"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Launches itself on several ranks, trains there, and prints on rank 0."""
    parser = argparse.ArgumentParser(
        prog="hvd-gqsgd bench auto",
        description='Trains with bits="auto" beside each of its settings, fixed.',
    )
    add_arguments(parser)
    parser.add_argument("--model", choices=MODELS, default="resnet50")
    parser.add_argument("--steps", type=int, default=300, help="(default: %(default)s)")
    parser.add_argument(
        "--rates", default="", metavar="RATE,RATE", help="in place of --rate: limits that follow "
        "each other while the arms train, for as many steps each",
    )  # fmt: skip
    parser.add_argument(
        "--arms", default="", help="only settings with one of these names, or one of these "
        f"words in their name, separated by commas: {', '.join(OF_AUTO)}, and on hosts of several "
        f"ranks {', '.join(FLAT_OF_AUTO)}",
    )  # fmt: skip
    parser.add_argument(
        "--most-load", type=float, default=0.2, metavar="CORES",
        help="leave out of all sums the rounds in which other processes use more cores, unless "
        "most rounds have more (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(given)
    rates = [rate.strip() for rate in options.rates.split(",")] if options.rates else []
    if not all(rates) or (rates and options.rate) or options.steps < max(len(rates), 1):
        parser.error(
            "--steps must be at least 1 and the number of --rates, none of which may be empty, "
            f"and --rate must not go with --rates, got --steps {options.steps}, --rates "
            f"{options.rates!r} and --rate {options.rate}"
        )
    several = options.hosts not in (None, options.ranks)  # on a host
    here = (*OF_AUTO, *(FLAT_OF_AUTO if several else ()))
    among = arms_of_words(options.arms)
    arms = [name for name in here if name in among]
    if not arms or (options.arms and not all(map(str.strip, options.arms.split(",")))):
        parser.error(
            f"--arms must have parts of the names {', '.join(here)}, got --arms {options.arms!r}"
        )
    if not is_rank():
        options.rate = rates[0] if rates else options.rate
        sys.exit(relaunch("hvd_gqsgd.bench.auto", given, options))
    limits: list[str | None] = [*rates] if rates and INTERFACE in os.environ else [options.rate]
    result = _train(options.model, arms, options.steps, limits, options.most_load)
    if result is None:
        return
    if options.json:
        print(json.dumps(result))
    else:
        show(result)


def _train(
    model: str, fixed: Sequence[str], steps: int, rates: Sequence[str | None], most_load: float
) -> dict[str, Any] | None:
    """Trains all arms in turn, and returns ``summary``'s result on rank 0.

    Args:
        fixed: names of the arms beside ``bits="auto"``.
        model, steps, rates, most_load: as given.
    """
    import horovod.torch as hvd
    import torch

    from hvd_gqsgd.bench.rounds import interleaved, progress_bar
    from hvd_gqsgd.bench.training import Arm, make_arm

    hvd.init()
    torch.set_num_threads(1)
    make_arm(FP32, model).step()  # opens Horovod's connections
    arms = {name: make_arm(name, model) for name in (*fixed, AUTO)}
    auto = arms[AUTO]
    assert isinstance(auto, Arm)
    assert auto.conductor is not None
    conductor = auto.conductor
    paused = time.perf_counter()
    settled: list[bool] = []
    chosen: list[str] = []

    def prepare(name: str) -> None:
        if name == AUTO:
            conductor.leave_out(time.perf_counter() - paused)

    def step() -> None:
        nonlocal paused
        auto.step()
        paused = time.perf_counter()

    begins = _begins(steps, len(rates))

    with progress_bar(steps) as progress:

        def after_round() -> None:
            settled.append(conductor.settled)
            chosen.append(conductor.chosen)
            if len(chosen) in begins and hvd.rank() == 0:  # others wait for it at a barrier
                rate = rates[begins.index(len(chosen))]
                subprocess.run([HOSTS, "rate", str(rate)], check=True)
            progress()

        calls: dict[str, Callable[[], object]] = {name: arm.step for name, arm in arms.items()}
        timings = interleaved(
            calls | {AUTO: step}, steps, prepare=prepare, progress=after_round, warm_up=0,
            most_load=math.inf,
        )  # fmt: skip
    if hvd.rank() != 0:
        return None
    tensors = shapes_of(model)
    load = [max(loads) for loads in zip(*(t.load for t in timings.values()), strict=True)]
    return {
        "model": model,
        "ranks": hvd.size(),
        "tensors": len(tensors),
        "parameters": sum(math.prod(shape) for _, shape in tensors),
        **summary(
            {name: timing.seconds for name, timing in timings.items()},
            chosen, settled, rates, load, most_load,
        ),
        "plan": conductor.state_dict()["schedule"]["plan"],
    }  # fmt: skip


def _begins(steps: int, phases: int) -> list[int]:
    return [steps * phase // phases for phase in range(phases)]


def summary(
    seconds: dict[str, list[float]],
    chosen: Sequence[str],
    settled: Sequence[bool],
    rates: Sequence[str | None],
    load: Sequence[float],
    most_load: float,
) -> dict[str, Any]:
    """Compares ``bits="auto"`` with its settings, over all steps and over those of each rate.

    Args:
        seconds: of each step, by arm.
        chosen: the setting that was the fastest so far, after each step.
        settled: whether no setting was being tried, after each step.
        rates: limits of the link, each for as many steps; None: no limit.
        load: cores that other processes used in each round.
        most_load: rounds with more are left out of all sums, unless most rounds have more.

    Returns:
        ``steps``; ``arms``: by name, the ``seconds`` of all steps and the ``settled_seconds`` of
        those after ``bits="auto"`` had settled; ``rates``: for each, its ``rate``, the step that it
        ``begins`` at, the steps until ``bits="auto"`` had ``settled`` (None: it had not), the
        setting ``chosen`` then, the ``best`` fixed arm from then on, and ``auto_takes``, the time
        of ``bits="auto"`` relative to that of the best fixed arm; ``load``; ``left_out``, the
        number of rounds; and ``loaded``, whether most rounds had more load, so that all count.
    """
    steps = len(chosen)
    begins = [*_begins(steps, len(rates)), steps]
    without = {step for step in range(steps) if load[step] <= most_load}
    loaded = 2 * len(without) < steps
    quiet = set(range(steps)) if loaded else without

    def total(arm: str, of: set[int]) -> float:
        return sum(seconds[arm][step] for step in of)

    of_rates, after = [], set()
    for rate, (begin, end) in zip(rates, itertools.pairwise(begins), strict=True):
        at = _settled_at(chosen, settled, begin, end)
        window = set(range(end if at is None else at, end)) & quiet
        row: dict[str, Any] = {
            "rate": rate, "begins": begin, "settled": None if at is None else at - begin,
            "chosen": chosen[end - 1], "best": None, "auto_takes": None,
        }  # fmt: skip
        if window:
            row["best"] = min(seconds.keys() - {AUTO}, key=lambda arm: total(arm, window))
            row["auto_takes"] = total(AUTO, window) / total(row["best"], window)
        of_rates.append(row)
        after |= window
    return {
        "steps": steps,
        "arms": {
            name: {
                "seconds": total(name, quiet),
                "settled_seconds": total(name, after),
                "rounds_ms": [each * 1e3 for each in seconds[name]],
            }
            for name in seconds
        },
        "rates": of_rates,
        "load": list(load),
        "left_out": steps - len(quiet),
        "loaded": loaded,
    }


def _settled_at(chosen: Sequence[str], settled: Sequence[bool], begin: int, end: int) -> int | None:
    """The first step without a trial after the last change of the chosen setting."""
    changes = [step for step in range(max(begin, 1), end) if chosen[step] != chosen[step - 1]]
    return next((step for step in range(max([begin, *changes]), end) if settled[step]), None)


def show(result: dict[str, Any]) -> None:
    """Prints the result of ``summary`` and the plan."""
    print(
        f"{result['model']}: {result['parameters']:,} parameters in {result['tensors']} tensors, "
        f"{result['ranks']} ranks; {result['steps']} steps of each arm in turn; of the slowest rank"
    )
    auto = result["arms"][AUTO]
    rows = []
    for name, arm in result["arms"].items():
        cells = [name]
        for kind in ("seconds", "settled_seconds"):
            relative = f"{auto[kind] / arm[kind] - 1:+.1%}" if arm[kind] else "-"
            cells += [f"{arm[kind]:.2f}", relative]
        rows.append(cells)
    show_table(["", "all steps, s", "auto takes", "settled, s", "auto takes"], rows)
    rows = [
        [
            of["rate"] or "no limit", str(of["begins"]),
            "did not" if of["settled"] is None else str(of["settled"]),
            of["chosen"], (of["best"] or "").removeprefix("GlobalQSGD "),
            "" if of["auto_takes"] is None else f"{of['auto_takes'] - 1:+.1%}",
        ]
        for of in result["rates"]
    ]  # fmt: skip
    header = ["link", "from step", "steps to settle", "setting", "best fixed", "auto takes"]
    show_table(header, rows, left=5)
    print("plan: " + ", ".join(f"{step}: {name}" for step, name in result["plan"]))
    print(
        f"rounds left out because of other load: {result['left_out']} of {result['steps']}"
        f"{' (most rounds had too much, so all count)' if result['loaded'] else ''}; "
        f"most other load in a round: {max(result['load']):.2f} cores"
    )


if __name__ == "__main__":
    main()
