"""Signatures and docstrings of the public names, for ``docs/API.md`` and its tests.

Sources are parsed, not imported, so the libraries of adapters need not be installed.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import hvd_gqsgd

__all__ = ["Entry", "Parameter", "definitions", "entries", "parsed"]

PACKAGE = Path(hvd_gqsgd.__file__).parent
SECTION = re.compile(r"^(Args|Returns|Raises|Example):{1,2}$", re.MULTILINE)
Function = ast.FunctionDef | ast.ClassDef


@dataclass(frozen=True)
class Parameter:
    """An argument of a function, or a field of a dataclass."""

    name: str
    type: str = ""
    default: str = ""
    text: str = ""
    """The docstring of a field."""


@dataclass(frozen=True)
class Entry:
    """A public function, class, method or property."""

    name: str
    """The name below ``hvd_gqsgd``, with the module of an adapter or the class of a method."""
    module: str
    node: Function
    parameters: tuple[Parameter, ...]
    is_member: bool
    """Whether it is a method or a property."""

    @property
    def is_property(self) -> bool:
        """Whether it is a property."""
        return any("property" in ast.unparse(each) for each in self.node.decorator_list)

    @functools.cached_property
    def sections(self) -> dict[str, str]:
        """The docstring by its headings; the text before the first has the heading ``""``."""
        heading, *rest = SECTION.split(ast.get_docstring(self.node) or "")
        parts = [("", heading), *zip(rest[::2], rest[1::2], strict=True)]
        return {name: "\n".join(_dedent(text)) if name else text for name, text in parts}

    def items(self, section: str) -> dict[str, str]:
        """The names of a section of the docstring, each with its text."""
        found = re.split(r"^(\w+): ", self.sections.get(section, ""), flags=re.MULTILINE)[1:]
        texts = (" ".join(text.split()) for text in found[1::2])
        fields = {p.name: p.text for p in self.parameters if p.text and section == "Args"}
        return fields | dict(zip(found[::2], texts, strict=True))


def source(node: ast.expr | None) -> str:
    """The source of a type, without the quotes of a string."""
    return ast.unparse(node).strip("'\"") if node is not None else ""


def _dedent(text: str) -> list[str]:
    return [line.removeprefix("    ") for line in text.strip("\n").splitlines()]


@functools.cache
def parsed(module: str) -> ast.Module:
    """The syntax of a module of the package, named from there."""
    return ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text())


def definitions(body: list[ast.stmt]) -> dict[str, Function]:
    """Functions and classes by name; of overloads, the implementation."""
    return {node.name: node for node in body if isinstance(node, Function)}


def _constants(module: str) -> dict[str, str]:
    return {
        ast.unparse(node.targets[0]): ast.unparse(node.value)
        for node in parsed(module).body
        if isinstance(node, ast.Assign)
    }


def _parameters(node: Function, module: str, skip: int) -> Iterator[Parameter]:
    constants = _constants(module)

    def parameter(name: str, kind: ast.expr | None, default: ast.expr | None) -> Parameter:
        value, type_ = ast.unparse(default) if default else "", source(kind)
        choices = constants.get(type_, "")
        shown = choices if "Literal" in choices else type_
        return Parameter(name, shown, constants.get(value, value))

    if isinstance(node, ast.ClassDef):
        for field, docs in zip(node.body, node.body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and "ClassVar" not in ast.unparse(field.annotation):
                one = parameter(ast.unparse(field.target), field.annotation, field.value)
                if not one.name.startswith("_"):
                    yield Parameter(one.name, one.type, one.default, _text(docs))
        return
    given = node.args
    defaults = [None] * (len(given.args) - len(given.defaults)) + given.defaults
    for arg, default in [*zip(given.args, defaults, strict=True)][skip:]:
        yield parameter(arg.arg, arg.annotation, default)
    if given.vararg:
        yield parameter(f"*{given.vararg.arg}", given.vararg.annotation, None)
    elif given.kwonlyargs:
        yield Parameter("*")
    for arg, value in zip(given.kwonlyargs, given.kw_defaults, strict=True):
        yield parameter(arg.arg, arg.annotation, value)
    if given.kwarg:
        yield parameter(f"**{given.kwarg.arg}", given.kwarg.annotation, None)


def _text(node: ast.stmt) -> str:
    """The docstring of a field."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return " ".join(str(node.value.value).split())
    return ""


def entries(name: str, module: str) -> Iterator[Entry]:
    """A public name of a module; for a class, its public methods and properties too."""
    node = definitions(parsed(module).body)[name.rpartition(".")[2]]
    methods = definitions(node.body) if isinstance(node, ast.ClassDef) else {}
    init = methods.get("__init__")
    skip = int(isinstance(node, ast.ClassDef) and init is not None)
    yield Entry(name, module, node, tuple(_parameters(init or node, module, skip)), False)
    for method, defined in methods.items():
        if not method.startswith("_"):
            parameters = tuple(_parameters(defined, module, 1))
            yield Entry(f"{name}.{method}", module, defined, parameters, True)
