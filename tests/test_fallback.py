"""Where nothing was compiled NumPy does the work of the kernels: with one warning, and their bits.

A copy of the package without native libraries stands for such an installation.
"""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import bits_of, gradient_like, name
from test_imports import PACKAGE, python
from torch import Tensor

from hvd_gqsgd import build_info, simulate
from hvd_gqsgd._native import fallback, ops

pytestmark = pytest.mark.launches

OPTIONS: list[dict[str, Any]] = [
    {"bits": bits, "exchange": exchange, "block_size": block_size, "norm": norm}
    for (bits, norm), exchange, block_size in itertools.product(
        [(8, "max"), (5, "l2"), (16, "max")],
        ["allreduce", "two_phase", "one_phase"],
        [1000, 1500, None],
    )
] + [
    {"bits": bits, "exchange": exchange, "dither": "exponential", "correlated": False}
    for bits, exchange in itertools.product([4, 8], ["two_phase", "one_phase"])
]

# The bits of a mean as a hexadecimal number.
MEANS = """
import torch
from hvd_gqsgd import simulate

x = torch.arange(6000, dtype=torch.float32).sin().view(3, 2000)
for exchange in ("allreduce", "two_phase", "one_phase"):
    print(simulate(x, exchange=exchange).view(torch.uint8).numpy().tobytes().hex())
"""

USES = """
import torch
import torch.distributed as dist
from hvd_gqsgd import BlockBits, GlobalQSGD, simulate

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
state = GlobalQSGD(min_numel=0).ddp_state()
for _ in range(3):
    assert state.average(torch.ones(3), first=True).wait().equal(torch.ones(3))
try:
    simulate(torch.ones(2, 3), bits=BlockBits(4))
except NotImplementedError as error:
    print(error)
"""


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A folder with a copy of the package, without native libraries."""
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "docs", "bench")
    shutil.copytree(PACKAGE, tmp_path / "hvd_gqsgd", ignore=ignored)
    return tmp_path


def means(rows: Tensor) -> list[Tensor]:
    """The means of several ranks with all options."""
    return [simulate(rows, seed=5, **options) for options in OPTIONS]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=name)
def test_bits_of_the_kernels(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    rows = gradient_like(rng, (3, 2500), dtype)
    rows[:, 7] = 0
    if dtype == torch.float64:
        rows[1, -1] = torch.inf  # which takes all of its block along
    expected = means(rows)
    for operator in fallback.OPERATORS:
        monkeypatch.setattr(ops, operator.__name__, operator)
    for options, mean, of_kernels in zip(OPTIONS, means(rows), expected, strict=True):
        assert bits_of(mean).equal(bits_of(of_kernels)), options


@pytest.mark.parametrize("bits", [4, 8])
def test_sums_of_exponential_codes(bits: int) -> None:
    codes, other = torch.arange(2**16).to(torch.int32).view(torch.uint8).view(2, -1)
    expected, got = other.clone(), other.clone()
    ops.combine(codes, expected, bits, -5)
    fallback.combine(codes, got, bits, -5)
    assert got.equal(expected)


@pytest.mark.parametrize("numel", [0, 1, 15, 4095, 4097, 20_000])
def test_sums_of_squares(numel: int) -> None:
    x, got = gradient_like(np.random.default_rng(0), numel), torch.empty((), dtype=torch.float64)
    fallback.sum_of_squares(x, got)
    assert got.equal(ops.sum_of_squares(x))


def test_buffers_of_another_length() -> None:
    with pytest.raises(ValueError, match="a buffer must have 2 elements, got 1"):
        fallback.block_max(torch.ones(10), 5, torch.zeros(1, dtype=torch.int32))


@pytest.mark.timeout(150)
def test_one_warning(copied: Path) -> None:
    """And the operators are those of NumPy, whatever loads them."""
    without, compiled = python("-c", MEANS, path=copied), python("-c", MEANS)
    assert without.returncode == compiled.returncode == 0, without.stderr + compiled.stderr
    assert without.stdout == compiled.stdout
    assert without.stderr.count("no kernels are compiled: NumPy does their work") == 1
    assert not compiled.stderr


@pytest.mark.timeout(150)
def test_uses(copied: Path) -> None:
    """A front end works; widths per block say what they need."""
    done = python("-c", USES, path=copied)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("BlockBits needs the compiled kernels: run `pip install")


@pytest.mark.timeout(150)
def test_an_older_pytorch(copied: Path) -> None:
    code = "import torch; del torch.library.register_fake; from hvd_gqsgd import GlobalQSGD"
    done = python("-c", f"{code}; GlobalQSGD()", path=copied)
    assert "ImportError: hvd_gqsgd needs PyTorch 2.4 or newer, got 2." in done.stderr


@pytest.mark.timeout(150)
def test_doctor_tells(copied: Path) -> None:
    done = python("-m", "hvd_gqsgd", "doctor", "--no-test", path=copied)
    assert done.returncode == 0, done.stdout
    assert "--  native part: not built: NumPy does its work, which is slow" in done.stdout
    assert "instruction set" not in done.stdout
    info = python(
        "-c", "import hvd_gqsgd, json; print(json.dumps(hvd_gqsgd.build_info()))", path=copied
    )
    found = json.loads(info.stdout)
    assert found["native"]["cpu"] == {"built": False, "loads": None, "error": None}
    assert (found["parts"], found["instruction_set"]) == ([], "python")
    assert build_info()["instruction_set"] != "python"
