"""Each tensor that the package makes has a device and a type given, so that none follows defaults.

What that is for, on ranks: ``ranks/test_defaults.py``.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import hvd_gqsgd

PACKAGE = Path(hvd_gqsgd.__file__).parent
# Programs of their own, in which nobody sets defaults.
PROGRAMS = {"bench", "tools"}
NAMES = (
    "arange as_tensor asarray empty eye full linspace logspace ones rand randint randn randperm "
    "scalar_tensor tensor zeros"
)
FACTORIES = {f"torch.{name}" for name in NAMES.split()}


def without_device_or_dtype(source: str) -> Iterator[str]:
    """Calls of PyTorch's factories that leave the device or the type to the defaults."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in FACTORIES:
            given = {keyword.arg for keyword in node.keywords}
            if not {"device", "dtype"} <= given:
                yield f"{node.lineno}: {ast.unparse(node)}"


def test_no_tensor_follows_the_defaults() -> None:
    files = [f for f in PACKAGE.rglob("*.py") if f.relative_to(PACKAGE).parts[0] not in PROGRAMS]
    assert len(files) > 50
    found = {str(file): list(without_device_or_dtype(file.read_text())) for file in files}
    assert not {file: calls for file, calls in found.items() if calls}


def test_one_that_does_is_found() -> None:
    assert list(without_device_or_dtype("x = torch.empty(3, dtype=torch.int32)"))
    assert list(without_device_or_dtype("x = torch.zeros(3, device='cpu')"))
    assert not list(without_device_or_dtype("torch.ones(3, dtype=d, device=c)"))
