"""Elastic Horovod for real: a worker is killed, the others go on, and another one joins them."""

from __future__ import annotations

import ast
import os
import re
import signal
import sys
from collections import defaultdict
from pathlib import Path

import pytest
from launch import HERE, Job, environment, gloo, started

pytestmark = pytest.mark.launches

SCRIPT = HERE / "checked_elastic.py"
LIMIT = 140  # seconds

# This machine under two names, as a host on which a worker has failed is left out for a while.
SURVIVES, FAILS = "localhost", "127.0.0.1"
STEPS = 50
STARTED = re.compile(r"rank (\d) of (\d), ([\w.]+), (\d+): from step (\d+) on")
STEP = re.compile(r"step (\d+), (\d) ranks: ")
EXCHANGED = re.compile(r"rank \d of (\d): number (\d+), ([\w ]+), (\w+)")
ENDED = re.compile(r"rank (\d) of (\d): perplexity ([\d.]+), replica difference (\S+), (.*)")


def end_workers(job: Job) -> None:
    """Workers are in sessions of their own."""
    for match in STARTED.finditer(job.said):
        with_id = Path("/proc", match[4], "cmdline")
        if with_id.exists() and SCRIPT.name.encode() in with_id.read_bytes():
            os.kill(int(match[4]), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.timeout(LIMIT + 40)
@pytest.mark.parametrize("bits", ["dynamic", pytest.param("auto", marks=pytest.mark.long)])
def test_a_worker_is_lost_and_one_is_gained(tmp_path: Path, bits: str) -> None:
    hosts = tmp_path / "hosts.sh"
    hosts.write_text(f"#!/bin/sh\necho {SURVIVES}:2\necho {FAILS}:1\n")
    hosts.chmod(0o755)
    command = [
        *gloo(3), "--min-np", "2", "--max-np", "3", "--host-discovery-script", str(hosts),
        "--network-interfaces", "lo", "--blacklist-cooldown-range", "1", "1",
        sys.executable, str(SCRIPT), "--bits", bits, "--budget", "6", "--steps", f"{STEPS}",
        "--width", "64", "--layers", "1", "--context", "32", "--validate", "24",
        "--batch-size", "24",
    ]  # fmt: skip
    # A survivor may wait for the other one so long until both see that the third is gone.
    env = environment() | {"HOROVOD_GLOO_TIMEOUT_SECONDS": "12"}
    with started(command, LIMIT, env) as job:
        try:
            said = follow(job)
        finally:
            end_workers(job)
    check_exchanges(said)
    if bits == "dynamic":
        by_node = re.findall(r"rank \d of (\d): number \d+, [\w ]+ on 2 nodes, right", said)
        assert set(by_node) == {"3"}


def follow(job: Job) -> str:
    """Kills the worker on the second host, and sees another one join; returns all that was said."""
    first = job.wait_for(STARTED, 3)
    assert sorted(match[1] for match in first) == ["0", "1", "2"]
    assert {(match[2], match[5]) for match in first} == {("3", "0")}
    job.wait_for(STEP, 2)
    (lost,) = (match for match in first if match[3] == FAILS)
    killed = len(job.said)
    os.kill(int(lost[4]), signal.SIGKILL)

    # The survivors are the same processes, and go on from what was committed, not from 0.
    second = [m for m in job.wait_for(STARTED, 2, killed) if m[2] == "2"]
    assert {m[4] for m in second} <= {m[4] for m in first} - {lost[4]}
    assert all(int(m[5]) >= 10 for m in second)
    alone = [m for m in job.wait_for(STEP, 2, killed) if m[2] == "2"]
    assert alone

    newcomers = [m for m in job.wait_for(STARTED, 5, killed) if m[4] not in {f[4] for f in first}]
    assert [(m[2], m[3]) for m in newcomers] == [("3", FAILS)]
    assert int(newcomers[0][5]) >= int(alone[0][1])

    ended = job.wait_for(ENDED, 3)
    assert job.wait() == 0, job.said[-6000:]
    assert sorted(match[1] for match in ended) == ["0", "1", "2"]
    assert {(match[2], match[4]) for match in ended} == {("3", "0")}
    assert len({match[5] for match in ended}) == 1  # one schedule of bit widths, too
    assert 1 < float(ended[0][3]) < 40  # of 256 bytes
    return job.said


def check_exchanges(said: str) -> None:
    """All ranks, the newcomer too, went on from one state, and had right means of one width."""
    starts = defaultdict(list)
    for match in re.finditer(r"rank \d of (\d) goes on from (.+)", said):
        starts[match[1], match[2]].append(match.end())
    assert [(int(size), len(ranks)) for (size, _), ranks in starts.items()] == [
        (3, 3), (2, 2), (3, 3),
    ]  # fmt: skip

    widths = defaultdict(set)
    for size, number, bits, verdict in EXCHANGED.findall(said):
        assert verdict == "right", f"step {number} of {size} ranks"
        widths[size, number].add(bits)
    assert all(len(each) == 1 for each in widths.values()), widths

    (_, state), last = starts.popitem()
    numbers = [int(match[2]) for match in EXCHANGED.finditer(said, min(last)) if match[1] == "3"]
    begin = ast.literal_eval(state)["step"]
    assert sorted(numbers) == sorted(3 * list(range(begin, STEPS)))
