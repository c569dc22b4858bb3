"""Front ends under ``torch.compile``: called, and not traced."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

_callback: Callable[[], object]
try:
    from torch._C._dynamo.eval_frame import get_eval_frame_callback as _callback
except ImportError:
    _callback = functools.partial(sys.modules.get, "torch._dynamo")

__all__ = ["opaque"]

P = ParamSpec("P")
R = TypeVar("R")


def opaque(function: Callable[P, R]) -> Callable[P, R]:
    """Excludes a function from tracing by Dynamo, as ``torch.compiler.disable`` does.

    ``torch.compiler.disable`` imports Dynamo, which takes a second, and takes microseconds in each
    call: this function calls it while Dynamo is active.
    """

    @functools.cache
    def disabled() -> Callable[P, R]:
        made: Callable[P, R] = torch.compiler.disable(function)
        return made

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if _callback() is None:
            return function(*args, **kwargs)
        return disabled()(*args, **kwargs)

    call._torchdynamo_disable = True  # type: ignore[attr-defined]  # read while tracing a caller
    return call
