"""Methods of a class that has a default instance.

Horovod's own compressors are classes with static methods, so users pass ``compression=GlobalQSGD``.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

__all__ = ["ClassOrInstanceMethod"]

P = ParamSpec("P")
R = TypeVar("R")


class ClassOrInstanceMethod(Generic[P, R]):
    """A method that is bound to the result of ``_default()`` when called on the class."""

    def __init__(self, method: Callable[Concatenate[Any, P], R]) -> None:
        self._method = method
        self.__doc__ = method.__doc__

    def __get__(self, instance: Any, owner: Any) -> Callable[P, R]:
        bound = instance if instance is not None else owner._default()

        return MethodType(self._method, bound)
