"""That ``semantics.py`` accepts what is right and rejects what is wrong."""

from __future__ import annotations

import horovod.torch as hvd
import pytest
import torch
from semantics import BITS, Doubled, Model, differs, grads, outcome, plain, quantized

from hvd_gqsgd import GlobalQSGD
from hvd_gqsgd.codecs.linear import levels_for

pytestmark = [pytest.mark.few, pytest.mark.usefixtures("several")]


class Codes:
    """Hands Horovod the codes themselves, as integers: right in a sum, but not in a mean, which
    Horovod truncates."""

    LEVELS = 64

    @classmethod
    def compress(cls, tensor):
        return (tensor * cls.LEVELS).round().int(), tensor.dtype

    @classmethod
    def decompress(cls, tensor, ctx):
        return tensor.to(ctx) / cls.LEVELS


class Local(hvd.Compression.none):
    """Gives each rank its own."""

    @staticmethod
    def compress(tensor):
        return tensor.clone(), tensor.clone()

    @staticmethod
    def decompress(tensor, ctx):
        return ctx


class Gone(hvd.Compression.none):
    """Does nothing to the first tensor."""

    @staticmethod
    def decompress(tensor, ctx):
        return tensor if tensor.numel() > 2000 else torch.zeros_like(tensor)


def reduce_(run, op=hvd.Average):
    """Multiples of 1/64, so that the codes are exact."""
    run.magnitude = run.size if op == hvd.Sum else 1
    x = torch.full((3000,), (7 + (run.rank == 0)) / Codes.LEVELS)
    return [hvd.allreduce(x, op=op, name=run.name(), compression=run.compression())]


def train(run):
    model = Model()
    optimizer = run.optimizer(model)
    run.backward(model)
    optimizer.step()
    return grads(model)


def fail(run):
    raise ValueError("this one")


def fail_otherwise(run):
    raise ValueError("that one")


@pytest.mark.parametrize(("program", "compression", "right"), [
    (train, GlobalQSGD(bits=BITS, min_numel=100), True),
    (train, hvd.Compression.none, True),
    (train, Doubled, False),
    (train, Local, False),
    (train, Gone, False),
    (train, hvd.Compression.fp16, False),
    (train, GlobalQSGD(bits=BITS - 3, min_numel=100), False),
    (reduce_, Codes, False),
    (lambda run: reduce_(run, hvd.Sum), Codes, True),
])  # fmt: skip
def test_wrong_compressors_are_rejected(rank, size, program, compression, right):
    theirs = outcome(program, plain, rank, size)
    ours = outcome(program, lambda **options: compression, rank, size)
    assert (differs(ours, theirs) is None) is right


def test_other_errors_are_rejected(rank, size):
    one, other, none = (outcome(p, quantized, rank, size) for p in (fail, fail_otherwise, train))
    assert differs(one, one) is None
    for pair in [(one, other), (other, one), (one, none), (none, one)]:
        assert differs(*pair) is not None


def test_the_bound_is_that_of_the_mean(rank, size):
    """One level is allowed, and two are not."""

    def one(run):
        return [torch.ones(3)]

    def off_by(levels):
        return lambda run: [torch.ones(3) + levels / levels_for(BITS, size)]

    expected = outcome(one, plain, rank, size)
    assert differs(outcome(off_by(1), plain, rank, size), expected) is None
    assert differs(outcome(off_by(2), plain, rank, size), expected) is not None
