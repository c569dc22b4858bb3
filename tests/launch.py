"""Starts jobs of several ranks, over MPI and over Gloo, and ends them when they take too long."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LIMIT = 900  # seconds for one run; each test in it has a limit of its own


def mpirun(ranks: int) -> list[str]:
    """Command line that starts ranks, more than cores if need be, over MPI."""
    return [_program("mpirun"), "--map-by", ":OVERSUBSCRIBE", "--bind-to", "none", "-n", f"{ranks}"]


def gloo(ranks: int) -> list[str]:
    """The same over Gloo."""
    return [_program("horovodrun"), "--gloo", "-np", f"{ranks}"]


def _program(name: str) -> str:
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.fail(f"{name} is neither beside {sys.executable} nor on the PATH")
    return found


def environment() -> dict[str, str]:
    """One thread a rank, polite waiting, and what Open MPI wants to hear of root."""
    env = dict(os.environ, OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1")
    env["OMPI_MCA_mpi_yield_when_idle"] = "1"  # there are more ranks than cores
    if os.geteuid() == 0:
        env |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return env


def run(command: list[str], limit: int = LIMIT) -> subprocess.CompletedProcess[str]:
    """Runs a job, and ends all of it when it takes longer than ``limit`` seconds."""
    process = subprocess.Popen(
        command,
        cwd=HERE.parent,
        env=environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 15)  # the launcher passes it on to all ranks
        output, _ = process.communicate(timeout=30)
        pytest.fail(f"{' '.join(command)} took more than {limit} s:\n{output[-20000:]}")
    return subprocess.CompletedProcess(command, process.returncode, output, "")


class Job:
    """A job that something is done to while it runs, and what it has said so far."""

    def __init__(self, command: list[str], limit: int, env: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            command, cwd=HERE.parent, env=env or environment(), text=True, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        self.said = ""
        self._deadline = time.monotonic() + limit
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said += line

    def wait_for(
        self, pattern: str | re.Pattern[str], count: int = 1, after: int = 0
    ) -> list[re.Match[str]]:
        """The matches in what was said from there on, when there are so many."""
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
        """Its exit status, when it has ended and all that it said has been read."""
        try:
            status = self.process.wait(max(self._deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it does not end:\n{self.said[-6000:]}") from None
        self._reader.join(10)
        return status

    def end(self) -> None:
        """Ends it if it still runs."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(10)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)


@contextlib.contextmanager
def started(command: list[str], limit: int, env: dict[str, str] | None = None) -> Iterator[Job]:
    """A job that has ``limit`` seconds, and is ended if it still runs when the block is left."""
    job = Job(command, limit, env)
    try:
        yield job
    finally:
        job.end()
