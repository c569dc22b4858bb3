"""Exchanges by node over real ranks: nodes that are given, and nodes that ranks find."""

from __future__ import annotations

import horovod.torch as hvd
import pytest
import torch
from helpers import assert_same_on_all_ranks, backward, gradients, mlp

from hvd_gqsgd import AgreementError, BlockBits, DynamicBits, GlobalQSGD, allreduce, simulate
from hvd_gqsgd.exchanges import by_node
from hvd_gqsgd.transports.horovod import HorovodTransport

OPERATORS = [
    {}, {"bits": 5}, {"dither": "exponential"}, {"norm": "l2"}, {"bits": BlockBits(4)},
    {"bits": BlockBits(5), "exchange": "allreduce"},
]  # fmt: skip
WORKING = {part: getattr(by_node, part) for part in ("_cut", "_add", "_copy")}


def nodes_for(size):
    """Two nodes of different sizes."""
    return (size // 2, size - size // 2)


@pytest.fixture(autouse=True)
def three_ranks(size):
    if size < 3:
        pytest.skip("needs two nodes, one of them with two ranks")


@pytest.fixture
def found(monkeypatch, size):
    """The nodes as Horovod's ranks find them, which tell each other the numbers of their hosts."""
    first = nodes_for(size)[0]
    monkeypatch.setattr(HorovodTransport, "nodes", None)
    monkeypatch.setattr(
        "hvd_gqsgd.exchanges.by_node.host_number", lambda: 1 + (hvd.rank() >= first)
    )


@pytest.mark.core
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("options", OPERATORS, ids=str)
def test_allreduce(rank, size, comm, options, dtype):
    nodes = nodes_for(size)
    for step, numel in enumerate((20_001, 1500, 1)):
        everyone = gradients(size, numel, seed=step, dtype=dtype)
        result = allreduce(everyone[rank], comm, step=step, hierarchy=nodes, **options)
        assert torch.equal(result, simulate(everyone, step=step, hierarchy=nodes, **options))
        assert_same_on_all_ranks(result)


@pytest.mark.core
@pytest.mark.parametrize("options", OPERATORS, ids=str)
def test_horovod(rank, size, found, options):
    """Average and Sum, in the bits of nodes that are given."""
    compressor = GlobalQSGD(min_numel=0, hierarchy="node", **options)
    nodes = nodes_for(size)
    for step, numel in enumerate((20_001, 3000, 1)):
        everyone = gradients(size, numel, seed=step)
        mean = hvd.allreduce(everyone[rank], compression=compressor)
        assert torch.equal(mean, simulate(everyone, step=step, hierarchy=nodes, **options))
        given = GlobalQSGD(min_numel=0, hierarchy=nodes, **options)
        given.load_state_dict(given.state_dict() | {"step": step})
        total = hvd.allreduce(everyone[rank], op=hvd.Sum, compression=given)
        torch.testing.assert_close(total / size, mean)


@pytest.mark.core
def test_dynamic_widths(rank, size, found):
    """A schedule learns the norm of the whole mean, the same on all ranks."""
    compressor = GlobalQSGD(bits=BlockBits(DynamicBits(5)), min_numel=0, hierarchy="node")
    for step in range(5):
        everyone = gradients(size, 20_000, seed=step) * 4.0**step
        mean = hvd.allreduce(everyone[rank], compression=compressor)
        assert_same_on_all_ranks(mean)
        assert_same_on_all_ranks(torch.tensor(compressor.stats().bits))


@pytest.mark.core
def test_optimizer(rank, size, found):
    """The bits of buckets of any size; bytes inside and between are counted apart."""
    results = []
    for bucket_mb in (0.01, 25):
        model = mlp()
        compressor = GlobalQSGD(min_numel=64, bucket_mb=bucket_mb, hierarchy="node")
        optimizer = hvd.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.01),
            named_parameters=model.named_parameters(),
            compression=compressor,
        )
        for step in range(3):
            optimizer.zero_grad()
            backward(model, rank, step)
            optimizer.step()
        results.append(torch.cat([p.detach().view(-1) for p in model.parameters()]))
        assert_same_on_all_ranks(results[-1])
        alone = size == 3 and rank == 0  # on its node
        assert (compressor.stats().bytes_inside == 0) == alone
    assert torch.equal(*results)


@pytest.mark.core
def test_ddp(rank, size, new_state):
    """Many small buckets in flight, with the bits of each alone."""
    state, nodes = new_state(hierarchy=nodes_for(size)), nodes_for(size)
    everyone = gradients(size, 5000)
    for step in range(2):
        buffers = [everyone[rank].clone() for _ in range(20)]
        futures = [state.average(buffer, first=i == 0) for i, buffer in enumerate(buffers)]
        for future in futures:
            future.wait()
        assert torch.equal(buffers[0], simulate(everyone, step=step, hierarchy=nodes))
        assert_same_on_all_ranks(torch.cat(buffers))


@pytest.mark.core
@pytest.mark.parametrize("options", [{}, {"bits": BlockBits(8)}], ids=str)
def test_join(rank, size, found, options):
    """The ranks that remain go on without nodes; once all are back, by node again. The last rank
    stays: Horovod 0.28.1 may crash once lower ones have left."""
    compressor = GlobalQSGD(min_numel=0, hierarchy="node", **options)
    for step in range(2 + rank):
        everyone = gradients(size, 5000, seed=step)
        mean = hvd.allreduce(everyone[rank], name="x", compression=compressor)
        present = everyone if step < 2 else everyone[step - 1 :]
        exact = present.sum(0) / size
        assert (mean - exact).norm() < 0.15 * exact.norm()
    hvd.join()
    step = int(hvd.allreduce(torch.tensor(compressor.state_dict()["step"]), op=hvd.Max, name="s"))
    everyone = gradients(size, 5000, seed=99)
    mean = hvd.allreduce(everyone[rank], name="x", compression=compressor)
    assert_same_on_all_ranks(mean)
    if not options:
        expected = simulate(everyone, step=step, hierarchy=nodes_for(size))
        assert (mean - expected).norm() < 0.1 * expected.norm()


@pytest.mark.few
@pytest.mark.parametrize(
    ("part", "last"), [("_cut", False), ("_cut", True), ("_add", False), ("_copy", False)]
)
def test_a_rank_that_fails(rank, size, found, part, last, monkeypatch):
    """An error of one rank is one on all, from the first message to the last, and the next step is
    right. The last rank may own no shard."""
    compressor = GlobalQSGD(min_numel=0, hierarchy="node")
    hvd.allreduce(torch.ones(5000), name="x", compression=compressor)

    def fails(*arguments):
        raise MemoryError("on purpose")

    at_fault = rank == (size - 1 if last else 0)
    if at_fault:
        monkeypatch.setattr(by_node, part, fails)
    with pytest.raises(MemoryError if at_fault else AgreementError):
        hvd.allreduce(torch.ones(5000), name="y", compression=compressor)
    monkeypatch.setattr(by_node, part, WORKING[part])
    for name in ("v", "w"):
        mean = hvd.allreduce(torch.ones(5000), name=name, compression=compressor)
        torch.testing.assert_close(mean, torch.ones(5000), rtol=0, atol=0.02)


@pytest.mark.few
@pytest.mark.parametrize("options", [{"hierarchy": "node"}, {"bits": 4}], ids=str)
@pytest.mark.parametrize("knows", [False, True])
def test_a_rank_that_drops_a_step(rank, size, found, options, knows):
    """It gives up its tensors; the others see it, and all go on. Whether it knows the nodes by
    then or not, and where they do not pay, as one of 1 rank does not: the others exchange without
    them."""
    compressor = GlobalQSGD(min_numel=0, bucket_mb=0.01, **options)
    if knows:
        hvd.allreduce(torch.ones(5000), name="o", compression=compressor)
    probe, context = compressor.compress(torch.ones(5000))
    if rank == 0:
        del context
        context = None
    reduced = hvd.allreduce(probe, name="p", op=hvd.Average)
    if rank == 0:
        probe, context = compressor.compress(torch.full((5000,), 2.0))
    else:
        with pytest.raises(AgreementError, match="abandoned this step"):
            compressor.decompress(reduced, context)
        probe, context = compressor.compress(torch.full((5000,), 2.0))
    reduced = hvd.allreduce(probe, name="q", op=hvd.Average)
    assert torch.allclose(compressor.decompress(reduced, context), torch.tensor(2.0), rtol=0.02)


@pytest.mark.few
def test_different_nodes_are_a_disagreement(rank, size):
    first = nodes_for(size)[0] + (rank == 0)
    sizes = (first, size - first)
    with pytest.raises(AgreementError, match="different options"):
        hvd.allreduce(torch.ones(5000), compression=GlobalQSGD(min_numel=0, hierarchy=sizes))
