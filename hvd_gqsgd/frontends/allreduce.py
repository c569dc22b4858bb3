"""Averages or sums one tensor over MPI, a process group of PyTorch, or Horovod."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from hvd_gqsgd.checks import check_step
from hvd_gqsgd.codecs import check_compressible, check_unmasked
from hvd_gqsgd.front_end import FrontEnd
from hvd_gqsgd.frontends.compiling import opaque
from hvd_gqsgd.frontends.endpoint import Endpoint
from hvd_gqsgd.frontends.reduce_op import ReduceOp, reduction
from hvd_gqsgd.option_types import OptionKeywords

if TYPE_CHECKING:
    from mpi4py import MPI
    from typing_extensions import Unpack

__all__ = ["allreduce"]

FRONT_END = FrontEnd(
    "allreduce()",
    own=("comm", "op", "out", "step"),
    without={
        "min_numel": "it compresses tensors of any size; leave it out",
        "bucket_mb": "it exchanges one tensor, in a bucket of its own; leave it out",
    },
    exchanges=("reduce_scatter",),
)

Array = TypeVar("Array", Tensor, "np.ndarray[Any, Any]")


@FRONT_END.documented
@opaque
def allreduce(
    x: Array,
    comm: MPI.Comm | dist.ProcessGroup | None = None,
    op: ReduceOp = "mean",
    out: Array | None = None,
    *,
    step: int | None = None,
    **options: Unpack[OptionKeywords],
) -> Array:
    """Returns the mean or the sum of ``x`` over the ranks of ``comm``, exchanged as small integers.

    This is a collective: all ranks call it in the same order, with tensors of the same shape and
    dtype and with the same options. The call blocks until the result is available; on a GPU, until
    the exchange is enqueued on the current stream. All ranks get the same bits.

    Tensors on GPUs are exchanged over NCCL if this package was built with NCCL, with one GPU per
    rank. Otherwise, or if ``comm`` is a process group of another backend, tensors are staged
    through host memory.

    Args:
        x: a tensor on the CPU or a GPU, or a NumPy array; float16, bfloat16, float32 or float64,
            of any shape and layout.
        comm: an intracommunicator of mpi4py, a process group of ``torch.distributed``, or None for
            all ranks of Horovod.
        op: ``"mean"`` or ``"sum"``, or a reduction of any library: ``MPI.SUM``,
            ``torch.distributed.ReduceOp.SUM`` or ``AVG``, ``hvd.Sum`` or ``hvd.Average``.
        out: the tensor or array to write the result to, of the shape and dtype of ``x``; ``x``
            itself is accepted. None allocates the result, in memory that is reused once nothing
            refers to the result.
        step: number of the step, starting at 0. The dither depends on the step. None continues
            from the last call with these options on this communicator; steps of the last 16 sets
            of options are kept.
        options: see :class:`hvd_gqsgd.options.Options`. ``min_numel`` and ``bucket_mb`` are not
            accepted, as they have no effect on a single tensor.

    Returns:
        ``out``, or a new tensor or array like ``x``.

    Raises:
        TypeError: ``x``, ``comm``, ``op`` or an option has the wrong type, or an option is unknown.
        ValueError: an option or ``step`` is out of range, ``op`` is not linear, ``out`` does not
            match ``x``, or the lanes are too narrow for the world size.
        NotImplementedError: ``x`` is on a device without kernels in this build.
        AgreementError: on all ranks, if ranks disagree on shapes, dtypes, ``op`` or options; on all
            other ranks, if one rank raises any of the errors above, except errors about ``comm``.
        ImportError: ``comm`` is None, and Horovod is not installed.
        Exception: as raised by MPI, PyTorch or Horovod if the exchange fails.

    Example::

        mean = allreduce(x, MPI.COMM_WORLD, bits=4)
        allreduce(x, MPI.COMM_WORLD, MPI.SUM, out=x)  # in place
    """
    endpoint = Endpoint.of(comm)
    try:
        mean = reduction(op) == "mean"
        given, result = _tensor("x", x), None if out is None else _tensor("out", out)
        _check(given, result)
        flat = given.contiguous().view(-1)
        target = None if result is None or not _can_hold(result, flat) else result.view(-1)
        pipeline = endpoint.pipeline(FRONT_END.options(options), flat.device)
        if step is not None:
            check_step(step, " or None (the next one)")
        pipeline.begin_step(step)
        scale = 1 / endpoint.transport.size if mean else 1.0
        ticket = pipeline.submit(flat, scale=scale, out=target)
    except Exception:
        endpoint.refuse()
        raise
    pipeline.wait(ticket)
    decoded = pipeline.decode(ticket, scale).view(given.shape)
    if out is None or result is None:
        # Of its class, as a result of NumPy would be.
        return x.__array_wrap__(decoded.numpy()) if isinstance(x, np.ndarray) else decoded
    if target is None:
        result.copy_(decoded)
    return out


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
    check_unmasked(name, value)
    writeable = value.flags.writeable and all(stride >= 0 for stride in value.strides)
    if name == "out" and not writeable:
        raise ValueError("out must be writeable and have no negative strides")
    return torch.from_numpy(value if writeable else value.copy())


def _check(x: Tensor, out: Tensor | None) -> None:
    check_compressible("x", x)
    if out is None:
        return
    if (out.shape, out.dtype, out.device) != (x.shape, x.dtype, x.device):
        raise ValueError(
            f"out must be like x, {tuple(x.shape)} of {x.dtype} on {x.device}, got "
            f"{tuple(out.shape)} of {out.dtype} on {out.device}"
        )
    check_compressible("out", out)
    if any(n > 1 and stride == 0 for n, stride in zip(out.shape, out.stride(), strict=True)):
        raise ValueError(
            f"out must have memory for each element, got strides {out.stride()} for the shape "
            f"{tuple(out.shape)}, as expand() makes them: pass its clone()"
        )
    if out.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(
            "out must not be a tensor of torch.inference_mode() outside of it: pass its clone()"
        )


def _can_hold(out: Tensor, x: Tensor) -> bool:
    """Whether a flat result can be written straight to ``out``: not if it shares a part of its
    memory with ``x``."""
    if not out.is_contiguous():
        return False
    begin, other = out.data_ptr(), x.data_ptr()
    return begin == other or abs(begin - other) >= x.nbytes
