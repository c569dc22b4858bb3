"""Gradients summed as small integers inside Allreduce: for Horovod, MPI, and PyTorch's DDP.

>>> import horovod.torch as hvd
>>> from hvd_gqsgd import GlobalQSGD
>>> opt = hvd.DistributedOptimizer(opt, compression=GlobalQSGD)  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvd_gqsgd.collective import allreduce
from hvd_gqsgd.ddp import ddp_hook
from hvd_gqsgd.errors import AgreementError
from hvd_gqsgd.info import build_info
from hvd_gqsgd.schedule import DynamicBits
from hvd_gqsgd.simulate import simulate
from hvd_gqsgd.stats import Stats

if TYPE_CHECKING:
    from hvd_gqsgd.compressor import GlobalQSGD

__all__ = [
    "AgreementError",
    "DynamicBits",
    "GlobalQSGD",
    "Stats",
    "allreduce",
    "build_info",
    "ddp_hook",
    "simulate",
]


def __getattr__(name: str) -> object:
    # The one thing here that imports Horovod, which takes a second.
    if name == "GlobalQSGD":
        from hvd_gqsgd.compressor import GlobalQSGD

        return GlobalQSGD
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
