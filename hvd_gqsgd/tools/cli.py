"""The command ``hvd-gqsgd``: checks an installation, and measures and predicts training steps."""

from __future__ import annotations

import argparse
import difflib
import importlib
import itertools
import sys
from collections.abc import Sequence
from typing import Any

from hvd_gqsgd import __version__

__all__ = ["main"]

COMMANDS = {
    "doctor": ("hvd_gqsgd.tools.doctor", "check what is built and in use, and test 2 ranks"),
    "model": ("hvd_gqsgd.bench.predict", "predict a training step, and the setting that pays"),
    "bench step": ("hvd_gqsgd.bench.step", "time training steps, with Horovod and with DDP"),
    "bench auto": ("hvd_gqsgd.bench.auto", 'train with bits="auto" beside its settings, fixed'),
    "bench allreduce": ("hvd_gqsgd.bench.allreduce", "time allreduces of all sizes"),
    "bench memory": ("hvd_gqsgd.bench.memory", "measure the peak memory of training steps"),
    "bench mpi": ("hvd_gqsgd.bench.mpi", "time the allreduce over MPI alone; under mpirun"),
    "bench calibrate": ("hvd_gqsgd.bench.calibrate", "measure a machine, for model --machine"),
    "bench kernels": ("hvd_gqsgd.bench.kernels", "time the kernels against memcpy"),
    "bench cpu": ("hvd_gqsgd.bench.cpu", "time the CPU's part of an exchange, for each operator"),
    "bench error": ("hvd_gqsgd.bench.error", "compare the operators' errors with their bounds"),
    "bench frontier": ("hvd_gqsgd.bench.frontier", "compare errors and losses at equal bytes"),
}
"""Module and description, by command."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command; each has a ``--help`` of its own."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:2] == ["bench", "--calibrate"]:
        given[1] = "calibrate"
    for name, (module, _) in COMMANDS.items():
        words = name.split()
        if given[: len(words)] == words:
            _import(module, name).main(given[len(words) :])
            return
    parser = argparse.ArgumentParser(
        prog="hvd-gqsgd",
        description="Checks an installation, and measures and predicts training steps.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="commands, each with a --help of its own:\n"
        + "\n".join(f"  {name:18}{text}" for name, (_, text) in COMMANDS.items()),
    )
    parser.add_argument("--version", action="version", version=f"hvd_gqsgd {__version__}")
    parser.add_argument("command", nargs="+", help="one of those below")
    if given in (["bench"], ["bench", "-h"], ["bench", "--help"]):
        given = ["--help"]
    if not given or given[0].startswith("-"):
        parser.parse_args(given)
    wrong = " ".join(itertools.takewhile(lambda word: not word.startswith("-"), given[:2]))
    close = difflib.get_close_matches(wrong, COMMANDS, n=1, cutoff=0.5)
    suggestion = f" (did you mean {close[0]!r}?)" if close else ""
    parser.error(
        f"there is no command {wrong!r}{suggestion}; the commands are {', '.join(COMMANDS)}"
    )


def _import(module: str, command: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        sys.exit(f"hvd-gqsgd {command}: {error}; run hvd-gqsgd doctor for details")
