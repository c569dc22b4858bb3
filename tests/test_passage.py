"""Gradients without compression on their way through a compressor's two methods."""

from __future__ import annotations

import gc
import inspect
import time
import weakref
from typing import Any

import pytest
import torch

from hvd_gqsgd._native import ops
from hvd_gqsgd._native.passage import Counts, Passage

pytestmark = pytest.mark.skipif(not ops.COMPILED, reason="all gradients take the long way")

CONTEXT = object()


class Front:
    """A compressor with that short way; ``calls`` are those of the long ways."""

    def __init__(self, timed: bool = True) -> None:
        self.calls: list[str] = []
        self.before: Any = None  # what had passed when the last step began
        self.passes = True
        self.session = 1
        self.passage = Passage(
            self.begin, self.compress, self.decompress, CONTEXT, min_numel=10, timed=timed
        )

    def begin(self):
        self.calls.append("begin")
        self.before = self.passage.take()
        self.passage.handed_out = False
        return self.passes

    def compress(self, tensor):
        self.calls.append("compress")
        return tensor.clone(), "compressed"

    def decompress(self, tensor, context):
        self.calls.append(f"decompress {context}")
        return tensor

    def open(self, dtype=torch.float32, free=0):
        self.passage.open(dtype, free, ((vars(self), "session"),))
        return self

    def exchange(self, *tensors):
        """One step."""
        exchanged = [self.passage.compress(tensor) for tensor in tensors]
        for tensor, (sent, context) in zip(tensors, exchanged, strict=True):
            assert self.passage.decompress(sent, context) is sent
            assert (sent is tensor) == (context in (None, CONTEXT))
        return [context for _, context in exchanged]


def test_gradients_pass_as_they_are():
    front = Front().open()
    large, small = torch.ones(10), torch.ones(3, 3)
    assert front.exchange(large, small, large) == [CONTEXT, None, CONTEXT]
    assert front.calls == ["begin"]
    counts, of_step, steps = front.passage.take()
    assert Counts(*counts) == Counts(*of_step) == Counts(20, 2, 9, 1)
    assert len(steps) == 1
    assert Counts(*front.passage.take()[0]) == Counts()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(10, dtype=torch.float64),
        torch.ones(10, requires_grad=True),
        torch.ones(20)[::2],
        torch.ones(20).to_sparse(),
        torch.ones(20, device="meta"),
        torch.ones(20).to_mkldnn(),
    ],
    ids=["dtype", "requires_grad", "not contiguous", "sparse", "device", "mkldnn"],
)
def test_others_take_the_long_way(tensor):
    front = Front().open()
    front.passage.compress(tensor)
    assert front.calls == ["compress"]
    assert Counts(*front.passage.take()[0]) == Counts()


def test_what_is_no_tensor():
    front = Front().open()
    with pytest.raises(AttributeError, match="clone"):
        front.passage.compress(3)
    with pytest.raises(TypeError, match="missing 1 required"):
        front.passage.compress()
    with pytest.raises(TypeError, match="missing 1 required"):
        front.passage.decompress(torch.ones(10))


def test_keywords():
    front = Front().open()
    sent, context = front.passage.compress(tensor=torch.ones(10))
    assert front.passage.decompress(tensor=sent, context=context) is sent
    assert front.calls == ["compress", "decompress compressed"]
    assert [*inspect.signature(front.passage.compress).parameters] == ["tensor"]
    assert [*inspect.signature(front.passage.decompress).parameters] == ["tensor", "ctx"]


class Wrapper(torch.Tensor):
    """Asks Python for its strides, which raises an error."""

    @staticmethod
    def __new__(cls):
        return torch.Tensor._make_wrapper_subclass(
            cls, (10,), dtype=torch.float32, dispatch_sizes_strides_policy="strides"
        )

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise ArithmeticError(f"no {function}")


def test_an_error_of_a_tensor():
    """That of the long way."""
    front = Front().open()
    with pytest.raises(ArithmeticError, match=r"no aten\.clone"):
        front.passage.compress(Wrapper())
    assert front.calls == ["compress"]


def test_a_subclass_of_tensor_passes():
    parameter = torch.nn.Parameter(torch.ones(10), requires_grad=False)
    assert Front().open().exchange(parameter) == [CONTEXT]


def test_a_way_that_is_not_open():
    front = Front()
    assert front.exchange(torch.ones(10)) == ["compressed"]
    front.open().passage.close()
    assert front.exchange(torch.ones(10)) == ["compressed"]
    assert front.calls == ["compress", "decompress compressed"] * 2


def test_a_variable_that_changes():
    """In the middle of a step, and between two of them."""
    front = Front().open(free=5)
    large = torch.ones(10)
    front.exchange(large)
    front.passage.compress(large)
    front.session = 2
    front.passage.compress(large)
    assert front.calls == ["compress"]
    front.open(free=5)
    assert front.exchange(large) == [CONTEXT]
    del front.session
    assert front.exchange(large) == ["compressed"]
    with pytest.raises(KeyError, match="session"):
        front.open()


def test_steps_that_begin_freely():
    """And their times, without that of the step before them."""
    front = Front().open(free=2)
    large, small = torch.ones(10), torch.ones(5)
    before = time.perf_counter()
    for _ in range(3):
        front.exchange(large, large, small)
    assert front.calls == ["begin"]
    counts, of_step, (first, *more) = front.before
    assert Counts(*counts) == Counts(40, 4, 10, 2)
    assert Counts(*of_step) == Counts(20, 2, 5, 1)
    assert first == (0.0, 0.0, 0.0)
    assert len(more) == 2
    times = [before, *(time for step in more for time in step)]
    assert times == sorted(times)
    (last,) = front.passage.take()[2]
    assert 0.0 == last[0] < times[-1] < last[1] < last[2] < time.perf_counter()


def test_a_step_that_goes_compressed():
    front = Front().open()
    front.passes = False
    assert front.exchange(torch.ones(10)) == ["compressed"]
    assert front.calls == ["begin", "compress", "decompress compressed"]


def test_no_clock_is_read():
    front = Front(timed=False).open()
    front.exchange(torch.ones(10))
    assert front.passage.take()[2] == ((0.0, 0.0, 0.0),)


@pytest.mark.parametrize("where", ["begin", "compress", "decompress"])
def test_errors_of_the_long_way(where):
    front = Front()

    def fail(*args):
        raise ArithmeticError(where)

    setattr(front, where, fail)
    front.passage = Passage(front.begin, front.compress, front.decompress, CONTEXT, 10, True)
    if where == "begin":
        front.open()
    with pytest.raises(ArithmeticError, match=where):
        front.exchange(torch.ones(10))


@pytest.mark.parametrize(
    "arguments",
    [
        ("float32", 0, ()),
        (torch.float32, "0", ()),
        (torch.float32, 0, []),
        (torch.float32, 0, (({}, 3),)),
        (torch.float32, 0, ((3, "a"),)),
    ],
)
def test_wrong_arguments(arguments):
    with pytest.raises(TypeError):
        Front().passage.open(*arguments)
    with pytest.raises(TypeError):
        Passage(3)


def test_nothing_is_kept():
    """Neither gradients nor a compressor that is no longer used."""
    front = Front().open(free=1000)
    tensor = torch.ones(10)
    for _ in range(100):
        front.exchange(tensor)
    gone = weakref.ref(tensor)
    del tensor
    assert gone() is None
    gone = weakref.ref(front)
    del front
    gc.collect()
    assert gone() is None
