"""The networks that ``hvd-gqsgd model`` predicts for: by name, by size, or from a module."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import math
import operator
import os
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hvd_gqsgd.bench.gradients import Named, module_of, shapes_of
from hvd_gqsgd.tools.cost_model import Gradients

if TYPE_CHECKING:
    from torch import nn

__all__ = ["Network", "number_of"]

Shape = Sequence[float]

MODULE = 10
"""Tensors of a module for FSDP2, of a network that is given by its size."""

UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9}


@dataclass(frozen=True)
class Network:
    """The parameters of a network."""

    name: str
    modules: tuple[tuple[Shape, ...], ...]
    """The shapes of the parameters of each module that FSDP2 reduces and gathers."""
    min_numel: int = 4096
    """Tensors with fewer elements are not compressed."""

    @classmethod
    def of_model(cls, name: str) -> Network:
        """One of ``gradients.MODELS``."""
        return cls._of_named(name, shapes_of(name))

    @classmethod
    def of_size(cls, parameters: int, tensors: int) -> Network:
        """Square matrices of equal size, ``MODULE`` of them in a module.

        Args:
            parameters: number of parameters, at least ``tensors``.
            tensors: number of tensors, at least 1.
        """
        each, more = divmod(parameters, tensors)
        sides = (math.sqrt(each + (i < more)) for i in range(tensors))
        shapes = iter([(side, side) for side in sides])
        modules = iter(lambda: tuple(itertools.islice(shapes, MODULE)), ())
        size = f"{parameters / 1e6:,.4g}M" if parameters >= 10**5 else f"{parameters:,}"
        return cls(f"network of {size} parameters", tuple(modules))

    @classmethod
    def of_module(cls, name: str, module: nn.Module) -> Network:
        """The parameters of a module that require gradients.

        Raises:
            ValueError: there are none, or one is not initialized.
        """
        from torch.nn.parameter import is_lazy

        trained = [(path, p) for path, p in module.named_parameters() if p.requires_grad]
        if lazy := [path for path, p in trained if is_lazy(p)]:
            raise ValueError(
                f"{name}: parameter {lazy[0]!r} has no shape yet: pass a batch through the module "
                "before it is returned"
            )
        if not trained:
            raise ValueError(f"{name}: the module has no parameter with requires_grad=True")
        return cls._of_named(name, [(path, tuple(p.shape)) for path, p in trained])

    @classmethod
    def of_function(cls, place: str) -> Network:
        """The module that a function returns, made on the meta device where that works.

        Args:
            place: ``package.module:function``; the function is called without arguments, and once
                more without the meta device if it fails there.

        Raises:
            ValueError: there is no such function, it fails, or it returns something else.
        """
        here = os.getcwd()
        sys.path.insert(0, here)
        try:
            with contextlib.redirect_stdout(sys.stderr):  # the output may be JSON
                return cls.of_module(place, _built(place, _found(place)))
        finally:
            sys.path.remove(here)

    @classmethod
    def _of_named(cls, name: str, parameters: Iterable[Named]) -> Network:
        groups = itertools.groupby(parameters, lambda named: module_of(named[0]))
        return cls(name, tuple(tuple(shape for _, shape in group) for _, group in groups))

    @property
    def shapes(self) -> list[Shape]:
        """The shapes of all parameters."""
        return list(itertools.chain.from_iterable(self.modules))

    @property
    def module_sizes(self) -> list[int]:
        """The elements of each module."""
        return [sum(map(_size, shapes)) for shapes in self.modules]

    @property
    def gradients(self) -> Gradients:
        """The gradients of all parameters."""
        return Gradients.of(map(_size, self.shapes), self.min_numel)


def number_of(text: str) -> int:
    """The number of parameters that ``350M``, ``1.3B`` or ``25557032`` stands for.

    Raises:
        argparse.ArgumentTypeError: the text is something else, or the number is out of range.
    """
    found = re.fullmatch(r"(\d+(?:\.\d*)?(?:e\d+)?)([KMBG]?)", text.strip(), re.IGNORECASE)
    number = float(found[1]) * UNITS[found[2].upper()] if found else 0
    if not 1 <= number <= 1e15:
        raise argparse.ArgumentTypeError(
            f"must be a number from 1 to 1e15, such as 25557032, 350M or 1.3B, got {text!r}"
        )
    return round(number)


def _size(shape: Shape) -> int:
    return round(math.prod(shape))


def _found(place: str) -> Any:
    module, _, path = place.partition(":")
    if not module or not path:
        raise ValueError(f"must be package.module:function, got {place!r}")
    try:
        imported = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        raise ValueError(
            f"{place}: {module} cannot be imported ({type(error).__name__}: {error}): it must be "
            "on the Python path or in the current directory, and its import must run no program"
        ) from error
    try:
        return operator.attrgetter(path)(imported)
    except Exception as error:  # of a module that imports what it is asked for
        raise ValueError(
            f"{place}: there is no {path!r} in {module} that can be imported "
            f"({type(error).__name__}: {error})"
        ) from error


def _built(place: str, function: Any) -> nn.Module:
    import torch
    from torch import nn

    if isinstance(function, nn.Module):
        return function
    try:
        with torch.device("meta"):
            built = function()
    except (Exception, SystemExit):
        try:
            built = function()
        except (Exception, SystemExit) as error:
            raise ValueError(
                f"{place} failed ({type(error).__name__}: {error}): it must be a function that "
                "takes no arguments, reads none of the command line, and returns a torch.nn.Module"
            ) from error
    if not isinstance(built, nn.Module):
        raise ValueError(f"{place}: it must return a torch.nn.Module, got {type(built).__name__}")
    return built
