"""Names of gradients are found in a time that grows with their number, and not with its square."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from hvd_gqsgd.frontends.parameter_names import ParameterNames


class Counted(torch.nn.Parameter):
    """A parameter that counts how often it was asked for its gradient."""

    asked = 0

    @property
    def grad(self) -> Tensor | None:
        Counted.asked += 1
        return self.__dict__.get("gradient")


def asked(names: ParameterNames, parameters: dict[str, Counted], order: list[str]) -> int:
    """How often it takes to find all of them, for gradients that come one at a time."""
    Counted.asked = 0
    for name in order:
        parameters[name].gradient = torch.ones(1)
        assert names.find(parameters[name].gradient) == name
    return Counted.asked


def made(count: int) -> tuple[ParameterNames, dict[str, Counted], list[str]]:
    parameters = {str(i): Counted(torch.zeros(1)) for i in range(count)}
    order = list(parameters)
    random.Random(count).shuffle(order)
    return ParameterNames(parameters.items()), parameters, order


@pytest.mark.parametrize("count", [1, 1000])
def test_the_order_of_the_step_before(count: int) -> None:
    """Whatever it is: as of Horovod's set of parameters that get no gradient."""
    names, parameters, order = made(count)
    for step in range(3):
        for parameter in parameters.values():
            parameter.gradient = None
        most = count**2 if step == 0 else 4 * count + 4
        assert asked(names, parameters, order) <= most


def test_gradients_that_are_all_there() -> None:
    """In another order in each step."""
    names, parameters, order = made(1000)
    for step in range(3):
        for parameter in parameters.values():
            parameter.gradient = torch.ones(1)
        random.Random(step).shuffle(order)
        Counted.asked = 0
        for name in order:
            assert names.find(parameters[name].gradient) == name
        assert Counted.asked < 6 * len(order)


def test_another_order_in_each_backward_pass() -> None:
    """As of experts that a router chooses; each gradient is asked for when it is made."""

    class Trained(torch.nn.Parameter):
        @property
        def grad(self) -> Tensor | None:
            Counted.asked += 1
            return torch.Tensor.grad.__get__(self)

    parameters = {str(i): Trained(torch.ones(1)) for i in range(1000)}
    names, order = ParameterNames(parameters.items()), list(parameters)
    found = []

    def of(name: str) -> Callable[..., None]:
        return lambda *_: found.append(
            (name, names.find(torch.Tensor.grad.__get__(parameters[name])))
        )

    nodes = [p.expand_as(p).grad_fn.next_functions[0][0] for p in parameters.values()]
    for name, node in zip(parameters, nodes, strict=True):
        node.register_hook(of(name))  # as Horovod does
    for step in range(3):
        random.Random(step).shuffle(order)
        for parameter in parameters.values():
            torch.Tensor.grad.__set__(parameter, None)
        found.clear()
        Counted.asked = 0
        sum(parameters[name] for name in order).backward()
        assert [name for name, _ in found] == order[::-1]
        assert all(name == given for name, given in found)
        assert Counted.asked < 4 * len(order)


def test_what_is_no_gradient() -> None:
    names, parameters, order = made(10)
    asked(names, parameters, order)
    assert names.find(torch.ones(1)) is None
    assert names.find(parameters[order[3]].gradient) == order[3]
