"""Rival compressors against their formulas, and the command that compares errors with theirs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hvd_gqsgd.bench import frontier, rivals
from hvd_gqsgd.bench.rivals import MXFP4, MXFP8, Float


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("element", "dtype"),
    [(MXFP8, torch.float8_e4m3fn), (Float(2, -14, 15, 57344, 8), torch.float8_e5m2)],
)
def test_small_formats_round_as_in_pytorch(element: Float, dtype: torch.dtype) -> None:
    x = torch.cat([random(2000) * 2.0**e for e in range(-20, 8)]).clamp(-448, 448)
    assert torch.equal(element.round(x), x.to(dtype).float())


def test_e2m1_has_eight_magnitudes() -> None:
    magnitudes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    assert torch.equal(MXFP4.round(magnitudes), magnitudes)
    x = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 7, -0.26])  # ties go to even mantissas
    assert MXFP4.round(x).tolist() == [0, 1, 1, 2, 2, 4, 4, 6, -0.5]


@pytest.mark.parametrize("element", [MXFP8, MXFP4])
def test_mx_scales_each_block(element: Float) -> None:
    """Powers of two change nothing but the scale; blocks do not see each other."""
    x = element.round(random(32) * element.largest / 4)
    x[0] = element.largest
    rows = torch.cat([x * 2.0**20, x * 2.0**-20, torch.zeros(40)])
    estimate = rivals.mx(torch.stack([rows, rows]), element)
    assert torch.equal(estimate.mean, rows)
    assert estimate.bits == element.bits + 0.25


@pytest.mark.parametrize("node", [1, 2, 4])
def test_qgz(node: int) -> None:
    """Each of the roundings is off by half a level at most; codes that are exact stay so."""
    rows = random(4, 1000)
    estimate = rivals.qgz(rows, node)
    level = rows.abs().max() / 7
    error = (estimate.mean - rows.mean(0)).abs().max()
    assert level / 20 < error <= (3 if node < 4 else 2) * level / 2 * 1.001
    assert estimate.bits == (4 + 1 / 16) * (1 if node == 4 else (2 + 1 / node) / 2)
    exact = torch.randint(-7, 8, (1, 1000)).float()
    exact[:, ::100] = 7
    assert torch.equal(rivals.qgz(exact.repeat(4, 1), node).mean, exact[0])


def test_int_sgd() -> None:
    """Unbiased while nothing is clipped. The mean of 400 independent estimates is off by less than
    5 standard deviations of its own, in all of 64 elements: one false alarm in 27,000 runs."""
    rows = random(4, 64)
    estimates = []
    for seed in range(400):
        rival = rivals.IntSgd(seed=seed)
        assert torch.equal(rival(rows).mean, rows.mean(0))  # the first step is exact
        estimates.append(rival(rows).mean)
        assert rival.clipped == 0
    all_ = torch.stack(estimates)
    off = (all_.mean(0) - rows.mean(0)).abs() / (all_.std(0) / 400**0.5)
    assert off.max() < 5
    assert ((all_.mean(0) + 0.05 - rows.mean(0)).abs() / (all_.std(0) / 20)).max() > 5
    rival(rows * 100)
    assert rival.clipped > 0


def test_power_sgd() -> None:
    """A mean of so many columns is exact after two steps, and others lose their rest."""
    matrix = random(30, 2) @ random(2, 20, seed=1)
    rows = torch.stack([matrix.flatten() * 0.5, matrix.flatten() * 1.5])
    rival = rivals.PowerSgd((30, 20), rank=2)
    assert torch.allclose(rival(rows).mean, rows.mean(0), atol=1e-4)
    one = rivals.PowerSgd((30, 20), rank=1)
    estimate = one(rows)
    assert not torch.allclose(estimate.mean, rows.mean(0), atol=1e-1)
    assert estimate.bits == 32 * 50 / 600


def test_fp16() -> None:
    """Each rank's gradient is rounded, and each sum."""
    rows = torch.tensor([[1.0, 65000.0, 1 + 2**-12], [2**-11, 65000.0, 1.0]])
    assert rivals.fp16(rows).mean.tolist() == [0.5, float("inf"), 1.0]


def test_frontier_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows come in the order of bytes; more bits of one kind have less error."""
    files = []
    for step in range(3):
        files.append(str(tmp_path / f"{step}.pt"))
        torch.save([random(4, 40, 50, seed=step), random(4, 40, seed=step)], files[-1])
    frontier.main(["--json", "--node", "2", *files])
    result = json.loads(capsys.readouterr().out)
    assert (result["ranks"], result["steps"]) == (4, 3)
    rows = {row["name"]: row for row in result["rows"]}
    assert [row["bits"] for row in result["rows"]] == sorted(row["bits"] for row in rows.values())
    for name in ("two phases, 4 bits", "two phases, 8 bits", "fp16"):
        following = rows[name]["error"]
        assert following < 1
    errors = [rows[f"two phases, {bits} bits"]["error"] for bits in (2, 3, 4, 5, 6, 8)]
    assert errors == sorted(errors, reverse=True)
    assert {"IntSGD, 8 bits", "ZeRO++ qgZ, 4 bits", "PowerSGD, rank 4", "MXFP4"} <= rows.keys()
    frontier.main(["--markdown", files[0]])
    assert "| MXFP8 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.pt"], "nowhere.pt cannot be read"),
        (["--ranks", "1"], "--ranks must be from 2 to 127, got 1"),
        (["--node", "3"], "--node must divide the 8 ranks, got 3"),
    ],
)
def test_wrong_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        frontier.main(arguments)
    assert message in capsys.readouterr().err


def test_a_file_of_something_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "one.pt"
    torch.save([torch.ones(1, 5)], path)
    with pytest.raises(SystemExit):
        frontier.main([str(path)])
    assert "must hold a list of tensors of shape (ranks, ...)" in capsys.readouterr().err
