"""Trains the same model with plain Horovod, with GlobalQSGD, and with the setting that it measures.

    python examples/demo.py

Each run is ``digits_cnn.py``. As root each rank has an emulated host, with a limited link between
them, where fp32 takes long; otherwise the ranks share the memory of this machine. Ends with an
error if GlobalQSGD cost more than a point of accuracy, saved too few bytes, or left the ranks with
different models.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from digits import make_model
from rich.console import Console
from rich.table import Table

from hvd_gqsgd.bench.figure import STYLES, draw, figure_file, new_figure, save
from hvd_gqsgd.bench.hosts import emulated_hosts
from hvd_gqsgd.bench.prediction import predict
from hvd_gqsgd.tools.cost_model import PRESETS, Gradients
from hvd_gqsgd.tools.launch import (
    LAUNCHERS,
    LaunchError,
    fits,
    launch_command,
    launch_environment,
    run_job,
)
from hvd_gqsgd.tools.settings import BLOCKS_4, FP32, LINEAR_8

SCRIPT = Path(__file__).with_name("digits_cnn.py")
TIMEOUT = 600  # seconds a run; on an idle machine it takes some ten to fifty
MIN_ACCURACY = 95.0  # percent
MAX_LOSS = 1.0  # points of accuracy between two runs
MIN_RATIO = 3.8  # times fewer bytes at 8 bits and less, on the tensors that are compressed
LINKS = ("25gbe", "10gbe", "1gbe", "200mbit")  # of PRESETS, to predict

Result = dict[str, Any]
Launch = Callable[..., int | None]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2, help="at least 2")
    parser.add_argument("--bits", default="8", help="lane width of GlobalQSGD: 2 to 16 or dynamic")
    parser.add_argument("--dither", choices=("linear", "exponential"), default="linear")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument(
        "--width", type=int, default=512,
        help="of the hidden layer; 512 makes gradients of 2.2 MB",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--launcher", choices=tuple(LAUNCHERS), default="mpi")
    parser.add_argument(
        "--rate", default="200mbit",
        help="limit of the links between emulated hosts, as root; memory: no hosts, ranks share "
        "the memory of this machine",
    )  # fmt: skip
    parser.add_argument(
        "--plot", type=figure_file, metavar="FILE", default="demo.png",
        help="draw accuracy over seconds to this file",
    )  # fmt: skip
    args = parser.parse_args()
    if args.ranks < 2:
        parser.error(f"--ranks must be at least 2, got {args.ranks}: one rank exchanges nothing")
    return args


@contextlib.contextmanager
def launching(args: argparse.Namespace) -> Iterator[tuple[Launch, str]]:
    """What runs a command on all ranks, and where these are, as a sentence."""
    bound = fits(args.ranks)
    why = ""
    with contextlib.ExitStack() as stack:
        if args.rate == "memory":
            pass
        elif os.geteuid() != 0:
            why = " (emulated hosts need root)"
        else:
            try:
                hosts = emulated_hosts(args.ranks, args.rate, args.ranks, args.launcher)
                run = stack.enter_context(hosts)
            except (LaunchError, OSError) as error:
                why = f" ({error})"
            else:
                yield run, f"Each rank has an emulated host; links are limited to {args.rate}."
                return
        job = launch_command(args.launcher, args.ranks, bound=bound)
        env = launch_environment(bound=bound)
        yield (
            lambda command, **given: run_job([*job, *command], env, **given),
            f"The ranks share one machine's memory{why}, the fastest of links.",
        )


def train(
    launch: Launch, args: argparse.Namespace, folder: Path, compression: str, bits: str
) -> Result:
    result = folder / "result.json"
    command = [
        *(sys.executable, str(SCRIPT), "--json", str(result), "--compression", compression),
        *("--bits", bits, "--dither", args.dither if bits == args.bits else "linear"),
        *("--epochs", str(args.epochs), "--width", str(args.width), "--seed", str(args.seed)),
    ]
    print(f"$ {shlex.join(command)}", flush=True)
    status = launch(command, timeout=TIMEOUT)
    if status is None:
        sys.exit(f"the run did not end within {TIMEOUT} s")
    if status != 0:
        sys.exit(f"the run failed with exit status {status}")
    return json.loads(result.read_text())


def ratio(result: Result, of: str = "") -> float:
    """How many times fewer bytes; 1 if there were none, as in GlobalQSGD's stats()."""
    on_wire = result[f"{of}bytes_on_wire"]
    return result[f"{of}bytes_before"] / on_wire if on_wire else 1.0


def name_of(result: Result) -> str:
    if result["compression"] == "none":
        return "fp32"
    return 'bits="auto"' if result["bits"] == "auto" else f"{result['bits']} bits"


def show(runs: list[Result], where: str) -> None:
    fp32 = runs[0]
    table = Table(title=f"Handwritten digits on {fp32['ranks']} ranks", title_justify="left")
    table.add_column()
    for run in runs:
        table.add_column(name_of(run), justify="right")

    def add(text: str, cell: Callable[[Result], str], end_section: bool = False) -> None:
        table.add_row(text, *map(cell, runs), end_section=end_section)

    add("test accuracy", lambda r: f"{r['accuracy']:.2%}", end_section=True)
    add("time to train", lambda r: f"{r['seconds']:.2f} s")
    add("of that blocked in communication", lambda r: f"{r['seconds_blocked']:.2f} s")
    add("times faster", lambda r: f"{fp32['seconds'] / r['seconds']:.2f}")
    add("setting of the last step", lambda r: r["setting"] or name_of(r), end_section=True)
    for tensors, of in (("gradients", ""), ("compressed ones", "compressed_")):

        def size(r: Result, key: str, of: str = of) -> str:
            return f"{r[of + key] / 1e6:.1f} MB" if r[of + key] else "-"

        add(f"{tensors}: before", partial(size, key="bytes_before"))
        add("on the wire", partial(size, key="bytes_on_wire"))
        add(
            "times fewer",
            lambda r, of=of: f"{ratio(r, of):.2f}" if r[f"{of}bytes_before"] else "-",
            end_section=True,
        )
    add("replica difference", lambda r: f"{r['replica_difference']:g}")
    Console().print(table)
    megabytes = fp32["bytes_before"] / fp32["steps"] / 1e6
    print(
        f"{where} Bytes are those that a rank hands to collectives:\n{megabytes:.1f} MB of "
        f'gradients in each of {fp32["steps"]} steps. bits="auto" has 4 settings, fp32 among them.'
    )


def show_prediction(runs: list[Result], gradients: Gradients) -> None:
    """Steps of this training on real links, by the cost model."""
    compute = min((r["seconds"] - r["seconds_blocked"]) / r["steps"] for r in runs)
    settings = (FP32, LINEAR_8, BLOCKS_4)
    table = Table(title="The same on real links, predicted (ms a step)", title_justify="left")
    table.add_column("link")
    for setting in settings:
        table.add_column(setting.name, justify="right")
    table.add_column("recommended")
    for link in LINKS:
        predicted = predict(gradients, runs[0]["ranks"], PRESETS[link], compute)
        times = [predicted["steps"].get(setting.name) for setting in settings]
        cells = [f"{each['ms']:.1f}" if each else "-" for each in times]
        table.add_row(link, *cells, predicted["recommended"])
    print()
    Console().print(table)
    print(
        f"With {compute * 1e3:.1f} ms of computing, the least of the runs above. "
        "hvd-gqsgd model predicts other networks and links."
    )


def plot(runs: list[Result], file: Path) -> None:
    figure, (axes,) = new_figure()
    for run, style in zip(runs, STYLES, strict=False):
        seconds, accuracies = zip(*run["curve"], strict=True)
        draw(axes, seconds, [100 * a for a in accuracies], style, name_of(run), markers=12)
    axes.set(xlabel="time of training (s)", ylabel="test accuracy (%)", xlim=(0, None))
    axes.legend()
    save(figure, file)
    print(f"accuracy over seconds: {file}")


def failures(runs: list[Result]) -> list[str]:
    """The bounds that do not hold."""
    failed = []
    fp32, fixed, _ = runs
    for result in runs:
        accuracy, name = 100 * result["accuracy"], name_of(result)
        apart = abs(accuracy - 100 * fp32["accuracy"])
        if not accuracy > MIN_ACCURACY:
            failed.append(f"{name}: an accuracy of {accuracy:.2f} % is not above {MIN_ACCURACY:g}")
        if not apart <= MAX_LOSS:
            failed.append(f"{name}: {apart:.2f} points from fp32, more than {MAX_LOSS:g}")
        if result["replica_difference"] != 0:
            failed.append(f"{name}: replicas differ, by up to {result['replica_difference']:g}")
    if fixed["bits"] in ("dynamic", *range(2, 9)) and not ratio(fixed, "compressed_") >= MIN_RATIO:
        failed.append(f"{ratio(fixed, 'compressed_'):.2f} times fewer bytes, not {MIN_RATIO:g}")
    return failed


def main() -> None:
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # ends the ranks too
    runs = []
    try:
        with tempfile.TemporaryDirectory() as folder, launching(args) as (launch, where):
            print(where)
            for text, compression, bits in (
                ("plain Horovod, fp32", "none", args.bits),
                (f"GlobalQSGD, {args.bits} bits", "gqsgd", args.bits),
                ('GlobalQSGD, bits="auto"', "gqsgd", "auto"),
            ):
                print(f"\n{len(runs) + 1} of 3: training on {args.ranks} ranks with {text}")
                runs.append(train(launch, args, Path(folder), compression, bits))
    except LaunchError as error:
        sys.exit(str(error))
    print()
    show(runs, where)
    show_prediction(runs, Gradients.of(make_model(args.width).parameters()))
    plot(runs, args.plot)
    failed = failures(runs)
    if failed:
        sys.exit("FAILED: " + "; ".join(failed))
    fp32, fixed, auto = runs
    print(
        f"OK: accuracy {100 * (fixed['accuracy'] - fp32['accuracy']):+.2f} points, "
        f"{ratio(fixed, 'compressed_'):.2f} times fewer bytes on the compressed tensors, "
        f'identical replicas; bits="auto" trains in {auto["seconds"]:.1f} s, fp32 in '
        f"{fp32['seconds']:.1f} s"
    )


if __name__ == "__main__":
    main()
