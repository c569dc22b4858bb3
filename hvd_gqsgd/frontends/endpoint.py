"""Endpoints of the communicators of ``allreduce``."""

from __future__ import annotations

import sys
from collections import OrderedDict
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from hvd_gqsgd.engine.agreement import Ahead, find_nodes, refuse
from hvd_gqsgd.engine.operation_names import OperationNames
from hvd_gqsgd.engine.pipeline import Pipeline
from hvd_gqsgd.options import Options
from hvd_gqsgd.registry import of_horovod, of_mpi, of_process_group
from hvd_gqsgd.transports.base import Transport
from hvd_gqsgd.transports.devices import transport_for
from hvd_gqsgd.transports.process_groups import NOT_A_MEMBER, check_group, has_nccl, host_group
from hvd_gqsgd.transports.torch_distributed import TorchDistributedTransport

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["Endpoint"]

MOST_PIPELINES = 16
"""Sets of options whose step numbers, schedules and buffers are kept for a communicator."""


class Endpoint:
    """The endpoint of this process in a communicator, with pipelines that persist between calls."""

    def __init__(self, transport: Transport, nccl: bool = True) -> None:
        self.transport = transport
        self._nccl = nccl  # for tensors on GPUs
        self._transports: dict[torch.device, Transport] = {}
        self._names = OperationNames("gqsgd-allreduce")
        self._pipelines: OrderedDict[tuple[Options, torch.device], Pipeline] = OrderedDict()

    @staticmethod
    def of(comm: MPI.Comm | dist.ProcessGroup | None) -> Endpoint:
        """Returns the endpoint of a communicator; None stands for Horovod.

        Raises:
            TypeError: it is not a communicator.
            ValueError: it cannot be used.
            ImportError: there is no Horovod.
        """
        if comm is None:
            return _of_horovod()
        mpi = sys.modules.get("mpi4py.MPI")  # if it was not imported, this is none of its
        if mpi is not None and isinstance(comm, mpi.Comm):
            return _of_mpi(comm)
        if isinstance(comm, dist.ProcessGroup) or comm is NOT_A_MEMBER:
            return _of_process_group(check_group(comm))
        raise TypeError(
            "comm must be an mpi4py.MPI.Comm, a torch.distributed.ProcessGroup, or None for "
            f"Horovod, got {comm!r}"
        )

    def pipeline(self, options: Options, device: torch.device) -> Pipeline:
        """Returns the pipeline for these options. All ranks evict the same pipelines."""
        key = (options, device)
        pipeline = self._pipelines.pop(key, None)
        if pipeline is None:
            if device not in self._transports:
                self._transports[device] = transport_for(device, self.transport, self._nccl)
            pipeline = Pipeline(
                options, self._transports[device], names=self._names, protocol=Ahead
            )
        self._pipelines[key] = pipeline
        if len(self._pipelines) > MOST_PIPELINES:
            self._pipelines.popitem(last=False)
        return pipeline

    def refuse(self) -> None:
        """Notifies the other ranks, which may be waiting, that this rank does not take part."""
        self._names.renew(self.transport.session)
        name = f"{self._names.prefix(0)}.0.header"
        self._names.failures += 1
        refuse(self.transport, name)


def _of_horovod() -> Endpoint:
    try:
        from hvd_gqsgd.transports.horovod import HorovodTransport
    except ImportError as error:
        raise ImportError(
            "comm is None, which selects Horovod, but Horovod is not installed"
        ) from error
    return of_horovod("endpoint", lambda: Endpoint(HorovodTransport()))


def _of_process_group(group: dist.ProcessGroup) -> Endpoint:
    def make() -> Endpoint:
        transport = TorchDistributedTransport(host_group(group))
        transport.nodes = find_nodes(transport, "hosts")
        return Endpoint(transport, has_nccl(group))

    return of_process_group(group, "endpoint", make)


def _of_mpi(comm: MPI.Comm) -> Endpoint:
    from hvd_gqsgd.transports.mpi import MpiTransport

    transport = MpiTransport(comm)  # raises if there can be none

    def make() -> Endpoint:
        transport.nodes = find_nodes(transport, "hosts")
        return Endpoint(transport)

    return of_mpi(comm, "endpoint", make)
