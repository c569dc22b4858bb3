"""Buffers: used again once nothing refers to them, and not before."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from simulated_ranks import Group, check_unnamed, gradients, same
from torch import Tensor

from hvd_gqsgd.engine.buffer_pool import KEEP_STEPS, BufferPool


def take(pool: BufferPool, numel: int = 100, dtype: torch.dtype = torch.float32) -> Tensor:
    """On the CPU."""
    return pool.take(numel, dtype, torch.device("cpu"))


@pytest.mark.parametrize(
    "hold",
    [
        lambda x: x,
        lambda x: x.view(10, 10),
        lambda x: x[50:60],
        lambda x: x.detach(),
        lambda x: x.numpy(),
        lambda x: torch.nn.Parameter(x),
        lambda x: {"grad": [x]},
    ],
    ids=["itself", "view", "slice", "detached", "numpy", "parameter", "container"],
)
def test_held_buffers_are_not_handed_out(hold: Callable[[Tensor], object]) -> None:
    """In whatever form they are held; and they are again as soon as they are not."""
    pool = BufferPool()
    x = take(pool)
    address = x.data_ptr()
    held = hold(x)
    del x
    for _ in range(3):
        assert take(pool).data_ptr() != address
    del held
    assert address in {y.data_ptr() for y in [take(pool), take(pool)]}


def test_buffers_of_which_python_has_the_storage() -> None:
    """PyTorch never again tells whether it is held, so they are not handed out any more."""
    pool = BufferPool()
    x = take(pool)
    address = x.data_ptr()
    storage = x.untyped_storage()
    del x
    kept = [take(pool)]
    assert kept[0].data_ptr() != address
    del storage
    kept += [take(pool), take(pool)]
    assert len({y.data_ptr() for y in kept}) == 3


def test_buffers_are_told_apart() -> None:
    """By length and type: a buffer is never cut from another one."""
    pool = BufferPool()
    first = take(pool).data_ptr()
    assert take(pool).data_ptr() == first
    kept = [take(pool), take(pool, 99), take(pool, 100, torch.int32), take(pool, 0)]
    assert [x.numel() for x in kept] == [100, 99, 100, 0]
    assert [x.dtype for x in kept] == [torch.float32, torch.float32, torch.int32, torch.float32]
    assert len({x.data_ptr() for x in kept}) == 4


def test_buffers_are_given_back() -> None:
    """Once they have not been asked for in some steps."""
    pool = BufferPool()
    x = take(pool)
    held = x.untyped_storage()
    del x
    for _ in range(KEEP_STEPS):
        pool.next_step()
    assert len(pool) == 1
    pool.next_step()
    assert len(pool) == 0
    assert held.nbytes() >= 400


def test_results_are_never_overwritten() -> None:
    """While the user holds a gradient, steps use other memory; after that, the same again."""
    tensors = gradients(2, [(None, 5000)])
    group = Group(2)
    held = group.exchange(tensors)
    copies = [own[0].clone() for own in held]
    for step in (1, 2, 3):
        check_unnamed(group.exchange(tensors), tensors, step=step)
    for own, copy in zip(held, copies, strict=True):
        assert same(own[0], copy)

    addresses = {own[0].data_ptr() for own in held}
    del held, own
    seen = set()
    for _ in range(4):
        seen |= {own[0].data_ptr() for own in group.exchange(tensors)}
    assert addresses < seen
    assert len(seen) == 4, "two buffers a rank take turns"


def test_no_memory_is_taken_in_later_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms, words and results come from the step before."""
    tensors = gradients(2, [(None, 5000), (None, 300)])
    group = Group(2)
    group.exchange(tensors)
    made = []
    empty = torch.empty
    monkeypatch.setattr(
        "hvd_gqsgd.engine.buffer_pool.torch.empty", lambda *a, **k: made.append(a) or empty(*a, **k)
    )
    group.exchange(tensors)
    assert not made
    group.exchange(gradients(2, [(None, 5001)]))
    assert made
