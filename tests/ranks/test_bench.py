"""The benchmarks, with tensors so small that they take no time: what they report, not how fast."""

from __future__ import annotations

import json
import operator
import os

import horovod.torch as hvd
import pytest
import torch
from conftest import process_group

from hvd_gqsgd.bench import allreduce, auto, gradients, step, training
from hvd_gqsgd.bench.operators import (
    ARMS,
    AUTO,
    AUTO_DDP,
    FLAT,
    FP16,
    FP32,
    FSDP_ARMS,
    KEPT,
    OF_AUTO,
    OURS,
)
from hvd_gqsgd.plan import SETTING_NAMES

pytestmark = pytest.mark.few

SHAPES = [("small", (10,)), ("large", (100, 90))]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # for tables
    monkeypatch.setitem(gradients.MODELS, "tiny", lambda: iter(SHAPES))


def test_a_step_of_each_arm(several, capsys):
    """Those of DDP and FSDP2 need a process group, and it is said which arms do not run."""
    process_group()
    result = training.measure("tiny", ARMS, 1)
    assert not any("error" in arm for arm in result["arms"].values())
    megabytes = {name: arm["megabytes"] for name, arm in result["arms"].items()}
    assert megabytes[FP32] == megabytes["DDP fp32"] == pytest.approx(4 * 9010 / 1e6)
    assert megabytes[FP16] == megabytes["DDP fp16"] == pytest.approx(2 * 9010 / 1e6)
    assert megabytes["GlobalQSGD 4 bits"] < megabytes["GlobalQSGD 8 bits"] < megabytes[FP16]
    assert all(len(arm["rounds_ms"]) == 1 for arm in result["arms"].values())
    assert (result["tensors"], result["parameters"], result["ranks"]) == (2, 9010, hvd.size())
    assert result["hosts"] == 1
    sharded = [result["arms"][name] for name in FSDP_ARMS]
    stock, bf16, eight, four, *_, both = (arm["gradient_megabytes"] for arm in sharded)
    assert stock == pytest.approx(4 * 9010 / 1e6, rel=0.03)
    assert stock > 1.9 * bf16 > 1.8 * eight > 1.5 * four
    assert eight == pytest.approx(both)
    *exact, rounded = (arm["weight_megabytes"] for arm in sharded)
    assert exact == pytest.approx([2 * stock] * len(exact))  # gathered twice
    assert rounded < stock
    for arm in sharded:
        assert arm["gradient_ms"] > 0 < arm["ms"]
        assert arm["megabytes"] == arm["gradient_megabytes"] + arm["weight_megabytes"]
    assert sharded[0]["times_faster"] == sharded[0]["weight_times_faster"] == 1
    result["arms"]["another"] = {"error": "it is made of wood"}
    step.show(result)
    printed = capsys.readouterr().out
    assert all(name in printed for name in ARMS)
    assert "another: it is made of wood" in printed


@pytest.mark.parametrize("part", ["make_arm", "Arm.step"])
def test_an_arm_that_fails_on_one_rank(rank, several, monkeypatch, part):
    """It is left out on all of them."""
    call = operator.attrgetter(part)(training)

    def fails_on_the_last(arm, *more):
        result = call(arm, *more)
        if FP16 in (arm, getattr(arm, "label", None)) and rank == hvd.size() - 1:
            raise TypeError("no")
        return result

    monkeypatch.setattr(f"{training.__name__}.{part}", fails_on_the_last)
    result = training.measure("tiny", [FP32, FP16], 1)
    last = rank == hvd.size() - 1
    said = "TypeError: no" if last else "RuntimeError: failed on another rank"
    assert result["arms"][FP16] == {"error": said}
    assert result["arms"][FP32]["ms"] > 0


def test_the_exchange_alone(rank, capsys):
    """As its command prints it."""
    step.main(["--model", "tiny", "--exchange", "--repeats", "1", "--json"])
    printed = capsys.readouterr().out
    if rank:
        assert not printed
        return
    result = json.loads(printed)
    assert result["what"] == "exchange"
    assert not result["compute_ms"]
    assert set(result["arms"]) == {FP32, FP16, *OURS} - {*FLAT, *KEPT}
    assert not any("error" in arm for arm in result["arms"].values())


def test_auto_beside_its_settings(rank, capsys):
    """As its command prints it."""
    for form in ([], ["--json"]):
        auto.main(["--model", "tiny", "--steps", "12", *form])
        printed = capsys.readouterr().out
        if rank:
            assert not printed
        elif form:
            result = json.loads(printed)
            assert (result["steps"], result["parameters"]) == (12, 9010)
            assert [*result["arms"]] == [*OF_AUTO, AUTO]
            assert all(len(arm["rounds_ms"]) == 12 for arm in result["arms"].values())
            assert result["plan"][0] == [0, "fp32"]
            assert len(result["rates"]) == 1
        else:
            assert "12 steps of each arm" in printed
            assert "plan: 0: fp32" in printed


def test_auto_settles_before_it_is_timed(rank, several, monkeypatch):
    """In as many steps on all ranks."""
    process_group()
    for name in (AUTO, AUTO_DDP):
        arm = training.make_arm(name, "tiny")
        assert not arm.conductor.settled
        arm.settle(exchange_alone=False)
        taken = arm.conductor.coming
        assert arm.conductor.settled or taken == training.MOST_STEPS
        assert arm.conductor.chosen in SETTING_NAMES
        assert len(set(hvd.allgather(torch.tensor([taken])).tolist())) == 1
        arm.settle(exchange_alone=False)
        assert arm.conductor.coming == taken
    assert training.make_arm(FP32, "tiny").conductor is None


def test_allreduces(rank, several, capsys, tmp_path):
    plot = tmp_path / "allreduce.png"
    allreduce.main(["--largest", "0.00390625", "--repeats", "1", "--plot", str(plot)])
    printed = capsys.readouterr().out
    if rank:
        assert not printed
        return
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert f"{hvd.size()} ranks, 1 rounds" in printed
    for said in (allreduce.FP32, allreduce.FP16, *allreduce.OPERATORS, "4 KiB", "busbw"):
        assert said in printed


def test_allreduces_over_mpi(rank, size, capsys):
    if "OMPI_COMM_WORLD_SIZE" not in os.environ:
        pytest.skip("needs MPI")
    from hvd_gqsgd.bench import mpi

    for form in ([], ["--json"]):
        mpi.main(["--megabytes", "0.01", "--repeats", "1", *form])
        printed = capsys.readouterr().out
        if rank:
            assert not printed
        elif form:
            result = json.loads(printed)
            assert (result["numel"], result["ranks"]) == (2621, size)
            assert result["native"]
            assert all(row["ms"] > 0 for row in result["rows"].values())
        else:
            assert all(name in printed for name in mpi.OPERATORS)
