"""Front ends under ``torch.compile`` are called and not traced."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import pytest
import torch
from torch import Tensor
from torch._C._dynamo import eval_frame

from hvd_gqsgd.frontends import compiling

Decorator: TypeAlias = Callable[..., Any]


@pytest.fixture(params=["PyTorch here", "PyTorch before 2.6"])
def opaque(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Decorator]:
    """The decorator, also as of a PyTorch that does not tell what traces."""
    if request.param != "PyTorch here":
        monkeypatch.delattr(eval_frame, "get_eval_frame_callback", raising=False)
        importlib.reload(compiling)
        monkeypatch.undo()
    yield compiling.opaque
    importlib.reload(compiling)


def test_calls_are_not_traced(opaque: Decorator) -> None:
    seen: list[object] = []

    @opaque
    def front_end(x: Tensor) -> Tensor:
        seen.append((type(x), torch.compiler.is_compiling()))
        return x + 1

    @torch.compile(backend="eager")
    def step(x: Tensor) -> Tensor:
        return front_end(x * 2) * 3

    x = torch.arange(3.0)
    for _ in range(2):
        assert torch.equal(step(x), (2 * x + 1) * 3)
    assert torch.equal(front_end(x), x + 1)
    assert seen == 3 * [(Tensor, False)]
    torch.compiler.reset()


def test_dynamo_is_not_imported(opaque: Decorator, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing is compiled: that would take a second."""
    monkeypatch.delitem(sys.modules, "torch._dynamo", raising=False)
    assert opaque(abs)(-3) == 3
    assert "torch._dynamo" not in sys.modules
