"""What Hypothesis draws, the same on all ranks, between real ones: the bits of ``simulate``."""

from __future__ import annotations

import functools

import horovod.torch as hvd
import pytest
import torch
from helpers import assert_same_on_all_ranks
from hypothesis import strategies as st
from strategies import LAYOUTS, drawn, layouts, magnitudes, operators

from hvd_gqsgd import GlobalQSGD, allreduce, simulate
from hvd_gqsgd.options import digest

pytestmark = pytest.mark.few

SHAPES = st.one_of(
    st.lists(st.integers(0, 20), max_size=3).map(tuple),
    st.sampled_from([(1023,), (1025,), (3, 700), (5, 41, 7)]),
)


@st.composite
def cases(draw, size):
    """The tensors of all ranks in some layout, options, a step, and the mean."""
    shape = draw(SHAPES)
    kind = draw(LAYOUTS)
    tensors = [layouts(x, kind) for x in draw(magnitudes((size, *shape)))]
    options, step = draw(operators(size)), draw(st.integers(0, 2**30))
    flat = torch.stack([x.reshape(-1) for x in tensors])
    return tensors, options, step, simulate(flat, step=step, **options).view(shape)


@functools.cache
def examples(size):
    return drawn(cases(size), 25)


def bits(x):
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.contiguous().view(integers[x.element_size()])


def test_allreduce(rank, size, comm):
    for tensors, options, step, expected in examples(size):
        mean = allreduce(tensors[rank], comm, step=step, **options)
        assert (mean.dtype, mean.shape) == (expected.dtype, expected.shape), options
        assert torch.equal(bits(mean), bits(expected)), (options, step)


def test_compressor(rank, size):
    for tensors, options, step, expected in examples(size):
        compressor = GlobalQSGD(min_numel=0, **options)
        compressor.load_state_dict(compressor.state_dict() | {"step": step})
        mean = hvd.allreduce(tensors[rank], compression=compressor)
        assert (mean.dtype, mean.shape) == (expected.dtype, expected.shape), options
        assert torch.equal(bits(mean), bits(expected)), (options, step)


def test_all_ranks_draw_the_same(size):
    """Or the tests above would wait for ever; and all different."""
    drawn_here = [digest(repr(example)) for example in examples(size)]
    assert len(set(drawn_here)) > 15
    assert_same_on_all_ranks(torch.tensor(drawn_here))
