"""Counts of bytes and tensors of a rank, before and after compression."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import ClassVar, Literal

__all__ = ["Reason", "Stats"]

_log = logging.getLogger("hvd_gqsgd")

Reason = Literal["small", "sparse", "type", "alone", "auto", "other"]
"""The reason that a tensor was not compressed."""

MANY = 100
"""Number of tensors after which rank 0 warns if none was compressed."""


@dataclass
class Stats:
    """Counts of one rank since the compressor was created or the counts were reset.

    ``print(stats)`` shows a summary.

    Bytes on the wire are the bytes handed to an Allreduce. In a ring of n ranks, each rank sends
    2(n-1)/n times as many bytes. An Alltoall of the same number of bytes sends half of that, and so
    does an Allgather with a result of this size: their bytes count half. Bytes of compressed
    tensors include norms, headers, padding and probes.

    With an exchange by node, bytes on the wire are those of messages between nodes: each rank has
    its share of those of its node.

    Under FSDP, bytes on the wire are the bytes handed to a reduce-scatter, which is half of an
    Allreduce: an Alltoall counts in full, and an Allreduce twice.
    """

    steps: int = 0
    """Exchanges: one per training step, and one per plain ``hvd.allreduce``."""
    tensors: int = 0
    """Tensors handed to the compressor; under DDP, buckets, or gradients with error feedback; under
    FSDP, modules."""
    tensors_bypassed: int = 0
    """Tensors that were not compressed: small, sparse, of an integer type, of a single rank, or
    needed by autograd."""
    tensors_small: int = 0
    """Uncompressed tensors with fewer elements than ``min_numel``."""
    tensors_sparse: int = 0
    """Uncompressed tensors that are sparse."""
    tensors_alone: int = 0
    """Uncompressed tensors of a single rank, which neither exchanges nor rounds."""
    tensors_auto: int = 0
    """Uncompressed tensors of steps that ``bits="auto"`` leaves uncompressed."""
    compressed_bytes_before: int = 0
    """Gradient bytes of compressed tensors."""
    compressed_bytes_on_wire: int = 0
    """Bytes on the wire of compressed tensors."""
    bytes_inside: int = 0
    """Bytes of compressed tensors that were exchanged within nodes, in full precision or as codes;
    not part of the bytes on the wire. See the option ``hierarchy``."""
    bypassed_bytes: int = 0
    """Bytes of the tensors that were not compressed, the same before and on the wire."""
    elements: int = 0
    """Elements of compressed tensors."""
    weight_bytes_before: int = 0
    """Bytes of the weights that FSDP gathered, with ``weight_bits``; counted as those handed to an
    all-gather, in which each rank sends its shard to all others."""
    weight_bytes_on_wire: int = 0
    """Bytes of these weights on the wire, those that were not rounded included."""
    slots_filled: int = 0
    """Horovod operation slots that no collective used; see ``engine/operation_slots.py``."""
    bits: int = 0
    """Lane width of the last compressed step; with ``BlockBits``, the budget rounded up."""
    setting: str = ""
    """The setting of the last step with ``bits="auto"``: "fp32", "16 bits", "8 bits", "4 bits per
    block", or one of these widths with " flat"."""
    decisions: int = 0
    """How often ``bits="auto"`` found another setting to be the fastest."""

    _warned = False
    _REASONS: ClassVar[dict[str, str]] = {
        "small": "smaller than min_numel",
        "sparse": "sparse",
        "alone": "of a single rank, which exchanges nothing",
        "auto": "of steps that bits='auto' leaves uncompressed",
        "other": "of a type without kernels, or needed by autograd",
    }

    @property
    def bytes_before(self) -> int:
        """Gradient bytes of all tensors."""
        return self.compressed_bytes_before + self.bypassed_bytes

    @property
    def bytes_on_wire(self) -> int:
        """Bytes on the wire of all tensors."""
        return self.compressed_bytes_on_wire + self.bypassed_bytes

    @property
    def ratio(self) -> float:
        """Compression ratio of all tensors; 1 if there were none."""
        return _ratio(self.bytes_before, self.bytes_on_wire)

    @property
    def compressed_ratio(self) -> float:
        """Compression ratio of the compressed tensors; 1 if there were none."""
        return _ratio(self.compressed_bytes_before, self.compressed_bytes_on_wire)

    @property
    def weight_ratio(self) -> float:
        """Compression ratio of the weights that FSDP gathered; 1 if there were none."""
        return _ratio(self.weight_bytes_before, self.weight_bytes_on_wire)

    @property
    def mean_bits(self) -> float:
        """Bits on the wire per element of the compressed tensors, overhead included."""
        return _ratio(8 * self.compressed_bytes_on_wire, self.elements)

    @property
    def bypassed_share(self) -> float:
        """Share of tensors that were not compressed, from 0 to 1."""
        return self.tensors_bypassed / self.tensors if self.tensors else 0.0

    @property
    def why_nothing(self) -> str:
        """The reason that no tensor was compressed; empty if one was, or if there were none."""
        if self.elements or not self.tensors_bypassed:
            return ""
        counts = {
            "small": self.tensors_small, "sparse": self.tensors_sparse, "alone": self.tensors_alone,
            "auto": self.tensors_auto,
        }  # fmt: skip
        counts["other"] = self.tensors_bypassed - sum(counts.values())
        reasons = (f"{n:,} {self._REASONS[why]}" for why, n in counts.items() if n)
        return (
            f"GlobalQSGD compressed none of {self.tensors_bypassed:,} tensors: {', '.join(reasons)}"
        )

    def bypass(self, why: Reason, nbytes: int, rank: Callable[[], int]) -> None:
        """Counts an uncompressed tensor.

        Rank 0 logs one warning if none of the first 100 tensors is compressed.

        Args:
            why: the reason that the tensor is not compressed.
            nbytes: size of the tensor in bytes.
            rank: returns the number of this rank; called for the warning alone.
        """
        self.tensors_bypassed += 1
        self.bypassed_bytes += nbytes
        self.tensors_small += why == "small"
        self.tensors_sparse += why == "sparse"
        self.tensors_alone += why == "alone"
        self.tensors_auto += why == "auto"
        if self._warned or self.tensors_auto or self.tensors_bypassed != MANY:
            return
        if self.why_nothing and not rank():
            self._warned = True
            _log.warning("%s", self.why_nothing)

    def reset(self) -> None:
        """Sets all counts of this object to zero.

        ``GlobalQSGD.stats`` returns a copy: reset the counts of a compressor by
        ``GlobalQSGD.reset_stats``.
        """
        for each in fields(self):
            setattr(self, each.name, each.default)

    def __str__(self) -> str:
        lines = [
            f"steps: {self.steps:,}; tensors: {self.tensors:,}, of which {self.tensors_bypassed:,} "
            f"bypassed ({self.bypassed_share:.1%})",
            f"all tensors: {self.bytes_before:,} bytes -> {self.bytes_on_wire:,} on the wire, "
            f"{self.ratio:.2f} times fewer",
        ]
        if not (self.tensors or self.weight_bytes_before):
            lines[1] = NOTHING
        if self.why_nothing:
            lines.append(self.why_nothing)
        if self.elements:
            lines.append(
                f"compressed tensors: {self.compressed_bytes_before:,} bytes -> "
                f"{self.compressed_bytes_on_wire:,} on the wire, "
                f"{self.compressed_ratio:.2f} times fewer, {self.mean_bits:.2f} bits per element"
            )
        if self.setting:
            lines.append(f"bits='auto': {self.setting}; decisions: {self.decisions}")
        if self.bytes_inside:
            lines.append(f"within nodes: {self.bytes_inside:,} bytes")
        if self.weight_bytes_before:
            lines.append(
                f"weights: {self.weight_bytes_before:,} bytes -> {self.weight_bytes_on_wire:,} on "
                f"the wire, {self.weight_ratio:.2f} times fewer"
            )
        return "\n".join(lines)


NOTHING = (
    "nothing was exchanged: no step has run, or the job has one rank, on which Horovod does not "
    "call the compressor"
)


def _ratio(before: int, after: int) -> float:
    return before / after if after else 1.0
