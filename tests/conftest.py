"""The tests of ``ranks/`` are for several processes: ``test_ranks.py`` starts them.

To run them by hand: ``mpirun -n 4 python -m pytest tests/ranks`` or ``horovodrun --gloo -np 4
...``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from hvd_gqsgd._native import ops

# Of Hypothesis: the same examples in each run and on all ranks, unless `--hypothesis-profile long`
# asks for more and others.
settings.register_profile(
    "repeatable",
    max_examples=60,
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile(
    "long",
    settings.get_profile("repeatable"),
    max_examples=1500,
    derandomize=False,
    print_blob=True,
)
settings.load_profile("repeatable")

HERE = Path(__file__).parent
LAUNCHED = bool({"OMPI_COMM_WORLD_SIZE", "HOROVOD_SIZE", "PMI_SIZE"} & os.environ.keys())

collect_ignore = [] if LAUNCHED else ["ranks"]


def pytest_report_header(config: pytest.Config) -> list[str]:
    """Says what is being tested."""
    from hvd_gqsgd import build_info

    return [f"hvd_gqsgd: {build_info()}"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips what needs a GPU, or CUDA in this build, where there is none."""
    missing = None
    if not torch.cuda.is_available():
        missing = "there is no GPU that PyTorch can use"
    elif "cuda" not in ops.devices():
        missing = "hvd_gqsgd was built without CUDA"
    for item in items:
        if missing and item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason=missing))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object | None:
    """For ``--dist loadgroup``: tests that launch something go one after the other, as ranks that
    wait for a core of their own take several times as long beside others. (Groups of pytest-xdist
    3.8 itself have no effect with pytest 9.2.)"""
    if config.getoption("dist") != "loadgroup":
        return None
    from xdist.scheduler import LoadScopeScheduling

    mark = "pytestmark = pytest.mark.launches"
    launching = {f.name for f in HERE.glob("test_*.py") if mark in f.read_text()}

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0].rpartition("/")[2]
            return "launches" if file in launching else nodeid

    return Scheduling(config, log)


@pytest.fixture
def thread_count() -> Iterator[Callable[[int], None]]:
    """Sets PyTorch's number of threads, for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
