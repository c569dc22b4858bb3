"""Every rank runs every test, in the same order; rank 0 reports, and a failure ends the job."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import horovod.torch as hvd
import pytest
import torch
import torch.distributed as dist

from hvd_gqsgd import DDPState, GlobalQSGD, exchanges
from hvd_gqsgd._native import mpi as native_mpi
from hvd_gqsgd.bench.training import start_process_group
from hvd_gqsgd.engine import agreement
from hvd_gqsgd.exchanges import by_node
from hvd_gqsgd.nodes import nodes_of_hosts
from hvd_gqsgd.transports import simulated
from hvd_gqsgd.transports.horovod import HorovodTransport

if "OMPI_COMM_WORLD_SIZE" in os.environ:
    # MPI must outlive Horovod for Horovod to be started anew, and the two must get along anyway.
    from mpi4py import MPI

EVEN = hvd.ProcessSet([0])
ODD = hvd.ProcessSet([0])


def _size_before_init() -> int:
    for variable in ("HOROVOD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if variable in os.environ:
            return int(os.environ[variable])
    return 1


def start_horovod() -> None:
    """Joins the job, with the process sets of the even and of the odd ranks."""
    size = _size_before_init()
    sets = []
    if size >= 3:  # a process set must differ from the others and from all ranks
        EVEN.ranks, ODD.ranks = list(range(0, size, 2)), list(range(1, size, 2))
        sets = [EVEN, ODD]
    hvd.init(process_sets=sets)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds an option for nodes that this machine does not have."""
    parser.addoption(
        "--ranks-per-node", type=int, help="pretend that so many consecutive ranks are on one node"
    )


def pretend_nodes(per_node: int) -> None:
    """Gives ranks the numbers of different hosts, and ``simulate`` the same nodes."""
    for module in (agreement, by_node):
        module.host_number = lambda: 1 + hvd.rank() // per_node  # type: ignore[attr-defined]
    HorovodTransport.nodes = None  # type: ignore[assignment]
    exchanges.by_node_pays = lambda kind: True  # by node whatever the options
    simulated.one_node = lambda size: nodes_of_hosts(  # type: ignore[attr-defined]
        tuple(rank // per_node for rank in range(size))
    )


@pytest.hookimpl(trylast=True)  # after the terminal reporter was made
def pytest_configure(config: pytest.Config) -> None:
    """Starts Horovod; rank 0 alone reports."""
    start_horovod()
    if (per_node := config.getoption("--ranks-per-node")) is not None:
        pretend_nodes(per_node)
    torch.set_num_threads(1)
    if hvd.rank() != 0:
        config.pluginmanager.unregister(name="terminalreporter")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What disturbs later tests goes last: after join() and after errors ranks have counted
    different numbers of unnamed operations, and errors leave some behind that no other rank will
    answer."""
    last = (
        "test_semantics", "test_auto.py::test_process_sets", "_join", "once_another_one_has_left",
        "_gives_up", "test_disagreement",
    )  # fmt: skip

    def order(item: pytest.Item) -> int:
        return max((i for i, name in enumerate(last, 1) if name in item.nodeid), default=0)

    items.sort(key=order)
    if config.getoption("--ranks-per-node") is not None:
        items[:] = [item for item in items if not item.get_closest_marker("flat")]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """A rank whose test has failed would leave the others waiting: it takes them along."""
    outcome = yield
    report = outcome.get_result()
    if report.failed:
        text = f"\nrank {hvd.rank()} of {hvd.size()}: {item.nodeid} failed\n{report.longreprtext}\n"
        os.write(sys.__stderr__.fileno(), text.encode())
        os._exit(1)


@pytest.fixture(scope="session")
def rank() -> int:
    """This process's rank."""
    return hvd.rank()


@pytest.fixture(scope="session")
def size() -> int:
    """How many ranks there are."""
    return hvd.size()


@pytest.fixture
def restart() -> Callable[[], None]:
    """Starts Horovod anew, as elastic training does when workers come or go."""

    def shut_down_and_start() -> None:
        hvd.barrier()  # shutdown() ends what others are still waiting for
        hvd.shutdown()
        start_horovod()

    return shut_down_and_start


@pytest.fixture
def several(size: int) -> None:
    """Skips a test that needs ranks to differ."""
    if size == 1:
        pytest.skip("needs two ranks")


COMMS = ["horovod", "torch", "mpi", "mpi4py"]


@pytest.fixture(params=COMMS)
def comm(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """All ranks, as ``hvd_gqsgd.allreduce`` takes them: over Horovod, a process group of PyTorch,
    and MPI, there with the native part and without."""
    kind = request.param
    if kind == "horovod":
        yield None
        return
    if "OMPI_COMM_WORLD_SIZE" not in os.environ:
        pytest.skip("the same as under mpirun")
    if kind == "torch":
        yield process_group()
        return
    if kind == "mpi":
        assert native_mpi.usable_with(MPI.Get_library_version())
    else:
        monkeypatch.setattr(native_mpi, "usable_with", lambda version: False)
    comm = MPI.COMM_WORLD.Dup()  # its own counts of steps
    yield comm
    comm.Free()


@functools.cache
def process_group() -> dist.ProcessGroup:
    """PyTorch's, of all ranks."""
    start_process_group(None)
    hvd.barrier()  # a rank that destroyed it at once would fail others that still connect
    return dist.group.WORLD


@pytest.fixture
def process_set(rank: int, size: int) -> hvd.ProcessSet:
    """The even or the odd ranks, whichever this rank belongs to."""
    if size < 3:
        pytest.skip("needs three ranks")
    return EVEN if rank % 2 == 0 else ODD


@pytest.fixture
def new_state() -> Iterator[Callable[..., DDPState]]:
    """Makes states, and gives back their connections after the test."""
    states = []

    def make(**options: Any) -> DDPState:
        states.append(GlobalQSGD(**({"min_numel": 0} | options)).ddp_state(process_group()))
        return states[-1]

    yield make
    for state in states:
        state.close()
