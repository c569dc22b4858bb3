"""The adapters, with the real libraries, on 2 ranks: whether they compress, learn, and resume."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
from launch import HERE, run

pytestmark = pytest.mark.launches


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "library",
    [
        *("lightning", "accelerate", "transformers", "ray"),
        *(f"deepspeed-{stage}" for stage in (0, 1, 2)),
    ],
)
def test_compressed_and_resumed(library: str, tmp_path: Path) -> None:
    if importlib.util.find_spec(library.partition("-")[0]) is None:
        pytest.skip(f"{library.partition('-')[0]} is not installed")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = [str(HERE / "adapters.py"), library, str(tmp_path)]
    ranks = [sys.executable] if library == "ray" else [*torchrun, "--nproc-per-node", "2"]
    job = run([*ranks, *script], limit=240)
    assert job.returncode == 0, job.stdout[-5000:]
    found = re.search(r"RESULT (.*)", job.stdout)
    assert found is not None
    result = json.loads(found[1])
    assert result["ratio"] > 3, "compressed, and not silently left out"
    for way in ("compressed", "resumed"):
        assert result[way] == pytest.approx(result["plain"], rel=0.25, abs=0.05), result
    whole, first, second = result["steps"]
    assert (whole, second) == (2 * first, whole), "it goes on from the step of the checkpoint"
    assert result["counted"] == [whole, first, first]


LEFT_OPEN = """
import torch, torch.distributed as dist
from hvd_gqsgd import GlobalQSGD, ddp_hook
dist.init_process_group("gloo")
model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(100, 100))
compressor = GlobalQSGD()
model.register_comm_hook(compressor.ddp_state(), ddp_hook)
model(torch.full((8, 100), 1.0 + dist.get_rank())).square().mean().backward()
assert compressor.stats().ratio > 3
print("DONE", flush=True)
"""


@pytest.mark.timeout(120)
def test_exit_without_destroy_process_group(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(LEFT_OPEN)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    job = run([*torchrun, "--nproc-per-node", "2", str(script)], limit=90)
    assert job.returncode == 0, job.stdout[-5000:]
    assert job.stdout.count("DONE") == 2
