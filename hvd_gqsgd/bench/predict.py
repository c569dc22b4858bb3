"""``hvd-gqsgd model``: predicts training steps, and recommends a setting."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hvd_gqsgd.bench.gradients import MODELS, layers_of, shapes_of
from hvd_gqsgd.bench.link_plot import plot_links
from hvd_gqsgd.bench.node_plot import PER_NODE, plot_nodes
from hvd_gqsgd.bench.table import show_table
from hvd_gqsgd.tools import node_model
from hvd_gqsgd.tools.advice import break_even, recommend
from hvd_gqsgd.tools.cost_model import (
    BLOCKS_4,
    FP16,
    FP32,
    LINEAR_4,
    LINEAR_8,
    PRESETS,
    TWO_PHASE_8,
    Gradients,
    Machine,
    Setting,
    possible,
    steps_of,
)
from hvd_gqsgd.tools.node_model import Cluster
from hvd_gqsgd.tools.sharded_model import (
    SHARDED_SETTINGS,
    gradient_seconds,
    sharded_step_seconds,
    weight_seconds,
)

__all__ = ["against", "gradients_of", "main", "modules_of", "predict", "predict_sharded"]

ARMS = {
    "Horovod fp32": FP32,
    "Horovod fp16": FP16,
    "GlobalQSGD 8 bits": LINEAR_8,
    "GlobalQSGD 4 bits": LINEAR_4,
    "GlobalQSGD 4 bits per block": BLOCKS_4,
    "GlobalQSGD 8 bits two-phase": TWO_PHASE_8,
}
"""The settings of arms of ``hvd-gqsgd bench step``, by node where a host has several ranks."""

FLAT_ARMS = {"GlobalQSGD 8 bits flat": LINEAR_8, "GlobalQSGD 4 bits flat": LINEAR_4}
"""The settings of its arms that leave nodes out of account."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints predicted steps, the bandwidth below which quantization pays, and a recommendation."""
    parser = argparse.ArgumentParser(
        prog="hvd-gqsgd model",
        description="Predicts training steps with each setting, and recommends one.",
    )
    machine = parser.add_mutually_exclusive_group()
    machine.add_argument("--preset", choices=PRESETS, default="1gbe", help="(default: %(default)s)")
    machine.add_argument(
        "--machine", type=Path, metavar="FILE", help="the output of hvd-gqsgd bench calibrate"
    )
    parser.add_argument("--ranks", type=int, default=8, help="(default: %(default)s)")
    parser.add_argument(
        "--per-node", type=int, default=1, metavar="L",
        help="ranks on each node, which share the node's link (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--model", choices=MODELS, default="resnet50")
    parser.add_argument(
        "--compute", type=float, default=100, metavar="MS",
        help="forward and backward pass of one rank alone (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--measured", type=Path, metavar="FILE",
        help="the output of hvd-gqsgd bench step --json, to compare the predictions with; it has "
        "the model, the number of ranks and the time of computing",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="write a figure too, as PNG")
    parser.add_argument(
        "--plot-links", type=Path, metavar="FILE",
        help="write a figure of the step over the speed of the link, with PowerSGD, as PNG",
    )  # fmt: skip
    parser.add_argument(
        "--plot-nodes", type=Path, metavar="FILE",
        help="write a figure of the step over the number of nodes, as PNG; of --per-node ranks "
        f"each, or else {PER_NODE}",
    )  # fmt: skip
    options = parser.parse_args(arguments)
    if options.ranks < 1 or not 0 <= options.compute < math.inf:
        parser.error(
            "--ranks must be at least 1, and --compute a number of at least 0, got "
            f"{options.ranks} and {options.compute:g}"
        )
    if options.per_node < 1 or options.ranks % options.per_node:
        parser.error(
            "--per-node must be a number that divides --ranks, got "
            f"{options.per_node} and {options.ranks}"
        )
    if options.measured is not None and (options.plot or options.plot_links or options.plot_nodes):
        parser.error("--plot draws predictions for many ranks; leave it or --measured out")
    if options.per_node > 1 and (options.plot or options.plot_links):
        parser.error("--plot and --plot-links draw one rank a node; leave --per-node out")
    chosen = PRESETS[options.preset]
    try:
        if options.machine is not None:
            chosen = _machine(options.machine)
        if options.measured is not None:
            measured, found = _measured(options.measured, chosen)
            _show_against(measured, found, options.json)
            return
    except (OSError, ValueError) as error:
        parser.error(str(error))
    gradients, compute = gradients_of(options.model), options.compute / 1e3
    result = predict(gradients, options.ranks, chosen, compute, options.per_node)
    if options.per_node == 1:
        modules = modules_of(options.model)
        result["fsdp2"] = predict_sharded(modules, options.ranks, chosen, compute)
    if options.plot is not None:
        _plot(gradients, compute, chosen, options.plot)
    if options.plot_links is not None:
        plot_links(options.model, options.ranks, compute, chosen, options.plot_links)
    if options.plot_nodes is not None:
        per_node = options.per_node if options.per_node > 1 else PER_NODE
        plot_nodes(options.model, gradients, per_node, compute, chosen, options.plot_nodes)
    if options.json:
        print(json.dumps(result))
        return
    _show(result, options)


def _show(result: dict[str, Any], options: argparse.Namespace) -> None:
    rows = [
        [name, f"{step['ms']:.1f}", f"{step['times_faster']:.2f}"]
        for name, step in result["steps"].items()
    ]
    ranks = f"{options.ranks} rank{'s' * (options.ranks > 1)}"
    if options.per_node > 1:
        ranks += f", {options.per_node} on each node"
    print(f"{options.model} on {ranks}, {options.compute:g} ms of computing a step")
    show_table(["", "ms a step", "times faster"], rows)
    print(result["advice"])
    if "fsdp2" not in result:
        return
    rows = [
        [name, *(f"{step[key]:.1f}" for key in ("ms", "gradient_ms", "weight_ms")),
         f"{step['times_faster']:.2f}"]
        for name, step in result["fsdp2"].items()
    ]  # fmt: skip
    show_table(["", "ms a step", "of gradients", "of weights", "times faster"], rows)


def gradients_of(model: str) -> Gradients:
    """The gradients of one of ``gradients.MODELS``."""
    return Gradients.of([math.prod(shape) for _, shape in shapes_of(model)])


def modules_of(model: str) -> list[int]:
    """The elements of each layer of one of ``gradients.MODELS``, for FSDP2."""
    return [sum(math.prod(shape) for _, shape in layer) for layer in layers_of(model)]


def predict_sharded(
    modules: Sequence[int], ranks: int, machine: Machine, compute: float
) -> dict[str, dict[str, float]]:
    """Predicts a step under FSDP2 with each setting.

    Returns:
        By the setting's name: ``ms``, of these ``gradient_ms`` and ``weight_ms``, and
        ``times_faster`` than with float32.
    """
    seconds = {
        setting: sharded_step_seconds(setting, modules, ranks, machine, compute)
        for setting in SHARDED_SETTINGS
    }
    return {
        setting.name: {
            "ms": time * 1e3,
            "gradient_ms": gradient_seconds(setting, modules, ranks, machine) * 1e3,
            "weight_ms": weight_seconds(setting, modules, ranks, machine) * 1e3,
            "times_faster": seconds[SHARDED_SETTINGS[0]] / time,
        }
        for setting, time in seconds.items()
    }


def predict(
    gradients: Gradients, ranks: int, machine: Machine, compute: float, per_node: int = 1
) -> dict[str, Any]:
    """Predicts a step with each setting that is possible.

    Args:
        gradients, ranks, machine: the exchange.
        compute: seconds of the forward and the backward pass; the latter takes two thirds.
        per_node: ranks of each node. With several, settings are predicted flat and by node.

    Returns:
        ``steps``, by the setting's name: ``ms`` and ``times_faster`` than fp32; ``break_even``, the
        bandwidth in bytes per second below which the best setting pays; and ``advice``, a sentence.
    """

    def steps_on(there: Machine) -> dict[Setting, float]:
        if per_node == 1:
            return steps_of(gradients, ranks, there, *_passes(compute))
        cluster = Cluster(ranks // per_node, per_node)
        return node_model.steps_of(gradients, cluster, there, *_passes(compute))

    steps = steps_on(machine)
    return {
        "steps": {
            setting.name: {"ms": time * 1e3, "times_faster": steps[FP32] / time}
            for setting, time in steps.items()
        },
        "break_even": break_even(steps_on, ranks, machine),
        "advice": recommend(steps, ranks),
    }


def against(measured: dict[str, Any], machine: Machine) -> dict[str, dict[str, float]]:
    """Compares predictions with the result of ``bench.training.measure``.

    Returns:
        By arm, and by the parts of a step under FSDP2: ``measured_ms``, ``predicted_ms``, and
        ``off``, the error of the prediction relative to the measured time; without FSDP2 where
        each of several hosts has several ranks.

    Raises:
        ValueError: hosts have different numbers of ranks.
    """
    gradients, cluster = gradients_of(measured["model"]), _cluster(measured)
    compute, found = measured.get("compute_ms", 0.0) / 1e3, {}
    sharded = {}
    if cluster.per_node == 1:
        sharded = predict_sharded(modules_of(measured["model"]), cluster.ranks, machine, compute)
    for name, arm in measured["arms"].items():
        for kind, part in (("ms", ""), ("gradient_ms", ", gradients"), ("weight_ms", ", weights")):
            if name in sharded and kind in arm:
                found[f"{name}{part}"] = _compared(arm[kind], sharded[name][kind])
    for name, arm in measured["arms"].items():
        setting = (ARMS | FLAT_ARMS).get(name)
        if setting is None or "error" in arm:
            continue
        if not possible(setting, cluster.ranks):  # exchange="auto" took two phases
            setting = dataclasses.replace(setting, two_phase=True)
        # hierarchy="auto" goes by node in place of two phases.
        by_node = name not in FLAT_ARMS and (setting.two_phase or not setting.quantized)
        exchange = (setting, gradients, cluster, machine, by_node)
        if measured["what"] == "exchange":
            seconds = node_model.exchange_seconds(*exchange)
        else:
            passes = _passes(measured["compute_ms"] / 1e3)
            seconds = node_model.step_seconds(*exchange, *passes)
        found[name] = _compared(arm["ms"], seconds * 1e3)
    return found


def _cluster(measured: dict[str, Any]) -> Cluster:
    """The nodes of a measurement. One host alone has its memory as the links of its ranks."""
    ranks, hosts = measured["ranks"], measured.get("hosts", 1)
    if ranks % hosts:
        raise ValueError(f"each host must have as many ranks, got {ranks} on {hosts} hosts")
    return Cluster(hosts, ranks // hosts) if hosts > 1 else Cluster(ranks, 1)


def _compared(measured: float, predicted: float) -> dict[str, float]:
    return {
        "measured_ms": measured, "predicted_ms": predicted, "off": predicted / measured - 1
    }  # fmt: skip


def _machine(file: Path) -> Machine:
    """Reads the output of ``bench calibrate``.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is something else.
    """
    numbers = _read(file, "--machine", "calibrate")
    known = {field.name for field in dataclasses.fields(Machine)}
    if unknown := numbers.keys() - known:
        raise ValueError(
            f"--machine {file}: it has {', '.join(sorted(unknown))}, which a machine has not"
        )
    if missing := {"alpha", "beta"} - numbers.keys():
        raise ValueError(f"--machine {file}: it must have {' and '.join(sorted(missing))}")
    for name, value in numbers.items():
        optional = name == "beta_two_phase" and value is None
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not optional and not (number and 0 <= value < math.inf):
            raise ValueError(f"--machine {file}: {name} must be a number from 0 on, got {value!r}")
    for name in ("beta", "beta_two_phase", "gamma", "inside"):
        if numbers.get(name) == 0:
            raise ValueError(f"--machine {file}: {name} must be above 0")
    return Machine(**numbers)


def _measured(file: Path, machine: Machine) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
    """Reads the output of ``bench step --json``, and compares it with predictions.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is something else.
    """
    measured = _read(file, "--measured", "step --json")
    try:
        return measured, against(measured, machine)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(
            f"--measured {file}: it must be the output of hvd-gqsgd bench step --json "
            f"({type(error).__name__}: {error})"
        ) from error


def _read(file: Path, option: str, command: str) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{option} {file}: it is no JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{option} {file}: it must be the output of hvd-gqsgd bench {command}, one JSON "
            f"object, got {type(content).__name__}"
        )
    return content


def _show_against(
    measured: dict[str, Any], found: dict[str, dict[str, float]], as_json: bool
) -> None:
    if as_json:
        print(json.dumps(found))
        return
    print(f"{measured['model']}, {measured['what']}, {measured['ranks']} ranks; ms")
    rows = [
        [name, f"{row['measured_ms']:.1f}", f"{row['predicted_ms']:.1f}", f"{row['off']:+.0%}"]
        for name, row in found.items()
    ]
    show_table(["", "measured", "predicted", "off"], rows)


def _passes(compute: float) -> tuple[float, float]:
    """Seconds of the forward and of the backward pass."""
    return compute / 3, 2 * compute / 3


def _plot(gradients: Gradients, compute: float, machine: Machine, file: Path) -> None:
    """Draws the speed-up by the best setting, over ranks and bandwidth."""
    from matplotlib.figure import Figure

    low, high, points = 100e6 / 8, 900e9, 61
    bandwidths = [low * (high / low) ** (i / (points - 1)) for i in range(points)]
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for ranks in (2, 4, 8, 16, 64, 256, 1024):
        gains = []
        for beta in bandwidths:
            there = dataclasses.replace(machine, beta=beta, beta_two_phase=None)
            seconds = steps_of(gradients, ranks, there, *_passes(compute))
            gains.append(seconds[FP32] / min(seconds.values()))
        axes.plot([8 * beta for beta in bandwidths], gains, label=f"{ranks} ranks")
    axes.set(xscale="log", xlabel="bandwidth of each link, bit/s", ylabel="times faster than fp32")
    axes.set_title("a step with the best setting")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
