"""The command ``hvd-gqsgd``, as users start it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launch import run

import hvd_gqsgd
from hvd_gqsgd.bench import allreduce, hosts, memory, step
from hvd_gqsgd.bench.measured import against
from hvd_gqsgd.bench.networks import Network
from hvd_gqsgd.bench.operators import FLAT, KEPT
from hvd_gqsgd.bench.table import show_table
from hvd_gqsgd.tools import cli, doctor
from hvd_gqsgd.tools.cost_model import PRESETS, Machine
from hvd_gqsgd.tools.doctor import Finding
from hvd_gqsgd.tools.launch import printed_json

pytestmark = pytest.mark.launches

COMMAND = [sys.executable, "-m", "hvd_gqsgd"]


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    """Names every command, also to those who ask for one that there is not."""
    for given in (["--help"], [], ["bench"], ["bench", "speed"]):
        with pytest.raises(SystemExit):
            cli.main(given)
        text = "".join(capsys.readouterr())
        assert given == [] or all(name in text for name in cli.COMMANDS)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["doctr", "--no-test"], "no command 'doctr' (did you mean 'doctor'?); the commands"),
        (["bench", "stepp", "--json"], "no command 'bench stepp' (did you mean 'bench step'?);"),
        (["memory"], "no command 'memory' (did you mean 'bench memory'?);"),
        (["x"], "no command 'x'; the commands are doctor, "),
        (["--verbose"], "the following arguments are required: command"),
    ],
)
def test_a_command_that_there_is_not(
    given: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(given)
    assert exit_.value.code == 2
    assert said in capsys.readouterr().err


def test_a_command_that_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """As without Horovod, or the native part: the error alone, and where to look."""
    monkeypatch.setitem(cli.COMMANDS, "bench step", ("hvd_gqsgd.no_such_module", ""))
    with pytest.raises(SystemExit, match=r"hvd-gqsgd bench step: No module .*; run hvd-gqsgd doc"):
        cli.main(["bench", "step"])


def test_version() -> None:
    """As that of the package, by both names of the command."""
    script = Path(sys.executable).with_name("hvd-gqsgd")
    for command in (COMMAND, [str(script)]) if script.exists() else (COMMAND,):
        done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
        assert done.stdout == f"hvd_gqsgd {hvd_gqsgd.__version__}\n"


# --- doctor --------------------------------------------------------------------------------------


def test_doctor() -> None:
    """All is well where the tests run, by all launchers."""
    done = run([*COMMAND, "doctor"])
    assert done.returncode == 0, done.stdout
    for backend in ("torchrun", "mpi4py", "mpi", "gloo"):
        assert f"2 ranks over {backend}: both have the right mean" in done.stdout
    assert "native part: built for cpu" in done.stdout


@pytest.fixture
def launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes shell scripts of the launchers; before that there are none."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", "/nonexistent")

    def make(script: str) -> None:
        for name in ("mpirun", "horovodrun"):
            (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
            (tmp_path / name).chmod(0o755)

    return make


RIGHT = "echo hvd_gqsgd: the mean of {} ranks is right"


@pytest.mark.parametrize(
    ("script", "state", "found"),
    [
        (None, "missing", "was found neither in"),
        ("echo it fails; exit 1", "broken", "it fails"),
        ("echo it hangs; exec /bin/sleep 60", "broken", "not finished after 0.5 s: it hangs"),
        ("echo no rank runs", "broken", "no rank runs"),
        # Of another MPI than Horovod's: each rank is a world of its own.
        (f"{RIGHT.format(1)}; {RIGHT.format(1)}", "broken", "the mean of 1 ranks is right"),
        (f"{RIGHT.format(2)}", "broken", "is right"),
        (f"{RIGHT.format(2)}; {RIGHT.format(2)}", "ok", "both have the right mean"),
    ],
)
def test_doctor_tests_launchers(
    launcher: Callable[[str], None], script: str | None, state: str, found: str
) -> None:
    if script is not None:
        launcher(script)
    timeout = 0.5 if "hangs" in found else 20
    findings = list(doctor.check_ranks(["mpi", "gloo"], timeout=timeout))
    assert [finding.what for finding in findings] == ["2 ranks over mpi", "2 ranks over gloo"]
    for finding in findings:
        assert finding.state == state
        assert found in finding.found
        assert bool(finding.fix) == (state == "broken")


BUILT = {"built": True, "loads": True, "error": None}
ABSENT = {"built": False, "loads": None, "error": None}
UNUSABLE = {"built": True, "loads": False, "error": "it is for another PyTorch"}
NATIVE = {"cpu": BUILT, "cuda": ABSENT, "mpi": {**BUILT, "loads": None}}


def test_doctor_checks_the_native_part() -> None:
    assert doctor.check_native(NATIVE, ["cpu", "mpi"]).found == "built for cpu, mpi"
    broken = doctor.check_native({**NATIVE, "cpu": UNUSABLE}, [])
    assert (broken.state, broken.found) == ("broken", "it is for another PyTorch")
    assert "pip install" in broken.fix


def test_doctor_checks_the_instruction_set() -> None:
    assert doctor.check_instruction_set("x86-64-v3", ["generic", "x86-64-v3"]).state == "ok"
    generic = doctor.check_instruction_set("generic", ["generic"])
    assert generic.state == ("missing" if os.uname().machine == "x86_64" else "ok")


@pytest.mark.parametrize(
    ("cuda", "parts", "states"),
    [
        (BUILT, ["cpu", "cuda", "nccl"], ["ok", "ok", "ok"]),
        (BUILT, ["cpu", "cuda"], ["ok", "ok", "missing"]),
        (ABSENT, ["cpu"], ["ok", "broken"]),
        (UNUSABLE, ["cpu"], ["ok", "broken"]),
    ],
)
def test_doctor_checks_gpus(cuda: dict[str, Any], parts: list[str], states: list[str]) -> None:
    """Kernels that are not there are an error where there is a GPU; NCCL is not."""
    native = {**NATIVE, "cuda": cuda}
    findings = list(doctor.check_gpus(["A GPU", "A GPU"], native, parts))
    assert findings[0].found == "2: A GPU"
    assert [finding.state for finding in findings] == states
    assert all(finding.fix for finding in findings if finding.state != "ok")
    if cuda["error"]:
        assert cuda["error"] in findings[1].found
    without = list(doctor.check_gpus([], native, parts))
    assert [(finding.what, finding.state) for finding in without] == [("GPU", "missing")]
    only_gpu = list(doctor.check_gpus(["A GPU"], {**native, "cpu": UNUSABLE}, []))
    assert len(only_gpu) == 1


MPI = {"library": "Open MPI v9", "threads": "multiple", "error": None}


@pytest.mark.parametrize(
    ("printed", "native", "expected"),
    [
        (MPI, NATIVE, {"MPI": "ok", "native part for MPI": "ok"}),
        ({**MPI, "error": "for another MPI"}, NATIVE,
         {"MPI": "ok", "native part for MPI": "missing"}),
        ({**MPI, "error": "not built"}, {**NATIVE, "mpi": ABSENT},
         {"MPI": "ok", "native part for MPI": "missing"}),
        (MPI, {**NATIVE, "cpu": UNUSABLE}, {"MPI": "ok"}),
        ({"missing": "mpi4py"}, NATIVE, {"mpi4py": "missing"}),
        (None, NATIVE, {"MPI": "broken"}),
    ],
)  # fmt: skip
def test_doctor_checks_mpi(
    printed: dict[str, Any] | None, native: dict[str, Any], expected: dict[str, str]
) -> None:
    command = ["echo", json.dumps(printed)] if printed else ["sh", "-c", "echo no libmpi; exit 1"]
    findings = list(doctor.check_mpi(native, command))
    assert {finding.what: finding.state for finding in findings} == expected
    assert all(finding.fix for finding in findings if finding.state != "ok")
    if printed is None:
        assert "no libmpi" in findings[0].found


def test_doctor_checks_horovod() -> None:
    horovod = {"version": "1", "mpi": True, "gloo": True, "nccl": False}
    (found,) = doctor.check_horovod(horovod, [])
    assert found == Finding("Horovod", "ok", "1, with mpi, gloo")
    assert [each.state for each in doctor.check_horovod(horovod, ["A GPU"])] == ["ok", "missing"]
    (without,) = doctor.check_horovod(None, [])
    assert without.state == "missing"
    assert without.fix


def test_doctor_reports(capsys: pytest.CaptureFixture[str]) -> None:
    """With a status that says whether something is broken; what is missing is not."""
    findings = [Finding("one", "ok", "fine"), Finding("two", "missing", "not there", "buy it")]
    assert doctor.report(findings) == 0
    assert capsys.readouterr().out == "ok  one: fine\n--  two: not there\n      buy it\n"
    assert doctor.report([Finding("three", "broken", "no"), *findings]) == 1
    assert capsys.readouterr().out.startswith("!!  three: no\n")


# --- benchmarks ----------------------------------------------------------------------------------


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
    assert hosts.launch("hvd_gqsgd.bench.step", [], 1000, "1gbit") != 0
    monkeypatch.setattr(os, "geteuid", lambda: 1)
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    monkeypatch.setenv("PATH", "/nonexistent")
    assert hosts.launch("hvd_gqsgd.bench.step", [], 2, "1gbit") == 1
    said = capsys.readouterr().err
    assert "--rate needs root" in said
    assert "mpirun was found neither in" in said


@pytest.mark.parametrize("ranks", ["0", "-1", "two"])
def test_no_ranks(ranks: str, capsys: pytest.CaptureFixture[str]) -> None:
    for benchmark in ("step", "auto", "allreduce", "memory", "calibrate"):
        with pytest.raises(SystemExit, match="2"):
            cli.main(["bench", benchmark, "--ranks", ranks])
        said = capsys.readouterr().err
        assert f"argument --ranks: must be an integer of at least 1, got {ranks!r}" in said


def result_of(*arguments: str) -> dict[str, Any]:
    """The result of a benchmark on 2 ranks."""
    done = run([*COMMAND, "bench", *arguments, "--json"])
    assert done.returncode == 0, done.stdout
    return printed_json(done.stdout)


def test_bench_allreduce() -> None:
    """All arms, with the bytes that they send."""
    result = result_of("allreduce", "--largest", "0.0625", "--repeats", "2")
    assert result["ranks"] == 2
    for row in result["rows"]:
        widths = {"fp32": 32, "fp16": 16, "4 bits": 4, "4 bits per block": 4}
        bits = widths.get(row["arm"], 8)
        assert row["bytes"] * bits / 32 <= row["wire_bytes"] <= row["bytes"] * bits / 32 + 1500
        assert 0 < row["ms"] <= row["ms_p99"]
    assert {row["bytes"] for row in result["rows"]} == {4096, 16384, 65536}
    with pytest.raises(SystemExit, match="2"):
        allreduce.main(["--smallest", "2000", "--largest", "1"])


@pytest.mark.parametrize(
    ("words", "number", "kept"),
    [("", 21, 0), ("Horovod", 2, 0), ("1/64", 4, 4), ("Horovod fp32, leader", 2, 1)],
)
def test_arms_of_bench_step(words: str, number: int, kept: int) -> None:
    """Those of a part of the elements take part where they are asked for."""
    arms = step.without(KEPT, step.without(FLAT, step.chosen(words), words), words)
    assert (len(arms), len({*KEPT}.intersection(arms))) == (number, kept)


def test_bench_step(tmp_path: Path) -> None:
    """Horovod and DDP, with and without."""
    plot = tmp_path / "step.png"
    arms = "Horovod fp32,DDP fp32,GlobalQSGD 8 bits,DDP GlobalQSGD 8 bits"
    given = ["--model", "resnet20", "--arms", arms, "--repeats", "1", "--most-load", "inf"]
    result = result_of("step", *given, "--plot", str(plot))
    assert plot.read_bytes().startswith(b"\x89PNG")
    gradients = Network.of_model("resnet20").gradients
    small, full = 4 * gradients.small_elements / 1e6, 4 * gradients.elements / 1e6
    expected = {  # DDP's buckets have no small tensors
        "Horovod fp32": full, "DDP fp32": full, "DDP GlobalQSGD 8 bits": full / 4,
        "GlobalQSGD 8 bits": small + (full - small) / 4,
    }  # fmt: skip
    assert result["arms"].keys() == expected.keys()
    for name, arm in result["arms"].items():
        assert arm["ms"] > 0 and not arm.get("error"), name
        assert arm["megabytes"] == pytest.approx(expected[name], rel=0.03), name
    assert not math.isnan(result["arms"]["DDP GlobalQSGD 8 bits"]["times_faster"])
    assert result["compute_ms"] > 0
    compared = against(result, PRESETS["1gbe"])
    assert set(compared) == {"Horovod fp32", "GlobalQSGD 8 bits"}
    for name, row in compared.items():
        assert row["measured_ms"] == result["arms"][name]["ms"]
        assert row["predicted_ms"] > result["compute_ms"]


def test_bench_memory(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The peak is at most 1.5 times the gradients above that of plain Horovod."""
    result = result_of("memory", "--arms", "GlobalQSGD 8 bits")
    monkeypatch.setattr(memory, "measure", lambda *given: result)
    memory.main([])
    assert "resnet50: gradients of 102.2 MB" in capsys.readouterr().out
    assert result["gradient_megabytes"] == pytest.approx(102.2, rel=0.01)
    assert len(result["arms"]) == 2
    for name, arm in result["arms"].items():
        assert arm["peak_megabytes"] > 3 * result["gradient_megabytes"], name
        assert arm["more"] <= 1.5, name


def test_bench_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    """Operators without levels for so many ranks are left out."""
    for ranks, summed in ((2, True), (200, False)):
        arguments = ["--ranks", str(ranks), "--numel", "3000", "--repeats", "1", "--json"]
        cli.main(["bench", "cpu", *arguments])
        rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
        assert ("8 bits per block Allreduce" in rows) == summed
        assert rows["4 bits per block"]["exchange"] == "two_phase"
        assert rows["4 bits"]["to_4_bits"] == 1
        assert all(row["ns_per_element"] > 0 for row in rows.values())
    with pytest.raises(SystemExit):
        cli.main(["bench", "cpu", "--ranks", "1"])
    assert "--ranks must be at least 2, got 1" in capsys.readouterr().err
    cli.main(["bench", "cpu", "--numel", "3000", "--repeats", "1"])
    assert "4 bits per block of 128" in capsys.readouterr().out


def test_bench_calibrate() -> None:
    """A machine that the model takes."""
    machine = Machine(**result_of("--calibrate", "--repeats", "1", "--megabytes", "4"))
    assert 1e7 < machine.beta < 1e12 and 0 < machine.operation < 1
    assert 1e7 < machine.inside < 1e12 and machine.inside != Machine.inside  # which is a guess
    assert 0 <= machine.exposed <= 1
    assert all(value >= 0 for value in dataclasses.asdict(machine).values())
