"""Builds the native parts, and says which PyTorch they need; all else is in pyproject.toml.

CXX names the C++ compiler: by default c++. Where there is none nothing is compiled, and NumPy does
the work of the kernels.

MPICXX names the compiler wrapper of the MPI to build for: by default the mpicxx beside this Python,
or else on the PATH. Empty: no part for MPI.

CUDA is taken from CUDA_HOME, or else from where nvcc is, if PyTorch was built for it. Empty: no
part for GPUs. TORCH_CUDA_ARCH_LIST says for which GPUs: by default those of this machine, or,
without any, compute capability 8.0, 9.0 and what comes after. NCCL is that of PyTorch's own
packages, NCCL_HOME, or the system.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
from glob import glob
from pathlib import Path
from platform import machine

from setuptools import setup

LEAST_TORCH = (2, 4)
# What the package needs where nothing is compiled: the oldest that `make matrix` tries.
REQUIRES = ["numpy>=1.26", f"torch>={LEAST_TORCH[0]}.{LEAST_TORCH[1]}"]

# pip builds in an environment without PyTorch: build for the one that it installs to.
for folder in site.getsitepackages() if importlib.util.find_spec("torch") is None else ():
    site.addsitedir(folder)

try:
    import torch
    from torch.utils import cpp_extension
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
except ImportError as error:
    # A source distribution needs no compiler, so it needs no PyTorch. All else stops here, before
    # pip downloads dependencies for a build that cannot succeed.
    if not {"egg_info", "sdist"}.intersection(sys.argv):
        sys.exit(
            f"""
hvd_gqsgd is compiled against the PyTorch that it will run with, and this Python cannot import it:
    {type(error).__name__}: {error}
If it is not installed, install it first:
    pip install torch setuptools wheel && pip install --no-build-isolation hvd_gqsgd
If it is installed, the build was isolated from it. Let it see your environment:
    pip install --no-build-isolation hvd_gqsgd
In the repository of hvd_gqsgd, write . for hvd_gqsgd.
"""
        )
    setup(install_requires=REQUIRES)
    sys.exit()

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
if TORCH < LEAST_TORCH:
    sys.exit(
        f"hvd_gqsgd needs PyTorch {REQUIRES[1][7:]} or newer; {torch.__version__} is installed"
    )


def has_compiler() -> bool:
    """Whether there is a C++ compiler; one that CXX names must be there."""
    named = os.environ.get("CXX")
    found = shutil.which(shlex.split(named or "c++")[0]) is not None
    if named and not found:
        sys.exit(f"hvd_gqsgd: CXX is set, but {named} was not found")
    return found


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
    # Without the path of that MPI: the library is loaded where mpi4py has loaded its own, and must
    # find that one or none. Intel's wrapper says -Xlinker for -Wl.
    flags = iter(shlex.split(shown.stdout.replace("-Xlinker ", "-Wl,"))[1:])
    kept = []
    for flag in flags:
        if flag in ("-Wl,-rpath", "-Wl,--rpath"):
            next(flags)
        elif not flag.startswith(("-Wl,-rpath,", "-Wl,--rpath,", "-Wl,-rpath=", "-Wl,--rpath=")):
            kept.append(flag)
    return kept


def cuda_home() -> Path | str:
    """Where CUDA is, or why there is none to build for."""
    if os.environ.get("CUDA_HOME") == "":
        return "CUDA_HOME is empty"
    if torch.version.cuda is None:
        return f"PyTorch {torch.__version__} was built without it"
    # PyTorch's guess is wrong where the nvcc on the PATH is a link or a script.
    nvcc = shutil.which("nvcc")
    linked = Path(nvcc).resolve().parents[1] if nvcc else None
    homes = [Path(home) for home in (cpp_extension.CUDA_HOME, linked, "/usr/local/cuda") if home]
    for home in homes:
        if (home / "bin/nvcc").exists() and (home / "include/cuda_runtime.h").exists():
            shown = subprocess.run([str(home / "bin/nvcc"), "--version"], capture_output=True)
            found = re.search(r"release (\d+)", shown.stdout.decode())
            if found is None or found[1] != torch.version.cuda.split(".")[0]:
                return f"PyTorch has CUDA {torch.version.cuda}, and {home} has {found and found[1]}"
            return home
    return f"nvcc and its headers were found in none of {', '.join(map(str, homes))}; set CUDA_HOME"


def nccl_flags() -> tuple[list[str], list[str]] | str:
    """Folders of NCCL's headers and what the linker needs, or why there is none to build for."""
    package = (
        importlib.util.find_spec("nvidia.nccl") if importlib.util.find_spec("nvidia") else None
    )
    homes = [Path(folder) for folder in (package and package.submodule_search_locations) or ()]
    homes += [Path(home) for home in (os.environ.get("NCCL_HOME"), CUDA, "/usr") if home]
    for home in homes:
        if (home / "include" / "nccl.h").exists():
            for folder in (home / "lib", home / "lib64", home / "lib" / f"{machine()}-linux-gnu"):
                # By its file name: PyTorch's packages have no other, and it is the one that
                # PyTorch will have loaded.
                if (folder / "libnccl.so.2").exists():
                    return [str(home / "include")], [f"-L{folder}", "-l:libnccl.so.2"]
    return f"nccl.h and libnccl.so.2 were found in none of {', '.join(map(str, homes))}"


COMPILER = has_compiler()
NO_COMPILER = "no C++ compiler was found"
MPI = mpi_flags() if COMPILER else unusable(NO_COMPILER)
CUDA = cuda_home() if COMPILER else NO_COMPILER
NCCL = "there is no CUDA" if isinstance(CUDA, str) else nccl_flags()
# Why parts are left out.
LEFT_OUT = {
    part: found for part, found in (("MPI", MPI), ("CUDA", CUDA), ("NCCL", NCCL))
    if isinstance(found, str)
}  # fmt: skip
if isinstance(CUDA, Path):
    cpp_extension.CUDA_HOME = str(CUDA)
    if not torch.cuda.is_available():
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0+PTX")


class Build(BuildExtension):
    """Says what is built before building it."""

    def build_extensions(self) -> None:
        for part in ("CPU", "MPI", "CUDA", "NCCL"):
            left_out = f"left out ({LEFT_OUT[part]})" if part in LEFT_OUT else "built"
            print(f"hvd_gqsgd: {part}: {left_out}", flush=True)
        super().build_extensions()


# Absolute, as the compiler runs in another folder.
INCLUDE = [os.path.abspath("native")]
HEADERS = glob("native/**/*.h", recursive=True)
STANDARD = "-std=c++17" if TORCH < (2, 14) else "-std=c++20"  # that of PyTorch's headers
CXXFLAGS = [
    STANDARD,
    "-O3",
    "-fno-math-errno",
    # Floating-point exception flags are never read. Without them float16 conversions vectorize.
    "-fno-trapping-math",
    # A fused multiply-add rounds once where two operations round twice. Every instruction set must
    # give the same bits, so none may fuse.
    "-ffp-contract=off",
    # For at::parallel_for alone: not at the link, where torch's own OpenMP serves.
    "-fopenmp",
    # No -march: the sources name the instruction sets that they are compiled for, and choose at run
    # time, so that a wheel runs on any processor of its architecture.
]


def library(name: str, sources: list[str], flags: list[str] | None = None) -> CppExtension:
    """A library of PyTorch operators, for torch.ops.load_library; _C is a Python module too."""
    return CppExtension(
        f"hvd_gqsgd._native.{name}",
        sources=sources,
        include_dirs=INCLUDE,
        depends=HEADERS,
        extra_compile_args=[*CXXFLAGS, *(flags or [])],
        extra_link_args=flags or [],
    )


def cuda_library() -> CUDAExtension:
    """The kernels for GPUs and, if it was found, NCCL."""
    sources = ["native/torch/cuda.cc", *sorted(glob("native/cuda/*.cu"))]
    include, link = [], []
    if not isinstance(NCCL, str):
        include, link = NCCL
        sources += ["native/torch/nccl.cc", *sorted(glob("native/nccl/*.cc"))]
    return CUDAExtension(
        "hvd_gqsgd._native._cuda",
        sources=sources,
        include_dirs=[*INCLUDE, *include],
        depends=HEADERS,
        extra_compile_args={
            "cxx": CXXFLAGS,
            # For the same bits as on the CPU: no fused multiply-add here either.
            "nvcc": [STANDARD, "-O3", "--fmad=false"],
        },
        extra_link_args=link,
    )


libraries = []
if COMPILER:
    sources = ["native/torch/cpu.cc", "native/torch/passage.cc", *sorted(glob("native/cpu/*.cc"))]
    libraries.append(library("_C", sources))
    # What is compiled runs with the PyTorch of its headers alone, so a wheel asks for that one.
    REQUIRES[1] = f"torch=={TORCH[0]}.{TORCH[1]}.*"
else:
    print(f"hvd_gqsgd: CPU: left out ({NO_COMPILER}): NumPy does its work, slowly", flush=True)
if isinstance(MPI, list):
    sources = ["native/torch/mpi.cc", *sorted(glob("native/mpi/*.cc"))]
    libraries.append(library("_mpi", sources, MPI))
if isinstance(CUDA, Path):
    libraries.append(cuda_library())

setup(cmdclass={"build_ext": Build}, ext_modules=libraries, install_requires=REQUIRES)
