"""A short soak, and that the soak finds what leaks. The long one is ``make soak``."""

from __future__ import annotations

import re
import sys

import pytest
from launch import HERE, mpirun, run

pytestmark = pytest.mark.launches

SOAK = [sys.executable, str(HERE / "soak.py")]
SETTINGS = [
    "default", "4 bits, two phases", "dynamic, 5 bits", "1/16 by a leader", "1/16 in turn, EF21",
    "1/16, MARINA", "2 bits, two phases", "auto",
]  # fmt: skip
"""Those of ``soak.py`` but DDP, whose first hundreds of steps take memory."""


def test_nothing_grows() -> None:
    """On two ranks."""
    job = run([*mpirun(2), *SOAK, "--steps", "1200", "--settings", *SETTINGS], 90)
    assert job.returncode == 0, job.stdout
    assert len(re.findall(r"^.{20} [01] +150 ", job.stdout, re.MULTILINE)) == 16


def test_leaks_are_found() -> None:
    job = run([*mpirun(2), *SOAK, "--steps", "250", "--leak", "--settings", *SETTINGS[:5]], 90)
    assert job.returncode == 1, job.stdout
    for kind in ("memory", "objects", "threads", "files", "in flight"):
        assert len(re.findall(rf"WRONG on rank \d: {kind}: .* a step", job.stdout)) == 10
