"""``hvd.DistributedOptimizer`` in all the ways that users call it: see ``semantics.py``."""

from __future__ import annotations

import horovod.torch as hvd
import pytest
import torch
from semantics import MARKS, Model, Ways, check, grads, weights
from torch import nn

pytestmark = MARKS
way = Ways()  # filled below


@pytest.mark.parametrize(("program", "refuses"), way)
def test_as_plain_horovod(rank, size, program, refuses):
    check(program, refuses, rank, size)


# What is asked for


@way()
@way(op=hvd.Sum, groups=2)
@way(num_groups=2)
@way(gradient_predivide_factor=0.5, groups=2)
@way(gradient_predivide_factor=2.0, op=hvd.Sum)
@way(backward_passes_per_step=0)
@way(groups=-1)
@way(groups=[[1.0]])
@way(named_parameters=None)
@way(op=hvd.Min, refuses="linear reduction")
@way(op=hvd.Max, refuses="linear reduction")
@way(op=hvd.Product, refuses="linear reduction")
@way(op=hvd.Adasum, refuses="linear reduction")
def one_step(run, **options):
    run.magnitude = run.size if options.get("op") == hvd.Sum else 1
    if options.get("op") == hvd.Adasum and not hvd.mpi_enabled():
        pytest.skip("ends Horovod's background thread")
    model = Model()
    optimizer = run.optimizer(model, **options)
    run.backward(model)
    optimizer.step()
    return grads(model)


@way()
@way(twice=True)
def groups_of_parameters(run, twice=False):
    model = Model()
    groups = [[model.long, model.bias], [model.wide, *([model.long] if twice else [])]]
    optimizer = run.optimizer(model, groups=groups, backward_passes_per_step=2)
    run.magnitude = 2
    run.backward(model)
    run.backward(model, step=1)
    optimizer.step()
    return grads(model)


@way(names="same")
@way(names="missing")
@way(names="not pairs")
@way(names="a generator")
@way(names="twice the same parameter")
def named_parameters(run, names):
    model = Model()
    named = run.named(model)
    if names == "same":
        named = [("x", p) for _, p in named]
    elif names == "missing":
        named = named[1:]
    elif names == "not pairs":
        named = list(model.parameters())
    elif names == "twice the same parameter":
        named.append((run.name("zzz"), model.wide))
    compression = run.compression(named_parameters=None if names == "not pairs" else named)
    if names == "a generator":
        named = (pair for pair in named)
    optimizer = run.optimizer(model, named_parameters=named, compression=compression)
    run.backward(model)
    optimizer.step()
    return grads(model)


# When backward(), step(), synchronize() and zero_grad() come


@way(passes=2, done=1)
@way(passes=3, done=2)
@way(passes=2, done=1, groups=2)
@way(passes=1, done=2)
@way(passes=2, done=3)
@way(passes=1, done=0)
@way(passes=2, done=0, groups=2)
def number_of_backward_passes(run, passes, done, **options):
    """Then an ordinary step: nothing is left of too few or too many."""
    model = Model()
    optimizer = run.optimizer(model, backward_passes_per_step=passes, **options)
    run.magnitude = passes
    for step in range(done):
        run.backward(model, step)
    optimizer.step()
    first = grads(model)
    optimizer.zero_grad()
    for step in range(passes):
        run.backward(model, step)
    optimizer.step()
    return [*(g.clone() for g in first), *grads(model)]


@way()
def another_number_of_backward_passes(run):
    model = Model()
    optimizer = run.optimizer(model)
    for passes in (1, 3, 2):
        optimizer.set_backward_passes_per_step(passes)
        for step in range(passes):
            run.backward(model, step)
        optimizer.step()
        optimizer.zero_grad()
    run.magnitude = 6
    return weights(model)


@way(then="raise")
@way(then="step")
@way(then="synchronize")
def zero_grad_too_early(run, then):
    model = Model()
    optimizer = run.optimizer(model)
    run.backward(model)
    if then == "raise" or run.size == 1:  # where Horovod has nothing in flight
        optimizer.zero_grad()
        return weights(model)
    with pytest.raises(AssertionError, match="zero_grad"):
        optimizer.zero_grad()
    getattr(optimizer, then)()
    return grads(model)


@way()
def zero_grad_of_the_model(run):
    """Which Horovod does not see; what was reduced and not used is gone."""
    model = Model()
    optimizer = run.optimizer(model)
    run.backward(model)
    optimizer.synchronize()
    model.zero_grad()
    run.backward(model, step=1)
    optimizer.step()
    return grads(model)


@way()
def zero_grad_with_an_argument(run):
    optimizer = run.optimizer(Model())
    optimizer.zero_grad(set_to_none=True)
    return []


@way()
def gradients_that_autograd_sees(run):
    model = Model()
    optimizer = run.optimizer(model)
    run.loss([p.square() for p in model.parameters()]).backward(create_graph=True)
    optimizer.step()
    return grads(model)


@way()
def clipping(run):
    """To a norm far below the gradient's, by which errors are divided; that of the norm itself is
    at most that of all 4010 elements."""
    model = Model()
    optimizer = run.optimizer(model)
    for step in range(2):
        optimizer.zero_grad()
        run.backward(model, step)
        optimizer.synchronize()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with optimizer.skip_synchronize():
            optimizer.step()
    return [*weights(model), norm / 4010**0.5]


@way()
def synchronize_twice(run):
    """A user forgot skip_synchronize(): the mean is reduced once more."""
    model = Model()
    optimizer = run.optimizer(model)
    run.backward(model)
    optimizer.synchronize()
    optimizer.step()
    run.magnitude = 2
    return grads(model)


def step_with_a_closure(run, model, optimizer, reduced):
    def closure():
        optimizer.zero_grad()
        loss = run.loss(model)
        loss.backward()
        if reduced:
            optimizer.synchronize()
        return loss

    if reduced:
        with optimizer.skip_synchronize():
            optimizer.step(closure)
    else:
        optimizer.step(closure)


@way(reduced=True)
@way(reduced=False)
def a_closure(run, reduced):
    """Horovod reduces before it calls the closure, which therefore must do so itself; otherwise
    step() takes gradients that are in flight."""
    model = Model()
    optimizer = run.optimizer(model)
    step_with_a_closure(run, model, optimizer, reduced)
    if reduced:
        return weights(model)
    optimizer.synchronize()
    return grads(model)


@way(reduced=True)
@way(reduced=False)
def a_closure_that_is_called_often(run, reduced):
    model = Model()
    lbfgs = torch.optim.LBFGS(model.parameters(), lr=1.0, max_iter=2, history_size=1)
    optimizer = run.optimizer(model, lbfgs)
    step_with_a_closure(run, model, optimizer, reduced)
    return grads(model)


@way()
def an_exception_in_the_middle_of_backward(run):
    """On all ranks, and caught; the step after it is right."""
    model = Model()
    optimizer = run.optimizer(model)
    if run.size > 1:
        model.bias.register_hook(lambda grad: 1 / 0 if len(failed) == 0 else None)
        failed = []
        with pytest.raises(ZeroDivisionError):
            run.backward(model)
        failed.append(True)
        optimizer.synchronize()
    optimizer.zero_grad()
    run.backward(model)
    optimizer.step()
    return grads(model)
