"""Process sets that are there from the start, process sets that come and go, and ranks that leave
by ``hvd.join()``: see ``semantics.py``."""

from __future__ import annotations

import conftest
import horovod.torch as hvd
import pytest
from semantics import Model, Ways, check, weights

pytestmark = pytest.mark.few
way, dynamic_way, join_way = Ways(), Ways(), Ways()


@pytest.mark.parametrize(("program", "refuses"), way)
def test_as_plain_horovod(rank, size, process_set, program, refuses):
    check(program, refuses, rank, size)


@pytest.mark.parametrize(("program", "refuses"), dynamic_way)
def test_dynamic_as_plain_horovod(rank, size, dynamic, program, refuses):
    check(program, refuses, rank, size)


@pytest.mark.parametrize(("program", "refuses"), join_way)
def test_join_as_plain_horovod(rank, size, several, program, refuses):
    check(program, refuses, rank, size)


@pytest.fixture
def dynamic(several, restart, monkeypatch):
    """Horovod with process sets that may come and go."""
    if not hvd.mpi_enabled():
        pytest.skip("hvd.init() may abort when a static Gloo job is started anew")
    monkeypatch.setenv("HOROVOD_DYNAMIC_PROCESS_SETS", "1")
    restart()
    yield
    monkeypatch.undo()
    restart()


def train(run, process_set, **options):
    """Two steps; ranks outside of the process set take their own."""
    run.replicated = False
    run.magnitude = 2 * (process_set.size() if options.get("op") == hvd.Sum else 1)
    model = Model()
    compression = run.compression(named_parameters=run.named(model), process_set=process_set)
    optimizer = run.optimizer(model, process_set=process_set, compression=compression, **options)
    for step in range(2):
        optimizer.zero_grad()
        run.backward(model, step)
        optimizer.step()
    return weights(model)


@way()
@way(op=hvd.Sum)
@way(gradient_predivide_factor=2.0)
@way(backward_passes_per_step=2)
def even_and_odd_ranks(run, **options):
    return train(run, conftest.ODD if run.rank % 2 else conftest.EVEN, **options)


@way()
@way(groups=2)
def even_ranks_alone(run, **options):
    return train(run, conftest.EVEN, **options)


@way()
def reduced_in_a_process_set(run):
    """The other ranks get Horovod's error."""
    run.replicated = False
    compression = run.compression(process_set=conftest.EVEN)
    x = run.random(3000)
    return [hvd.allreduce(x, process_set=conftest.EVEN, name=run.name(), compression=compression)]


@dynamic_way()
def process_sets_that_come_and_go(run):
    results = []
    for _ in range(2):
        process_sets = [hvd.add_process_set([0]), hvd.add_process_set(range(1, run.size))]
        results += train(run, process_sets[run.rank > 0])
        hvd.barrier()
        for process_set in process_sets:
            assert hvd.remove_process_set(process_set)
    return results


@dynamic_way()
def a_process_set_that_is_gone(run):
    everyone_but_0 = hvd.add_process_set(range(1, run.size))
    hvd.remove_process_set(everyone_but_0)
    compression = run.compression(process_set=everyone_but_0)
    x = run.random(3000)
    return [hvd.allreduce(x, process_set=everyone_but_0, name=run.name(), compression=compression)]


@join_way()
@join_way(op=hvd.Sum)
@join_way(gradient_predivide_factor=2.0)
@join_way(backward_passes_per_step=2)
def uneven_batches(run, **options):
    """Rank r has r + 1 of them."""
    run.replicated = False
    run.magnitude = 2 * run.size * (run.size if options.get("op") == hvd.Sum else 1)
    model = Model()
    optimizer = run.optimizer(model, **options)
    for step in range(run.rank + 1):
        optimizer.zero_grad()
        run.backward(model, step)
        optimizer.step()
    hvd.join()
    return weights(model)
