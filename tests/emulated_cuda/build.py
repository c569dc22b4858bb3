"""Compiles native/cuda and native/nccl for the emulated CUDA of this folder."""

from __future__ import annotations

import functools
import hashlib
import os
import shlex
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

__all__ = ["load_kernels", "load_nccl"]

HERE = Path(__file__).parent
NATIVE = HERE.parents[1] / "native"
KERNELS = sorted((NATIVE / "cuda").glob("*.cu"))
OPS = (
    "block_max", "block_argmax", "block_squares", "l2_norms", "quantize", "dequantize",
    "requantize", "dequantize_means", "combine", "sum_of_squares", "block_widths",
    "quantize_blocks", "requantize_blocks", "dequantize_blocks", "sum_codes", "sum_blocks",
)  # fmt: skip

FLAGS = [
    *("-std=c++17", "-O1", "-fPIC", "-x", "c++", "-fno-math-errno", "-ffp-contract=off"),
    # What CUDA does not forgive, and this processor would.
    *("-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"),
    *("-Wno-unknown-pragmas", *(f"-I{folder}" for folder in (HERE, NATIVE))),
]


@functools.cache
def load_kernels(cache: Path) -> None:
    """Defines the ops of ``torch.ops.hvd_gqsgd_emulated``."""
    for name in OPS:
        schema = str(getattr(torch.ops.hvd_gqsgd, name).default._schema)
        _library.define(schema.removeprefix("hvd_gqsgd::"))
    torch.ops.load_library(_build(cache, [*KERNELS, HERE / "ops.cc"]))


@functools.cache
def load_nccl(cache: Path, mpi: tuple[str, ...]) -> None:
    """Defines ``torch.classes.hvd_gqsgd_emulated.NcclCommunicator``, given what a compiler needs
    for MPI."""
    sources = [*KERNELS, *sorted((NATIVE / "nccl").glob("*.cc")), HERE / "nccl_ops.cc"]
    torch.ops.load_library(_build(cache, sources, mpi))


def _build(cache: Path, sources: Sequence[Path], more: Sequence[str] = ()) -> str:
    """Compiles and links what has changed since the last time."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    flags = [*FLAGS, *(f"-isystem{folder}" for folder in include_paths())]

    def compile_(source: Path) -> list[str]:
        # Kernels are compiled alike for both libraries, and so but once.
        return [*compiler, *flags, *(() if source in KERNELS else more), "-c", str(source)]

    headers = [file for folder in (NATIVE, HERE) for file in sorted(folder.rglob("*.h"))]
    common = [torch.__version__.encode()]
    common += [file.read_bytes() for file in (*headers, Path(__file__))]

    def object_of(source: Path) -> Path:
        parts = [*common, repr(compile_(source)).encode(), source.read_bytes()]
        key = hashlib.sha256(b"".join(parts)).hexdigest()[:16]
        return cache / f"{source.stem}-{key}.o"

    def make(to: Path, command: list[str]) -> None:
        if not to.exists():
            own = Path(f"{to}.{os.getpid()}.tmp")  # another process may make the same
            subprocess.run([*command, "-o", str(own)], check=True)
            own.rename(to)

    objects = [object_of(source) for source in sources]
    with ThreadPoolExecutor() as pool:
        list(pool.map(make, objects, map(compile_, sources)))
    key = hashlib.sha256(repr(objects).encode()).hexdigest()[:16]
    library = cache / f"{key}.so"
    torch_ = [*(f"-L{folder}" for folder in library_paths()), "-ltorch_cpu", "-lc10"]
    make(library, [*compiler, "-shared", *map(str, objects), *torch_, *more])
    return str(library)


_library = torch.library.Library("hvd_gqsgd_emulated", "DEF")
