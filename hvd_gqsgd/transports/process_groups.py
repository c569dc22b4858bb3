"""Process groups beside the user's: of the same ranks, for the host, and one a kind of message."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch.distributed as dist

from hvd_gqsgd.registry import of_process_group

__all__ = [
    "NOT_A_MEMBER",
    "check_group",
    "give_back_channels",
    "has_nccl",
    "host_group",
    "take_channels",
]

NOT_A_MEMBER: object = dist.GroupMember.NON_GROUP_MEMBER
"""The value of ``torch.distributed.new_group`` on ranks outside of the new group."""


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


def host_group(group: object) -> dist.ProcessGroup:
    """The ranks as a process group that takes tensors on the CPU: ``group`` itself, or one over
    Gloo, which all ranks must then ask for.

    Raises:
        TypeError, ValueError: see ``check_group``.
    """
    checked = check_group(group)
    if "cpu:" in dist.get_backend_config(checked):
        return checked
    return of_process_group(checked, "host", lambda: _new_group(checked, "gloo", "host"))


def take_channels(
    group: dist.ProcessGroup, messages: Sequence[str]
) -> dict[str, dist.ProcessGroup]:
    """A process group of the ranks of ``group`` for each kind of message. All of its ranks must
    call this."""
    spare = _spare(group)
    return {
        message: spare[message].pop()
        if spare[message]
        else _new_group(group, _cpu_backend(group), message)
        for message in messages
    }


def give_back_channels(group: dist.ProcessGroup, channels: Mapping[str, dist.ProcessGroup]) -> None:
    """Leaves them to the next one who takes channels of ``group``. All ranks must call this, with
    nothing in flight."""
    for message, channel in channels.items():
        _spare(group)[message].append(channel)


def _spare(group: dist.ProcessGroup) -> defaultdict[str, list[dist.ProcessGroup]]:
    """Channels that were given back. They are kept rather than destroyed: a new process group of
    the same ranks might get the name of a destroyed one, and look for its members there."""
    return of_process_group(group, "spare channels", lambda: defaultdict(list))


def _new_group(group: dist.ProcessGroup, backend: str, use: str) -> dist.ProcessGroup:
    ranks = dist.get_process_group_ranks(group)
    made = dist.new_group(
        ranks,
        backend=backend,
        # Ranks outside of the group know nothing of this. Where there are none, PyTorch's usual way
        # is the safer one: the other one hangs if ranks are in different numbers of groups.
        use_local_synchronization=len(ranks) < dist.get_world_size(),
        group_desc=f"hvd_gqsgd {use}",
    )
    assert isinstance(made, dist.ProcessGroup)
    return made


def _cpu_backend(group: dist.ProcessGroup) -> str:
    """Of "cpu:gloo,cuda:nccl", say, "gloo"."""
    backends = dict(part.split(":") for part in dist.get_backend_config(group).split(","))
    return backends["cpu"]
