"""Rival compressors against their formulas, and the command that compares errors with theirs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from hvd_gqsgd import BlockBits, simulate
from hvd_gqsgd.bench import frontier, rivals
from hvd_gqsgd.bench.rivals import MXFP4, MXFP8, Float
from hvd_gqsgd.bench.wire import wire_bytes_of
from hvd_gqsgd.options import Options
from hvd_gqsgd.simulation import SimulatedRanks


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
        scales = random(40, 1, seed=9).exp() ** 2  # rows, and so blocks, differ
        torch.save([scales * random(4, 40, 500, seed=step), random(4, 40, seed=step)], files[-1])
    frontier.main(["--json", "--node", "2", *files])
    result = json.loads(capsys.readouterr().out)
    (world,) = result["worlds"]
    assert (world["ranks"], result["steps"]) == (4, 3)
    rows = {row["name"]: row for row in world["rows"]}
    assert [row["bits"] for row in world["rows"]] == sorted(row["bits"] for row in rows.values())
    for name in ("two phases, 4 bits", "two phases, 8 bits", "fp16"):
        following = rows[name]["error"]
        assert following < 1
    for kind, widths in (("two phases", (2, 3, 4, 5, 6, 8)), ("per block", (2.5, 3, 4, 5))):
        errors = [rows[f"{kind}, {bits} bits"]["error"] for bits in widths]
        assert errors == sorted(errors, reverse=True)
    assert rows["per block, 4 bits"]["error"] < rows["two phases, 4 bits"]["error"] / 2
    assert {"IntSGD, 8 bits", "ZeRO++ qgZ, 4 bits", "PowerSGD, rank 4", "MXFP4"} <= rows.keys()
    steps = {row["name"]: row for row in world["over_steps"]}
    for bits in (4, 5, 6):
        fixed, dynamic = steps[f"{bits} bits"], steps[f"{bits} bits per step"]
        assert dynamic["bits"] == pytest.approx(fixed["bits"], abs=0.4)  # three steps: 4, 6 or 8
        assert fixed["error"] > 0
        assert dynamic["error"] > 0
        assert steps[f"{bits} bits per block"]["error"] < fixed["error"]
        assert steps[f"{bits} bits per block and step"]["error"] > 0

    frontier.main(["--markdown", "--ranks", "2", "4", "--", files[0]])
    said = capsys.readouterr().out
    assert said.count("| MXFP8 |") == 2
    assert "2 ranks, 20,040 elements" in said


def test_sizes_of_blocks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """At equal bytes: more bits have less error, whichever size; norms of 32 elements take 1.5."""
    file = tmp_path / "gradients.pt"
    torch.save([random(200, 1, seed=9).exp() ** 2 * random(4, 200, 300)], file)
    frontier.main(["--block-sizes", "--json", str(file)])
    (world,) = json.loads(capsys.readouterr().out)["worlds"]
    rows = world["block_sizes"]
    assert (3, 32) not in {(row["total"], row["block_size"]) for row in rows}
    for size in frontier.BLOCK_SIZES:
        errors = [row["error"] for row in rows if row["block_size"] == size]
        assert errors == sorted(errors, reverse=True)
    (small,) = [row for row in rows if (row["total"], row["block_size"]) == (4, 32)]
    assert small["budget"] == pytest.approx(2.5, abs=0.02)
    frontier.main(["--block-sizes", "--markdown", str(file)])
    assert "| 4 |" in capsys.readouterr().out


@pytest.mark.parametrize("options", [{"bits": 3}, {"bits": 4}, {"bits": BlockBits(2.5)}])
@pytest.mark.parametrize("size", [2, 3])
def test_bytes_are_those_that_simulated_ranks_send(size: int, options: dict[str, Any]) -> None:
    chosen = Options(**options, exchange="two_phase")
    ranks = SimulatedRanks(size, chosen)
    numels = [5000, 300, 7]
    rows = [[(str(n), random(n, seed=10 * rank + n)) for n in numels] for rank in range(size)]
    ranks.means(rows)
    assert ranks.stats.compressed_bytes_on_wire == wire_bytes_of(chosen, numels, size)


def test_simulated_ranks_are_those_of_simulate() -> None:
    rows = random(3, 5000)
    ranks = SimulatedRanks(3, Options(bits=4))
    for step in range(3):
        (mean,) = ranks.means([[("", row)] for row in rows])
        assert torch.equal(mean, simulate(rows, step=step, bits=4))


LINES = """
import argparse, torch
from torch import nn
from hvd_gqsgd.bench.trainer import Training

def parse_args(arguments):
    parser = argparse.ArgumentParser()
    parser.add_argument("--seed", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--record")
    return parser.parse_args(arguments)

def make_training(args, ranks):
    torch.manual_seed(args.seed)
    model = nn.Sequential(nn.Linear(100, 50), nn.BatchNorm1d(50))
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, 1)
    seen = []

    def loss(step, rank):
        seen.append((step, rank))
        torch.manual_seed(100 * step + rank)
        return model(torch.randn(8, 100) + rank).square().mean()

    def evaluate():
        assert seen == [(step, rank) for step in range(args.steps) for rank in range(ranks)]
        return (model[1].running_mean.abs().sum() + model[0].weight.abs().sum()).item()

    return Training(model, optimizer, schedule, args.steps, loss, "sum", evaluate)
"""


def test_training_in_one_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The recorded gradients are of the model in fp32, whatever else is trained; runs that are
    done are not repeated."""
    script = tmp_path / "lines_to_train.py"
    script.write_text(LINES)
    record, results = tmp_path / "record.pt", tmp_path / "results.jsonl"
    command = ["--train", f"{script} --steps 3 --record {record}", "--ranks", "2",
               "--settings", "fp32", "8 bits", "4 bits per block", "6 bits per step",
               "--results", str(results)]  # fmt: skip
    frontier.main([*command, "--seeds", "0", "1", "--json"])
    runs = json.loads(capsys.readouterr().out)
    assert [(run["setting"], run["seed"]) for run in runs[::4]] == [("fp32", 0), ("fp32", 1)]
    exact, eight, block, dynamic = runs[:4]
    assert exact["bits"] == 32
    assert exact["error"] == 0
    assert 0 < eight["error"] < block["error"] < 1
    assert eight["value"] == pytest.approx(exact["value"], rel=0.01)
    assert eight["value"] != exact["value"]
    assert eight["bits"] == 8 * wire_bytes_of(Options(exchange="two_phase"), [5000], 2) / 5000
    assert dynamic["bits"] == pytest.approx(6.3, abs=0.5)
    step = frontier.load(record)
    assert [x.shape for x in step] == [(2, 50), (2, 50), (2, 50), (2, 50, 100)]

    script.unlink()  # nothing is left to run
    frontier.main([*command, "--seeds", "1", "0", "--markdown"])
    said = capsys.readouterr().out
    assert "2 ranks, 3 steps, 2 seeds" in said
    assert "| 4 bits per block |" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.pt"], "nowhere.pt cannot be read"),
        (["--ranks", "1"], "--ranks must be from 2 to 127, got 1"),
        (["--node", "3"], "--node must divide the 8 ranks, got 3"),
        (["--train", "x.py", "--ranks", "2", "4"], "--ranks must be one number for --train"),
        (["--train", "x.py", "--settings", "none"], "invalid choice: 'none'"),
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
