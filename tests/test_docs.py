"""The README and the pages: links, commands, code, names of options and of files."""

from __future__ import annotations

import argparse
import inspect
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hvd_gqsgd import GlobalQSGD
from hvd_gqsgd.options import OPTIONS
from hvd_gqsgd.tools import cli

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "hvd_gqsgd" / "docs").glob("*.md"))
FILES = [README, ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md", *PAGES]

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


def test_every_page_is_linked_from_the_readme() -> None:
    linked = {README.parent / link for link in LINK.findall(prose(README))}
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


@every_file
def test_python_blocks_compile(file: Path) -> None:
    for language, code in FENCED.findall(file.read_text()):
        if language == "python":
            compile(code, str(file), "exec")


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
    roots = (ROOT, ROOT / "hvd_gqsgd")  # the second for folders of the package
    assert [name for name in names if not any((root / name).is_file() for root in roots)] == []
    targets = {target for part in code for target in re.findall(r"^make ([a-z-]+)", part)}
    makefile = (ROOT / "Makefile").read_text()
    assert [name for name in targets if not re.search(rf"^{name}:", makefile, re.MULTILINE)] == []
