"""Runs jobs of several ranks, over MPI and over Gloo, and ends them when they take too long."""

from __future__ import annotations

import contextlib
import re
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvd_gqsgd.tools.launch import capture_job, launch_command, launch_environment, running

HERE = Path(__file__).parent
LIMIT = 900  # seconds for one run; each test in it has a limit of its own


def mpirun(ranks: int) -> list[str]:
    """The command line that launches ranks over MPI, more than cores if need be."""
    return launch_command("mpi", ranks)


def gloo(ranks: int) -> list[str]:
    """The same over Gloo."""
    return launch_command("gloo", ranks)


def environment() -> dict[str, str]:
    """The environment of a job: one thread a rank, and output at once."""
    return launch_environment() | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def run(command: list[str], limit: int = LIMIT) -> subprocess.CompletedProcess[str]:
    """Runs a job, and ends all of it when it takes longer than ``limit`` seconds."""
    status, output = capture_job(command, environment(), timeout=limit, cwd=HERE.parent)
    if status is None:
        pytest.fail(f"{' '.join(command)} took more than {limit} s:\n{output[-20000:]}")
    return subprocess.CompletedProcess(command, status, output, "")


class Job:
    """A running job and its output so far, for tests that interfere with it."""

    def __init__(self, process: subprocess.Popen[bytes], limit: float) -> None:
        self.process = process
        self.said = ""
        self._deadline = time.monotonic() + limit
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said += line.decode(errors="replace")

    def wait_for(
        self, pattern: str | re.Pattern[str], count: int = 1, after: int = 0
    ) -> list[re.Match[str]]:
        """Waits for ``count`` matches or more in the output from ``after`` on, and returns them."""
        pattern = re.compile(pattern)
        while time.monotonic() < self._deadline:
            ended = self.process.poll() is not None
            if ended:
                self._reader.join(10)
            matches = list(pattern.finditer(self.said, after))
            if len(matches) >= count:
                return matches
            assert not ended, f"ended before {count} of {pattern.pattern}:\n{self.said[-6000:]}"
            time.sleep(0.05)
        raise AssertionError(f"waited for {pattern.pattern} in vain:\n{self.said[-6000:]}")

    def wait(self) -> int:
        """Waits for the end of the job and of its output, and returns its exit status."""
        try:
            status = self.process.wait(max(self._deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it does not end:\n{self.said[-6000:]}") from None
        self._reader.join(10)
        return status


@contextlib.contextmanager
def started(command: list[str], limit: int, env: dict[str, str] | None = None) -> Iterator[Job]:
    """A job that has ``limit`` seconds, and is ended if it still runs when the block is left."""
    with running(command, env or environment(), output=subprocess.PIPE, cwd=HERE.parent) as process:
        yield Job(process, limit)
