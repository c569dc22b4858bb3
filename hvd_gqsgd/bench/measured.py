"""The files of ``hvd-gqsgd model``: a calibrated machine, and measured steps to compare with."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from hvd_gqsgd.bench.networks import Network
from hvd_gqsgd.bench.prediction import passes, predict_sharded
from hvd_gqsgd.bench.table import show_table
from hvd_gqsgd.tools import node_model
from hvd_gqsgd.tools.cost_model import Machine
from hvd_gqsgd.tools.node_model import Cluster
from hvd_gqsgd.tools.settings import (
    BLOCKS_4,
    EXPONENTIAL_8,
    FP16,
    FP32,
    LINEAR_4,
    LINEAR_8,
    TWO_PHASE_8,
    kept,
    possible,
)

__all__ = ["against", "read_machine", "read_measured", "show_against"]

ARMS = {
    "Horovod fp32": FP32,
    "Horovod fp16": FP16,
    "GlobalQSGD 8 bits": LINEAR_8,
    "GlobalQSGD 4 bits": LINEAR_4,
    "GlobalQSGD 4 bits per block": BLOCKS_4,
    "GlobalQSGD 8 bits two-phase": TWO_PHASE_8,
    "GlobalQSGD exponential": EXPONENTIAL_8,
    **{f"GlobalQSGD {setting.name}": setting for setting in kept(1 / 64, 2)},
}
"""The settings of arms of ``hvd-gqsgd bench step``, by node where a host has several ranks."""

FLAT_ARMS = {
    "GlobalQSGD 8 bits flat": LINEAR_8,
    "GlobalQSGD 8 bits two-phase flat": TWO_PHASE_8,
    "GlobalQSGD 4 bits flat": LINEAR_4,
}
"""The settings of its arms with ``hierarchy="flat"``."""


def against(measured: dict[str, Any], machine: Machine) -> dict[str, dict[str, float]]:
    """Compares predictions with the result of ``bench.training.measure``.

    Returns:
        By arm, and by the parts of a step under FSDP2: ``measured_ms``, ``predicted_ms``, and
        ``off``, the error of the prediction relative to the measured time.

    Raises:
        ValueError: hosts have different numbers of ranks.
    """
    network, cluster = Network.of_model(measured["model"]), _cluster(measured)
    compute = measured.get("compute_ms", 0.0) / 1e3
    found: dict[str, dict[str, float]] = {}
    sharded = predict_sharded(
        network.module_sizes, cluster.ranks, machine, compute, cluster.per_node
    )["steps"]
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
        by_node = name not in FLAT_ARMS and (
            (setting.two_phase and setting.keep == 1) or not setting.quantized
        )
        exchange = (setting, network.gradients, cluster, machine, by_node)
        if measured["what"] == "exchange":
            seconds = node_model.exchange_seconds(*exchange)
        else:
            compute = measured["compute_ms"] / 1e3
            seconds = node_model.step_seconds(*exchange, *passes(compute))
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


def read_machine(file: Path) -> Machine:
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


def read_measured(
    file: Path, machine: Machine
) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
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


def show_against(
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
