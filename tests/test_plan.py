"""``plan`` and ``error``, and the state of ``bits="auto"``: what they accept, and their errors."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from hvd_gqsgd import DDPState, DynamicBits, GlobalQSGD
from hvd_gqsgd.auto.arms import arms_of
from hvd_gqsgd.options import Options


@pytest.mark.parametrize("make", [GlobalQSGD, DDPState])
@pytest.mark.parametrize(
    ("name", "other"),
    [("16 bits", {"dither": "exponential"}), ("4 bits per block", {"block_size": None})],
)
def test_a_plan_has_possible_settings(make: Any, name: str, other: dict[str, Any]) -> None:
    """Said before any step, also of a setting that a late step has."""
    with pytest.raises(ValueError, match=rf"other options: 'fp32'.*'8 bits'.*got '{name}' at step"):
        make(bits="auto", plan=[(0, "fp32"), (5000, name)], **other)
    make(bits="auto", plan=[(0, "fp32"), (5000, "8 bits")], **other)


def test_error_bounds_the_error_of_the_dither() -> None:
    """Exponential codes round x by x^2/8, however many bits they have."""
    options = Options(bits="auto", dither="exponential", error=1e-3)
    assert [arm.name for arm in arms_of(options, 2)] == ["fp32"]
    options = Options(bits="auto", error=1e-3)
    assert [arm.name for arm in arms_of(options, 2)][:3] == ["fp32", "16 bits", "8 bits"]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"plan": [(0, "9 bits")]}, ValueError, "a setting of plan must be one of"),
        ({"plan": [(5, "fp32"), (1, "8 bits")]}, ValueError, "a step of plan must be from 6"),
        ({"plan": [1]}, TypeError, "plan must be pairs"),
        ({"plan": ""}, TypeError, "plan must be pairs"),
        ({"words": None}, TypeError, "a state must be a list of ints, got None"),
        ({"words": [9] + 36 * [0]}, ValueError, "the arm of the state must be from 0 to 6, got 9"),
        ({"ranks": -1}, ValueError, "ranks must be from 0"),
        ({"more": 1}, ValueError, "must have the keys step and schedule"),
    ],
)
def test_states_are_checked(change: dict[str, Any], error: type, message: str) -> None:
    """A state that is refused changes nothing."""
    compressor = GlobalQSGD(bits="auto")
    before = compressor.state_dict()
    state = copy.deepcopy(before) | {"step": 7}
    state["schedule"] |= change
    with pytest.raises(error, match=message):
        compressor.load_state_dict(state)
    assert compressor.state_dict() == before


def test_states_have_a_step() -> None:
    state = GlobalQSGD(bits="auto").state_dict()
    del state["step"]
    with pytest.raises(ValueError, match="must have the keys step and schedule"):
        GlobalQSGD(bits="auto").load_state_dict(state)
    with pytest.raises(TypeError, match="must be a dict"):
        GlobalQSGD(bits="auto").load_state_dict([])  # type: ignore[arg-type]


def test_states_of_other_bits_are_refused() -> None:
    auto = GlobalQSGD(bits="auto").state_dict()
    for bits in (8, DynamicBits(5)):
        with pytest.raises(ValueError, match="give bits as when the state was saved"):
            GlobalQSGD(bits=bits).load_state_dict(auto)
        with pytest.raises(ValueError, match="give bits as when the state was saved"):
            GlobalQSGD(bits="auto").load_state_dict(GlobalQSGD(bits=bits).state_dict())
