"""Elastic Horovod for real: a worker is killed, the others go on, and another one joins them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from launch import HERE, environment, gloo

SCRIPT = HERE.parent / "examples" / "language_elastic.py"
LIMIT = 140  # seconds

# This machine under two names, as a host on which a worker has failed is left out for a while.
SURVIVES, FAILS = "localhost", "127.0.0.1"
STARTED = re.compile(r"rank (\d) of (\d), ([\w.]+), (\d+): from step (\d+) on")
STEP = re.compile(r"step (\d+), (\d) ranks: ")
ENDED = re.compile(r"rank (\d) of (\d): perplexity ([\d.]+), replica difference (\S+), (.*)")


class Job:
    """An elastic job, and what it has said so far."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(
            command, cwd=HERE.parent, env=environment(), text=True, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.said = ""
        self._deadline = time.monotonic() + LIMIT
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said += line

    def wait_for(self, pattern: re.Pattern[str], count: int, after: int = 0) -> list[re.Match[str]]:
        """The matches in what was said from there on, when there are so many."""
        while time.monotonic() < self._deadline:
            ended = self.process.poll() is not None
            if ended:
                self._reader.join(10)
            matches = list(pattern.finditer(self.said, after))
            if len(matches) >= count:
                return matches
            assert not ended, f"ended before {count} of {pattern.pattern}:\n{self.said[-6000:]}"
            time.sleep(0.1)
        raise AssertionError(f"waited for {pattern.pattern} in vain:\n{self.said[-6000:]}")

    def end(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
        for match in STARTED.finditer(self.said):  # workers are in sessions of their own
            with_id = Path("/proc", match[4], "cmdline")
            if with_id.exists() and SCRIPT.name.encode() in with_id.read_bytes():
                os.kill(int(match[4]), signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.timeout(LIMIT + 40)
def test_a_worker_is_lost_and_one_is_gained(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts.sh"
    hosts.write_text(f"#!/bin/sh\necho {SURVIVES}:2\necho {FAILS}:1\n")
    hosts.chmod(0o755)
    job = Job(
        [
            *gloo(3), "--min-np", "2", "--max-np", "3", "--host-discovery-script", str(hosts),
            "--blacklist-cooldown-range", "2", "4",
            sys.executable, str(SCRIPT), "--bits", "dynamic", "--budget", "6", "--steps", "400",
            "--width", "64", "--layers", "1", "--context", "32", "--validate", "24",
            "--batch-size", "24",
        ]
    )  # fmt: skip
    try:
        first = job.wait_for(STARTED, 3)
        assert sorted(match[1] for match in first) == ["0", "1", "2"]
        assert {(match[2], match[5]) for match in first} == {("3", "0")}
        job.wait_for(STEP, 4)
        (lost,) = (match for match in first if match[3] == FAILS)
        killed = len(job.said)
        os.kill(int(lost[4]), signal.SIGKILL)

        # The survivors are the same processes, and go on from what was committed, not from 0.
        second = [m for m in job.wait_for(STARTED, 2, killed) if m[2] == "2"]
        assert {m[4] for m in second} <= {m[4] for m in first} - {lost[4]}
        assert all(int(m[5]) >= 20 for m in second)
        alone = [m for m in job.wait_for(STEP, 2, killed) if m[2] == "2"]
        assert alone

        newcomers = [
            m for m in job.wait_for(STARTED, 5, killed) if m[4] not in {f[4] for f in first}
        ]
        assert [(m[2], m[3]) for m in newcomers] == [("3", FAILS)]
        assert int(newcomers[0][5]) >= int(alone[0][1])

        ended = job.wait_for(ENDED, 3)
        assert job.process.wait(20) == 0, job.said[-6000:]
    finally:
        job.end()
    assert sorted(match[1] for match in ended) == ["0", "1", "2"]
    assert {(match[2], match[4]) for match in ended} == {("3", "0")}
    assert len({match[5] for match in ended}) == 1  # one schedule of bit widths, too
    assert {int(step) for step in re.findall(r"'step': (\d+)", job.said)} == {400}
    assert 1 < float(ended[0][3]) < 40  # of 256 bytes
