"""The command ``hvd-gqsgd``, as users start it."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from launch import run

from hvd_gqsgd import cli, doctor
from hvd_gqsgd.bench import predict
from hvd_gqsgd.model import PRESETS, Machine

COMMAND = [sys.executable, "-m", "hvd_gqsgd.cli"]


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    """Names every command, also to those who ask for one that there is not."""
    for given in (["--help"], [], ["bench"], ["bench", "speed"]):
        with pytest.raises(SystemExit):
            cli.main(given)
        text = "".join(capsys.readouterr())
        assert given == [] or all(name in text for name in cli.COMMANDS)


def test_doctor() -> None:
    """All is well where the tests run, over MPI and over Gloo."""
    done = run([*COMMAND, "doctor"])
    assert done.returncode == 0, done.stdout
    assert "2 ranks over mpi: both have the right mean" in done.stdout
    assert "2 ranks over gloo: both have the right mean" in done.stdout


def test_doctor_finds_what_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher that is missing, one that fails, and one that hangs."""
    horovod = {"version": "0", "mpi": True, "gloo": True, "nccl": False}
    monkeypatch.setattr(doctor, "_program", lambda name: None)
    assert {finding.state for finding in doctor._tests(horovod)} == {"missing"}
    monkeypatch.setattr(doctor, "_program", lambda name: "false")
    failed = list(doctor._tests(horovod))
    assert {finding.state for finding in failed} == {"broken"}
    assert all(finding.fix for finding in failed)
    monkeypatch.setattr(doctor, "LIMIT", 0.5)
    status, _ = doctor._run(["sleep", "60"])
    assert status is None


def result_of(*arguments: str) -> dict[str, Any]:
    """What a benchmark on 2 ranks prints; beside it may stand what its progress bar left."""
    done = run([*COMMAND, "bench", *arguments, "--json"])
    assert done.returncode == 0, done.stdout
    found: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :].splitlines()[0])
    return found


def test_bench_allreduce() -> None:
    """All arms, with the bytes that they send."""
    result = result_of("allreduce", "--largest", "0.0625", "--repeats", "2")
    assert result["ranks"] == 2
    for row in result["rows"]:
        bits = {"fp32": 32, "fp16": 16, "4 bits": 4}.get(row["arm"], 8)
        assert row["bytes"] * bits / 32 <= row["wire_bytes"] <= row["bytes"] * bits / 32 + 1500
        assert 0 < row["ms"] <= row["ms_p99"]
    assert {row["bytes"] for row in result["rows"]} == {4096, 16384, 65536}


def test_bench_step(tmp_path: Path) -> None:
    """Horovod and DDP, with and without."""
    plot = tmp_path / "step.png"
    arms = "Horovod fp32,DDP fp32,GlobalQSGD 8 bits,DDP GlobalQSGD 8 bits"
    result = result_of(
        "step", "--model", "dlrm", "--arms", arms, "--repeats", "1", "--plot", str(plot)
    )
    assert plot.read_bytes().startswith(b"\x89PNG")
    full = result["parameters"] * 4 / 1e6
    for name, arm in result["arms"].items():
        assert arm["ms"] > 0 and not arm.get("error"), name
        small = "8 bits" in name
        assert arm["megabytes"] == pytest.approx(full / 4 if small else full, rel=0.02)
    assert not math.isnan(result["arms"]["DDP GlobalQSGD 8 bits"]["times_faster"])
    assert 0 < result["compute_ms"] < result["arms"]["Horovod fp32"]["ms"]
    compared = predict.against(result, PRESETS["1gbe"])
    assert set(compared) == {"Horovod fp32", "GlobalQSGD 8 bits"}
    for name, row in compared.items():
        assert row["measured_ms"] == result["arms"][name]["ms"]
        assert row["predicted_ms"] > result["compute_ms"]


def test_bench_memory() -> None:
    """What the README promises: at most 1.5 times the gradients more than plain Horovod."""
    result = result_of("memory", "--arms", "GlobalQSGD 8 bits")
    assert result["gradient_megabytes"] == pytest.approx(102.2, rel=0.01)
    assert len(result["arms"]) == 2
    for name, arm in result["arms"].items():
        assert arm["peak_megabytes"] > 3 * result["gradient_megabytes"], name
        assert arm["more"] <= 1.5, name


def test_bench_calibrate() -> None:
    """A machine that the model takes."""
    machine = Machine(**result_of("--calibrate", "--repeats", "1"))
    assert 1e7 < machine.beta < 1e12 and 0 < machine.operation < 1
    assert 0 <= machine.exposed <= 1
    assert all(value >= 0 for value in dataclasses.asdict(machine).values())
