"""FSDP2: what goes wrong on one rank or on all of them, and replicas (HSDP)."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist
from helpers import gradients
from hooked import Given
from sharded import mesh, shard, step
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import Shard

from hvd_gqsgd import AgreementError, DynamicBits, GlobalQSGD, simulate
from hvd_gqsgd._native import ops

if "OMPI_COMM_WORLD_SIZE" not in os.environ:
    pytest.skip("the same as under mpirun", allow_module_level=True)


@pytest.mark.usefixtures("several")
@pytest.mark.parametrize("other", [{"seed": 1}, {"bits": 4}, {"norm": "l2"}], ids=str)
def test_ranks_that_disagree(rank, size, other):
    model = shard(Given(5000))
    compressor = GlobalQSGD(**(other if rank == size - 1 else {}))
    with pytest.raises(AgreementError, match=f"ranks use different options: {next(iter(other))};"):
        compressor.fsdp(model)


@pytest.mark.usefixtures("several")
@pytest.mark.parametrize(("options", "kind", "message"), [
    ({"exchange": "two_phase"}, TypeError, r"GlobalQSGD\.fsdp\(\) takes no option 'exchange'"),
    ({"bucket_mb": 5}, TypeError, "no option 'bucket_mb': FSDP reduces a module at a time"),
    ({"bits": DynamicBits(8)}, ValueError, r"bits must not be DynamicBits\(\.\.\.\)"),
    ({"error_feedback": "ef21", "named_parameters": [("x", torch.ones(1))]}, ValueError,
     r"GlobalQSGD\.fsdp\(\) takes no error feedback, .*: leave error_feedback='ef21' out, or use"),
], ids=str)  # fmt: skip
def test_an_error_of_one_rank_is_one_on_all(rank, size, options, kind, message):
    model = shard(Given(5000))
    if rank == 0:
        with pytest.raises(kind, match=message):
            GlobalQSGD(**options).fsdp(model)
    else:
        with pytest.raises(AgreementError, match="could not take part"):
            GlobalQSGD().fsdp(model)


@pytest.mark.usefixtures("several")
@pytest.mark.parametrize("others", [
    {"weight_bits": 4}, {}, {"weight_bits": 8, "weight_exceptions": ["w*"]},
], ids=str)  # fmt: skip
def test_ranks_that_disagree_on_weights(rank, size, others):
    model = shard(nn.Linear(50, 50))
    kept = {"weight_bits": 8, "weight_exceptions": ["bias"]}
    with pytest.raises(AgreementError, match="ranks use different options: weight_"):
        GlobalQSGD().fsdp(model, **(kept if rank == 0 else others))


@pytest.mark.parametrize(("options", "kind", "message"), [
    ({"weight_bits": 1}, ValueError, "weight_bits must be from 2 to 16 or None.*, got 1"),
    ({"weight_bits": 8.0}, TypeError, r"weight_bits must be an int or None \(weights as they are"),
    ({"weight_exceptions": ["bias"]}, ValueError, "has no effect with weight_bits=None"),
    ({"weight_bits": 8, "weight_exceptions": "bias"}, TypeError, "a sequence of .* got 'bias'"),
    ({"weight_bits": 8, "weight_exceptions": ["nor"]}, ValueError,
     "has 'nor', which is the name of no parameter: they are weight, bias$"),
    ({"weight_bits": 8, "weight_exceptions": ["*t", "b*"]}, ValueError, "no parameter to round"),
], ids=str)  # fmt: skip
def test_options_of_weights(rank, size, options, kind, message):
    """An error of one rank is one on all."""
    model = shard(nn.Linear(50, 50))
    if rank == 0:
        with pytest.raises(kind, match=message):
            GlobalQSGD().fsdp(model, **options)
    else:
        with pytest.raises(AgreementError, match="could not take part"):
            GlobalQSGD().fsdp(model)


@pytest.mark.usefixtures("several")
@pytest.mark.parametrize("stage", ["quantize_each", "dequantize_each"])
def test_an_error_while_weights_are_gathered(rank, size, stage, monkeypatch):
    """After the message it is that of one rank alone."""

    def fails(*arguments):
        raise MemoryError("on purpose")

    for attempt in range(2):
        model = shard(nn.Linear(50, 50))
        GlobalQSGD(min_numel=0).fsdp(model, weight_bits=8)
        if rank == size - 1 and not attempt:
            monkeypatch.setattr(ops, stage, fails)
        if not attempt and (rank == size - 1 or stage == "quantize_each"):
            with pytest.raises(MemoryError if rank == size - 1 else AgreementError):
                model(torch.ones(1, 50))
        else:
            model(torch.ones(1, 50))
        monkeypatch.undo()


@pytest.mark.usefixtures("several")
def test_weights_in_another_order(rank, size):
    """An error on all ranks, where PyTorch would mix up the weights of two modules."""
    models = [shard(nn.Linear(*sizes)) for sizes in ((50, 60), (60, 50))]
    for model in models:
        GlobalQSGD(min_numel=0).fsdp(model, weight_bits=8)
    with pytest.raises(AgreementError, match="handed in different tensors, or in another order"):
        models[rank == 0](torch.ones(50 if rank else 60))


@pytest.mark.usefixtures("several")
@pytest.mark.parametrize("stage", ["block_max_each", "quantize_each", "sum_codes"])
def test_an_error_between_two_messages(rank, size, stage, monkeypatch):
    """As of memory that runs out, on the last rank alone. After the last message it is that rank's
    alone, and the others have a right shard."""

    def fails(*arguments):
        raise MemoryError("on purpose")

    everyone = gradients(size, 5000)
    model = shard(Given(5000), GlobalQSGD(min_numel=0))
    if rank == size - 1:
        monkeypatch.setattr(ops, stage, fails)
    if rank == size - 1 or stage != "sum_codes":
        with pytest.raises(MemoryError if rank == size - 1 else AgreementError):
            model(everyone[rank]).backward()
    else:
        model(everyone[rank]).backward()
    monkeypatch.undo()
    model = shard(Given(5000), GlobalQSGD(min_numel=0))
    assert torch.equal(step(model, everyone[rank]), simulate(everyone, exchange="one_phase"))


@pytest.mark.usefixtures("several")
def test_modules_in_another_order(rank, size):
    """An error on all ranks, where PyTorch would end the program or wait."""
    models = [shard(Given(numel), GlobalQSGD(min_numel=0)) for numel in (4000, 5000)]
    losses = [model(torch.ones(model.weight.numel())) for model in models]
    with pytest.raises(AgreementError, match="handed in different tensors, or in another order"):
        losses[rank == 0].backward()


@pytest.mark.parametrize("seam", ["set_custom_reduce_scatter", "set_custom_all_gather"])
def test_a_pytorch_without_the_seam(rank, size, seam, monkeypatch):
    model = shard(Given(50))
    monkeypatch.delattr(FSDPModule, seam)
    with pytest.raises(NotImplementedError, match=r"needs PyTorch 2\.9 or newer"):
        GlobalQSGD().fsdp(model)


@pytest.mark.parametrize("model", [nn.Linear(3, 3), None], ids=str)
def test_what_is_no_model_of_fsdp(rank, size, model):
    with pytest.raises(TypeError, match=r"takes a model of .*: call fully_shard\(model\) before"):
        GlobalQSGD().fsdp(model)


def test_parameters_on_several_meshes(rank, size):
    common = pytest.importorskip("torch.distributed.fsdp._fully_shard._fsdp_common")
    if not hasattr(common, "ShardPlacementResult"):
        pytest.skip("needs a PyTorch that has them")
    ours, other = (
        common.FSDPMeshInfo(mesh=each, shard_mesh_dim=0)
        for each in (mesh(), DeviceMesh.from_group(dist.new_group([*range(size)]), "cpu"))
    )
    model = shard(
        nn.Linear(50, 50),
        shard_placement_fn=lambda parameter: common.ShardPlacementResult(
            Shard(0), ours if parameter.dim() == 2 else other
        ),
    )
    with pytest.raises(NotImplementedError, match="parameters are on several meshes"):
        GlobalQSGD().fsdp(model, weight_bits=8)


# --- HSDP ----------------------------------------------------------------------------------------


def grid(size):
    """Ranks by which half holds them, and by their shard."""
    if size % 2:
        pytest.skip("needs an even number of ranks")
    return mesh(2, size // 2, names=("replicate", "shard"))


@pytest.mark.core
@pytest.mark.parametrize("options", [{}, {"exchange": "two_phase", "bits": 4}], ids=str)
def test_replicas(rank, size, options):
    """PyTorch's mean within each half, which is exact here, and ours of the two halves."""
    both = grid(size)
    model = shard(Given(6000), mesh=both["shard"])
    group = both["replicate"].get_group()
    compressor = GlobalQSGD(min_numel=0, **options)
    assert compressor.fsdp(model, replicate_group=group) is model
    everyone = (16 * gradients(size, 6000)).round()
    model(everyone[rank]).backward()
    found = model.weight.grad.to_local()
    halves = everyone.view(2, size // 2, 6000).mean(1)
    shards = halves.view(2, size // 2, -1)[:, rank % (size // 2)]
    assert torch.equal(found, simulate(shards, **options))
    assert compressor.stats().tensors == 1


def test_a_mesh_that_replicates(rank, size):
    model = shard(Given(6000), mesh=grid(size))
    with pytest.raises(ValueError, match=r"HSDP.*replicate_group=mesh\['replicate'\]\.get_group"):
        GlobalQSGD().fsdp(model)


@pytest.mark.usefixtures("several")
def test_replicas_that_hold_different_shards(rank, size):
    """On the last rank alone, too: the others are told."""
    group = mesh().get_group()
    for own in (True, rank == size - 1):
        model = shard(Given(6000))
        kind, message = (ValueError, "hold different shards") if own else (AgreementError, "part")
        with pytest.raises(kind, match=message):
            GlobalQSGD().fsdp(model, replicate_group=group if own else None)


def test_replicas_no_more(rank, size):
    """A second call replaces the first, with replicas and without."""
    both = grid(size)
    group, everyone = both["replicate"].get_group(), gradients(size, 6000)
    model, compressors = shard(Given(6000), mesh=both["shard"]), []
    for replicas in (group, None, group):
        compressors.append(GlobalQSGD(min_numel=0))
        compressors[-1].fsdp(model, replicate_group=replicas)
        model(everyone[rank]).backward()
    # PyTorch reduces among more than one rank only.
    assert [each.stats().tensors for each in compressors] == [1, size > 2, 1]
