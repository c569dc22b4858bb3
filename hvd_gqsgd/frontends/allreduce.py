"""``allreduce``: one tensor, over MPI, a process group of PyTorch, or Horovod."""

from __future__ import annotations

import sys
import weakref
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hvd_gqsgd.checks import check_choice, check_int
from hvd_gqsgd.codecs import check_device, is_compressible
from hvd_gqsgd.engine.agreement import refuse
from hvd_gqsgd.engine.operation_names import Namespace
from hvd_gqsgd.engine.pipeline import Pipeline
from hvd_gqsgd.options import Options
from hvd_gqsgd.transports.base import Transport
from hvd_gqsgd.transports.devices import transport_for
from hvd_gqsgd.transports.process_groups import has_nccl, host_group
from hvd_gqsgd.transports.torch_distributed import TorchDistributedTransport

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["allreduce"]

# Sets of options whose step numbers, schedules and buffers are kept for a communicator.
MOST_PIPELINES = 16

Array = TypeVar("Array", Tensor, "np.ndarray[Any, Any]")


def allreduce(
    x: Array,
    comm: MPI.Comm | dist.ProcessGroup | None = None,
    op: str = "mean",
    out: Array | None = None,
    *,
    step: int | None = None,
    **options: Any,
) -> Array:
    """The mean or the sum of ``x`` over the ranks of ``comm``, exchanged as small integers.

    A collective like any other: all ranks call it, in one order, with tensors of one shape and type
    and the same options. It returns when the result is there, the same bits on every rank; or, on
    a GPU, enqueued on the current stream.

    Tensors on GPUs go over NCCL, where this package was built with it, one GPU a rank. Those of a
    process group with another backend, or without NCCL, go by way of the host's memory.

    Args:
        x: a tensor on the CPU or a GPU, or a NumPy array; float16, bfloat16, float32 or float64,
            of any shape and layout.
        comm: an intracommunicator of mpi4py, a process group of ``torch.distributed``, or None for
            all ranks of Horovod.
        op: "mean" or "sum".
        out: where to put the result, of the shape and type of ``x``; may be ``x`` itself. None: in
            memory that is used again only after nothing refers to it any more.
        step: a number that the dither depends on, from 0 on; None: one more than in the call before
            with these options on this communicator, if it is one of the last 16 sets of options.
        options: as for ``GlobalQSGD``: bits, dither, exchange, norm, block_size, correlated, seed.
            ``exchange="reduce_scatter"``, for exponential dithering over MPI alone, sums codes by
            an MPI operator, in ``MPI_Reduce_scatter_block``, and rounds at each sum.

    Returns:
        ``out``, or a new tensor or array like ``x``.

    Raises:
        TypeError: ``x``, ``comm`` or an option is of a wrong type.
        ValueError: an option or ``step`` is out of range, ``out`` does not match ``x``, or the
            lanes are too narrow for the number of ranks.
        NotImplementedError: ``x`` is on a device for which there are no kernels.
        AgreementError: on every rank, if ranks disagree on shapes, types or options. And on all
            others, if a rank raises one of the errors above, but for those about ``comm``.
        ImportError: ``comm`` is None, and there is no Horovod.
        Exception: what MPI, PyTorch or Horovod raise if the exchange fails.
    """
    endpoint = _Endpoint.of(comm)
    try:
        check_choice("op", op, ("mean", "sum"))
        given, result = _tensor("x", x), None if out is None else _tensor("out", out)
        _check(given, result)
        flat = given.contiguous().view(-1)
        target = None if result is None or not _can_hold(result, flat) else result.view(-1)
        pipeline = endpoint.pipeline(Options(**options), flat.device)
        if step is not None:
            check_int("step", step, 0, 2**30, "None (the next one)")  # with room for those to come
        pipeline.begin_step(step)
        scale = 1 / endpoint.transport.size if op == "mean" else 1.0
        ticket = pipeline.submit(flat, scale=scale, out=target)
    except Exception:
        endpoint.refuse()
        raise
    pipeline.wait(ticket)
    decoded = pipeline.decode(ticket, scale).view(given.shape)
    if out is None or result is None:
        return decoded.numpy() if isinstance(x, np.ndarray) else decoded
    if target is None:
        result.copy_(decoded)
    return out


class _Endpoint:
    """This process's end of a communicator, and what is to be remembered from call to call."""

    def __init__(self, transport: Transport, nccl: bool = True) -> None:
        self.transport = transport
        self._nccl = nccl  # for tensors on GPUs
        self._transports: dict[torch.device, Transport] = {}
        self._namespace = Namespace("gqsgd-allreduce")
        self._pipelines: OrderedDict[tuple[Options, torch.device], Pipeline] = OrderedDict()

    @staticmethod
    def of(comm: MPI.Comm | dist.ProcessGroup | None) -> _Endpoint:
        """The one of a communicator.

        Raises:
            TypeError: it is none.
            ValueError: it cannot be used.
        """
        if comm is None:
            return _of_horovod()
        mpi = sys.modules.get("mpi4py.MPI")  # if it was not imported, this is none of its
        if mpi is not None and isinstance(comm, mpi.Comm):
            return _of_mpi(comm)
        if isinstance(comm, dist.ProcessGroup):
            return _of_process_group(comm)
        raise TypeError(
            "comm must be an mpi4py.MPI.Comm, a torch.distributed.ProcessGroup, or None for "
            f"Horovod, got {comm!r}"
        )

    def pipeline(self, options: Options, device: torch.device) -> Pipeline:
        """The one for these options. The same ones are forgotten on all ranks."""
        key = (options, device)
        pipeline = self._pipelines.pop(key, None)
        if pipeline is None:
            if device not in self._transports:
                self._transports[device] = transport_for(device, self.transport, self._nccl)
            pipeline = Pipeline(
                options, self._transports[device], namespace=self._namespace, ahead=True
            )
        self._pipelines[key] = pipeline
        if len(self._pipelines) > MOST_PIPELINES:
            self._pipelines.popitem(last=False)
        return pipeline

    def refuse(self) -> None:
        """Tells the other ranks, who may be waiting, that this one does not take part."""
        self._namespace.renew(self.transport.session)
        name = f"{self._namespace.prefix(0)}.0.header"
        self._namespace.failures += 1
        refuse(self.transport, name)


_horovod: list[_Endpoint] = []
_process_groups: weakref.WeakKeyDictionary[dist.ProcessGroup, _Endpoint] = (
    weakref.WeakKeyDictionary()
)
_mpi_keyval: list[int] = []


def _of_horovod() -> _Endpoint:
    if not _horovod:
        try:
            from hvd_gqsgd.transports.horovod import HorovodTransport
        except ImportError as error:
            raise ImportError("comm is None, which stands for Horovod, which is missing") from error
        _horovod.append(_Endpoint(HorovodTransport()))
    return _horovod[0]


def _of_process_group(group: dist.ProcessGroup) -> _Endpoint:
    if group not in _process_groups:
        transport = TorchDistributedTransport(host_group(group))
        _process_groups[group] = _Endpoint(transport, has_nccl(group))
    return _process_groups[group]


def _of_mpi(comm: MPI.Comm) -> _Endpoint:
    from mpi4py import MPI

    from hvd_gqsgd.transports.mpi import MpiTransport

    if not _mpi_keyval:
        _mpi_keyval.append(MPI.Comm.Create_keyval())  # not copied by Dup
    endpoint = comm.Get_attr(_mpi_keyval[0]) if comm != MPI.COMM_NULL else None
    if endpoint is None:
        endpoint = _Endpoint(MpiTransport(comm))
        comm.Set_attr(_mpi_keyval[0], endpoint)
    assert isinstance(endpoint, _Endpoint)
    return endpoint


def _tensor(name: str, value: object) -> Tensor:
    """A tensor in the memory of a tensor or an array, or in a copy of ``x`` where none can be.

    Raises:
        TypeError: it is neither, or of a type that PyTorch does not have.
        ValueError: ``out`` cannot be written to.
    """
    if isinstance(value, Tensor):
        return value.detach()
    if not isinstance(value, np.ndarray):
        raise TypeError(f"{name} must be a torch.Tensor or a NumPy array, got {type(value)}")
    writeable = value.flags.writeable and all(stride >= 0 for stride in value.strides)
    if name == "out" and not writeable:
        raise ValueError("out must be writeable and have no negative strides")
    return torch.from_numpy(value if writeable else value.copy())


def _check(x: Tensor, out: Tensor | None) -> None:
    if x.layout != torch.strided or not is_compressible(x.dtype):
        raise TypeError(
            f"x must be dense and float16, bfloat16, float32 or float64, got {x.dtype}"
            + (f" of layout {x.layout}" if x.layout != torch.strided else "")
        )
    check_device("x is", x)
    if out is not None and (out.shape, out.dtype, out.device) != (x.shape, x.dtype, x.device):
        raise ValueError(
            f"out must be like x, {tuple(x.shape)} of {x.dtype} on {x.device}, got "
            f"{tuple(out.shape)} of {out.dtype} on {out.device}"
        )


def _can_hold(out: Tensor, x: Tensor) -> bool:
    """Whether a flat result can be written straight to ``out``: not if it shares a part of its
    memory with ``x``."""
    if not out.is_contiguous():
        return False
    begin, other = out.data_ptr(), x.data_ptr()
    return begin == other or abs(begin - other) >= x.nbytes
