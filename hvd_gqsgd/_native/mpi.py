"""The allreduce over MPI as a torch op, in a library of its own: all else works without any MPI."""

from __future__ import annotations

import functools
import logging

import torch

from hvd_gqsgd import layout
from hvd_gqsgd._native import loader, ops  # noqa: F401 (ops: its operators are used)

__all__ = ["CHUNK", "allreduce", "built", "combined_bytes", "most_ranks", "usable_with"]

CHUNK = 3 * 2**16
"""Elements of a chunk: small enough for a core's cache, large enough to hide a round trip."""

_log = logging.getLogger("hvd_gqsgd")

_library = torch.library.Library("hvd_gqsgd", "FRAGMENT")
_library.define(
    "mpi_allreduce(Tensor x, Tensor(a!) out, int comm, int block_size, int kind, int bits, "
    "int levels, int seed, int step, int tensor_id, bool correlated, float scale, int chunk) -> ()"
)
_library.define("mpi_library_version() -> str")
torch.library.register_fake("hvd_gqsgd::mpi_allreduce", lambda *args: None, lib=_library)

allreduce = torch.ops.hvd_gqsgd.mpi_allreduce.default
"""``mpi_allreduce(x, out, comm, block_size, kind, bits, levels, seed, step, tensor_id, correlated,
scale, chunk)``: ``scale`` times the sum over the ranks, to ``out``, which may be ``x``.

``comm`` is the Fortran handle of an MPI communicator; ``kind``, ``bits`` and ``levels`` are those
of a ``Codec``; ``chunk`` is the number of elements in one message. All but ``x`` must be the same
on all ranks. Blocks, without the GIL. MPI's errors are raised as ``RuntimeError``.
"""


def built() -> bool:
    """Whether the library was built."""
    return loader.built("_mpi")


@functools.cache
def usable_with(library_version: str) -> bool:
    """Whether communicators of this MPI, by its ``MPI_Get_library_version``, can be passed to it;
    logs why not."""
    if not built():
        _log.info("the native part for MPI is not built: mpi4py moves the codes, which is slower")
        return False
    try:
        loader.load("_mpi")
    except ImportError as error:
        _log.warning("the native part for MPI cannot be used, and mpi4py is slower: %s", error)
        return False
    own = torch.ops.hvd_gqsgd.mpi_library_version()
    if own.strip("\0\n ") != library_version.strip("\0\n "):
        _log.warning(
            "the native part was built with %r, but mpi4py uses %r, which is slower without it",
            own, library_version,
        )  # fmt: skip
        return False
    return True


def combined_bytes(numel: int, block_size: int, bits: int, ranks: int) -> int:
    """Bytes of the exponential codes that are combined: a packet for each tile, of a key of 8 bytes
    and the words of the longest tile, and as many packets for each rank."""
    tiles = layout.tiles_for(numel, block_size)
    longest = min(numel, block_size, layout.TILE)
    packet = 8 + -(-layout.words_for(longest, max(longest, 1), bits) // 2) * 8
    return -(-tiles // ranks) * ranks * packet


def most_ranks(bits: int) -> int:
    """How many ranks' exponential codes can be combined: each but the first doubles the largest
    level that may come about, and one level must be left."""
    return (1 << bits - 1) - 1
