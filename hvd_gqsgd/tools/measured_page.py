"""Writes the tables of measured steps into the documentation, from ``docs/measured.json``::

    hvd-gqsgd bench step --exchange --rate 1gbit --json >result.json
    python -m hvd_gqsgd.tools.measured_page result.json

Without a file, the tables are written anew. A table stands between two comments of Markdown; the
first one names its columns, as ``<!-- measured: step 1gbit, exchange 1gbit -->``, and with
``, few arms`` the table has the most important rows of the first processor alone.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["add", "main", "tables_of", "with_tables"]

ROOT = Path(__file__).parents[2]
FILE = ROOT / "hvd_gqsgd" / "docs" / "measured.json"
PAGES = [ROOT / "README.md", FILE.with_name("BENCHMARKS.md")]

BLOCK = re.compile(r"(<!-- measured: ([\w ,]+) -->\n).*?(\n<!-- end -->)", re.DOTALL)
FEW = (
    "Horovod fp32", "Horovod fp16", "GlobalQSGD 8 bits", "GlobalQSGD 4 bits",
    "DDP PowerSGD rank 4", "DDP GlobalQSGD 8 bits",
)  # fmt: skip
SETS = {"x86-64-v3": "AVX2", "x86-64-v4": "AVX-512"}
RATES = {"shm": "shared memory", "1gbit": "1 Gbit/s", "200mbit": "200 Mbit/s"}

Record = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> None:
    """Adds the results in files to the records, and writes the tables."""
    records: list[Record] = json.loads(FILE.read_text())
    for name in sys.argv[1:] if arguments is None else arguments:
        records = add(records, json.loads(Path(name).read_text()))
    FILE.write_text(json.dumps(records, indent=1) + "\n")
    for page in PAGES:
        page.write_text(with_tables(page.read_text(), records))


def add(records: Sequence[Record], result: Record) -> list[Record]:
    """Returns the records with a result of ``bench step --json``.

    The result replaces one of the same kind on the same processor.
    """
    arms = {
        name: {"ms": round(arm["ms"], 1), "times_faster": round(arm["times_faster"], 3)}
        for name, arm in result["arms"].items()
        if "error" not in arm
    }
    keys = ("what", "rate", "model", "ranks", "hosts", "processor", "instruction_set", "commit",
            "command")  # fmt: skip
    record = {key: result[key] for key in keys} | {"arms": arms}
    kind = _kind(record)
    return [each for each in records if _kind(each) != kind] + [record]


def with_tables(page: str, records: Sequence[Record]) -> str:
    """Returns the text of a page with its tables written anew."""

    def table(match: re.Match[str]) -> str:
        return match[1] + tables_of(match[2], records) + match[3]

    return BLOCK.sub(table, page)


def tables_of(columns: str, records: Sequence[Record]) -> str:
    """Returns the tables of all processors, in Markdown.

    Args:
        columns: kinds of results, as ``"exchange 1gbit, step 1gbit"``; ``"few arms"`` shortens.
        records: the results.
    """
    kinds = [column.strip() for column in columns.split(",")]
    few = "few arms" in kinds
    kinds = [kind for kind in kinds if kind != "few arms"]
    processors = list(dict.fromkeys(record["processor"] for record in records))
    parts = []
    for processor in processors[:1] if few else processors:
        found = {f"{r['what']} {r['rate']}": r for r in records if r["processor"] == processor}
        chosen = [found.get(kind) for kind in kinds]
        if any(chosen):
            parts.append(_table(kinds, chosen, few))
    return "\n\n".join(parts)


def _table(kinds: Sequence[str], chosen: Sequence[Record | None], few: bool) -> str:
    """The table of one processor, under its name."""
    known = [record for record in chosen if record is not None]
    isa = known[0]["instruction_set"]
    names = list(dict.fromkeys(name for record in known for name in record["arms"]))
    heads = [f"{what}, {RATES[rate]}: ms | speedup" for what, rate in map(str.split, kinds)]
    lines = [
        f"| {known[0]['processor']}, {SETS.get(isa, isa)} | " + " | ".join(heads) + " |",
        "|---" * (1 + 2 * len(kinds)) + "|",
    ]
    for name in names:
        if not few or name in FEW:
            arms = [record["arms"].get(name) if record else None for record in chosen]
            cells = [f"{a['ms']:.0f} | {a['times_faster']:.1f}" if a else " | " for a in arms]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _kind(record: Record) -> tuple[Any, ...]:
    return tuple(record[key] for key in ("what", "rate", "model", "ranks", "hosts", "processor"))


if __name__ == "__main__":
    main()
