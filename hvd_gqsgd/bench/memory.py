"""Peak memory of training steps, against plain Horovod: ``hvd-gqsgd bench memory``.

Each arm of ``hvd-gqsgd bench step`` runs in a job of its own, so that no arm reuses memory of
another one.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from hvd_gqsgd.bench.gradients import MODELS
from hvd_gqsgd.bench.hosts import add_arguments, launch
from hvd_gqsgd.bench.networks import Network
from hvd_gqsgd.bench.operators import FP32
from hvd_gqsgd.bench.step import chosen
from hvd_gqsgd.bench.table import show_table
from hvd_gqsgd.tools.launch import printed_json

__all__ = ["main", "measure"]

STEPS = 2
"""Rounds that count. All buffers are allocated by then, as warm-up steps come before."""


def measure(model: str, arms: Sequence[str], ranks: int, rate: str | None) -> dict[str, Any]:
    """Peak resident memory by arm, of the rank that uses most.

    Args:
        model: one of ``gradients.MODELS``.
        arms: of ``operators.ARMS``; Horovod's fp32 comes first in any case.
        ranks: number of ranks.
        rate: limit of the links between emulated hosts; None: ranks of this machine.

    Returns:
        ``gradient_megabytes``, and for each arm in ``arms``: ``peak_megabytes``, and ``more``, the
        difference from Horovod's fp32 as a multiple of the gradients.

    Raises:
        RuntimeError: a job failed.
    """
    peaks: dict[str, float] = {}
    gradients = 4 * Network.of_model(model).gradients.elements / 1e6
    for name in (FP32, *(arm for arm in arms if arm != FP32)):
        with tempfile.TemporaryFile() as output:
            given = [
                "--model", model, "--arms", name, "--repeats", str(STEPS), "--most-load", "inf",
                "--json",
            ]  # fmt: skip
            status = launch("hvd_gqsgd.bench.step", given, ranks, rate, output)
            output.seek(0)
            said = output.read().decode(errors="replace")
        if status != 0:
            raise RuntimeError(f"{name} failed with exit status {status}: {said}")
        result = printed_json(said)
        if "error" in result["arms"][name]:
            raise RuntimeError(f"{name} does not run: {result['arms'][name]['error']}")
        peaks[name] = result["peak_megabytes"]
    return {
        "model": model,
        "ranks": ranks,
        "gradient_megabytes": gradients,
        "arms": {
            name: {"peak_megabytes": peak, "more": (peak - peaks[FP32]) / gradients}
            for name, peak in peaks.items()
        },
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        prog="hvd-gqsgd bench memory",
        description="Peak memory of training steps of a model's shape, against plain Horovod.",
    )
    add_arguments(parser)
    parser.add_argument("--model", choices=MODELS, default="resnet50")
    parser.add_argument(
        "--arms", default="Horovod,GlobalQSGD",
        help="names, or words in names, of the arms of bench step (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    try:
        result = measure(options.model, chosen(options.arms), options.ranks, options.rate)
    except RuntimeError as error:
        sys.exit(f"hvd-gqsgd: {error}")
    if options.json:
        print(json.dumps(result))
        return
    print(f"{result['model']}: gradients of {result['gradient_megabytes']:.1f} MB, a rank's peak")
    rows = [
        [name, f"{arm['peak_megabytes']:.0f}", f"{arm['more']:+.2f}"]
        for name, arm in result["arms"].items()
    ]
    show_table(["", "MB", "more, in gradients"], rows)


if __name__ == "__main__":
    main()
