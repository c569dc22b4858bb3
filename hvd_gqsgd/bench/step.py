"""Times a training step of a model's shape, against plain Horovod, the hooks of DDP, and FSDP2.

``hvd-gqsgd bench step [--rate 1gbit]``.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from hvd_gqsgd.bench.figure import figure_file, new_figure, save
from hvd_gqsgd.bench.gradients import MODELS
from hvd_gqsgd.bench.hosts import INTERFACE, add_arguments, is_rank, relaunch
from hvd_gqsgd.bench.machine import machine
from hvd_gqsgd.bench.operators import ARMS, DDP_ARMS, FLAT, FSDP_ARMS, KEPT
from hvd_gqsgd.bench.table import show_table

__all__ = ["chosen", "main", "show"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Launches itself on several ranks, measures there, and prints on rank 0."""
    parser = argparse.ArgumentParser(
        prog="hvd-gqsgd bench step",
        description="Times training steps of a model's shape against plain Horovod, DDP and FSDP2.",
    )
    add_arguments(parser)
    parser.add_argument("--model", choices=MODELS, default="resnet50")
    parser.add_argument(
        "--arms", default="", help="only arms with one of these names, or one of these words in "
        f"their name, separated by commas: {', '.join(ARMS)}; speedups are relative to the first "
        "arm, and those of FSDP2 to the first arm of FSDP2",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=7, help="(default: %(default)s)")
    parser.add_argument(
        "--exchange", action="store_true", help="time the exchange alone, with gradients ready"
    )
    parser.add_argument(
        "--most-load", type=float, default=0.2, metavar="CORES",
        help="repeat rounds in which other processes use more cores (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--plot", type=figure_file, metavar="FILE", help="draw the medians, as .png, .pdf or .svg"
    )
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parser.parse_args(given)
    arms = chosen(options.arms)
    if options.hosts is None:  # else the default goes by node
        arms = without(FLAT, arms, options.arms)
    arms = without(KEPT, arms, options.arms)
    if options.exchange:
        arms = [name for name in arms if name not in (*DDP_ARMS, *FSDP_ARMS)]
    if not arms or options.repeats < 1:
        parser.error(
            "--arms must select one arm or more, and --repeats must be at least 1, got --arms "
            f"{options.arms!r} and --repeats {options.repeats}"
        )
    if not is_rank():
        sys.exit(relaunch("hvd_gqsgd.bench.step", given, options))

    import horovod.torch as hvd

    from hvd_gqsgd.bench import training

    result = training.run(
        options.model, arms, options.repeats,
        exchange_alone=options.exchange, most_load=options.most_load,
        interface=os.environ.get(INTERFACE),
    )  # fmt: skip
    if hvd.rank() != 0:
        return
    if options.plot is not None:
        _plot(result, options.plot)
    if options.json:
        command = shlex.join(["hvd-gqsgd", "bench", "step", *given])
        print(json.dumps(result | machine() | {"rate": options.rate or "shm", "command": command}))
    else:
        show(result)


def chosen(words: str) -> list[str]:
    """The arms with one of these names, or with one of these words in their name.

    Args:
        words: names and words, separated by commas.
    """
    split = [word.strip() for word in words.split(",")]
    parts = [word for word in split if word not in ARMS]
    return [name for name in ARMS if name in split or any(part in name for part in parts)]


def without(special: Collection[str], arms: list[str], words: str) -> list[str]:
    """The arms but for special ones, unless a name or a word selects special ones alone."""
    alone = [word for word in words.split(",") if {*chosen(word)} <= {*special}]
    asked = chosen(",".join(alone)) if alone else []
    return [name for name in arms if name not in special or name in asked]


def _plot(result: dict[str, Any], file: Path) -> None:
    """Draws the medians as bars, with lines from the fastest round to the slowest."""
    ran = {name: arm for name, arm in result["arms"].items() if "error" not in arm}
    medians = [arm["ms"] for arm in ran.values()]
    spread = [
        [arm["ms"] - min(arm["rounds_ms"]) for arm in ran.values()],
        [max(arm["rounds_ms"]) - arm["ms"] for arm in ran.values()],
    ]
    figure, (axes,) = new_figure(1.0 + 0.35 * len(ran))
    axes.barh(
        list(ran), medians, xerr=spread, color="0.75", edgecolor="black", ecolor="black", capsize=3
    )
    for place, median in enumerate(medians):
        axes.text(0, place, f" {median:.3g}", va="center", fontsize=9)
    axes.invert_yaxis()
    axes.set(xlabel=f"time of {_what(result)} (ms), median, fastest and slowest round")
    axes.set_title(f"{result['model']}, {result['ranks']} ranks")
    save(figure, file)


def _what(result: dict[str, Any]) -> str:
    return {"step": "a step", "exchange": "the exchange alone"}[result["what"]]


def _row(name: str, arm: dict[str, Any]) -> list[str]:
    if "error" in arm:
        return [name, "does not run", "", "", "", ""]
    low, high = min(arm["rounds_ms"]), max(arm["rounds_ms"])
    return [
        name, f"{arm['ms']:.1f}", f"{low:.0f} to {high:.0f}",
        f"{arm['times_faster']:.2f}", f"{arm['megabytes']:.1f}",
        f"{arm['link_megabytes']:.1f}" if arm["link_megabytes"] else "",
    ]  # fmt: skip


def _parts(name: str, arm: dict[str, Any]) -> list[str]:
    """A row with the time in collectives, which do not overlap under FSDP2."""
    return [
        name, f"{arm['gradient_ms']:.1f}", f"{arm['gradient_times_faster']:.2f}",
        f"{arm['gradient_ms'] / arm['ms']:.0%}",
        f"{arm['weight_ms']:.1f}", f"{arm['weight_times_faster']:.2f}",
    ]  # fmt: skip


def show(result: dict[str, Any]) -> None:
    """Prints the result of ``training.measure`` as tables; FSDP2 has its own."""
    print(
        f"{result['model']}: {_what(result)}; {result['parameters']:,} parameters in "
        f"{result['tensors']} tensors, {result['ranks']} ranks; medians of the slowest rank"
    )
    by_section: dict[bool, list[tuple[str, dict[str, Any]]]] = {False: [], True: []}
    for name, arm in result["arms"].items():
        by_section[name in FSDP_ARMS].append((name, arm))
    header = ["", "ms", "rounds", "times faster", "MB", "MB on a link"]
    if by_section[False]:
        show_table(header, [_row(*each) for each in by_section[False]])
    if by_section[True]:
        show_table(header, [_row(*each) for each in by_section[True]])
        header = ["of that", "gradients", "times faster", "share", "weights", "times faster"]
        show_table(header, [_parts(*each) for each in by_section[True] if "error" not in each[1]])
    for name, arm in result["arms"].items():
        if "error" in arm:
            print(f"{name}: {arm['error']}")
    ran = [arm for arm in result["arms"].values() if "error" not in arm]
    if result["compute_ms"]:
        print(f"a step without any exchange: {result['compute_ms']:.1f} ms")
    print(
        f"rounds discarded because of other load: {sum(arm['discarded'] for arm in ran)}; "
        f"most other load in a round that counts: {max(max(a['load']) for a in ran):.2f} cores"
    )


if __name__ == "__main__":
    main()
