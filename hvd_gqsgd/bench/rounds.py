"""Timing on several ranks: what is compared takes turns; disturbed rounds are taken again."""

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
"""Cores that other processes may take in a round."""

TRIES = 3
"""How many times as many rounds as are wanted may be tried."""


@dataclass
class Timing:
    """What one thing took, of the slowest rank, in seconds."""

    seconds: list[float] = field(default_factory=list)
    load: list[float] = field(default_factory=list)
    """Cores that other processes took meanwhile."""
    discarded: int = 0

    @property
    def median(self) -> float:
        """Seconds."""
        return float(np.median(self.seconds))

    @property
    def p99(self) -> float:
        """Seconds."""
        return float(np.percentile(self.seconds, 99))


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    repeats: int,
    *,
    prepare: Callable[[str], object] = lambda name: None,
    progress: Callable[[], object] = lambda: None,
    warm_up: int = 2,
) -> dict[str, Timing]:
    """Times each call on all ranks, from a barrier to the end of the slowest one.

    Args:
        calls: what to time, the same on all ranks.
        repeats: rounds that count.
        prepare: what to do before each call, with its name; not timed.
        progress: called after each round.
        warm_up: rounds before the first that counts.

    Rounds in which other processes took more than ``MOST_LOAD`` cores are taken again, as long as
    not more than ``TRIES`` times as many were tried; then they count, and ``load`` tells.
    """
    timings = {name: Timing() for name in calls}
    left = TRIES * repeats
    counted = -warm_up
    while counted < repeats:
        left -= counted >= 0
        round_ = {name: _time(calls[name], partial(prepare, name)) for name in calls}
        if counted < 0:
            counted += 1
            continue
        disturbed = [name for name, (_, load) in round_.items() if load > MOST_LOAD]
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
    """What to call after each round; on rank 0, if there is tqdm, that moves a bar."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda: None
        return
    with tqdm(total=rounds, unit="round", disable=hvd.rank() != 0, leave=False) as bar:
        yield lambda: bar.update()


def _time(call: Callable[[], object], prepare: Callable[[], object]) -> tuple[float, float]:
    """Seconds of the slowest rank, and the load by others; the same on all ranks."""
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
    """Seconds that this machine's cores have worked for processes, without interrupts."""
    fields: Sequence[str] = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    user, nice, system = (int(value) for value in fields[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


@functools.cache
def _one_machine() -> bool:
    """Whether all ranks share their cores, emulated hosts included: then others' load is known."""
    boot = uuid.UUID(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    boots = hvd.allgather(torch.tensor([list(boot.bytes)]), name="bench.boot")
    return len(boots.unique(dim=0)) == 1
