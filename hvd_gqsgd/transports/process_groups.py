"""Connections beside the user's process group: of the same ranks and with the same timeout, for
tensors of the host, and one a kind of message.

They are Gloo's, and not made by ``torch.distributed.new_group``. That names groups by counting, so
that ranks which have counted differently would wait for each other under two names.
"""

from __future__ import annotations

import secrets
from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from hvd_gqsgd.registry import of_process_group

__all__ = [
    "NOT_A_MEMBER",
    "Channel",
    "check_group",
    "give_back_channels",
    "has_nccl",
    "host_group",
    "take_channels",
]

NOT_A_MEMBER: object = dist.GroupMember.NON_GROUP_MEMBER
"""The value of ``torch.distributed.new_group`` on ranks outside of the new group."""


class Channel(Protocol):
    """The collectives of a process group, or of a connection that PyTorch does not list."""

    def rank(self) -> int:
        """This rank."""

    def size(self) -> int:
        """How many ranks there are."""

    def allreduce(self, tensors: list[Tensor], opts: Any = ...) -> Any:
        """Starts a reduction in place."""

    def alltoall_base(
        self, output: Tensor, input: Tensor, output_splits: list[int], input_splits: list[int]
    ) -> Any:
        """Starts sending each rank its part of ``input``."""

    def allgather(self, outputs: list[list[Tensor]], inputs: list[Tensor]) -> Any:
        """Starts collecting the tensors of all ranks."""


def check_group(group: object) -> dist.ProcessGroup:
    """A process group that this process is in; None stands for the default one.

    Raises:
        TypeError: it is no process group.
        ValueError: this process is not in it, or there is no default process group.
    """
    if isinstance(group, dist.ProcessGroup):
        return group
    if group is None:
        if not dist.is_initialized():
            raise ValueError(
                "there is no default process group: call torch.distributed.init_process_group() "
                "before, or give a process_group"
            )
        return check_group(dist.group.WORLD)
    if group is NOT_A_MEMBER:
        raise ValueError(
            "this process is not in the process group: torch.distributed.new_group() gave "
            f"GroupMember.NON_GROUP_MEMBER ({group!r}) here; leave the call to the members"
        )
    raise TypeError(
        "process_group must be a torch.distributed.ProcessGroup, or None for the default one, got "
        f"{group!r}"
    )


def has_nccl(group: dist.ProcessGroup | None) -> bool:
    """Whether tensors of a GPU go over NCCL."""
    return "nccl" in dist.get_backend_config(group)


def host_group(group: object) -> Channel:
    """The ranks, for tensors on the CPU: ``group`` itself, or a connection over Gloo, which all
    ranks must then ask for.

    Raises:
        TypeError, ValueError: see ``check_group``.
    """
    checked = check_group(group)
    if "cpu:" in dist.get_backend_config(checked):
        return checked

    def make() -> Channel:
        device = torch.device("cuda", torch.cuda.current_device())
        return _connect(checked, f"{_token(checked, device)}/host")

    return of_process_group(checked, "host", make)


def take_channels(group: object, messages: Sequence[str]) -> dict[str, Channel]:
    """A connection of the ranks of ``group`` for each kind of message. All of its ranks must call
    this."""
    checked = check_group(group)
    spare = _spare(checked)
    channels = {message: spare[message].pop() for message in messages if spare[message]}
    if len(channels) < len(messages):
        token = _token(host_group(checked), torch.device("cpu"))
        for message in messages:
            if message not in channels:
                channels[message] = _connect(checked, f"{token}/{message}")
    return channels


def give_back_channels(group: object, channels: Mapping[str, Channel]) -> None:
    """Leaves them to the next one who takes channels of ``group``. All ranks must call this, with
    nothing in flight."""
    for message, channel in channels.items():
        _spare(check_group(group))[message].append(channel)


def _spare(group: dist.ProcessGroup) -> defaultdict[str, list[Channel]]:
    """Channels that were given back."""
    return of_process_group(group, "spare channels", lambda: defaultdict(list))


def _token(channel: Channel, device: torch.device) -> str:
    """A name that no other connection has, the same on all ranks: rank 0 draws it."""
    number = torch.zeros(1, dtype=torch.int64, device=device)
    if channel.rank() == 0:
        number.fill_(secrets.randbits(62))
    channel.allreduce([number]).wait()
    return f"hvd_gqsgd/{number.item():x}"


def _connect(group: dist.ProcessGroup, name: str) -> Channel:
    store = dist.distributed_c10d._get_process_group_store(group)
    if store is None:
        raise ValueError(
            "the process group has no store for a rendezvous, as over MPI; use a process group "
            "over Gloo or NCCL, or hvd_gqsgd.allreduce on an mpi4py communicator"
        )
    prefixed = dist.PrefixStore(name, store)  # type: ignore[attr-defined]
    made: Any = dist.ProcessGroupGloo(prefixed, group.rank(), group.size(), _timeout(group))
    return made  # type: ignore[no-any-return]


def _timeout(group: dist.ProcessGroup) -> timedelta:
    """How long the user's own collectives wait."""
    on_host = "cpu:" in dist.get_backend_config(group)
    backend = group._get_backend(torch.device("cpu" if on_host else "cuda"))
    timeout: timedelta = backend.options._timeout
    return timeout
