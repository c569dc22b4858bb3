"""The most memory that training steps take, against plain Horovod: ``hvd-gqsgd bench memory``.

Each arm of ``hvd-gqsgd bench step`` runs in a job of its own, as memory that one had would be there
for the next.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from hvd_gqsgd.bench.gradients import MODELS
from hvd_gqsgd.bench.predict import gradients_of
from hvd_gqsgd.bench.step import FP32, chosen
from hvd_gqsgd.bench.table import show_table
from hvd_gqsgd.tools.launch import add_arguments, launch

__all__ = ["main", "measure"]

STEPS = 5
"""Enough for all buffers to be there."""


def measure(model: str, arms: Sequence[str], ranks: int, rate: str | None) -> dict[str, Any]:
    """Peak resident memory of the rank that takes most, by arm; the first one is Horovod's fp32.

    Returns:
        ``gradient_megabytes``, and for each arm in ``arms``: ``peak_megabytes``, and ``more``, the
        difference from the first one as a multiple of the gradients.

    Raises:
        RuntimeError: a job failed.
    """
    peaks: dict[str, float] = {}
    gradients = 4 * gradients_of(model).elements / 1e6
    for name in (FP32, *(arm for arm in arms if arm != FP32)):
        with tempfile.TemporaryFile() as output:
            given = ["--model", model, "--arms", name, "--repeats", str(STEPS), "--json"]
            status = launch("hvd_gqsgd.bench.step", given, ranks, rate, output)
            output.seek(0)
            said = output.read().decode()
        if status != 0:
            raise RuntimeError(f"{name} failed with exit status {status}: {said}")
        result = json.loads(said[said.index("{") :].splitlines()[0])
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
