"""The all-gather of codes, as of FSDP's weights: the reference's bits, and what is not rounded."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from helpers import DTYPES, as_numpy, assert_same, gradient_like, name
from torch import Tensor

from hvd_gqsgd.engine.agreement import Ahead
from hvd_gqsgd.engine.pipeline import Pipeline
from hvd_gqsgd.options import Options, digest
from hvd_gqsgd.reference import linear as reference
from hvd_gqsgd.transports.simulated import SimulatedWorld

SHAPES = [*itertools.product([7, 1024, 1500, None], [(1, 1), (2600, 3)]), (100, (300, 0))]


def gather(rows: list[list[Tensor]], *, step: int = 0, **options: object) -> list[list[Tensor]]:
    """What each rank decodes, given a list of tensors of each rank."""
    resolved = Options(exchange="gather", correlated=False, **options)  # type: ignore[arg-type]
    world = SimulatedWorld(len(rows))
    pipelines = [Pipeline(resolved, world.transport(r), protocol=Ahead) for r in range(len(rows))]
    tickets, outs = [], []
    for pipeline, tensors in zip(pipelines, rows, strict=True):
        pipeline.begin_step(step)
        outs.append([x.new_empty(len(rows), x.numel()) for x in tensors])
        tickets.append([
            pipeline.submit(x, f"of {number}", scale=1.0, out=out)
            for number, (x, out) in enumerate(zip(tensors, outs[-1], strict=True))
        ])  # fmt: skip
        pipeline.flush()
    for _ in range(3):
        for pipeline, each in zip(pipelines, tickets, strict=True):
            pipeline.poll(each[0])
    for pipeline, each in zip(pipelines, tickets, strict=True):
        for ticket in each:
            pipeline.decode(ticket, 1.0)
    return outs


@pytest.mark.parametrize("dtype", DTYPES, ids=name)
@pytest.mark.parametrize("bits", [2, 5, 8, 16])
def test_same_bits_as_reference(dtype: torch.dtype, bits: int) -> None:
    """Beside tensors of integers, which come as they are."""
    rng = np.random.default_rng(bits)
    for ranks, (block_size, numels) in zip(itertools.cycle([2, 3, 5]), SHAPES):
        rows = []
        for _ in range(ranks):
            coded = [gradient_like(rng, numel, dtype) for numel in numels]
            kept = torch.from_numpy(rng.integers(0, 99, 5, dtype=np.int16))
            rows.append([coded[0], kept, coded[1]])
        at = {"bits": bits, "block_size": block_size, "seed": 3}
        for outs in gather(rows, step=7, **at):
            for number, out in enumerate(outs):
                for rank, found in enumerate(out):
                    x = rows[rank][number]
                    if number == 1:
                        assert torch.equal(found, x)
                        continue
                    identity = digest((f"of {number}", 0, x.numel(), str(dtype)))
                    expected = reference.rounded(
                        as_numpy(x), step=7, tensor_id=identity, rank=rank, **at
                    )
                    assert_same(found, expected, (numels, number, rank))


def test_only_what_is_kept() -> None:
    rows = [[torch.arange(4) + rank] for rank in range(2)]
    for (out,) in gather(rows):
        assert torch.equal(out, torch.stack([rows[0][0], rows[1][0]]))


def test_blocks_that_are_not_finite() -> None:
    rows = [[torch.ones(2048)], [torch.ones(2048)]]
    rows[1][0][5] = torch.inf
    for (out,) in gather(rows):
        assert out[1, :1024].isnan().all()
        assert (out[0] == 1).all()
        assert (out[1, 1024:] == 1).all()
