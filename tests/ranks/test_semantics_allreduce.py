"""``hvd.allreduce`` and ``hvd.grouped_allreduce`` in all the ways that users call them: see
``semantics.py``."""

from __future__ import annotations

import horovod.torch as hvd
import pytest
import torch
from horovod.common.exceptions import HorovodInternalError
from semantics import MARKS, Ways, check

from hvd_gqsgd import AgreementError, GlobalQSGD

pytestmark = MARKS
way = Ways()  # filled below


@pytest.mark.parametrize(("program", "refuses"), way)
def test_as_plain_horovod(rank, size, program, refuses):
    check(program, refuses, rank, size)


@way(average=True)
@way(average=False)
@way(average=True, op=hvd.Sum)
@way(op=99)
@way(op="mean")
@way(op=hvd.Sum, prescale_factor=0.25, postscale_factor=-2.0)
@way(op=hvd.Sum, prescale_factor="half")
@way(op=hvd.Min, refuses="linear reduction")
@way(op=hvd.Max, refuses="linear reduction")
@way(op=hvd.Product, refuses="linear reduction")
@way(op=hvd.Adasum, refuses="linear reduction")
def one_tensor(run, **options):
    run.magnitude = run.size
    if options.get("op") == hvd.Adasum and not hvd.mpi_enabled():
        pytest.skip("ends Horovod's background thread")
    return [
        hvd.allreduce(run.random(3000), name=run.name(), compression=run.compression(), **options)
    ]


@way(average=False)
@way(op=hvd.Sum, prescale_factor=0.25, postscale_factor=-2.0)
@way(op=hvd.Max, refuses="linear reduction")
def several_tensors(run, **options):
    run.magnitude = run.size
    tensors = [run.random(*shape, seed=i) for i, shape in enumerate([(3000,), (3,), (50, 60)])]
    return hvd.grouped_allreduce(tensors, name=run.name(), compression=run.compression(), **options)


@way(numels=[])
@way(numels=[0])
@way(numels=[3])
@way(numels=[0, 300, 0])
def as_many_tensors(run, numels):
    tensors = [run.random(numel, seed=i) for i, numel in enumerate(numels)]
    compression = run.compression(min_numel=0)
    return hvd.grouped_allreduce(tensors, name=run.name(), compression=compression)


@way(op=hvd.Average)
@way(op=hvd.Sum)
@way(op=hvd.Min)
@way(op=hvd.Product)
def small_tensors(run, op):
    """They go to Horovod as they are, in any reduction."""
    run.magnitude = run.size
    compression = run.compression()
    return [hvd.allreduce(run.random(50), op=op, name=run.name(), compression=compression)]


@way(dtype=torch.int32)
@way(dtype=torch.int64, op=hvd.Average)
@way(dtype=torch.int64, op=hvd.Max)
@way(dtype=torch.int64, prescale_factor=0.5)
@way(dtype=torch.uint8)
@way(dtype=torch.int8)
@way(dtype=torch.int16)
@way(dtype=torch.bool)
@way(dtype=torch.complex64)
@way(dtype=torch.float16)
@way(dtype=torch.float64)
def types(run, dtype, op=hvd.Sum, **options):
    x = (run.random(3000) * 100).to(dtype)
    run.magnitude = 100 * run.size
    return [hvd.allreduce(x, op=op, name=run.name(), compression=run.compression(), **options)]


@way(x=[1.0, 2.0])
@way(x=None)
@way(x=1.0)
def no_tensor(run, x):
    return [hvd.allreduce(x, name=run.name(), compression=run.compression())]


@way()
def a_sparse_tensor(run):
    x = torch.eye(60).to_sparse()
    return [hvd.allreduce(x, name=run.name(), compression=run.compression()).to_dense()]


@way(call="allreduce_")
@way(call="allreduce_async")
@way(call="allreduce_async_")
@way(call="grouped_allreduce_")
@way(call="grouped_allreduce_async")
def without_an_argument_for_compression(run, call):
    x = run.random(3000)
    getattr(hvd, call)([x] if "grouped" in call else x, compression=run.compression())
    return []


@way(in_place=True)
@way(in_place=False)
def compressed_by_hand(run, in_place):
    """As Horovod's own optimizer does; with several in flight, which are asked for in another
    order."""
    compression = run.compression()
    start = hvd.allreduce_async_ if in_place else hvd.allreduce_async
    waiting = []
    for i in range(3):
        x, context = compression.compress(run.random(3000, seed=i))
        waiting.append((start(x, name=run.name(i)), context))
    return [compression.decompress(hvd.synchronize(h), context) for h, context in waiting[::-1]]


@way(op=hvd.Average)
@way(op=hvd.Sum)
@way(op=hvd.Sum, prescale_factor=0.5)
def differentiated(run, **options):
    """Forward and backward through the reduction of what requires a gradient."""
    run.magnitude = run.size
    compression = run.compression()
    x = run.random(3000).requires_grad_()
    y = hvd.allreduce(x * 1, name=run.name("one"), compression=compression, **options)
    tensors = [run.random(3000, seed=1).requires_grad_(), run.random(2000, seed=2)]
    z, w = hvd.grouped_allreduce(
        tensors, name=run.name("group"), compression=compression, **options
    )
    (y + z).mul(run.random(3000, same=True)).sum().backward()
    return [y, z, w, x.grad, tensors[0].grad]


@way(mode=torch.no_grad)
@way(mode=torch.inference_mode)
def not_differentiated(run, mode):
    x = run.random(3000).requires_grad_()
    with mode():
        y = hvd.allreduce(x, name=run.name(), compression=run.compression())
    assert not y.requires_grad
    return [y]


@way(op=hvd.Sum)
@way(prescale_factor=2.0)
def asked_otherwise_on_one_rank(run, **options):
    run.magnitude = 2
    options = options if run.rank == 0 else {}
    x = run.random(3000)
    return [hvd.allreduce(x, name=run.name(), compression=run.compression(), **options)]


@way()
def one_name_twice(run):
    compression = run.compression()
    pairs = [compression.compress(run.random(3000, seed=i)) for i in range(2)]
    handles = [hvd.allreduce_async(x, name=run.name()) for x, _ in pairs]
    return [
        compression.decompress(hvd.synchronize(h), c)
        for h, (_, c) in zip(handles, pairs, strict=True)
    ]


@pytest.mark.parametrize("other", [
    torch.ones(2900), torch.ones(60, 50), torch.ones(3000, dtype=torch.float64),
], ids=["length", "shape", "type"])  # fmt: skip
def test_disagreement_about_a_tensor(rank, several, other):
    """Horovod's error is one that elastic training takes for a lost rank; here it is another."""
    x = other if rank == 0 else torch.ones(3000)
    with pytest.raises(HorovodInternalError, match="Mismatched"):
        hvd.allreduce(x, name="plain")
    with pytest.raises(AgreementError, match="different shapes, types or order"):
        hvd.allreduce(x, name="quantized", compression=GlobalQSGD(min_numel=0))
