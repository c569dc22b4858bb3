"""The figures of benchmarks and of the performance model: one style, without colours."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib import image

from hvd_gqsgd.bench import allreduce, figure, predict, step
from hvd_gqsgd.bench.link_plot import plot_gains, plot_links
from hvd_gqsgd.bench.networks import Network
from hvd_gqsgd.bench.node_plot import plot_nodes
from hvd_gqsgd.tools.cost_model import PRESETS

RESNET = Network.of_model("resnet20")
STEPS = {
    "model": "resnet20", "what": "step", "ranks": 2,
    "arms": {"a": {"ms": 3.0, "rounds_ms": [2.0, 3.0, 5.0]}, "b": {"error": "no"}},
}  # fmt: skip
ROWS = {
    "ranks": 2,
    "rows": [
        {"arm": arm, "bytes": size, "ms": size / 1e4} for arm in "abcdefg" for size in (4096, 16384)
    ],
}
DRAW: dict[str, Callable[[Path], Any]] = {
    "step": lambda file: step._plot(STEPS, file),
    "allreduce": lambda file: allreduce._plot(ROWS, file),
    "gains": lambda file: plot_gains(RESNET, 0.1, PRESETS["1gbe"], file),
    "nodes": lambda file: plot_nodes(RESNET, 8, 0.1, PRESETS["pcie"], file),
    **{
        f"links, {preset}": lambda file, preset=preset: plot_links(
            RESNET, 4, 0.1, PRESETS[preset], file
        )
        for preset in PRESETS
    },
    "links of a size": lambda file: plot_links(
        Network.of_size(10**9, 300), 8, 0.0, PRESETS["1gbe"], file
    ),
    "links of one rank": lambda file: plot_links(RESNET, 1, 0.1, PRESETS["1gbe"], file),
    "links of a number": lambda file: plot_links(
        Network("scale", (((), (100, 100)),)), 2, 0.1, PRESETS["1gbe"], file
    ),
}


@pytest.mark.parametrize("name", DRAW)
def test_no_figure_needs_colours(name: str, tmp_path: Path) -> None:
    """Each pixel is gray, and the same figure has the same bytes."""
    file, again = tmp_path / "figure.png", tmp_path / "again.png"
    for each in (file, again):
        DRAW[name](each)
    assert file.read_bytes() == again.read_bytes()
    pixels = image.imread(file)
    assert (pixels[..., 0] == pixels[..., 1]).all() and (pixels[..., 1] == pixels[..., 2]).all()
    assert 0.5 < pixels[..., 0].mean() < 1


def test_styles_differ_without_colours() -> None:
    assert len({style.marker for style in figure.STYLES}) == len(figure.STYLES)
    assert len({(style.line, style.gray) for style in figure.STYLES}) >= 6


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg"])
def test_formats(suffix: str, tmp_path: Path) -> None:
    file = figure.figure_file(str(tmp_path / f"figure{suffix}"))
    DRAW["step"](file)
    assert file.stat().st_size > 1000


def test_files_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything is measured: what failed, the value, what is accepted."""
    with pytest.raises(argparse.ArgumentTypeError, match=r"end in .png, .pdf or .svg, got 'x.gif'"):
        figure.figure_file("x.gif")
    with pytest.raises(argparse.ArgumentTypeError, match=r"no directory '.*missing': create it"):
        figure.figure_file(str(tmp_path / "missing" / "x.png"))
    monkeypatch.setattr(figure.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(argparse.ArgumentTypeError, match="need matplotlib: pip install matplotlib"):
        figure.figure_file(str(tmp_path / "x.png"))


@pytest.mark.parametrize("option", ["--plot", "--plot-links", "--plot-nodes"])
def test_options(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for main in (predict.main, *([step.main, allreduce.main] if option == "--plot" else [])):
        with pytest.raises(SystemExit, match="2"):
            main([option, str(tmp_path / "x.txt")])
        assert f"argument {option}: the file must end in .png" in capsys.readouterr().err
    file = tmp_path / "x.png"
    predict.main(["--parameters", "1M", "--tensors", "10", option, str(file)])
    assert file.read_bytes()[:4] == b"\x89PNG"
    assert "1,000,000 parameters in 10 tensors" in capsys.readouterr().out
