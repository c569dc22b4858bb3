"""Prints tables, with rich if it is installed, or in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["show_table"]


def show_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: int = 1,
    title: str | None = None,
    markdown: bool = False,
) -> None:
    """Prints a table.

    Args:
        header: the names of columns.
        rows: the cells; if some rows have an empty last cell, each other row ends a section.
        left: number of columns of text, aligned to the left; others are aligned to the right.
        title: a line above the table.
        markdown: print Markdown also if rich is installed.
    """
    if not markdown:
        try:
            from rich.console import Console
            from rich.table import Table
        except ImportError:
            markdown = True
    if markdown:
        print(*([f"{title}:\n"] if title else []), sep="\n", end="\n" if title else "")
        rule = ["---" if column < left else "---:" for column in range(len(header))]
        for line in (header, rule, *rows):
            print("|", " | ".join(line), "|")
        return
    table = Table(title=title, title_justify="left")
    for column, name in enumerate(header):
        table.add_column(name, justify="left" if column < left else "right")
    sections = any(not row[-1] for row in rows)
    for row in rows:
        table.add_row(*row, end_section=sections and bool(row[-1]))
    Console().print(table)
