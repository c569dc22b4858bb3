"""State kept for a communicator from call to call: the one place of the package that has any.

A process group is referred to weakly. The state of an MPI communicator is an attribute of the
communicator, which MPI frees with it. That of Horovod lasts as long as the process; each user of it
notices when Horovod was started anew.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from mpi4py import MPI

__all__ = ["horovod_states", "of_horovod", "of_mpi", "of_process_group"]

T = TypeVar("T")

_horovod: dict[Hashable, Any] = {}
_process_groups: weakref.WeakKeyDictionary[Any, dict[Hashable, Any]] = weakref.WeakKeyDictionary()
_mpi_keyval: list[int] = []


def of_horovod(key: Hashable, make: Callable[[], T]) -> T:
    """The state of this key, made when it is first asked for."""
    return _of(_horovod, key, make)


def horovod_states(kind: type[T]) -> list[T]:
    """All states of Horovod of a type."""
    return [state for state in _horovod.values() if isinstance(state, kind)]


def of_process_group(group: object, key: Hashable, make: Callable[[], T]) -> T:
    """The state of this key for a process group or a channel, made when it is first asked for."""
    return _of(_process_groups.setdefault(group, {}), key, make)


def of_mpi(comm: MPI.Comm, key: Hashable, make: Callable[[], T]) -> T:
    """The state of this key for a communicator, made when it is first asked for."""
    from mpi4py import MPI

    if not _mpi_keyval:
        _mpi_keyval.append(MPI.Comm.Create_keyval())  # not copied by Dup
    states: Any = comm.Get_attr(_mpi_keyval[0])
    if states is None:
        states = {}
        comm.Set_attr(_mpi_keyval[0], states)
    return _of(states, key, make)


def _of(states: dict[Hashable, Any], key: Hashable, make: Callable[[], T]) -> T:
    if key not in states:
        states[key] = make()
    state: T = states[key]
    return state
