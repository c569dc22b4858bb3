"""Quantized gradient averaging for Horovod, MPI, and PyTorch's DDP and FSDP2.

>>> import horovod.torch as hvd
>>> from hvd_gqsgd import GlobalQSGD
>>> opt = hvd.DistributedOptimizer(opt, compression=GlobalQSGD)  # doctest: +SKIP

Importing the package imports nothing else; each name below imports what it needs on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hvd_gqsgd.codecs.bit_schedule import DynamicBits
    from hvd_gqsgd.codecs.block_bits import BlockBits
    from hvd_gqsgd.errors import AgreementError
    from hvd_gqsgd.frontends.allreduce import allreduce
    from hvd_gqsgd.frontends.ddp import DDPState, ddp_hook
    from hvd_gqsgd.frontends.horovod import GlobalQSGD
    from hvd_gqsgd.simulation import simulate
    from hvd_gqsgd.stats import Stats
    from hvd_gqsgd.tools.build_info import build_info

    GQSGDState = DDPState
    __version__: str

__all__ = [
    "AgreementError",
    "BlockBits",
    "DDPState",
    "DynamicBits",
    "GQSGDState",
    "GlobalQSGD",
    "Stats",
    "allreduce",
    "build_info",
    "ddp_hook",
    "simulate",
]

_MODULES = {
    "AgreementError": "errors",
    "DDPState": "frontends.ddp",
    "BlockBits": "codecs.block_bits",
    "DynamicBits": "codecs.bit_schedule",
    "GQSGDState": "frontends.ddp",
    "GlobalQSGD": "frontends.horovod",
    "Stats": "stats",
    "allreduce": "frontends.allreduce",
    "build_info": "tools.build_info",
    "ddp_hook": "frontends.ddp",
    "simulate": "simulation",
}


def __getattr__(name: str) -> object:
    if name == "__version__":
        value: object = _version()
    elif name in _MODULES:
        value = getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name[:2] == name[-2:] == "__")])


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version(__name__)
    except metadata.PackageNotFoundError:
        return "0+unknown"  # not installed, as with PYTHONPATH alone
