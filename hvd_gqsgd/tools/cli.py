"""The command ``hvd-gqsgd``: what works here, what it costs, and what it would cost elsewhere."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

__all__ = ["main"]

COMMANDS = {
    "doctor": ("hvd_gqsgd.tools.doctor", "what is built and active, with a test on 2 ranks"),
    "bench step": ("hvd_gqsgd.bench.step", "training steps of models' shapes, and the peers'"),
    "bench allreduce": ("hvd_gqsgd.bench.allreduce", "allreduces of all sizes"),
    "bench memory": ("hvd_gqsgd.bench.memory", "memory that training steps take at most"),
    "bench mpi": ("hvd_gqsgd.bench.mpi", "the allreduce over MPI alone; under mpirun"),
    "model": (
        "hvd_gqsgd.bench.predict",
        "what a step would take, and which setting pays",
    ),
    "bench calibrate": ("hvd_gqsgd.bench.calibrate", "what the model must know of a machine"),
    "bench kernels": ("hvd_gqsgd.bench.kernels", "kernels against copies of memory"),
    "bench error": ("hvd_gqsgd.bench.error", "errors of the operators against their bounds"),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs a command; each has a ``--help`` of its own."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:2] == ["bench", "--calibrate"]:
        given[1] = "calibrate"
    for name, (module, _) in COMMANDS.items():
        words = name.split()
        if given[: len(words)] == words:
            importlib.import_module(module).main(given[len(words) :])
            return
    parser = argparse.ArgumentParser(
        prog="hvd-gqsgd",
        description="What works here, and what it costs.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="commands, each with a --help of its own:\n"
        + "\n".join(f"  {name:18}{text}" for name, (_, text) in COMMANDS.items()),
    )
    parser.add_argument("command", nargs="+", help="one of those below")
    wrong = " ".join(parser.parse_args(given).command)
    parser.error(f"there is no command {wrong!r}; there are: {', '.join(COMMANDS)}")


if __name__ == "__main__":
    main()
