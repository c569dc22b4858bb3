"""Writes the tables of measured figures into the documentation, from ``docs/measured.json``::

    hvd-gqsgd bench step --exchange --rate 1gbit --json >result.json
    python -m hvd_gqsgd.tools.measured_page result.json

Without a file, the tables are written anew. A table stands between two comments of Markdown. The
first one names its contents:

- ``<!-- measured: step 1gbit, exchange 1gbit 2x2 -->``: the columns of results of ``bench step``,
  with the model unless it is ResNet-50, and with hosts x ranks of a host unless they are 2x1.
  With ``, few arms`` the table has the most important rows of the first processor alone.
- ``<!-- measured: table cpu -->``: the record with this name, whose ``columns`` are pairs of a
  header and the formats of the keys that a cell may have. Processor and command follow the table.
"""

from __future__ import annotations

import json
import re
import sys
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["add", "dumped", "main", "tables_of", "with_tables"]

ROOT = Path(__file__).parents[2]
FILE = ROOT / "hvd_gqsgd" / "docs" / "measured.json"
PAGES = [ROOT / "README.md", FILE.with_name("BENCHMARKS.md"), FILE.with_name("THEORY.md")]

BLOCK = re.compile(r"(<!-- measured: ([\w ,]+) -->\n).*?(\n<!-- end -->)", re.DOTALL)
FEW = (
    "Horovod fp32", "Horovod fp16", "GlobalQSGD 8 bits", "GlobalQSGD 4 bits",
    "DDP PowerSGD rank 4", "DDP GlobalQSGD 8 bits",
)  # fmt: skip
SETS = {"x86-64-v3": "AVX2", "x86-64-v4": "AVX-512"}
RATES = {
    "shm": "shared memory", "1gbit": "1 Gbit/s", "200mbit": "200 Mbit/s",
    "100mbit": "100 Mbit/s", "50mbit": "50 Mbit/s", "10mbit": "10 Mbit/s",
}  # fmt: skip
DIGITS = {"ms": 1, "times_faster": 3, "megabytes": 1}
"""Decimal places that are kept of a result of ``bench step``, by the end of its key."""

Record = dict[str, Any]
Column = tuple[str, dict[str, str]]
"""A header, and formats by key; a cell has the first of these keys that its row has."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Adds the results in files to the records, and writes the tables."""
    records: list[Record] = json.loads(FILE.read_text())
    for name in sys.argv[1:] if arguments is None else arguments:
        records = add(records, json.loads(Path(name).read_text()))
    FILE.write_text(dumped(records))
    for page in PAGES:
        page.write_text(with_tables(page.read_text(), records))


def add(records: Sequence[Record], result: Record) -> list[Record]:
    """Returns the records with a result of ``bench step --json``.

    The result replaces one of the same kind on the same processor with the same instruction set.
    """
    arms = {
        name: {
            f"{part}{end}": round(arm[f"{part}{end}"], digits)
            for part in ("", "gradient_", "weight_", "link_")
            for end, digits in DIGITS.items()
            if f"{part}{end}" in arm and (end != "megabytes" or part == "link_")
        }
        for name, arm in result["arms"].items()
        if "error" not in arm
    }
    keys = ("what", "rate", "model", "ranks", "hosts", "processor", "instruction_set", "commit",
            "command")  # fmt: skip
    record = {key: result[key] for key in keys} | {"arms": arms}
    replaced = [
        each
        for each in records
        if "arms" in each and _machine(each) == _machine(record) and _kind(each) == _kind(record)
    ]
    return [each for each in records if each not in replaced] + [record]


def dumped(records: Sequence[Record]) -> str:
    """Returns the JSON of the records, with a line for each arm, column and row."""
    return _lines("[", map(_dumped, records), "]", 0) + "\n"


def _dumped(record: Record) -> str:
    fields = []
    for key, value in record.items():
        text = _json(value)
        if isinstance(value, dict):
            text = _lines("{", (f"{_json(k)}: {_json(v)}" for k, v in value.items()), "}", 2)
        elif isinstance(value, list):
            text = _lines("[", map(_json, value), "]", 2)
        fields.append(f"{_json(key)}: {text}")
    return _lines("{", fields, "}", 1)


def _lines(begin: str, parts: Iterable[str], end: str, depth: int) -> str:
    """The parts on lines of their own, indented by one more than ``depth``."""
    inner = "\n" + " " * (depth + 1)
    return f"{begin}{inner}{f',{inner}'.join(parts)}{inner[:-1]}{end}"


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def with_tables(page: str, records: Sequence[Record]) -> str:
    """Returns the text of a page with its tables written anew."""

    def table(match: re.Match[str]) -> str:
        return match[1] + tables_of(match[2], records) + match[3]

    return BLOCK.sub(table, page)


def tables_of(contents: str, records: Sequence[Record]) -> str:
    """Returns the tables of all processors, in Markdown.

    Args:
        contents: kinds of results, as ``"exchange 1gbit, step 1gbit"``, and ``"few arms"``, which
            shortens; or the name of a record, as ``"table cpu"``.
        records: the results.

    Raises:
        KeyError: there is no record of this name.
    """
    if contents.startswith("table "):
        named = {record["table"]: record for record in records if "table" in record}
        return _named(named[contents.removeprefix("table ")])
    kinds = [kind.strip() for kind in contents.split(",")]
    few = "few arms" in kinds
    kinds = [kind for kind in kinds if kind != "few arms"]
    steps = [record for record in records if "arms" in record]
    machines = list(dict.fromkeys(map(_machine, steps)))
    parts = []
    for machine in machines[:1] if few else machines:
        found = {_kind(record): record for record in steps if _machine(record) == machine}
        chosen = [found.get(kind) for kind in kinds]
        if any(chosen):
            parts.append(_of_steps(kinds, chosen, few))
    return "\n\n".join(parts)


def _kind(record: Record) -> str:
    """What a result of ``bench step`` measured, as the comments of pages name it."""
    model = f" {record['model']}" * (record["model"] != "resnet50")
    hosts = f" {record['hosts']}x{record['ranks'] // record['hosts']}"
    return f"{record['what']} {record['rate']}{model}{hosts * (hosts != ' 2x1')}"


def _of_steps(kinds: Sequence[str], chosen: Sequence[Record | None], few: bool) -> str:
    """The table of one processor, under its name."""
    known = [record for record in chosen if record is not None]
    names = list(dict.fromkeys(name for record in known for name in record["arms"]))
    columns: list[Column] = [(_machine(known[0]), {"name": ""})]
    rows: dict[str, Record] = {name: {"name": name} for name in names if not few or name in FEW}
    for kind, record in zip(kinds, chosen, strict=True):
        columns += [
            (header, {f"{kind} {key}": style}) for header, key, style in _columns(kind, record)
        ]
        for name, arm in (record["arms"] if record else {}).items():
            if name in rows:
                rows[name] |= {f"{kind} {key}": value for key, value in arm.items()}
    return _table(columns, list(rows.values()))


def _columns(kind: str, record: Record | None) -> list[tuple[str, str, str]]:
    """The header, the key and the format of each column of a result of ``bench step``."""
    what, rate = kind.split()[:2]
    arms = record["arms"].values() if record else ()
    sharded = any("gradient_ms" in arm for arm in arms)
    style = ".2f" if sharded else ".1f"
    columns = [(f"{what}, {RATES[rate]}: ms", "ms", ".0f"), ("speedup", "times_faster", style)]
    if record and record["ranks"] > record["hosts"] and any(a.get("link_megabytes") for a in arms):
        columns.append(("MB on a link", "link_megabytes", ".1f"))
    for part in ("gradient", "weight") if sharded else ():
        columns.append((f"{part}s: ms", f"{part}_ms", ".0f"))
        columns.append(("speedup", f"{part}_times_faster", style))
    return columns


def _named(record: Record) -> str:
    """The table of a record with columns of its own, and its processor and command."""
    source = f"{_machine(record)}: `{record['command']}`"
    return f"{_table(record['columns'], record['rows'])}\n\n{textwrap.fill(source, 120)}"


def _machine(record: Record) -> str:
    isa = record.get("instruction_set")
    return f"{record['processor']}, {SETS.get(isa, isa)}" if isa else str(record["processor"])


def _table(columns: Sequence[Column], rows: Sequence[Record]) -> str:
    lines = [
        f"| {' | '.join(header for header, _ in columns)} |",
        f"{'|---' * len(columns)}|",
        *(f"| {' | '.join(_cell(row, styles) for _, styles in columns)} |" for row in rows),
    ]
    return "\n".join(lines)


def _cell(row: Record, styles: dict[str, str]) -> str:
    """A text, a number, or a mean and its standard deviation, with a unit after the format."""
    for key, style in styles.items():
        if key in row:
            if isinstance(row[key], str):
                return str(row[key])
            style, *unit = style.split(" ")
            mean, *deviation = row[key] if isinstance(row[key], list) else [row[key]]
            spread = [f"± {each:{style.removeprefix('+')}}" for each in deviation]
            return " ".join([f"{mean:{style}}", *spread, *unit]).replace("e-0", "e-")
    return ""


if __name__ == "__main__":
    main()
