"""A short soak, and that the soak finds what leaks. The long one is ``make soak``."""

from __future__ import annotations

import re
import sys

import pytest
from launch import HERE, mpirun, run

pytestmark = pytest.mark.launches

SOAK = [sys.executable, str(HERE / "soak.py")]


def test_nothing_grows() -> None:
    """On two ranks, with nine settings."""
    job = run([*mpirun(2), *SOAK, "--steps", "1350"], 90)
    assert job.returncode == 0, job.stdout
    assert len(re.findall(r"^.{20} [01] +150 ", job.stdout, re.MULTILINE)) == 18


def test_leaks_are_found() -> None:
    job = run([*mpirun(2), *SOAK, "--steps", "450", "--leak"], 90)
    assert job.returncode == 1, job.stdout
    for kind in ("memory", "objects", "threads", "files", "in flight"):
        assert len(re.findall(rf"WRONG on rank \d: {kind}: .* a step", job.stdout)) == 18
