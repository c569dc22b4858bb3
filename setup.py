"""Builds the native parts; everything else about the package is in pyproject.toml.

MPICXX names the compiler wrapper of the MPI to build for: by default the mpicxx beside this Python,
or else on the PATH. Empty: no part for MPI.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

from setuptools import setup

try:
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError as error:
    # A source distribution needs no compiler, so it needs no PyTorch. All else stops here, before
    # pip downloads dependencies for a build that cannot succeed.
    if not {"egg_info", "sdist"}.intersection(sys.argv):
        sys.exit(
            f"""
hvd_gqsgd is compiled against the PyTorch that it will run with, and this Python cannot import it:
    {type(error).__name__}: {error}
If PyTorch is installed, the build was isolated from it. Let it see your environment:
    pip install --no-build-isolation .
If it is not installed, install it first:
    pip install torch setuptools wheel && pip install --no-build-isolation .
"""
        )
    setup()
    sys.exit()


def unusable(why: str) -> str:
    """Leaves out the part for MPI, unless that was asked for."""
    if os.environ.get("MPICXX"):
        sys.exit(f"hvd_gqsgd: MPICXX is set, but {why}")
    return why


def mpi_flags() -> list[str] | str:
    """What the compiler needs for MPI, or why there is none to build for."""
    beside = Path(sys.executable).parent / "mpicxx"
    wrapper = os.environ.get("MPICXX", str(beside) if beside.exists() else "mpicxx")
    if not wrapper:
        return "MPICXX is empty"
    if shutil.which(wrapper) is None:
        return unusable(f"{wrapper} was not found")
    trial = subprocess.run(
        [wrapper, "-fsyntax-only", "-x", "c++", "-"],
        input="#include <mpi.h>",
        capture_output=True,
        text=True,
    )
    shown = subprocess.run([wrapper, "-show"], capture_output=True, text=True)
    if trial.returncode or shown.returncode:
        return unusable(f"{wrapper} does not work: {trial.stderr or shown.stderr}")
    return shlex.split(shown.stdout)[1:]


MPI = mpi_flags()
# Why parts are left out.
LEFT_OUT = {
    "CUDA": "native/cuda is not written yet",
    "NCCL": "native/nccl is not written yet",
}
if isinstance(MPI, str):
    LEFT_OUT["MPI"] = MPI


class Build(BuildExtension):
    """Says what is built before building it."""

    def build_extensions(self) -> None:
        for part in ("CPU", "MPI", "CUDA", "NCCL"):
            left_out = f"left out ({LEFT_OUT[part]})" if part in LEFT_OUT else "built"
            print(f"hvd_gqsgd: {part}: {left_out}", flush=True)
        super().build_extensions()


def library(name: str, sources: list[str], flags: list[str] | None = None) -> CppExtension:
    """Not a Python module: a library of PyTorch operators, for torch.ops.load_library."""
    return CppExtension(
        f"hvd_gqsgd.{name}",
        sources=sources,
        # Absolute, as the compiler runs in another folder.
        include_dirs=[os.path.abspath("native/include"), os.path.abspath("native")],
        depends=glob("native/**/*.h", recursive=True),
        extra_compile_args=[
            "-std=c++17",
            "-O3",
            "-fno-math-errno",
            # A fused multiply-add rounds once where two operations round twice. Every
            # instruction set must give the same bits, so none may fuse.
            "-ffp-contract=off",
            # For at::parallel_for alone: not at the link, where torch's own OpenMP serves.
            "-fopenmp",
            # No -march: the sources name the instruction sets that they are compiled for, and
            # choose at run time, so that a wheel runs on any processor of its architecture.
            *(flags or []),
        ],
        extra_link_args=flags or [],
    )


libraries = [library("_C", ["native/bindings.cc", *sorted(glob("native/cpu/*.cc"))])]
if isinstance(MPI, list):
    sources = ["native/mpi_bindings.cc", *sorted(glob("native/mpi/*.cc"))]
    libraries.append(library("_mpi", sources, MPI))

setup(cmdclass={"build_ext": Build}, ext_modules=libraries)
