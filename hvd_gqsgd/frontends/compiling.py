"""Front ends under ``torch.compile``: called, and not traced."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch._C._dynamo import eval_frame

__all__ = ["opaque"]

P = ParamSpec("P")
R = TypeVar("R")

_tracer: Callable[[], object] = getattr(
    eval_frame, "get_eval_frame_callback", functools.partial(sys.modules.get, "torch._dynamo")
)
"""Returns what traces now, or None; of an older PyTorch: what may."""


def opaque(function: Callable[P, R]) -> Callable[P, R]:
    """Excludes a function from tracing by Dynamo, as ``torch.compiler.disable`` does.

    ``torch.compiler.disable`` imports Dynamo, which takes a second, and what it returns takes some
    microseconds more in each call. So it is used only while Dynamo is active, or, with a PyTorch
    that cannot tell, once Dynamo was imported.
    """

    @functools.cache
    def disabled() -> Callable[P, R]:
        made: Callable[P, R] = torch.compiler.disable(function)
        return made

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if _tracer() is None:
            return function(*args, **kwargs)
        return disabled()(*args, **kwargs)

    call._torchdynamo_disable = True  # type: ignore[attr-defined]  # read by Dynamo
    return call
