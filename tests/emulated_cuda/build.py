"""Compiles native/cuda for the emulated CUDA of this folder, as ops of their own namespace."""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths, library_paths

__all__ = ["load"]

HERE = Path(__file__).parent
NATIVE = HERE.parents[1] / "native"
SOURCES = [*sorted((NATIVE / "cuda").glob("*.cu")), HERE / "ops.cc"]
OPS = (
    "block_max", "block_squares", "l2_norms", "quantize", "dequantize", "requantize",
    "dequantize_means", "combine", "sum_of_squares",
)  # fmt: skip

FLAGS = [
    *("-std=c++17", "-O1", "-fPIC", "-x", "c++", "-fno-math-errno", "-ffp-contract=off"),
    # What CUDA does not forgive, and this processor would.
    *("-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"),
    *("-Wno-unknown-pragmas", *(f"-I{folder}" for folder in (HERE, NATIVE, NATIVE / "include"))),
]


def load(cache: Path) -> None:
    """Defines the ops of ``torch.ops.hvd_gqsgd_emulated``; compiles only what has changed."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    flags = [*FLAGS, *(f"-isystem{folder}" for folder in include_paths())]
    headers = sorted(file for folder in (NATIVE, HERE) for file in folder.rglob("*.h"))
    key = hashlib.sha256(repr((compiler, flags, torch.__version__)).encode())
    for file in (*SOURCES, *headers, Path(__file__)):
        key.update(file.read_bytes())
    library = cache / f"{key.hexdigest()[:16]}.so"
    if not library.exists():
        objects = [cache / f"{source.name}.o" for source in SOURCES]
        commands = [
            [*compiler, *flags, "-c", str(source), "-o", str(to)]
            for source, to in zip(SOURCES, objects, strict=True)
        ]
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda command: subprocess.run(command, check=True), commands))
        linked = library.with_suffix(".tmp")
        torch_ = [*(f"-L{folder}" for folder in library_paths()), "-ltorch_cpu", "-lc10"]
        command = [*compiler, "-shared", *map(str, objects), *torch_, "-o", str(linked)]
        subprocess.run(command, check=True)
        linked.rename(library)
    for name in OPS:
        schema = str(getattr(torch.ops.hvd_gqsgd, name).default._schema)
        _library.define(schema.removeprefix("hvd_gqsgd::"))
    torch.ops.load_library(str(library))


_library = torch.library.Library("hvd_gqsgd_emulated", "DEF")
