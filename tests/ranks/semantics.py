"""Runs one program with plain Horovod and with GlobalQSGD, and compares what the user gets.

A program is a function that gets a :class:`Run` and returns tensors, or raises. With GlobalQSGD it
must raise the same where plain Horovod raises, and elsewhere return the same, up to the error of
quantization.

That error has a bound. With n ranks and 16 bits there are s = floor((2^16 - 1) / (2n)) levels a
side, and an element of the mean is less than M/s away from its true value, M being the largest
magnitude in its block on any rank. All gradients here are within [-1, 1], so M <= 1: a program that
returns the mean is allowed 1/s, and one that multiplies it or adds several says in
``Run.magnitude`` how many times that. What is wrong by a factor, or left out, is thousands of
levels away.
"""

from __future__ import annotations

import functools
import gc
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import horovod.torch as hvd
import pytest
import torch
from helpers import assert_same_on_all_ranks
from horovod.common.exceptions import HorovodInternalError
from torch import Tensor, nn

from hvd_gqsgd import AgreementError, GlobalQSGD
from hvd_gqsgd.codecs.linear import levels_for
from hvd_gqsgd.engine.operation_names import OperationNames
from hvd_gqsgd.registry import horovod_states

BITS = 16
MARKS = [
    pytest.mark.few,
    pytest.mark.filterwarnings("ignore"),  # Horovod's, of what is misused on purpose
]
_labels = itertools.count()


class Model(nn.Module):
    """Has whatever gradients it is given; two of its tensors are large enough to be compressed."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.wide = nn.Parameter(torch.zeros(30, 50, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(10, dtype=dtype))
        self.long = nn.Parameter(torch.zeros(2500, dtype=dtype))


class Run:
    """What a program may use: everything is new, so that none is in the way of the next one."""

    def __init__(self, make: Callable[..., Any], rank: int, size: int) -> None:
        self.rank, self.size = rank, size
        self.magnitude = 1.0
        """How many times the error of one mean may be in the result."""
        self.replicated = True
        """Whether all ranks get the same."""
        self._make = make
        self._label = f"program {next(_labels)}"

    def compression(self, **options: Any) -> Any:
        """The one in question."""
        return self._make(**options)

    def name(self, text: object = "") -> str:
        """One that no other program uses."""
        return f"{self._label}: {text}"

    def named(self, model: nn.Module) -> list[tuple[str, nn.Parameter]]:
        """As ``model.named_parameters()``, with names that no other program uses."""
        return [(self.name(name), p) for name, p in model.named_parameters()]

    def optimizer(
        self, model: nn.Module, wrapped: torch.optim.Optimizer | None = None, **options: Any
    ) -> Any:
        """As its users make it; plain SGD that takes the gradients off, unless told otherwise."""
        named = options.setdefault("named_parameters", self.named(model))
        if "compression" not in options:
            options["compression"] = self.compression(named_parameters=named)
        wrapped = wrapped or torch.optim.SGD(model.parameters(), lr=1.0)
        return hvd.DistributedOptimizer(wrapped, **options)

    def random(self, *shape: int, seed: int = 0, same: bool = False) -> Tensor:
        """This rank's numbers in [-1, 1], or the same on all ranks."""
        generator = torch.Generator().manual_seed(1000 * seed + (0 if same else 1 + self.rank))
        return torch.rand(*shape, generator=generator) * 2 - 1

    def loss(self, parameters: nn.Module | Iterable[Tensor], step: int = 0) -> Tensor:
        """One whose gradients are this rank's numbers in [-1, 1], of what requires any."""
        if isinstance(parameters, nn.Module):
            parameters = parameters.parameters()
        return torch.stack([
            (p * self.random(*p.shape, seed=10 * step + i).to(p.dtype)).sum().float()
            for i, p in enumerate(parameters) if p.requires_grad
        ]).sum()  # fmt: skip

    def backward(self, parameters: nn.Module | Iterable[Tensor], step: int = 0) -> None:
        """One backward pass of that loss."""
        self.loss(parameters, step).backward()


Program = Callable[..., Sequence[Tensor]]


def grads(model: nn.Module) -> list[Tensor]:
    """What a program returns that is about gradients."""
    return [p.grad.to_dense() for p in model.parameters() if p.grad is not None]


def weights(model: nn.Module) -> list[Tensor]:
    """What a program returns that is about what became of the parameters."""
    return [p.detach() for p in model.parameters()]


def plain(**options: Any) -> Any:
    """Horovod's own."""
    return hvd.Compression.none


def quantized(**options: Any) -> GlobalQSGD:
    """With several buckets, and tensors that are too small, even from a small model."""
    return GlobalQSGD(**{"bits": BITS, "min_numel": 100, "bucket_mb": 0.008} | options)


class Ways(list[Any]):
    """Programs, as parameters of a test. Decorate one with the options that it is called with, as
    often as there are ways to call it::

        way = Ways()

        @way()
        @way(op=hvd.Sum)
        def one_step(run, **options): ...
    """

    def __call__(self, refuses: str | None = None, **options: Any) -> Callable[[Program], Program]:
        """``refuses``: where plain Horovod would send it, whatever comes of that, GlobalQSGD raises
        an ``AgreementError`` that matches this."""

        def add(program: Program) -> Program:
            name = program.__name__ + "".join(f"-{k}={_short(v)}" for k, v in options.items())
            way = functools.partial(program, **options)
            self.append(pytest.param(way, refuses, id=name))
            return program

        return add


def check(program: Program, refuses: str | None, rank: int, size: int) -> None:
    """That a program does the same with GlobalQSGD, and that it would tell if it did not."""
    theirs = outcome(program, plain, rank, size)
    ours = outcome(program, quantized, rank, size)
    sent = not isinstance(theirs.result, Exception) or isinstance(
        theirs.result, HorovodInternalError
    )
    if refuses is not None and sent and size > 1:
        assert isinstance(ours.result, AgreementError), f"got {ours.result!r}"
        assert re.search(refuses, str(ours.result)), str(ours.result)
        return
    failed = torch.tensor(int(isinstance(ours.result, Exception)))
    if hvd.allreduce(failed, op=hvd.Max, name="failed"):  # on one rank at least
        following = [outcome(one_mean, make, rank, size) for make in (quantized, plain)]
        assert differs(*following) is None, f"the next one fails: {differs(*following)}"
    problem = differs(ours, theirs)
    assert problem is None, problem
    if isinstance(theirs.result, Exception):
        return
    if ours.run.replicated:
        for tensor in ours.result:
            assert_same_on_all_ranks(tensor)
    if size == 2 and any(tensor.any() for tensor in theirs.result):
        wrong = outcome(program, lambda **options: Doubled, rank, size)
        assert differs(wrong, theirs) is not None, "a wrong factor makes no difference"


def one_mean(run: Run) -> list[Tensor]:
    """What must work after any error."""
    return [hvd.allreduce(run.random(3000), name=run.name(), compression=run.compression())]


class Doubled(hvd.Compression.none):
    """Wrong on purpose."""

    @staticmethod
    def decompress(tensor: Tensor, ctx: Any) -> Tensor:
        return tensor * 2


class Outcome(NamedTuple):
    """What became of a program."""

    result: list[Tensor] | Exception
    run: Run


def outcome(program: Program, make: Callable[..., Any], rank: int, size: int) -> Outcome:
    """Runs a program, with what ``make`` makes as the compression."""
    run = Run(make, rank, size)
    try:
        return Outcome([tensor.detach().clone() for tensor in program(run)], run)
    except Exception as error:
        # Without the frames: they would hold on to whatever is in flight, until the garbage
        # collector comes, at another time on another rank.
        error.__context__ = error.__cause__ = None
        return Outcome(error.with_traceback(None), run)
    finally:
        complete_what_was_dropped()
        hvd.barrier()


def complete_what_was_dropped() -> None:
    """As the next step would with the names of the program, if there were one: ranks that drop a
    step have started different operations of it, and Horovod 0.28.1 does not survive ``join()`` on
    a rank that has one in flight which another rank has not."""
    names = [each for each in horovod_states(OperationNames) if each.unfinished]
    if names:
        gc.collect()  # optimizers are in cycles with their hooks
    for each in names:
        each.complete_dropped_steps()


def differs(ours: Outcome, theirs: Outcome) -> str | None:
    """How an outcome differs from plain Horovod's, if it does."""
    got, expected = ours.result, theirs.result
    if isinstance(got, Exception) or isinstance(expected, Exception):
        if type(got) is type(expected) and _words(expected) in _words(got):
            return None
        return f"plain Horovod: {expected!r}; here: {got!r}"
    if [(t.shape, t.dtype) for t in got] != [(t.shape, t.dtype) for t in expected]:
        return f"plain Horovod returns {expected!r}; here: {got!r}"
    for i, (tensor, wanted) in enumerate(zip(got, expected, strict=True)):
        rounding = 4 * torch.finfo(wanted.dtype).eps if wanted.is_floating_point() else 0
        allowed = ours.run.magnitude * (1 / levels_for(BITS, ours.run.size) + rounding)
        error = (tensor.double() - wanted.double()).abs()
        if not (error <= allowed).all():
            return f"tensor {i} is {error.max()} off, and {allowed} is allowed"
    return None


def _words(error: object) -> str:
    """The first line of what an error says, without numbers, which differ from run to run, and
    without what it tells of the type of tensor that Horovod was handed."""
    first = str(error).partition("\n")[0]
    return re.sub(r"\d+|attribute '\w+'|torch_\w+Tensor", "*", first)


def _short(value: Any) -> str:
    return getattr(value, "__name__", str(value)).replace(" ", "")
