"""Trains the same model with plain Horovod and with GlobalQSGD, and shows the two side by side.

    python examples/demo.py

Each run is ``digits_cnn.py`` on 2 ranks of this machine. Ends with an error if GlobalQSGD cost more
than a point of accuracy, saved too few bytes, or left the ranks with different models.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hvd_gqsgd.tools.launch import LAUNCHERS, LaunchError, fits, launch_command, run_ranks

SCRIPT = Path(__file__).with_name("digits_cnn.py")
TIMEOUT = 600  # seconds a run; on an idle machine it takes some ten
MIN_ACCURACY = 95.0  # percent
MAX_LOSS = 1.0  # points of accuracy between the two runs
MIN_RATIO = 3.8  # times fewer bytes at 8 bits and less, on the tensors that are compressed

Result = dict[str, Any]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2, help="at least 2")
    parser.add_argument("--bits", default="8", help="lane width of GlobalQSGD: 2 to 16 or dynamic")
    parser.add_argument("--dither", choices=("linear", "exponential"), default="linear")
    parser.add_argument("--epochs", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--launcher", choices=tuple(LAUNCHERS), default="mpi")
    args = parser.parse_args()
    if args.ranks < 2:
        parser.error(f"--ranks must be at least 2, got {args.ranks}: one rank exchanges nothing")
    return args


def train(args: argparse.Namespace, compression: str, result: Path) -> Result:
    command = [
        *(sys.executable, str(SCRIPT), "--json", str(result), "--compression", compression),
        *("--bits", args.bits, "--dither", args.dither),
        *("--epochs", str(args.epochs), "--seed", str(args.seed)),
    ]
    try:
        launcher = launch_command(args.launcher, args.ranks, bound=fits(args.ranks))
        print(f"$ {shlex.join(launcher + command)}", flush=True)
        run_ranks(command, ranks=args.ranks, timeout=TIMEOUT, launcher=args.launcher)
    except LaunchError as error:
        sys.exit(str(error))
    return json.loads(result.read_text())


def ratio(result: Result, of: str = "") -> float:
    """How many times fewer bytes; 1 if there were none, as in GlobalQSGD's stats()."""
    on_wire = result[f"{of}bytes_on_wire"]
    return result[f"{of}bytes_before"] / on_wire if on_wire else 1.0


def show(fp32: Result, gqsgd: Result) -> None:
    table = Table(title=f"Handwritten digits on {fp32['ranks']} ranks", title_justify="left")
    table.add_column()
    table.add_column("fp32", justify="right")
    table.add_column(f"GlobalQSGD, {gqsgd['bits']} bits", justify="right")
    both = (fp32, gqsgd)
    table.add_row("test accuracy", *(f"{r['accuracy']:.2%}" for r in both), end_section=True)
    for tensors, of in (("gradients, all tensors", ""), ("compressed tensors", "compressed_")):
        for text, key in ((f"{tensors}: before", "bytes_before"), ("on the wire", "bytes_on_wire")):
            sizes = (f"{r[of + key] / 1e6:.1f} MB" if r[of + key] else "-" for r in both)
            table.add_row(text, *sizes)
        ratios = (f"{ratio(r, of):.2f}" if r[f"{of}bytes_before"] else "-" for r in both)
        table.add_row("times fewer", *ratios, end_section=True)
    table.add_row("time blocked in communication", *(f"{r['seconds_blocked']:.2f} s" for r in both))
    table.add_row("time to train, in all", *(f"{r['seconds']:.2f} s" for r in both))
    table.add_section()
    table.add_row("replica difference", *(f"{r['replica_difference']:g}" for r in both))
    Console().print(table)
    print(
        "Bytes are those that a rank hands to collectives. The ranks share one machine's memory,\n"
        "the fastest of links: the times do not show what fewer bytes save on a network."
    )


def failures(fp32: Result, gqsgd: Result) -> list[str]:
    """The bounds that do not hold."""
    accuracies = [100 * result["accuracy"] for result in (fp32, gqsgd)]
    loss = accuracies[0] - accuracies[1]
    failed = []
    if not min(accuracies) > MIN_ACCURACY:
        failed.append(f"an accuracy of {min(accuracies):.2f} % is not above {MIN_ACCURACY:g} %")
    if not abs(loss) <= MAX_LOSS:
        failed.append(f"the accuracies are {abs(loss):.2f} points apart, more than {MAX_LOSS:g}")
    if gqsgd["bits"] in ("dynamic", *range(2, 9)) and not ratio(gqsgd, "compressed_") >= MIN_RATIO:
        failed.append(f"{ratio(gqsgd, 'compressed_'):.2f} times fewer bytes, not {MIN_RATIO:g}")
    for result in (fp32, gqsgd):
        if result["replica_difference"] != 0:
            failed.append(f"the replicas differ, by up to {result['replica_difference']:g}")
    return failed


def main() -> None:
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # ends the ranks too
    with tempfile.TemporaryDirectory() as folder:
        print(f"1 of 2: training on {args.ranks} ranks with fp32 gradients")
        fp32 = train(args, "none", Path(folder, "fp32.json"))
        print(f"\n2 of 2: the same with GlobalQSGD, {args.bits} bits")
        gqsgd = train(args, "gqsgd", Path(folder, "gqsgd.json"))
    print()
    show(fp32, gqsgd)
    failed = failures(fp32, gqsgd)
    if failed:
        sys.exit("FAILED: " + "; ".join(failed))
    print(
        f"OK: accuracy {100 * (gqsgd['accuracy'] - fp32['accuracy']):+.2f} points, "
        f"{ratio(gqsgd, 'compressed_'):.2f} times fewer bytes on the compressed tensors, "
        "identical replicas"
    )


if __name__ == "__main__":
    main()
