"""Compressors that travel: to workers that are spawned, to ``horovod.run``, and as copies."""

from __future__ import annotations

import copy
import multiprocessing
import pickle  # noqa: TID251  (of objects of our own)
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import horovod
import pytest
from torch import nn

from hvd_gqsgd import DynamicBits, GlobalQSGD

pytestmark = pytest.mark.launches

WAYS = {"pickle": lambda it: pickle.loads(pickle.dumps(it)), "deepcopy": copy.deepcopy}  # noqa: S301
STATE = {"steps": 3, "saved": 2**30, "last": 7, "recent": 8, "mean": 9}


def description(compressor: GlobalQSGD) -> tuple[str, dict[str, Any]]:
    """Its options and its state; at the top of the module, so that other processes find it."""
    return repr(compressor), compressor.state_dict()


@pytest.mark.parametrize("way", WAYS)
def test_options_and_state_travel(way: str) -> None:
    compressor = GlobalQSGD(DynamicBits(6, total_steps=9), seed=3, min_numel=7)
    compressor.load_state_dict({"step": 3, "schedule": STATE})
    again = WAYS[way](compressor)
    assert again.options == compressor.options
    assert description(again) == description(compressor)
    again.load_state_dict({"step": 0, "schedule": dict.fromkeys(STATE, 0)})
    assert compressor.state_dict()["step"] == 3, "the state is its own"
    assert WAYS[way](GlobalQSGD) is GlobalQSGD


@pytest.mark.parametrize("way", WAYS)
def test_with_its_model(way: str) -> None:
    """Names go on to mean the parameters of the model that travels along."""
    model = nn.Linear(100, 50)
    compressor = GlobalQSGD(named_parameters=model.named_parameters())
    pair = WAYS[way]((model, compressor))
    (_, weight), _ = pair[1]._given["named_parameters"]
    assert weight is pair[0].weight
    assert repr(pair[1]) == repr(compressor)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_worker_that_is_spawned() -> None:
    """As by a DataLoader, or by ``concurrent.futures``."""
    compressor = GlobalQSGD(bits=5, seed=2)
    compressor.load_state_dict({"step": 4, "schedule": {}})
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        assert pool.submit(description, compressor).result(100) == description(compressor)


@pytest.mark.timeout(120)
def test_horovod_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """From a parent that has used it itself."""

    def train(compressor: GlobalQSGD) -> tuple[bool, int]:
        import horovod.torch as hvd
        import torch

        from hvd_gqsgd import simulate

        hvd.init()
        rows = torch.arange(10_000.0).view(2, 5000)
        mean = hvd.allreduce(rows[hvd.rank()], name="x", compression=compressor)
        return torch.equal(mean, simulate(rows, step=1)), compressor.state_dict()["step"]

    import horovod.torch as hvd
    import torch

    hvd.init()
    compressor = GlobalQSGD(bits=8)
    hvd.allreduce(torch.ones(5000), compression=compressor)
    hvd.shutdown()
    assert horovod.run(train, args=(compressor,), num_proc=2, use_gloo=True) == [
        (True, 2),
        (True, 2),
    ]
