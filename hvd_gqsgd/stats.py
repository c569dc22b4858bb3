"""Bytes before and after quantization, as this rank counts them."""

from __future__ import annotations

from dataclasses import dataclass, fields

__all__ = ["Stats"]


@dataclass
class Stats:
    """This rank's counts since the compressor was made, or since the last reset.

    ``print(stats)`` shows a summary.

    Bytes are counted as those of an Allreduce: each one handed to it once, where a ring of n ranks
    sends 2(n-1)/n times as many. An Alltoall of as many bytes, and an Allgather that brings as many
    together, take half of that each, and count half. Those of compressed tensors include norms,
    headers, padding and probes.
    """

    steps: int = 0
    """Rounds of exchange: one a training step, one a plain ``hvd.allreduce``."""
    tensors: int = 0
    """Tensors that were handed to the compressor."""
    tensors_bypassed: int = 0
    """Those that went to Horovod as they are: small, integer, sparse, or needing autograd."""
    compressed_bytes_before: int = 0
    """Gradient bytes of the tensors that were compressed."""
    compressed_bytes_on_wire: int = 0
    """What they took on the wire."""
    bypassed_bytes: int = 0
    """Bytes of the tensors that were not compressed, before and on the wire."""
    elements: int = 0
    """Elements of the tensors that were compressed."""
    slots_filled: int = 0
    """Operation slots under Horovod that no collective used; see ``engine/operation_slots.py``."""
    bits: int = 0
    """Lane width of the last step."""

    @property
    def bytes_before(self) -> int:
        """Gradient bytes of all tensors."""
        return self.compressed_bytes_before + self.bypassed_bytes

    @property
    def bytes_on_wire(self) -> int:
        """Bytes on the wire for all tensors."""
        return self.compressed_bytes_on_wire + self.bypassed_bytes

    @property
    def ratio(self) -> float:
        """How many times smaller all tensors became; 1 if there were none."""
        return _ratio(self.bytes_before, self.bytes_on_wire)

    @property
    def compressed_ratio(self) -> float:
        """The same for the tensors that were compressed."""
        return _ratio(self.compressed_bytes_before, self.compressed_bytes_on_wire)

    @property
    def mean_bits(self) -> float:
        """Bits on the wire for each element that was compressed, all that goes with it included."""
        return _ratio(8 * self.compressed_bytes_on_wire, self.elements)

    @property
    def bypassed_share(self) -> float:
        """The share of tensors that were not compressed, from 0 to 1."""
        return self.tensors_bypassed / self.tensors if self.tensors else 0.0

    def reset(self) -> None:
        """Sets all counts to zero."""
        for each in fields(self):
            setattr(self, each.name, each.default)

    def __str__(self) -> str:
        lines = [
            f"{self.steps:,} steps, {self.tensors:,} tensors, {self.tensors_bypassed:,} of them "
            f"bypassed ({self.bypassed_share:.1%})",
            f"all tensors: {self.bytes_before:,} bytes -> {self.bytes_on_wire:,} on the wire, "
            f"{self.ratio:.2f} times fewer",
        ]
        if self.elements:
            lines.append(
                f"compressed ones: {self.compressed_bytes_before:,} bytes -> "
                f"{self.compressed_bytes_on_wire:,} on the wire, "
                f"{self.compressed_ratio:.2f} times fewer, {self.mean_bits:.2f} bits per element"
            )
        return "\n".join(lines)


def _ratio(before: int, after: int) -> float:
    return before / after if after else 1.0
