"""Error feedback where names or levels are missing, and where memory overflows."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from test_feedback import KINDS, step
from test_selections import ranks
from torch import nn

from hvd_gqsgd import DDPState

NEAREST: dict[str, Any] = {"rounding": "nearest"}


@pytest.mark.parametrize("options", KINDS[:5], ids=str)
def test_memory_that_is_not_finite_begins_anew(options: dict[str, Any]) -> None:
    """After one step without a result, on all ranks."""
    world, rows = ranks(2, **options), torch.randn(4, 2, 3000)
    step(world, rows[0])
    states = world.state_dicts()
    for tensors in states[1]["memory"]["tensors"].values():
        for x in tensors.values():
            x[17] = math.nan
    world.load_state_dicts(states)
    assert step(world, rows[1]).isnan().any()
    assert step(world, rows[2]).isfinite().all()
    for state in world.state_dicts():
        tensors = state["memory"]["tensors"]
        assert all(x.isfinite().all() for kept in tensors.values() for x in kept.values())
    first, second = (state["memory"]["history"] for state in world.state_dicts())
    assert first == second
    assert step(world, rows[3]).isfinite().all()


def test_econtrol_after_gradients_near_the_largest_float() -> None:
    """Its residual overflows, for one step."""
    world = ranks(2, keep=1 / 8, error_feedback="econtrol")
    finite = []
    for i in range(30):
        rows = torch.randn(2, 3000)
        if i in (3, 4, 5):
            rows[0] = rows[0].sign() * 3.3e38
        mean = step(world, rows)
        finite.append(bool(mean.isfinite().all()))
    assert False in finite[4:10]
    assert all(finite[10:])
    assert mean.abs().max() < 100


@pytest.mark.parametrize("options", [{"error_feedback": "ef21"}, {"select": "leader"}], ids=str)
def test_a_state_of_ddp_needs_them_for_error_feedback_alone(options: dict[str, Any]) -> None:
    """Before there is a process group, as where Lightning makes its strategy."""
    (option, value), *_ = options.items()
    model, options = nn.Linear(2, 2), options | {"keep": 1 / 8}
    with pytest.raises(ValueError, match=f"{option}='{value}' keeps .*: pass named_parameters="):
        DDPState(**options)
    with pytest.raises(TypeError, match="named_parameters must be pairs"):
        DDPState(named_parameters=3, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="yield nothing"):
        DDPState(named_parameters=[], **options)
    with pytest.raises(TypeError, match=r"takes no option 'named_parameters': .*; leave it out"):
        DDPState(keep=1 / 8, named_parameters=model.named_parameters())
    with pytest.raises(ValueError, match="does not go with bits='auto'"):
        DDPState(bits="auto", named_parameters=model.named_parameters(), **options)
    state = DDPState(named_parameters=model.named_parameters(), **options)
    assert "named_parameters=<2 of them>" in repr(state)
    assert repr(copy.deepcopy(state)) == repr(state)


@pytest.mark.parametrize(
    ("options", "remedies"),
    [
        ({"bits": 5, "exchange": "allreduce"}, [{"exchange": "auto"}, {"bits": 6}, NEAREST]),
        ({"bits": 4, "exchange": "allreduce"}, [{"exchange": "auto"}, {"bits": 6}]),
        ({"bits": 2, "exchange": "allreduce"}, [{"bits": 6}]),
        ({"bits": 2}, [{"bits": 3}, NEAREST]),
        ({"bits": 5, "keep": 1 / 8, "error_feedback": "marina"}, [{"bits": 6}]),
    ],
    ids=str,
)
def test_each_remedy_for_few_levels_helps(
    options: dict[str, Any], remedies: list[dict[str, Any]]
) -> None:
    options = {"error_feedback": "ef21"} | options
    rows = torch.randn(8, 1024)
    texts = {"exchange": "leave exchange out", "bits": "pass {} or more as bits"}
    texts["rounding"] = "pass rounding='nearest'"
    text = ", or ".join(texts[name].format(v) for each in remedies for name, v in each.items())
    with pytest.raises(ValueError, match=rf"for 8 ranks: {text}$"):
        step(ranks(8, **options), rows)
    for remedy in remedies:
        assert step(ranks(8, **options | remedy), rows).isfinite().all()
