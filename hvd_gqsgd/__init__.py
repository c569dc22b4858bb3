"""Gradients summed as small integers inside Allreduce: for Horovod, MPI, and PyTorch's DDP.

>>> import horovod.torch as hvd
>>> from hvd_gqsgd import GlobalQSGD
>>> opt = hvd.DistributedOptimizer(opt, compression=GlobalQSGD)  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from hvd_gqsgd.codecs.bit_schedule import DynamicBits
from hvd_gqsgd.errors import AgreementError
from hvd_gqsgd.frontends.allreduce import allreduce
from hvd_gqsgd.frontends.ddp import ddp_hook
from hvd_gqsgd.simulation import simulate
from hvd_gqsgd.stats import Stats
from hvd_gqsgd.tools.build_info import build_info

if TYPE_CHECKING:
    from hvd_gqsgd.frontends.horovod import GlobalQSGD

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
        from hvd_gqsgd.frontends.horovod import GlobalQSGD

        return GlobalQSGD
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
