"""Versions, and the state of the native parts."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import torch

import hvd_gqsgd
from hvd_gqsgd._native import loader

__all__ = ["build_info"]


def build_info() -> dict[str, Any]:
    """Returns versions, the native parts of this build, and the code paths in use.

    It works without the native parts, and then reports why they do not load.

    Returns:
        A dictionary with

        - ``version``, ``python``, ``torch``: versions
        - ``native``: for each of the native libraries ``cpu``, ``cuda`` and ``mpi``, a dictionary
          with ``built`` and ``loads`` (bool) and ``error`` (str or None). ``loads`` is None where
          loading was not tried: without the library; for all others if that of the CPU does not
          load; and for ``mpi``, which would load an MPI before mpi4py can choose one. Where
          ``cpu`` was not built NumPy does the work of the kernels
        - ``parts``: the native parts compiled in, of ``cpu``, ``cuda``, ``mpi`` and ``nccl``
        - ``instruction_sets``: names of the instruction sets that this build has kernels for and
          this processor supports
        - ``instruction_set``: name of the one in use; ``"python"`` where none was built; None where
          the native part does not load
        - ``threads``: number of threads that a kernel may use
        - ``horovod``: None if it is not installed, else its ``version`` and whether it was built
          with ``mpi``, ``gloo`` and ``nccl``
    """
    native = {"cpu": _library("_C", load=loader.built("_C"))}
    usable = native["cpu"]["loads"] is not False
    native["cuda"] = _library("_cuda", load=usable and loader.built("_cuda"))
    native["mpi"] = _library("_mpi", load=False)
    return {
        "version": hvd_gqsgd.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "native": native,
        **(_kernels() if usable else _NO_KERNELS),
        "threads": torch.get_num_threads(),
        "horovod": _horovod_info(),
    }


def _library(name: str, *, load: bool) -> dict[str, Any]:
    error = loader.try_load(name) if load else None
    return {
        "built": loader.built(name),
        "loads": error is None if load else None,
        "error": error,
    }


_NO_KERNELS: dict[str, Any] = {"parts": [], "instruction_sets": [], "instruction_set": None}


def _kernels() -> dict[str, Any]:
    from hvd_gqsgd._native import mpi, nccl, ops

    return {
        "parts": [
            *(device for device in ops.devices() if ops.COMPILED or device != "cpu"),
            *(["mpi"] if mpi.built() else []),
            *(["nccl"] if nccl.built() else []),
        ],
        "instruction_sets": ops.instruction_sets(),
        "instruction_set": ops.instruction_set(),
    }


def _horovod_info() -> dict[str, Any] | None:
    try:
        import horovod.torch as hvd
    except ImportError:
        return None
    return {
        "version": metadata.version("horovod"),
        "mpi": bool(hvd.mpi_built()),
        "gloo": bool(hvd.gloo_built()),
        "nccl": bool(hvd.nccl_built()),
    }
