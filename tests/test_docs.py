"""The README and the pages: links, commands, code, names of options and of files, the API."""

from __future__ import annotations

import argparse
import ast
import importlib
import inspect
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
from doc_code import FILES, README, ROOT

import hvd_gqsgd
from hvd_gqsgd import GlobalQSGD
from hvd_gqsgd.options import OPTIONS
from hvd_gqsgd.tools import api_page, cli
from hvd_gqsgd.tools.public_names import Entry, definitions, entries, parsed

FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)

pytestmark = pytest.mark.skipif(not README.is_file(), reason="images have no README")
every_file = pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))


def prose(file: Path) -> str:
    return FENCED.sub("", file.read_text())


def anchors(file: Path) -> set[str]:
    """The anchors that GitHub makes of headings."""
    titles = (re.sub(r"[^\w\- ]", "", title.lower()) for title in HEADING.findall(prose(file)))
    return {title.strip().replace(" ", "-") for title in titles}


def unresolved(file: Path, text: str) -> list[str]:
    """Relative links that lead nowhere."""
    found = []
    for link in LINK.findall(text):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = file.parent / name if name else file
        if not target.is_file() or (anchor and anchor not in anchors(target)):
            found.append(link)
    return found


@every_file
def test_links_resolve(file: Path) -> None:
    assert unresolved(file, prose(file)) == []


def test_wrong_links_are_found() -> None:
    text = "[a](nowhere.md) [b](README.md#nothing) [c](README.md#install) [d](#install)"
    assert unresolved(README, text) == ["nowhere.md", "README.md#nothing"]


def test_every_page_is_linked() -> None:
    """From the README, or from CONTRIBUTING, which it links."""
    linked = {ROOT / link for link in LINK.findall(prose(README))}
    assert ROOT / "CONTRIBUTING.md" in linked
    linked |= {ROOT / link for link in LINK.findall(prose(ROOT / "CONTRIBUTING.md"))}
    assert set(FILES) - {README} <= linked


def commands(file: Path) -> list[str]:
    """Each ``hvd-gqsgd ...``, in code within a line and in indented code."""
    text = prose(file).replace("\\\n", " ")
    inline = (" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text))
    found = [*inline, *re.findall(r"^ {4}(.*)$", text, re.MULTILINE)]
    matches = (re.search(r"(?:^|\s)hvd-gqsgd +(?!\.\.\.)(.+)", code) for code in found)
    return [re.split(r"\s(?:#|>|\|)", match[1])[0] for match in matches if match]


class ParsedError(Exception):
    """Raised in place of running a command."""


@pytest.fixture
def parses(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], bool]:
    """Whether a command exists and takes its arguments."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(self: argparse.ArgumentParser, *given: Any) -> None:
        parse(self, *given)  # type: ignore[call-overload]
        raise ParsedError

    def parses(command: str) -> bool:
        try:
            cli.main(shlex.split(command))
        except ParsedError:
            return True
        except SystemExit:
            pass
        return False

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    return parses


@every_file
def test_commands_parse(file: Path, parses: Callable[[str], bool]) -> None:
    assert [command for command in commands(file) if not parses(command)] == []


def test_wrong_commands_do_not_parse(parses: Callable[[str], bool]) -> None:
    assert parses("model --ranks 4")
    assert not parses("model --racks 4")
    assert not parses("models --ranks 4")


def test_all_commands_are_named() -> None:
    """And so the test above has found them."""
    given = [command for file in FILES for command in commands(file)]
    missing = {name for name in cli.COMMANDS if not any(c.startswith(name) for c in given)}
    assert missing <= {"bench calibrate"}  # as bench --calibrate
    assert len(given) > 20


def test_the_readme_is_short() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= 180
    assert len(text.split()) <= 1200


def test_tables_name_all_options() -> None:
    section = (ROOT / "hvd_gqsgd" / "docs" / "OPTIONS.md").read_text().split("## All options")[1]
    named = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    arguments = tuple(inspect.signature(GlobalQSGD).parameters)
    assert named[: len(OPTIONS)] == list(OPTIONS)
    assert set(named) == {*OPTIONS, *arguments}


@every_file
def test_files_and_targets_exist(file: Path) -> None:
    """Files and targets of ``make``, as far as code in a line names them; x is a placeholder."""
    code = re.findall(r"`([^`]+)`", prose(file))
    names = {name for part in code for name in re.findall(r"^(?:\w+/)+\w+\.\w+$", part)}
    names = {name for name in names if not re.search(r"[/_]x\.\w+$", name)}
    roots = (ROOT, ROOT / "hvd_gqsgd", file.parent)  # the second for folders of the package
    assert [name for name in names if not any((root / name).is_file() for root in roots)] == []
    targets = {target for part in code for target in re.findall(r"^make ([a-z-]+)", part)}
    makefile = (ROOT / "Makefile").read_text()
    assert [name for name in targets if not re.search(rf"^{name}:", makefile, re.MULTILINE)] == []


# --- the page of the API --------------------------------------------------------------------------

ENTRIES = [entry for part in api_page.all_entries().values() for entry in part]
every_entry = pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.name)


def test_the_page_of_the_api_is_up_to_date() -> None:
    """Else: ``python -m hvd_gqsgd.tools.api_page > hvd_gqsgd/docs/API.md``."""
    assert (ROOT / "hvd_gqsgd" / "docs" / "API.md").read_text() == api_page.page()


def public(module: str) -> list[str]:
    """A module's ``__all__``."""
    for node in parsed(module).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return list(ast.literal_eval(node.value))
    raise AssertionError(f"{module} has no __all__")


def test_the_page_has_all_public_names() -> None:
    adapters = {
        f"integrations.{file.stem}.{name}"
        for file in (ROOT / "hvd_gqsgd" / "integrations").glob("[a-z]*.py")
        for name in public(f"integrations.{file.stem}")
    }
    names = {entry.name for entry in ENTRIES if not entry.is_member}
    assert names == {*hvd_gqsgd.__all__, *adapters, "Options"} - {"GQSGDState"}


@every_entry
def test_arguments_and_results_are_documented(entry: Entry) -> None:
    assert entry.sections[""]
    arguments = [p.name.lstrip("*") for p in entry.parameters if p.name != "*"]
    assert list(entry.items("Args")) == arguments
    returns = getattr(entry.node, "returns", None)
    if not entry.is_property and returns is not None and ast.unparse(returns) != "None":
        assert "Returns" in entry.sections or entry.sections[""].startswith("Returns ")


def errors(node: ast.AST, module: str, within: dict[str, Any]) -> set[str]:
    """Errors that a function raises, itself or by private functions of its class and its module,
    and those in the docstrings of the package's functions that it calls."""
    found: set[str] = set()
    imported = {
        alias.name: each.module.removeprefix("hvd_gqsgd.")
        for each in parsed(module).body
        if isinstance(each, ast.ImportFrom) and (each.module or "").startswith("hvd_gqsgd.")
        for alias in each.names
    }
    for each in ast.walk(node):
        if isinstance(each, ast.Raise) and isinstance(each.exc, ast.Call):
            found.add(ast.unparse(each.exc.func))
        elif isinstance(each, ast.Call):
            name = ast.unparse(each.func).removeprefix("self.")
            if name in within and name.startswith("_"):
                found |= errors(within[name], module, {**within, name: ast.Pass()})
            elif name in imported:
                found |= documented_errors(name, imported[name])
    return found


def documented_errors(name: str, module: str) -> set[str]:
    """Errors in the docstring of a function or a class that a module of the package has."""
    function = getattr(importlib.import_module(f"hvd_gqsgd.{module}"), name)
    if not isinstance(function, FunctionType | type):
        return set()
    return set(next(entries(name, function.__module__.removeprefix("hvd_gqsgd."))).items("Raises"))


@every_entry
def test_errors_are_documented(entry: Entry) -> None:
    functions = definitions(parsed(entry.module).body)
    owner = functions.get(entry.name.split(".")[-2 if entry.is_member else -1])
    methods = definitions(owner.body) if isinstance(owner, ast.ClassDef) else {}
    begin = [methods.get(name) for name in ("__new__", "__init__", "__post_init__")]
    nodes = [entry.node] if entry.is_member or not methods else [node for node in begin if node]
    raised = {error for n in nodes for error in errors(n, entry.module, {**functions, **methods})}
    assert raised <= set(entry.items("Raises"))


def test_errors_are_found() -> None:
    (attach,) = [each for each in ENTRIES if each.name == "integrations.ddp.attach"]
    assert errors(attach.node, attach.module, {}) == {"TypeError"}
    assert {"TypeError", "ValueError"} <= errors(parsed("options"), "options", {})
