"""What the front ends say of their options, their exchange and their counts."""

from __future__ import annotations

import os

import horovod.torch as hvd
import pytest
import torch
from conftest import process_group
from helpers import gradients

from hvd_gqsgd import AgreementError, DynamicBits, GlobalQSGD, Stats, ddp_hook, simulate
from hvd_gqsgd.frontends.ddp import DDPState

pytestmark = pytest.mark.few


@pytest.fixture
def under_mpirun():
    """For what has nothing to do with Horovod."""
    if "OMPI_COMM_WORLD_SIZE" not in os.environ:
        pytest.skip("the same as under mpirun")


@pytest.mark.flat
def test_repr_of_a_compressor(size):
    """Before the first gradient it cannot know how many ranks there are."""
    compressor = GlobalQSGD(bits=16, seed=7)
    before = repr(compressor)
    assert before.startswith("GlobalQSGD(bits=16, ")
    assert before.endswith(")")
    hvd.allreduce(torch.ones(5000), compression=compressor)
    levels = (2**16 - 1) // (2 * size)
    assert repr(compressor) == f"{before}: allreduce on {size} ranks, levels per side: {levels}"


def test_repr_by_node(size):
    if size < 3:
        pytest.skip("needs two nodes, one of them with two ranks")
    known = f": by node: two_phase on 2 nodes, levels per side: 127, of {size} ranks"
    compressor = GlobalQSGD(hierarchy=(1, size - 1))
    hvd.allreduce(torch.ones(5000), compression=compressor)
    assert repr(compressor).endswith(known)
    assert repr(GlobalQSGD(hierarchy=(1, size - 1)).ddp_state(process_group())).endswith(known)


def test_repr_with_a_process_set(process_set):
    assert f"process_set={process_set}" in repr(GlobalQSGD(process_set=process_set))


def test_counts_of_a_compressor_can_be_reset(rank, size):
    """And go on from zero; the steps of the exchange are not theirs."""
    compressor, everyone = GlobalQSGD(), gradients(size, 5000)
    hvd.allreduce(everyone[rank], compression=compressor)
    first = compressor.stats()
    assert (first.steps, first.tensors, first.elements) == (1, 1, 5000)
    compressor.reset_stats()
    assert compressor.stats() == Stats()
    mean = hvd.allreduce(everyone[rank], compression=compressor)
    assert compressor.stats() == first
    assert torch.equal(mean, simulate(everyone, step=1))


@pytest.mark.usefixtures("under_mpirun")
class TestDDPState:
    """The same of ``DDPState``, and what it has no use for."""

    def test_it_is_the_compressors_state(self, rank, size):
        """Made either way, it gives the same bits."""
        everyone, options = gradients(size, 5000), {"bits": 6, "min_numel": 0, "norm": "l2"}
        compressor = GlobalQSGD(**options)
        for state in (DDPState(process_group(), **options), compressor.ddp_state(process_group())):
            x = everyone[rank].clone()
            state.average(x, first=True).wait()
            state.close()
            assert torch.equal(x, simulate(everyone, bits=6, norm="l2"))
        assert state.stats() == compressor.stats() != Stats()

    def test_it_takes_the_default_group(self, rank, size):
        process_group()
        state = DDPState(min_numel=0)
        x = torch.full((5000,), float(size))
        state.average(x, first=True).wait()
        state.close()
        assert torch.equal(x, torch.full((5000,), float(size)))

    @pytest.mark.flat
    def test_repr(self, size):
        levels = (2**16 - 1) // (2 * size)
        known = f": allreduce on {size} ranks, levels per side: {levels}"
        compressor = GlobalQSGD(bits=16)
        for state in (DDPState(process_group(), bits=16), compressor.ddp_state(process_group())):
            state.close()
            assert repr(state).startswith("DDPState(bits=16, dither='linear', ")
            assert repr(state).endswith(f"min_numel=4096, hierarchy='auto'){known}")
        assert repr(compressor).endswith(known)

    def test_counts_can_be_reset(self, rank, size):
        state = DDPState(process_group(), min_numel=1000)
        for numel in (5000, 10):
            state.average(torch.ones(numel), first=numel == 5000).wait()
        stats = state.stats()
        assert (stats.steps, stats.tensors, stats.tensors_bypassed) == (1, 2, 1)
        state.reset_stats()
        assert state.stats() == Stats()
        assert stats.tensors == 2, "a copy"
        state.close()

    @pytest.mark.parametrize(("options", "kind", "message"), [
        ({"bit": 8}, TypeError, r"DDPState\(\) got an unknown option 'bit': did you mean 'bits'"),
        ({"process_groups": None}, TypeError, "did you mean 'process_group'"),
        ({"bucket_mb": 25}, TypeError, "no option 'bucket_mb': .*bucket_cap_mb to DistributedDa"),
        ({"named_parameters": []}, TypeError, "no option 'named_parameters': .*leave it out"),
        ({"process_set": None}, TypeError, "no option 'process_set': .*give a process_group"),
        ({"bits": 99}, ValueError, "bits must be from 2 to 16"),
        ({"dither": "exponential", "exchange": "reduce_scatter"}, ValueError,
         r"take exchange='two_phase' for DDPState\(\)"),
    ])  # fmt: skip
    def test_an_error_of_one_rank_is_one_on_all(self, rank, size, options, kind, message):
        if rank == 0:
            with pytest.raises(kind, match=message):
                DDPState(process_group(), **options)
        else:
            with pytest.raises(AgreementError, match="could not take part"):
                DDPState(process_group())
        DDPState(process_group()).close()

    @pytest.mark.parametrize("options", [
        {"bucket_mb": 25}, {"named_parameters": [("x", torch.ones(3))]},
        {"process_set": hvd.global_process_set},
    ], ids=lambda options: next(iter(options)))  # fmt: skip
    def test_a_compressor_with_options_that_ddp_has_no_use_for(self, options):
        """Only if they were given; the default of ``bucket_mb`` is none of DDP's business."""
        GlobalQSGD(bits=DynamicBits(16)).ddp_state(process_group()).close()
        compressor, name = GlobalQSGD(**options), next(iter(options))
        message = rf"GlobalQSGD\.ddp_state\(\) takes no option '{name}': "
        with pytest.raises(TypeError, match=message):
            compressor.ddp_state(process_group())

    def test_what_is_no_process_group(self):
        with pytest.raises(TypeError, match=r"process_group must be a torch\.dist.*, got 8"):
            DDPState(8)

    def test_a_closed_state_is_not_used(self):
        """Its connections may be another state's by then."""
        state = DDPState(process_group(), min_numel=0)
        state.close()
        with pytest.raises(RuntimeError, match="was closed"):
            state.average(torch.ones(5000), first=True)

    def test_what_is_no_state(self):
        with pytest.raises(TypeError, match=r"a GQSGDState .* got <class.*its ddp_state\(\)"):
            ddp_hook(GlobalQSGD, None)
