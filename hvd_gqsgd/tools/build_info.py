"""What is compiled in, and which of it is active."""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import torch

from hvd_gqsgd._native import mpi as native_mpi
from hvd_gqsgd._native import nccl as native_nccl
from hvd_gqsgd._native import ops

__all__ = ["build_info"]


def build_info() -> dict[str, Any]:
    """Versions, the native parts of this build, and the paths that are in use.

    Returns:
        ``version``, ``python``, ``torch``; ``parts``: the native parts that are compiled in;
        ``instruction_sets`` that this build has kernels for and this processor runs, and the
        ``instruction_set`` in use; ``threads`` that a kernel may use; ``horovod``: None if it is
        not installed, else its ``version`` and whether it was built with ``mpi``, ``gloo`` and
        ``nccl``.
    """
    return {
        "version": metadata.version("hvd_gqsgd"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "parts": [
            *ops.devices(),
            *(["mpi"] if native_mpi.built() else []),
            *(["nccl"] if native_nccl.built() else []),
        ],
        "instruction_sets": ops.instruction_sets(),
        "instruction_set": ops.instruction_set(),
        "threads": torch.get_num_threads(),
        "horovod": _horovod_info(),
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
