"""Finding and loading the native libraries. Importing this module loads none."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import struct

__all__ = ["NAMES", "REMEDY", "built", "built_for_torch", "library_file", "load", "try_load"]

NAMES = ("_C", "_mpi", "_cuda")
"""The native libraries: CPU kernels, MPI, and CUDA kernels with NCCL."""

REMEDY = (
    "run `pip install --no-build-isolation .` in the repository of hvd_gqsgd, in an environment "
    "with the PyTorch that it will run with"
)
"""How to build the native libraries."""


def library_file(name: str) -> str | None:
    """The path of a native library of ``NAMES``; None if it was not built."""
    spec = importlib.util.find_spec(f"hvd_gqsgd._native.{name}")
    return spec.origin if spec is not None else None


def built(name: str) -> bool:
    """Whether a native library of ``NAMES`` was built; it may still fail to load."""
    return library_file(name) is not None


def load(name: str) -> None:
    """Loads a native library of ``NAMES``, which registers its PyTorch operators.

    Raises:
        ImportError: the library was not built, or not for the installed PyTorch.
    """
    failure = try_load(name)
    if failure is not None:
        raise ImportError(f"{failure}: {REMEDY}", name=name, path=library_file(name))


def try_load(name: str) -> str | None:
    """Loads a native library as ``load`` does; returns the reason if that fails, or else None."""
    file = library_file(name)
    if file is None:
        return f"the native library hvd_gqsgd/_native/{name} is not built"
    if _is_cut_short(file):
        return f"the native library {file} is incomplete, as an interrupted build or copy leaves it"
    import torch  # here, as it takes seconds

    try:
        torch.ops.load_library(file)
    except OSError as error:
        return (
            f"the native library {file} was built for another PyTorch than {torch.__version__}, or "
            f"a library that it needs is missing ({error.__cause__ or error})"
        )
    # It may load with another PyTorch all the same, and crash later.
    try:
        built_for = built_for_torch(name)
    except AttributeError:
        return f"the native library {file} was built from an older version of hvd_gqsgd"
    if built_for.split(".")[:2] != torch.__version__.split(".")[:2]:
        return (
            f"the native library {file} was built for PyTorch {built_for}, and PyTorch "
            f"{torch.__version__} is installed"
        )
    return None


def built_for_torch(name: str) -> str:
    """The version of PyTorch that a library of ``NAMES``, which loads, was compiled for.

    Raises:
        AttributeError: the library does not tell, as it is older than this function.
    """
    version = ctypes.CDLL(library_file(name)).hvd_gqsgd_built_for_torch
    version.restype = ctypes.c_char_p
    return str(version().decode())


def _is_cut_short(file: str) -> bool:
    """Whether a file ends before its ELF section headers do: loading it may kill the process."""
    with open(file, "rb") as library:
        header = library.read(64)
    if len(header) < 64 or header[:6] != b"\x7fELF\2\1":  # 64 bits, little-endian
        return False  # the dynamic linker tells what is wrong
    (sections,) = struct.unpack_from("<Q", header, 40)
    size, count = struct.unpack_from("<HH", header, 58)
    return bool(os.path.getsize(file) < sections + size * count)
