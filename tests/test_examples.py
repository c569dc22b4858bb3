"""The examples, on real ranks, with what they promise."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from launch import HERE, mpirun, run

from hvd_gqsgd.codecs.bit_schedule import wire_bits

pytestmark = pytest.mark.launches

EXAMPLES = HERE.parent / "examples"
DIGITS = EXAMPLES / "digits_cnn.py"


def train(folder: Path, *arguments: str) -> dict[str, Any]:
    """The result of training on the digits with 2 ranks."""
    result = folder / "result.json"
    command = [sys.executable, str(DIGITS), "--json", str(result), *arguments]
    job = run(mpirun(2) + command, limit=240)
    assert job.returncode == 0, job.stdout[-5000:]
    return json.loads(result.read_text())


@pytest.mark.timeout(600)
def test_dynamic_bits_reach_the_accuracy_of_eight(tmp_path: Path) -> None:
    """A budget of 5 mean bits costs less than a point, is held, and really moves the width."""
    plot = tmp_path / "bits.png"
    epochs = ["--epochs", "8"]
    fixed = train(tmp_path, *epochs, "--bits", "8")
    dynamic = train(tmp_path, *epochs, "--bits", "dynamic", "--budget", "5", "--plot", str(plot))
    assert dynamic["accuracy"] > max(fixed["accuracy"] - 0.01, 0.95)
    bits = [wire_bits(width) for width in dynamic["bits_per_step"]]
    assert sum(bits) / len(bits) == pytest.approx(5, rel=0.03)
    assert max(bits) - min(bits) >= 2
    shrunk = dynamic["compressed_bytes_on_wire"] / fixed["compressed_bytes_on_wire"]
    assert shrunk == pytest.approx(5 / 8, rel=0.03)
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.timeout(300)
def test_training_with_ddp() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    job = run(
        [*torchrun, "--nproc-per-node", "2", str(EXAMPLES / "digits_ddp.py"), "--epochs", "8"],
        limit=240,
    )
    assert job.returncode == 0, job.stdout[-5000:]
    accuracy = re.search(r"test accuracy +([0-9.]+)%", job.stdout)
    ratio = re.search(r"on the wire: ([0-9.]+) times fewer", job.stdout)
    assert accuracy is not None
    assert ratio is not None
    assert float(accuracy[1]) > 95
    assert float(ratio[1]) > 3.8
    assert re.search(r"replicas +identical", job.stdout)


@pytest.mark.timeout(300)
def test_training_with_fsdp(tmp_path: Path) -> None:
    """Where Horovod cannot be imported."""
    (tmp_path / "horovod.py").write_text("raise ImportError('not installed')")
    path = os.pathsep.join([str(tmp_path), str(HERE.parent)])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = ["--nproc-per-node", "2", str(EXAMPLES / "fsdp_language.py"), "--weight-bits", "8"]
    small = ["--steps", "4", "--layers", "1", "--width", "64", "--validate", "8"]
    job = run(["env", f"PYTHONPATH={path}", *torchrun, *script, *small], 240)
    assert job.returncode == 0, job.stdout[-5000:]
    assert float(re.findall(r"perplexity +([0-9.]+)", job.stdout)[0]) < 256
    for kind, least in (("gradient", 3.8), ("weight", 3.5)):
        ratio = re.findall(rf"{kind} bytes .* on the wire: ([0-9.]+) times fewer", job.stdout)
        assert float(ratio[0]) > least


@pytest.mark.timeout(100)
@pytest.mark.parametrize(("ranks", "most"), [(2, 0.03), (3, 0.04)])
def test_mean_over_mpi(ranks: int, most: float) -> None:
    job = run([*mpirun(ranks), sys.executable, str(EXAMPLES / "mpi4py_mean.py")], limit=80)
    assert job.returncode == 0, job.stdout[-5000:]
    error = re.search(r"relative error ([0-9.]+)", job.stdout)
    assert error is not None
    assert 0 < float(error[1]) < most


@pytest.mark.timeout(300)
def test_new_codec() -> None:
    """Unbiased, as its negative control is not, with a smaller error than linear codes of as many
    bytes; and the replicas of real ranks agree, or the script would fail."""
    command = [sys.executable, str(EXAMPLES / "new_codec.py")]
    job = run(command, limit=240)
    assert job.returncode == 0, job.stdout[-5000:]
    row = re.compile(r"^ +(\w+, \d bits|fp32) +([0-9.]+)(?: +([0-9,]+))?", re.MULTILINE)
    rows = row.findall(job.stdout)
    errors = {name: float(number) for name, number, nbytes in rows if not nbytes}
    for bits in (4, 8):
        assert errors[f"quadratic, {bits} bits"] < 0.85 * errors[f"linear, {bits} bits"]
    trained = {name: int(nbytes.replace(",", "")) for name, _, nbytes in rows if nbytes}
    assert trained["quadratic, 4 bits"] == trained["linear, 4 bits"] < trained["fp32"] / 7.8
    job = run([*mpirun(2), *command, "--ranks"], limit=120)
    assert job.returncode == 0, job.stdout[-5000:]
    assert re.search(r"test loss 0\.\d+, the same on 2 ranks", job.stdout)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_demo(tmp_path: Path) -> None:
    """In shared memory; it checks accuracies, bytes and replicas itself."""
    plot = tmp_path / "demo.png"
    small = ["--rate", "memory", "--width", "128", "--epochs", "8", "--plot", str(plot)]
    job = run([sys.executable, str(EXAMPLES / "demo.py"), *small], limit=500)
    assert job.returncode == 0, job.stdout[-5000:]
    for said in ('bits="auto"', "share one machine's memory", "ms of computing", "OK: accuracy"):
        assert said in job.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_rates_of_convergence() -> None:
    """In few steps: one table for each problem, and estimates that do not get in the way."""
    job = run([sys.executable, str(EXAMPLES / "rates.py"), "--steps", "16"], limit=100)
    assert job.returncode == 0, job.stdout[-5000:]
    assert len(re.findall("norm of the gradient, to the first one", job.stdout)) == 3
    lines = re.findall(r"^[|│] (?:float64|8 bits).*", job.stdout, re.MULTILINE)
    assert len(lines) == 9
    for line in lines[:6]:
        numbers = [float(cell) for cell in re.split(r"[|│]", line)[3:-1]]
        assert numbers == sorted(numbers, reverse=True)
