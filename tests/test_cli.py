"""The command ``hvd-gqsgd``, as users start it."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import run

from hvd_gqsgd._native import nccl as native_nccl
from hvd_gqsgd._native import ops
from hvd_gqsgd.bench import allreduce, memory, predict
from hvd_gqsgd.bench.table import show_table
from hvd_gqsgd.tools import cli, doctor
from hvd_gqsgd.tools.cost_model import PRESETS, Machine
from hvd_gqsgd.tools.launch import launch

COMMAND = [sys.executable, "-m", "hvd_gqsgd.tools.cli"]


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
    monkeypatch.setattr(doctor, "_program", lambda name: "bash")
    monkeypatch.setattr(doctor, "_run", lambda command: (None, "it hangs"))
    assert all("not done after 0.5 s: it hangs" in each.found for each in doctor._tests(horovod))


def test_doctor_says_what_can_be_done_without(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No Horovod, no kernels for this processor, no part for MPI, and no mpi4py."""
    findings = [
        *doctor._horovod(None), *doctor._tests(None), *doctor._mpi(built=False),
        doctor._instruction_set("generic", ["generic"]),
    ]  # fmt: skip
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    findings += doctor._mpi(built=True)
    found = {finding.what: finding for finding in findings}
    assert found.pop("MPI").state == "ok"
    assert set(found) == {"Horovod", "native part for MPI", "instruction set", "mpi4py"}
    assert {finding.state for finding in found.values()} == {"missing"}
    assert all(finding.fix for finding in found.values())

    monkeypatch.setattr(doctor, "examine", lambda test: iter(findings))
    with pytest.raises(SystemExit) as exit_:
        doctor.main([])
    assert exit_.value.code == 0  # nothing is broken
    assert capsys.readouterr().out.count("--  ") == 4


def test_doctor_where_mpi_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python that cannot start MPI, and a native part that was built for another one."""
    monkeypatch.setattr(sys, "executable", "false")
    (finding,) = doctor._mpi(built=True)
    assert (finding.what, finding.state) == ("MPI", "broken")
    monkeypatch.setattr(doctor, "_run", lambda command: (0, "Open MPI v9|multiple|0"))
    other = list(doctor._mpi(built=True))[-1]
    assert (other.what, other.state) == ("native part for MPI", "broken")


@pytest.mark.parametrize("devices", [("cpu",), ("cpu", "cuda")])
def test_doctor_where_there_is_a_gpu(
    monkeypatch: pytest.MonkeyPatch, devices: tuple[str, ...]
) -> None:
    """Kernels that are not built are an error there; NCCL is not."""
    for name, value in (("is_available", True), ("device_count", 2), ("get_device_name", "A GPU")):
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)
    monkeypatch.setattr(ops, "devices", lambda: devices)
    for built in (False, True):
        monkeypatch.setattr(native_nccl, "built", lambda built=built: built)
        gpu, kernels, *nccl = doctor._gpu()
        assert gpu.found == "2: A GPU"
        assert kernels.state == ("ok" if "cuda" in devices else "broken")
        expected = ["ok" if built else "missing"] if "cuda" in devices else []
        assert [finding.state for finding in nccl] == expected
    horovod = {"version": "1", "mpi": True, "gloo": True, "nccl": False}
    assert [finding.state for finding in doctor._horovod(horovod)] == ["ok", "missing"]


def test_tables(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """By rich, and as markdown, which is also what those get who have no rich."""
    header, rows = ["what", "ms", ""], [["one", "1.0", ""], ["two", "20.0", "x"]]
    show_table(header, rows, title="Times")
    lines = capsys.readouterr().out.splitlines()
    assert "Times" in lines[0]
    places = {cell: line.index(cell) for cell in ("1.0", "20.0") for line in lines if cell in line}
    assert places["1.0"] == places["20.0"] + 1  # numbers end at one place
    expected = (
        "Times:\n\n| what | ms |  |\n| --- | ---: | ---: |\n| one | 1.0 |  |\n| two | 20.0 | x |\n"
    )
    show_table(header, rows, title="Times", markdown=True)
    assert capsys.readouterr().out == expected
    monkeypatch.setitem(sys.modules, "rich.console", None)  # importing it fails
    show_table(header, rows, title="Times")
    assert capsys.readouterr().out == expected


def test_launching_where_that_is_not_possible(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without an mpirun, without root, and on more hosts than can be emulated."""
    monkeypatch.setattr(signal, "signal", lambda *given: None)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert launch("hvd_gqsgd.bench.step", [], 1000, "1gbit") != 0
    monkeypatch.setattr(os, "geteuid", lambda: 1)
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    monkeypatch.setenv("PATH", "/nonexistent")
    assert launch("hvd_gqsgd.bench.step", [], 2, "1gbit") == 1
    said = capsys.readouterr().err
    assert "--rate needs root" in said
    assert "mpirun was not found" in said


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
    with pytest.raises(SystemExit, match="2"):
        allreduce.main(["--smallest", "2000", "--largest", "1"])


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


def test_bench_memory(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What the README promises: at most 1.5 times the gradients more than plain Horovod."""
    result = result_of("memory", "--arms", "GlobalQSGD 8 bits")
    monkeypatch.setattr(memory, "measure", lambda *given: result)
    memory.main([])
    assert "resnet50: gradients of 102.2 MB" in capsys.readouterr().out
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
