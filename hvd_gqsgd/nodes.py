"""Nodes: the division of the ranks among machines, and the owners of a bucket's shards."""

from __future__ import annotations

import functools
import hashlib
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Nodes", "host_number", "nodes_of_hosts", "nodes_of_sizes", "one_node"]

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Nodes:
    """The ranks of each node.

    A bucket is cut in as many shards as the smallest node has ranks. On each node the rank at
    place ``g`` of the node owns shard ``g``; the other ranks of a larger node own none.
    """

    members: tuple[tuple[int, ...], ...]
    """Ranks of each node in ascending order; nodes in the order of their first ranks."""

    @functools.cached_property
    def shards(self) -> int:
        """Shards of a bucket."""
        return min(map(len, self.members))

    @property
    def flat(self) -> bool:
        """Whether there is nothing to gain: one node, or one rank on each."""
        return len(self.members) == 1 or max(map(len, self.members)) == 1

    @property
    def pays(self) -> bool:
        """Whether ``hierarchy="auto"`` may exchange by node: two nodes or more of two ranks or more
        each. A node of one rank would own the whole bucket, as in a flat exchange."""
        return len(self.members) > 1 and self.shards > 1

    def node(self, rank: int) -> int:
        """Number of the node of a rank."""
        return next(k for k, members in enumerate(self.members) if rank in members)

    def of(self, rank: int) -> tuple[int, ...]:
        """Ranks of the node of a rank."""
        return self.members[self.node(rank)]

    def shard(self, rank: int) -> int | None:
        """The shard that a rank owns; None if it owns none."""
        place = self.of(rank).index(rank)
        return place if place < self.shards else None

    def owners(self, shard: int) -> tuple[int, ...]:
        """The ranks that own a shard, one on each node."""
        return tuple(members[shard] for members in self.members)


def one_node(size: int) -> Nodes:
    """All ranks on one node."""
    return nodes_of_hosts((0,) * size)


@functools.lru_cache(maxsize=64)
def nodes_of_hosts(hosts: tuple[int, ...]) -> Nodes:
    """The nodes, given the number of each rank's host."""
    members: dict[int, list[int]] = {}
    for rank, host in enumerate(hosts):
        members.setdefault(host, []).append(rank)
    return Nodes(tuple(map(tuple, members.values())))


def nodes_of_sizes(sizes: Sequence[int], size: int) -> Nodes:
    """The nodes, given how many consecutive ranks each has.

    Raises:
        ValueError: they do not add up to ``size``, the number of ranks.
    """
    if sum(sizes) != size:
        raise ValueError(
            f"the ranks of the nodes {tuple(sizes)} must add up to the number of ranks, {size}, "
            f"got {sum(sizes)}: give the ranks of each node, or pass hierarchy='node' to find them"
        )
    return nodes_of_hosts(tuple(k for k, count in enumerate(sizes) for _ in range(count)))


@functools.cache
def host_number() -> int:
    """62 bits that identify this machine: ranks with the same number are on one node.

    The host name alone may be the same on machines that were cloned, and the boot id alone is the
    same in all containers of a machine, which need not share memory.
    """
    try:
        boot = _BOOT_ID.read_text()
    except OSError:
        boot = ""
    name = f"{socket.gethostname()}\n{boot}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "little") >> 2 | 1
