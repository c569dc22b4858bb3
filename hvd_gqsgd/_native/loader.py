"""Finding and loading the native libraries. Importing this module loads none."""

from __future__ import annotations

import importlib.util

import torch

__all__ = ["NAMES", "built", "load"]

NAMES = ("_C", "_mpi", "_cuda")
"""The native libraries: CPU kernels, MPI, and CUDA kernels with NCCL."""

BUILD = "pip install --no-build-isolation ."


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
    file = library_file(name)
    if file is None:
        raise ImportError(
            f"the native library hvd_gqsgd/_native/{name} is not built: run `{BUILD}` in the "
            "repository of hvd_gqsgd, with the PyTorch installed that it is to work with"
        )
    try:
        torch.ops.load_library(file)
    except OSError as error:
        raise ImportError(
            f"the native library {file} cannot be loaded by PyTorch {torch.__version__}: "
            f"{error.__cause__ or error}. It was built for another PyTorch, or a library that it "
            f"needs is missing: run `{BUILD}` in the repository of hvd_gqsgd again"
        ) from error
