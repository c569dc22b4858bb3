"""Builds the native part, hvd_gqsgd._C; everything else about the package is in pyproject.toml."""

from __future__ import annotations

import os
import sys
from glob import glob

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

# For each part its sources, or why it is left out.
PARTS: dict[str, list[str] | str] = {
    "CPU": ["native/bindings.cc", *sorted(glob("native/cpu/*.cc"))],
    "MPI": "native/mpi is not written yet",
    "CUDA": "native/cuda is not written yet",
    "NCCL": "native/nccl is not written yet",
}


class Build(BuildExtension):
    """Says what is built before building it."""

    def build_extensions(self) -> None:
        for name, part in PARTS.items():
            built = isinstance(part, list)
            print(f"hvd_gqsgd: {name}: {'built' if built else f'left out ({part})'}", flush=True)
        super().build_extensions()


setup(
    cmdclass={"build_ext": Build},
    ext_modules=[
        # Not a Python module: a library of PyTorch operators, for torch.ops.load_library.
        CppExtension(
            "hvd_gqsgd._C",
            sources=[file for part in PARTS.values() if isinstance(part, list) for file in part],
            include_dirs=[os.path.abspath("native/include")],  # the compiler runs in another folder
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
            ],
        )
    ],
)
