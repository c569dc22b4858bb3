"""Times calls on several ranks, in turn, and repeats disturbed rounds."""

from __future__ import annotations

import functools
import os
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import horovod.torch as hvd
import numpy as np
import torch

__all__ = ["Timing", "interleaved", "progress_bar"]

MOST_LOAD = 0.2
"""Most cores that other processes may use in a round that counts, by default."""

TRIES = 3
"""Most rounds, as a multiple of those that count."""


@dataclass
class Timing:
    """Times of one call, of the slowest rank."""

    seconds: list[float] = field(default_factory=list)
    """Seconds of each round."""
    load: list[float] = field(default_factory=list)
    """Cores that other processes used in each round."""
    discarded: int = 0
    """Number of rounds that were repeated."""

    @property
    def median(self) -> float:
        """The median, in seconds."""
        return float(np.median(self.seconds))

    @property
    def p99(self) -> float:
        """The 99th percentile, in seconds."""
        return float(np.percentile(self.seconds, 99))


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    prepare: Callable[[str], object] = lambda name: None,
    progress: Callable[[], object] = lambda: None,
    warm_up: int = 2,
    most_load: float = MOST_LOAD,
) -> dict[str, Timing]:
    """Times each call on all ranks, from a barrier to the end of the slowest one.

    Every other round has the reverse order, as the place of a call in a round affects its time.

    A round in which other processes used more than ``most_load`` cores is repeated, up to ``TRIES``
    times ``repeats`` rounds in all. After that such rounds count too, and ``load`` shows them.

    Args:
        calls: by name, the same on all ranks.
        repeats: number of rounds that count.
        prepare: called with the name before each call; not timed.
        progress: called after each round.
        warm_up: number of rounds before the first that counts.
        most_load: cores that other processes may use in a round that counts.

    Returns:
        The times by name, the same on all ranks.
    """
    timings = {name: Timing() for name in calls}
    left = TRIES * repeats
    counted = -warm_up
    while counted < repeats:
        left -= counted >= 0
        order = list(calls)[:: 1 if left % 2 else -1]
        round_ = {name: _time(calls[name], partial(prepare, name)) for name in order}
        if counted < 0:
            counted += 1
            continue
        disturbed = [name for name, (_, load) in round_.items() if load > most_load]
        if disturbed and left >= repeats - counted:
            for name in disturbed:
                timings[name].discarded += 1
            continue
        for name, (seconds, load) in round_.items():
            timings[name].seconds.append(seconds)
            timings[name].load.append(load)
        counted += 1
        progress()
    return timings


@contextmanager
def progress_bar(rounds: int) -> Iterator[Callable[[], object]]:
    """A function to call after each round, which advances a progress bar if tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda: None
        return
    with tqdm(total=rounds, unit="round", disable=hvd.rank() != 0, leave=False) as bar:
        yield lambda: bar.update()


def _time(call: Callable[[], object], prepare: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the slowest rank, and the load by other processes; the same on all ranks."""
    prepare()
    hvd.barrier()
    busy, own, begin = _busy(), time.process_time(), time.perf_counter()
    call()
    seconds = time.perf_counter() - begin
    hvd.barrier()
    wall = time.perf_counter() - begin
    ours = _total("sum", time.process_time() - own, hvd.Sum) if _one_machine() else None
    slowest = _total("max", seconds, hvd.Max)
    if ours is None:
        return slowest, 0.0
    others = _total("load", (_busy() - busy - ours) / wall, hvd.Min)
    return slowest, max(0.0, others)


def _total(name: str, value: float, op: int) -> float:
    message = torch.tensor([value], dtype=torch.float64)
    return float(hvd.allreduce(message, op=op, name=f"bench.{name}"))


def _busy() -> float:
    """Seconds of all cores of this machine in processes, without interrupts."""
    fields: Sequence[str] = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    user, nice, system = (int(value) for value in fields[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


@functools.cache
def _one_machine() -> bool:
    """Whether all ranks run on one machine, whose load by other processes is known."""
    boot = uuid.UUID(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    boots = hvd.allgather(torch.tensor([list(boot.bytes)]), name="bench.boot")
    return len(boots.unique(dim=0)) == 1
