"""The reduction of an ``allreduce``, as an object of MPI, PyTorch or Horovod."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, cast, get_args

import torch.distributed as dist

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["ReduceOp", "Reduction", "reduction"]

Reduction = Literal["mean", "sum"]
ReduceOp: TypeAlias = "Reduction | MPI.Op | dist.ReduceOp | dist.ReduceOp.RedOpType | int"

ACCEPTED = (
    '"mean", "sum", MPI.SUM, torch.distributed.ReduceOp.SUM or AVG, or Horovod\'s Sum or Average'
)


SYNONYMS = {"mean": "mean", "average": "mean", "avg": "mean", "sum": "sum", "add": "sum"}


def reduction(op: object) -> Reduction:
    """Returns ``"mean"`` or ``"sum"`` for a reduction of any library.

    Raises:
        TypeError: ``op`` is not a reduction.
        ValueError: ``op`` is neither a mean nor a sum.
    """
    if isinstance(op, str):
        if op in get_args(Reduction):
            return cast(Reduction, op)
        meant = SYNONYMS.get(op.lower())
        suggestion = f": did you mean {meant!r}?" if meant else ""
        raise ValueError(f"op must be {ACCEPTED}, got {op!r}{suggestion}")
    for prefix, kind, home, meanings in _libraries():
        if isinstance(op, kind) and not isinstance(op, bool):
            for name, meaning in meanings.items():
                if op == getattr(home, name):
                    return meaning
            raise ValueError(f"op must be {ACCEPTED}, got {_name(op, prefix, kind, home)}")
    raise TypeError(f"op must be {ACCEPTED}, got {op!r}")


def _libraries() -> Iterator[tuple[str, type, Any, dict[str, Reduction]]]:
    """The name, the type and the home of a library's reductions, and those that are linear.

    Nothing is imported: a caller with a reduction of a library has imported that library.
    """
    yield "ReduceOp", dist.ReduceOp, dist.ReduceOp, {"SUM": "sum", "AVG": "mean"}
    if (mpi := sys.modules.get("mpi4py.MPI")) is not None:
        yield "MPI", mpi.Op, mpi, {"SUM": "sum"}
    if (hvd := sys.modules.get("horovod.torch")) is not None:
        yield "hvd", int, hvd, {"Sum": "sum", "Average": "mean"}


def _name(op: object, prefix: str, kind: type, home: Any) -> str:
    """Returns the name of a reduction in its library; some have no readable ``repr``."""
    named = ((name, value) for name, value in vars(home).items() if name[0].isupper())
    name = next((name for name, value in named if isinstance(value, kind) and op == value), None)
    return repr(op) if name is None else f"{prefix}.{name}"
