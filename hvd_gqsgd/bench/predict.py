"""``hvd-gqsgd model``: predicts training steps, and recommends a setting."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hvd_gqsgd.bench.figure import figure_file
from hvd_gqsgd.bench.gradients import MODELS
from hvd_gqsgd.bench.link_plot import plot_gains, plot_links
from hvd_gqsgd.bench.measured import read_machine, read_measured, show_against
from hvd_gqsgd.bench.networks import Network, number_of
from hvd_gqsgd.bench.node_plot import PER_NODE, plot_nodes
from hvd_gqsgd.bench.prediction import predict, predict_sharded
from hvd_gqsgd.bench.table import show_table
from hvd_gqsgd.checks import MOST_GROUP, checked_keep
from hvd_gqsgd.tools.cost_model import PRESETS, Machine

__all__ = ["main"]

TENSORS = 200
"""Tensors of a network that is given by its number of parameters alone."""

MOST_TENSORS = 1_000_000


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints predicted steps, the bandwidth below which quantization pays, and a recommendation."""
    parser = _parser()
    options = parser.parse_args(arguments)
    _check(options, parser)
    machine = PRESETS[options.preset]
    try:
        if options.machine is not None:
            machine = read_machine(options.machine)
        if options.measured is not None:
            show_against(*read_measured(options.measured, machine), options.json)
            return
        network = dataclasses.replace(_network(options), min_numel=options.min_numel)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    _plot(network, machine, options)
    compute = options.compute / 1e3
    exchange = (options.ranks, machine, compute, options.per_node)
    result = predict(network.gradients, *exchange, 1 / (options.keep or 1))
    sharded = predict_sharded(network.module_sizes, *exchange)
    result |= {"fsdp2": sharded["steps"], "fsdp2_advice": sharded["advice"]}
    if options.json:
        print(json.dumps(result))
    else:
        _show(network, result, options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hvd-gqsgd model",
        description="Predicts training steps with each setting, and recommends one.",
    )
    machine = parser.add_mutually_exclusive_group()
    machine.add_argument(
        "--preset", choices=PRESETS, default="1gbe", help="link of each node (default: %(default)s)"
    )
    machine.add_argument(
        "--machine", type=Path, metavar="FILE", help="the output of hvd-gqsgd bench calibrate"
    )
    parser.add_argument(
        "--ranks", type=int, default=8, metavar="N", help="number of ranks (default: %(default)s)"
    )
    parser.add_argument(
        "--per-node", type=int, default=1, metavar="L",
        help="ranks on each node, which share the node's link (default: %(default)s)",
    )  # fmt: skip
    network = parser.add_mutually_exclusive_group()
    network.add_argument(
        "--model", choices=MODELS, default="resnet50", help="a known network (default: %(default)s)"
    )
    network.add_argument(
        "--parameters", type=number_of, metavar="NUMBER",
        help="a network with so many parameters, such as 350M or 1.3B, in tensors of equal size",
    )  # fmt: skip
    network.add_argument(
        "--module", metavar="PACKAGE:FUNCTION",
        help="the network that a function without arguments returns, a torch.nn.Module, such as "
        "torch.nn:Transformer; it is made on the meta device where that works",
    )  # fmt: skip
    parser.add_argument(
        "--tensors", type=int, metavar="NUMBER",
        help=f"number of tensors, for --parameters (default: {TENSORS})",
    )  # fmt: skip
    parser.add_argument(
        "--min-numel", type=int, default=Network.min_numel, metavar="N",
        help="tensors with fewer elements are not compressed, but by FSDP2 (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--compute", type=float, default=100, metavar="MS",
        help="forward and backward pass of one rank alone (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--keep", type=_group, metavar="1/M",
        help="also predict settings that exchange 1 of M elements, as --keep 1/64 or --keep 64; "
        "they are not recommended, as a step makes less progress",
    )  # fmt: skip
    parser.add_argument(
        "--measured", type=Path, metavar="FILE",
        help="compare predictions with the output of hvd-gqsgd bench step --json, which has the "
        "network, the number of ranks and the compute time",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument(
        "--plot", type=figure_file, metavar="FILE",
        help="draw the speedup over link speed, for numbers of ranks, as .png, .pdf or .svg",
    )  # fmt: skip
    parser.add_argument(
        "--plot-links", type=figure_file, metavar="FILE",
        help="draw the time of a step over link speed, with PowerSGD, the presets' links, the "
        "recommended setting and the break-even point",
    )  # fmt: skip
    parser.add_argument(
        "--plot-nodes", type=figure_file, metavar="FILE",
        help="draw the time of a step over the number of nodes, which have --per-node ranks, or "
        f"else {PER_NODE}",
    )  # fmt: skip
    return parser


def _group(text: str) -> int:
    """The value of ``--keep``: of how many elements one is exchanged."""
    above, _, below = text.partition("/")
    try:
        share = float(above) / float(below or 1)
        group = round(1 / checked_keep(1 / share if share > 1 else share))
    except (ValueError, ZeroDivisionError):
        group = 0
    if group < 2:
        raise argparse.ArgumentTypeError(
            f"must be a share from 1/2 to 1/{MOST_GROUP}, as 1/64, or 64 for 1 of 64 elements, got "
            f"{text!r}"
        )
    return group


def _check(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Checks what argparse does not."""
    if options.ranks < 1 or not 0 <= options.compute < math.inf:
        parser.error(
            "--ranks must be at least 1, and --compute a number of at least 0, got "
            f"{options.ranks} and {options.compute:g}"
        )
    if options.min_numel < 0:
        parser.error(f"--min-numel must be at least 0, got {options.min_numel}")
    if options.per_node < 1 or options.ranks % options.per_node:
        parser.error(
            "--per-node must be a number that divides --ranks, got "
            f"{options.per_node} and {options.ranks}"
        )
    if options.tensors is not None and options.parameters is None:
        parser.error(f"--tensors {options.tensors} goes with --parameters: pass both, or neither")
    if options.parameters is not None and options.tensors is not None:
        most = min(options.parameters, MOST_TENSORS)
        if not 1 <= options.tensors <= most:
            parser.error(f"--tensors must be from 1 to {most:,}, got {options.tensors:,}")
    if options.measured is not None:
        if options.keep is not None:
            parser.error("--measured has the settings of its measurement: pass it without --keep")
        if options.plot or options.plot_links or options.plot_nodes:
            parser.error("--plot draws predictions for many ranks: pass it without --measured")
        if options.parameters is not None or options.module is not None:
            parser.error(
                "--measured has the network of its measurement: pass it without --parameters and "
                "--module"
            )
    if options.per_node > 1 and (options.plot or options.plot_links):
        parser.error(
            "--plot and --plot-links draw one rank a node, got --per-node "
            f"{options.per_node}: pass --plot-nodes, or leave --per-node out"
        )


def _network(options: argparse.Namespace) -> Network:
    """The network of the arguments.

    Raises:
        ValueError: ``--module`` leads to none.
    """
    if options.parameters is not None:
        tensors = options.tensors or min(TENSORS, options.parameters)
        return Network.of_size(options.parameters, tensors)
    if options.module is None:
        return Network.of_model(options.model)
    try:
        return Network.of_function(options.module)
    except ValueError as error:
        raise ValueError(f"--module {error}") from error


def _plot(network: Network, machine: Machine, options: argparse.Namespace) -> None:
    compute = options.compute / 1e3
    if options.plot is not None:
        plot_gains(network, compute, machine, options.plot)
    if options.plot_links is not None:
        plot_links(network, options.ranks, compute, machine, options.plot_links)
    if options.plot_nodes is not None:
        per_node = options.per_node if options.per_node > 1 else PER_NODE
        plot_nodes(network, per_node, compute, machine, options.plot_nodes)


def _show(network: Network, result: dict[str, Any], options: argparse.Namespace) -> None:
    ranks = f"{options.ranks} rank{'s' * (options.ranks > 1)}"
    if options.per_node > 1:
        ranks += f", {options.per_node} on each node"
    gradients = network.gradients
    print(
        f"{network.name} on {ranks}, {options.compute:g} ms of computing a step; "
        f"{gradients.elements:,} parameters in {gradients.tensors} tensors"
    )
    rows = [
        [name, f"{step['ms']:.1f}", f"{step['times_faster']:.2f}", *_accuracy(step)]
        for name, step in result["steps"].items()
    ]
    show_table(["", "ms a step", "times faster", "levels", "error"], rows)
    print(result["advice"])
    if result["break_even"] > 0:
        limit = 8e-9 * result["break_even"]
        speed = "any speed" if limit == math.inf else f"up to {limit:.2g} Gbit/s"
        print(f"Compression pays on links of {speed}.")
    rows = [
        [name.removeprefix("FSDP2 ").removeprefix("GlobalQSGD "),
         *(f"{step[key]:.1f}" for key in ("ms", "gradient_ms", "weight_ms")),
         f"{step['times_faster']:.2f}", *_accuracy(step)]
        for name, step in result["fsdp2"].items()
    ]  # fmt: skip
    header = ["FSDP2", "ms a step", "gradients", "weights", "times faster", "levels", "error"]
    show_table(header, rows)
    print(result["fsdp2_advice"])
    print(
        "levels: on each side of zero, per block those of the mean width; - without quantization.\n"
        "error: expected error of the mean gradient, relative to it, for normal gradients that are "
        "independent between ranks"
        + ("; - with a leader, whose error feedback makes up for it in later steps.\nAn error "
           "above 100% is that of elements that are not exchanged: small steps average it out."
           if options.keep else ".")
    )  # fmt: skip


def _accuracy(step: dict[str, Any]) -> list[str]:
    levels, error = step["levels"], step["relative_error"]
    return ["-" if levels is None else str(levels), "-" if error is None else _percent(error)]


def _percent(share: float) -> str:
    """Of two significant digits."""
    if share < 1:
        return "0%" if share < 1e-6 else f"{100 * share:.2g}%"
    return f"{float(f'{100 * share:.2g}'):,.0f}%"


if __name__ == "__main__":
    main()
