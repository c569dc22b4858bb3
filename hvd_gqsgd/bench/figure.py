"""The style of all figures: line styles, markers and grays, so that no figure needs colours."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["STYLES", "Style", "draw", "figure_file", "log_ticks", "new_figure", "save"]

FORMATS = (".png", ".pdf", ".svg")


class Style(NamedTuple):
    """How a line is drawn."""

    line: str
    marker: str
    gray: str
    width: float = 1.5


STYLES = (
    Style("-", "o", "0.0"),
    Style("--", "s", "0.0"),
    Style("-.", "D", "0.4"),
    Style("-", "v", "0.4"),
    Style(":", "^", "0.0"),
    Style("--", "x", "0.4"),
    Style("-.", "P", "0.0"),
    Style(":", "*", "0.4"),
)
"""Lines that can be told apart without colours."""


def figure_file(text: str) -> Path:
    """The file of an option such as ``--plot``, checked before anything is measured.

    Raises:
        argparse.ArgumentTypeError: no figure can be written to it.
    """
    file = Path(text)
    if file.suffix.lower() not in FORMATS:
        raise argparse.ArgumentTypeError(
            f"the file must end in {', '.join(FORMATS[:-1])} or {FORMATS[-1]}, got {text!r}"
        )
    if not file.parent.is_dir():
        raise argparse.ArgumentTypeError(
            f"{text!r} cannot be written, as there is no directory {str(file.parent)!r}: create it"
        )
    if file.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written, as it is a directory")
    if importlib.util.find_spec("matplotlib") is None:
        raise argparse.ArgumentTypeError("figures need matplotlib: pip install matplotlib")
    return file


def new_figure(
    height: float = 4.2, rows: int = 1, columns: int = 1, share_x: bool | Literal["col"] = True
) -> tuple[Figure, Sequence[Axes]]:
    """A figure of 7 inches width, and its panels, row by row, which share their axes; those along x
    in a column alone with ``share_x="col"``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, height), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=share_x, sharey=True, squeeze=False)
    for axes in panels.flat:
        axes.grid(color="0.85", linewidth=0.6)
        axes.set_axisbelow(True)
    return figure, list(panels.flat)


def draw(
    axes: Axes, x: Sequence[float], y: Sequence[float], style: Style, label: str, markers: int = 8
) -> None:
    """Draws a line with about so many markers, at places that differ by style."""
    every = max(1, len(x) // markers)
    first = STYLES.index(style) % every if style in STYLES else 0
    axes.plot(
        x, y, style.line, color=style.gray, linewidth=style.width, label=label,
        marker=style.marker, markersize=5, markevery=(first, every),
        markerfacecolor="white" if style.marker in "osDv^" else style.gray,
    )  # fmt: skip


def log_ticks(axis: Any) -> None:
    """Puts plain numbers at 1, 2, 5, 10 and so on along a logarithmic axis."""
    from matplotlib.ticker import LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def save(figure: Figure, file: Path) -> None:
    """Writes a figure, with the same bytes for the same figure."""
    figure.savefig(file, dpi=110, metadata={"Software": None} if file.suffix == ".png" else None)
