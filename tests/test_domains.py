"""The three domains, on real ranks: each learns, goes on from a checkpoint, and is compared."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import HERE, mpirun, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hvd_gqsgd import simulate

pytestmark = pytest.mark.launches

EXAMPLES = HERE.parent / "examples"
QUICK_RUNS = 4


def train(script: str, folder: Path, *arguments: str, ranks: int = 2) -> str:
    """What a run on 2 ranks prints; its result is in ``result.json``."""
    result = folder / "result.json"
    command = [sys.executable, str(EXAMPLES / script), "--json", str(result), *arguments]
    job = run(mpirun(ranks) + command, limit=90)
    assert job.returncode == 0, job.stdout[-5000:]
    return job.stdout


def result_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "result.json").read_text())


def compare(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / "compare.py"), "--quick", "--folder", str(folder)]
    job = run(command, limit=600)  # a seventh of it on two idle cores
    assert job.returncode == 0, job.stdout[-5000:]
    return job


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_quick_comparison(tmp_path: Path) -> None:
    assert compare(tmp_path).stdout.count("s of training") == QUICK_RUNS
    results = {path: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert len(results) == QUICK_RUNS
    of: dict[str, dict[str, Any]] = {}
    for result in results.values():
        words = [str(result[key]) for key in ("compression", "dither", "bits") if result[key]]
        words += ["sparse"] * bool(result["sparse_bytes"])
        of.setdefault(result["domain"], {})[" ".join(words)] = result
    assert {domain: sorted(settings) for domain, settings in of.items()} == {
        "vision": ["gqsgd linear dynamic"],
        "language": ["gqsgd exponential 8", "none"],
        "recommender": ["gqsgd linear 8 sparse"],
    }

    assert all(result["replica_difference"] == 0 for result in results.values())
    assert all(result["ranks"] == 2 for result in results.values())
    # Far from chance, which is 10 %, 256 and 0.5.
    assert all(result["accuracy"] > 0.5 for result in of["vision"].values())
    assert all(result["perplexity"] < 60 for result in of["language"].values())
    assert all(result["AUC"] > 0.62 for result in of["recommender"].values())

    def ratio(domain: str, setting: str) -> float:
        result = of[domain][setting]
        return result["compressed_bytes_before"] / result["compressed_bytes_on_wire"]

    assert ratio("vision", "gqsgd linear dynamic") == pytest.approx(32 / 5, rel=0.05)
    assert ratio("language", "gqsgd exponential 8") > 3.9
    for settings in of.values():  # what they all would have taken without compression
        dense = [r["bytes_before"] / r["steps"] for r in settings.values() if not r["sparse_bytes"]]
        expected = [4 * sum(r["dense_numels"]) for r in settings.values() if not r["sparse_bytes"]]
        assert dense == expected
    # A row of a table takes its 17 numbers and a 64-bit index; 8192 flights look up one in each.
    sparse = of["recommender"]["gqsgd linear 8 sparse"]
    assert sparse["sparse_bytes"] == 15 * 8192 * (17 * 4 + 8) * sparse["steps"]

    table = (tmp_path / "comparison.md").read_text()
    for line in (
        "| fp32 |", "| DQ-SGD, 5 bits |", "| exponential, 8 bits |",
        "| linear, 8 bits, sparse tables |",
    ):  # fmt: skip
        assert line in table
    assert table.count("\n| ") == 3 + QUICK_RUNS  # three heads
    figure = (tmp_path / "comparison.png").read_bytes()
    assert figure.startswith(b"\x89PNG")
    assert len(figure) < 200_000

    # Other arguments would be another run; one file fewer, one run.
    lost, *kept = sorted(results)  # of language, which is the fastest
    lost.unlink()
    written = {path: path.stat().st_mtime_ns for path in kept}
    assert compare(tmp_path).stdout.count("s of training") == 1
    assert lost.exists()
    assert {path: path.stat().st_mtime_ns for path in kept} == written
    assert (tmp_path / "comparison.md").read_text() == table


RESUMED = [
    ("vision.py", ["--epochs", "1", "--channels", "16", "--bits", "4"], 20),
    ("language.py", ["--steps", "16", "--width", "64", "--layers", "2", "--bits", "dynamic"], 7),
    ("recommender.py", ["--batch-size", "16384", "--sparse", "--compression", "authors"], 6),
]


@pytest.mark.long  # two minutes; ranks/test_resume.py has the compressor's part of it
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("script", "arguments", "stop"), RESUMED)
def test_a_resumed_run_ends_with_the_same_bits(
    script: str, arguments: list[str], stop: int, tmp_path: Path
) -> None:
    train(script, tmp_path, *arguments)
    whole = result_of(tmp_path)
    (tmp_path / "result.json").unlink()

    checkpoint = ["--checkpoint", str(tmp_path / "checkpoint.pt"), "--save-every", "5"]
    logged = [*checkpoint, "--logdir", str(tmp_path / "log")]
    said = train(script, tmp_path, *arguments, *logged, "--stop-at", str(stop))
    assert f"stopped at step {stop} of {whole['steps']}" in said
    assert not (tmp_path / "result.json").exists()
    assert f"going on from step {stop} of" in train(script, tmp_path, *arguments, *logged)
    resumed = result_of(tmp_path)

    assert resumed["digest"] == whole["digest"]
    metric = whole["metric"]
    assert resumed[metric] == whole[metric]
    for count in ("bytes_before", "bytes_on_wire", "compressed_bytes_on_wire", "sparse_bytes"):
        assert resumed[count] == whole[count], count

    log = EventAccumulator(str(tmp_path / "log"))
    log.Reload()
    steps = [event.step for event in log.Scalars("loss")]
    assert steps == list(range(0, whole["steps"], 10))
    assert log.Scalars(metric)[0].value == pytest.approx(whole[metric], rel=1e-6)


@pytest.mark.long
@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("language", ["--steps", "5", "--width", "64", "--layers", "2"]),
        ("recommender", ["--batch-size", "32768"]),
    ],
)
@pytest.mark.parametrize("bits", ["block", "dynamic"])
def test_ranks_in_one_process_train_to_the_same_bits(
    script: str, arguments: list[str], bits: str, tmp_path: Path
) -> None:
    wide = ["--bits", bits, "--budget", "4", "--exchange", "two_phase"]
    train(f"{script}.py", tmp_path, *arguments, *wide)
    program = ONE_PROCESS.format(examples=EXAMPLES, script=script, arguments=arguments, bits=bits)
    job = run([sys.executable, "-c", program], limit=90)
    assert job.returncode == 0, job.stdout[-5000:]
    assert job.stdout.split()[-1] == result_of(tmp_path)["digest"]


ONE_PROCESS = """
import hashlib, sys, torch
sys.path.insert(0, "{examples}")
import {script} as example
from hvd_gqsgd import BlockBits, DynamicBits
from hvd_gqsgd.bench.trainer import train
from hvd_gqsgd.options import Options
torch.set_num_threads(1)
training = example.make_training(example.parse_args({arguments}), 2)
bits = dict(block=BlockBits(4), dynamic=DynamicBits(4, training.steps))["{bits}"]
train(training, 2, Options(bits=bits, exchange="two_phase"))
parameters = torch.nn.utils.parameters_to_vector(training.model.parameters()).detach()
print(hashlib.sha256(parameters.numpy().tobytes()).hexdigest())
"""


AUTHORS = """
import sys, horovod.torch as hvd, torch
sys.path.insert(0, "{examples}")
from common import Authors
hvd.init()
rows = [[torch.randn(n, generator=torch.Generator().manual_seed(10 * rank + n)) for n in (70, 5000)]
        for rank in range(hvd.size())]
compressor = Authors(seed=3)
for step in range(2):
    mine = [g.clone() for g in rows[hvd.rank()]]
    pairs = [compressor.compress(g) for g in mine]
    means = [compressor.decompress(hvd.allreduce(x, name=str(i)), ctx)
             for i, (x, ctx) in enumerate(pairs)]
    if hvd.rank() == 0:
        torch.save((rows, means), "{folder}/" + str(step))
"""


@pytest.mark.timeout(100)
def test_the_authors_scheme_has_one_norm_for_all_tensors(tmp_path: Path) -> None:
    program = AUTHORS.format(examples=EXAMPLES, folder=tmp_path)
    job = run([*mpirun(3), sys.executable, "-c", program], limit=60)
    assert job.returncode == 0, job.stdout[-5000:]
    for step in range(2):
        rows, means = torch.load(tmp_path / str(step), weights_only=True)
        flat = torch.stack([torch.cat(gradients) for gradients in rows])
        expected = simulate(flat, step=step, bits=8, block_size=None, correlated=False, seed=3)
        assert torch.equal(torch.cat(means), expected)
