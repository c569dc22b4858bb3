"""``hvd-gqsgd bench auto``: what it makes of the times of steps."""

from __future__ import annotations

import pytest

from hvd_gqsgd.bench import auto
from hvd_gqsgd.bench.operators import AUTO, FP32, OF_AUTO

EIGHT = OF_AUTO[2]


def summary(load: dict[int, float] | None = None) -> dict:
    """Ten steps on a slow link, where 8 bits are chosen at step 4, and ten on a fast one, where
    fp32 is chosen at step 15 and something is tried until step 17. Steps of fp32 take 4 s and then
    1 s, and of all other settings 2 s."""
    seconds = {name: [2.0] * 20 for name in (*OF_AUTO, AUTO)}
    seconds[FP32] = [4.0] * 10 + [1.0] * 10
    seconds[EIGHT] = [1.5] * 10 + [2.0] * 10
    seconds[AUTO] = [4.0] * 4 + [1.5] * 6 + [2.0] * 5 + [1.2] * 5
    chosen = ["fp32"] * 4 + ["8 bits"] * 11 + ["fp32"] * 5
    settled = [False] * 3 + [True] * 12 + [False] * 2 + [True] * 3
    others = [(load or {}).get(step, 0.0) for step in range(20)]
    return auto.summary(seconds, chosen, settled, ["20mbit", "1gbit"], others, 0.2)


def test_each_rate_has_a_best_arm() -> None:
    result = summary()
    slow, fast = result["rates"]
    assert slow == {
        "rate": "20mbit", "begins": 0, "settled": 4, "chosen": "8 bits", "best": EIGHT,
        "auto_takes": 1.0,
    }  # fmt: skip
    assert (fast["begins"], fast["settled"], fast["chosen"]) == (10, 7, "fp32")
    assert (fast["best"], fast["auto_takes"]) == (FP32, pytest.approx(1.2))
    assert result["arms"][FP32]["seconds"] == 50
    assert result["arms"][FP32]["settled_seconds"] == 6 * 4 + 3
    assert result["arms"][AUTO]["seconds"] == pytest.approx(16 + 9 + 10 + 6)
    assert result["left_out"] == 0


def test_rounds_beside_other_load_count_for_no_arm() -> None:
    result = summary({0: 1.0, 19: 0.3, 18: 0.1})
    assert result["left_out"] == 2
    assert result["arms"][FP32]["seconds"] == 50 - 4 - 1
    assert result["arms"][AUTO]["seconds"] == pytest.approx(41 - 4 - 1.2)
    assert not result["loaded"]
    half = summary(dict.fromkeys(range(10), 1.0))
    assert (half["left_out"], half["loaded"]) == (10, False)
    most = summary(dict.fromkeys(range(11), 1.0))
    assert (most["left_out"], most["loaded"]) == (0, True)


def test_a_run_that_does_not_settle(capsys: pytest.CaptureFixture[str]) -> None:
    seconds = {name: [1.0, 1.0] for name in (*OF_AUTO, AUTO)}
    result = auto.summary(seconds, ["fp32"] * 2, [False] * 2, [None], [0.0] * 2, 0.2)
    (row,) = result["rates"]
    assert row["settled"] is row["best"] is row["auto_takes"] is None
    auto.show(
        result | {"model": "x", "parameters": 1, "tensors": 1, "ranks": 2, "plan": [[0, "fp32"]]}
    )
    assert "did not" in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong",
    [
        ["--steps", "0"],
        ["--steps", "1", "--rates", "1gbit,20mbit"],
        ["--rates", "1gbit,"],
        ["--rates", "1gbit,20mbit", "--rate", "1gbit"],
    ],
)
def test_wrong_arguments(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        auto.main(wrong)
    assert "--steps must be at least 1" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["2 bits", "8 bits,", "flat"])
def test_arms_that_are_none(wrong: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        auto.main(["--arms", wrong])
    assert f"got --arms {wrong!r}" in capsys.readouterr().err
