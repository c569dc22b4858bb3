"""Prints ``docs/API.md``, from the signatures and the docstrings of the public names::

python -m hvd_gqsgd.tools.api_page > hvd_gqsgd/docs/API.md
"""

from __future__ import annotations

import ast
import re
import textwrap

import hvd_gqsgd
from hvd_gqsgd.tools.public_names import Entry, Parameter, entries, source

__all__ = ["all_entries", "main", "page"]

PARTS = {
    "Front ends": ("GlobalQSGD", "DDPState", "ddp_hook", "allreduce", "simulate"),
    "Options and bit widths": ("Options", "DynamicBits", "BlockBits"),
    "Results": ("Stats", "AgreementError", "build_info"),
    "Adapters": (
        "integrations.accelerate.attach",
        "integrations.ddp.attach",
        "integrations.deepspeed.attach",
        "integrations.lightning.GQSGDStrategy",
        "integrations.ray.prepare_model",
        "integrations.transformers.GQSGDCallback",
    ),
}
INTRODUCTION = """\
# API

The public names of `hvd_gqsgd` and of its adapters. `GQSGDState` is another name of `DDPState`.
A function with `**options` takes the fields of [`Options`](#options) as keywords, and all ranks
pass the same values. Examples: [FRONTENDS.md](FRONTENDS.md) and [OPTIONS.md](OPTIONS.md).

`python -m hvd_gqsgd.tools.api_page` prints this page from the docstrings."""

ROLE = re.compile(r":\w+:`~?([\w.]+)`")
WIDTH = 120


def all_entries() -> dict[str, list[Entry]]:
    """The entries of each part of the page; a class is followed by its methods."""
    return {
        part: [entry for name in names for entry in entries(name, _module(name)) if _shown(entry)]
        for part, names in PARTS.items()
    }


def _shown(entry: Entry) -> bool:
    """Whether the entry is shown: users pass the fields of ``Options`` as keywords, without one."""
    return not entry.name.startswith("Options.")


def _module(name: str) -> str:
    own = {**hvd_gqsgd._MODULES, "Options": "options"}
    return own.get(name) or name.rpartition(".")[0]


def page() -> str:
    """Returns the page, in Markdown."""
    blocks = [INTRODUCTION]
    for part, found in all_entries().items():
        blocks.append(f"## {part}")
        for entry in found:
            blocks += _entry(entry)
    return "\n\n".join(blocks) + "\n"


def _entry(entry: Entry) -> list[str]:
    signature = textwrap.fill(
        _signature(entry), WIDTH, initial_indent=4 * " ", subsequent_indent=8 * " "
    )
    blocks = [f"{'####' if entry.is_member else '###'} `{entry.name}`", signature]
    blocks += _paragraphs(entry.sections[""])
    types = {p.name.lstrip("*"): p for p in entry.parameters}
    arguments = {f"`{p}`{_type(types[p])}": text for p, text in entry.items("Args").items()}
    errors = {f"`{name}`": text for name, text in entry.items("Raises").items()}
    heading = "Fields" if any(p.text for p in entry.parameters) else "Arguments"
    for title, rows in ((heading, arguments), ("Raises", errors)):
        if title == "Raises" and "Returns" in entry.sections:
            blocks += ["Returns:", *_paragraphs(entry.sections["Returns"])]
        if rows:
            listed = (_marked(f"- {name}: {text}", "  ") for name, text in rows.items())
            blocks += [f"{title}:", "\n".join(listed)]
    if "Example" in entry.sections:
        blocks += ["Example:", _python(entry.sections["Example"])]
    return blocks


def _signature(entry: Entry) -> str:
    node = entry.node
    if isinstance(node, ast.ClassDef) and not entry.parameters:
        return f"class {entry.name}({', '.join(map(source, node.bases))})"
    returns = f" -> {source(node.returns)}" if isinstance(node, ast.FunctionDef) else ""
    if entry.is_property:
        return f"{entry.name}{returns}"
    given = (f"{p.name}={p.default}" if p.default else p.name for p in entry.parameters)
    return f"{entry.name}({', '.join(given)}){returns}"


def _type(parameter: Parameter) -> str:
    return "" if parameter.name.startswith("*") else f" (`{parameter.type}`)"


def _paragraphs(text: str) -> list[str]:
    """Paragraphs and lists, with code in Markdown's fences."""
    blocks = []
    for block in re.split(r"\n\n(?=\S)|(?<=::)\n\n", text.strip("\n")):
        if block.startswith("    "):
            blocks.append(_python(block))
        elif block.startswith("- "):
            blocks.append("\n".join(_marked(item, "  ") for item in re.split(r"\n(?=- )", block)))
        elif block not in ("", "::"):
            blocks.append(_marked(re.sub(r"::$", ":", block)))
    return blocks


def _python(code: str) -> str:
    lines = textwrap.dedent(code).strip("\n").splitlines()
    return "\n".join(["```python", *(re.sub(r"^(>>>|\.\.\.) ", "", line) for line in lines), "```"])


def _marked(text: str, indent: str = "") -> str:
    """Wraps text, with code and references in Markdown instead of reStructuredText."""
    text = ROLE.sub(lambda role: f"`{role[1].rpartition('.')[2]}`", text).replace("``", "`")
    return textwrap.fill(
        text, WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def main() -> None:
    """Prints the page."""
    print(page(), end="")


if __name__ == "__main__":
    main()
