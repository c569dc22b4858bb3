"""Error feedback: what ranks keep of a step, and what the steps to come make of it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import same_bits
from test_selections import ranks
from torch import Tensor, nn

from hvd_gqsgd import BlockBits, DynamicBits, GlobalQSGD, simulate
from hvd_gqsgd.bench.wire import wire_bytes_of
from hvd_gqsgd.exchanges import selected
from hvd_gqsgd.options import Options
from hvd_gqsgd.selections import RandomSelection
from hvd_gqsgd.simulation import SimulatedRanks

CPU = torch.device("cpu")
ESTIMATES: list[dict[str, Any]] = [
    {"keep": 1 / 8, "error_feedback": "ef21"},
    {"keep": 1 / 8, "error_feedback": "econtrol"},
    {"keep": 1 / 8, "select": "leader", "error_feedback": "ef21"},
    {
        "keep": 1 / 8,
        "select": "leader",
        "error_feedback": "econtrol",
        "bits": BlockBits(6, min_bits=5),
    },
    {"keep": 1 / 4, "error_feedback": "ef21", "bits": DynamicBits(6, total_steps=60, min_bits=4)},
    {"keep": 1 / 4, "error_feedback": "ef21", "correlated": False, "block_size": None},
    {"error_feedback": "ef21"},
    {"error_feedback": "econtrol", "bits": 6},
]
MARINA: list[dict[str, Any]] = [
    {"keep": 1 / 8, "error_feedback": "marina", "full_every": 3},
    {"keep": 1 / 8, "error_feedback": "marina", "full_every": 3, "select": "permutation"},
]
KINDS: list[dict[str, Any]] = [{"keep": 1 / 8, "error_feedback": "residual"}, *ESTIMATES, *MARINA]


def step(world: SimulatedRanks, rows: Tensor) -> Tensor:
    """The mean of a step, of one gradient."""
    (mean,) = world.means([[("x", row.contiguous())] for row in rows])
    return mean.clone()


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def residuals(world: SimulatedRanks) -> Tensor:
    return torch.stack([
        state["memory"]["tensors"]["residual"][key].double()
        for state in world.state_dicts() for key in state["memory"]["tensors"]["residual"]
    ])  # fmt: skip


@pytest.mark.parametrize("numel", [8 * 32 * 5, 8 * 32 * 5 + 3 * 32 + 7])
def test_runs_take_turns(numel: int) -> None:
    """In 8 steps each is sent, once in a full group, and in another order than 8 steps later."""
    selection = RandomSelection(8, 0, 0, 2, True)
    orders = []
    for first in (0, 8, 16):
        units = torch.stack([
            selection.choose([numel], [first + i], [0], CPU)[0].units for i in range(8)
        ])  # fmt: skip
        assert set(units.flatten().tolist()) == set(range(math.ceil(numel / 32)))
        assert all(len(group.unique()) == 8 for group in units.T[:5])
        orders.append(units.T[:5])
    assert not torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[1], orders[2])
    assert len({int(order[i, 0]) % 8 for order in orders for i in range(5)}) > 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_nothing_is_lost_in_turns(dtype: torch.dtype) -> None:
    """After 7 steps without a gradient all of the gradients were sent, each element once."""
    rows = torch.randn(4, 2009).to(dtype)
    world = ranks(4, keep=1 / 8, error_feedback="residual", bits=16)
    means = torch.stack([step(world, rows if i == 0 else torch.zeros_like(rows)) for i in range(8)])
    assert ((means != 0).sum(0) <= 1).all()
    assert relative(means.double().sum(0), rows.double().mean(0)) < (
        0.01 if dtype == torch.bfloat16 else 0.002
    )
    assert relative(means[0], rows.double().mean(0)) > 0.5


@pytest.mark.parametrize("options", [*ESTIMATES, *MARINA], ids=str)
def test_estimates_come_to_the_gradient(options: dict[str, Any]) -> None:
    """Where gradients stay the same, the result becomes their mean, far below the rounding of one
    step; also after steps with others, as estimates have all that was exchanged."""
    world = ranks(3, **options)
    for i in range(20):
        step(world, torch.randn(3, 5003, generator=torch.Generator().manual_seed(i)))
    rows = torch.randn(3, 5003)
    errors = [relative(step(world, rows), rows.mean(0)) for _ in range(200)]
    plain = relative(
        simulate(rows, **{k: v for k, v in options.items() if k == "bits"}), rows.mean(0)
    )
    if options["error_feedback"] != "econtrol":
        assert errors[-1] < 0.02 * plain
    # EControl sends what is left of the gradients before, in some m^2 steps.
    assert errors[-1] < 0.2 * errors[0]


def test_ef21_by_a_model() -> None:
    """h' = h + C(g - h), by a model in float64 that is given the choice, at 16 bits."""
    selection = RandomSelection(4, 0, 0, 2, True)
    world, own = ranks(2, keep=1 / 4, error_feedback="ef21", bits=16), torch.zeros(2, 2000)
    step(probe := ranks(2, keep=1 / 4, error_feedback="ef21"), torch.ones(2, 2000))
    identities = list(probe.state_dicts()[0]["memory"]["turns"])
    rows = torch.randn(12, 2, 2000)
    for i, gradients in enumerate(rows):
        units = selection.choose([2000], [i], identities, CPU)[0].units
        kept = (units[:, None] * 32 + torch.arange(32)).flatten()
        kept = kept[kept < 2000]
        own[:, kept] = gradients[:, kept]
        assert relative(step(world, gradients), own.mean(0)) < 1e-3


@pytest.mark.parametrize("select", ["random", "leader"])
def test_econtrol_loses_nothing(select: Any) -> None:
    """The results and the mean of the residuals add up to the means of the gradients."""
    world = ranks(3, keep=1 / 8, select=select, error_feedback="econtrol")
    rows = torch.randn(40, 3, 3000)
    total = torch.stack([step(world, gradients) for gradients in rows]).double().sum(0)
    exact = rows.double().mean(1).sum(0)
    assert relative(total + residuals(world).mean(0), exact) < 1e-5
    assert relative(total, exact) > 0.05


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_a_skipped_step_leaves_the_memory(options: dict[str, Any]) -> None:
    """A GradScaler drops a step with infinity."""
    world, twin = ranks(2, **options), ranks(2, **options)
    first, second = torch.randn(2, 2, 4096)
    broken = torch.randn(2, 4096)
    broken[1, 17] = math.inf
    assert same_bits(step(world, first), step(twin, first))
    assert step(world, broken).isnan().any()
    step(twin, torch.full((2, 4096), math.nan))
    after = step(world, second)
    assert after.isfinite().all()
    assert same_bits(after, step(twin, second))


def without_estimates(state: dict[str, Any]) -> dict[str, Any]:
    kept = {"residual": state["memory"]["tensors"].get("residual", {})}
    tensors = {kind: kept.get(kind, {}) for kind in state["memory"]["tensors"]}
    return state | {"memory": state["memory"] | {"history": {}, "tensors": tensors}}


@pytest.mark.parametrize("options", [*ESTIMATES[:3], *MARINA], ids=str)
@pytest.mark.parametrize("other", ["none", "of another run", "of other ranks"])
def test_estimates_that_do_not_belong_together(options: dict[str, Any], other: str) -> None:
    """A rank is new, or has loaded another state, also of as many steps, or was away: all ranks
    begin with estimates of zero, and have the same result."""
    rows = torch.randn(6, 2, 3000)

    def after_three_steps(gradients: Tensor, size: int = 2) -> list[dict[str, Any]]:
        world = ranks(size, **options)
        for each in gradients:
            step(world, each[:size] if size <= 2 else torch.cat([each, each[:1]]))
        return world.state_dicts()

    states = after_three_steps(rows[:3])
    broken = [states[0], states[1]]
    if other == "none":
        broken[1] = without_estimates(states[1])
    elif other == "of another run":
        broken[1] = after_three_steps(rows[3:])[1]
    else:
        broken = after_three_steps(rows[:3], 3)[:2]
    world, fresh = ranks(2, **options), ranks(2, **options)
    world.load_state_dicts(broken)
    fresh.load_state_dicts([without_estimates(state) for state in broken])
    for each in rows[3:5]:
        assert same_bits(step(world, each), step(fresh, each))
    first, second = (state["memory"]["history"] for state in world.state_dicts())
    assert first == second
    assert len(set(first.values())) == 1


def test_a_state_of_another_kind_or_model(caplog: pytest.LogCaptureFixture) -> None:
    """What is not kept is dropped; a tensor of another length is an error on all ranks."""
    world = ranks(2, keep=1 / 8, error_feedback="econtrol")
    step(world, torch.randn(2, 4096))
    states = world.state_dicts()
    for options in ({"error_feedback": kind} for kind in ("ef21", "marina", "residual", None)):
        other = ranks(2, keep=1 / 8, **options)
        caplog.clear()
        other.load_state_dicts(states)
        kind = options["error_feedback"] or ""
        dropped = {"residual": "estimates", "": "estimates and residuals"}.get(kind, "residuals")
        assert f"the {dropped} of the loaded state are dropped" in caplog.text
        step(other, torch.randn(2, 4096))
        kinds = {"ef21": {"own", "mean", "owed"}, "residual": {"residual", "owed"}}
        kinds["marina"] = {"own", "mean", "previous"}
        expected = kinds.get(kind, set())
        assert set(other.state_dicts()[0].get("memory", {"tensors": {}})["tensors"]) == expected
    for state in states:
        for tensors in state["memory"]["tensors"].values():
            for key in tensors:
                tensors[key] = torch.ones(17)
    world.load_state_dicts(states)
    with pytest.raises(ValueError, match="17 elements for a gradient of 4096: load a state of the"):
        step(world, torch.randn(2, 4096))


def test_tensors_that_take_turns_themselves() -> None:
    """As in a GAN, whose two optimizers share a compressor: each has all runs sent in 8 of its own
    steps, and all ranks as leaders."""
    world = ranks(2, keep=1 / 8, error_feedback="residual", bits=16)
    led = ranks(2, keep=1 / 4, select="leader", bits=16)
    sent = {name: torch.zeros(4096) for name in "ab"}
    rows = torch.zeros(2, 4096)
    rows[0, ::4], rows[1, 1::4] = 1, 1  # the largest elements of each rank
    leaders: dict[str, set[int]] = {"a": set(), "b": set()}
    for i in range(16):
        name = "ab"[i % 2]
        (mean,) = world.means([[(name, torch.ones(4096))] for _ in range(2)])
        sent[name] += mean != 0
        (mean,) = led.means([[(name, row.contiguous())] for row in rows])
        leaders[name].add(int(mean.nonzero()[0]) % 4)
    assert all((each == 1).all() for each in sent.values())
    assert leaders == {"a": {0, 1}, "b": {0, 1}}


def test_a_tensor_that_is_in_every_second_bucket() -> None:
    """Its runs take the turns of its own exchanges, as its leaders do."""
    world = ranks(2, keep=1 / 8, error_feedback="residual", bits=16)
    led, rows = ranks(2, keep=1 / 4, select="leader", bits=16), torch.zeros(2, 4096)
    rows[0, ::4], rows[1, 1::4] = 1, 1
    sent, leaders = torch.zeros(4096), set()
    for i in range(16):
        names = "ab" if i % 2 else "a"
        means = world.means([[(name, torch.ones(4096)) for name in names] for _ in range(2)])
        sent += means[-1] != 0 if i % 2 else 0
        found = led.means([[(name, row.contiguous()) for name in names] for row in rows])
        if i % 2:
            leaders.add(int(found[-1].nonzero()[0]) % 4)
    assert (sent == 1).all()
    assert leaders == {0, 1}


def test_inference_mode() -> None:
    """Estimates that are made in it are changed outside of it."""
    for options in KINDS:
        world, twin, rows = ranks(2, **options), ranks(2, **options), torch.randn(4, 2, 3000)
        for i, each in enumerate(rows):
            with torch.inference_mode(i % 2 == 0):
                mean = step(world, each.clone())
            assert same_bits(mean, step(twin, each))


def test_states_continue() -> None:
    for options in KINDS:
        world, rows = ranks(2, **options), torch.randn(6, 2, 3000)
        for gradients in rows[:3]:
            step(world, gradients)
        resumed = ranks(2, **options)
        resumed.load_state_dicts(world.state_dicts())
        for gradients in rows[3:]:
            assert same_bits(step(world, gradients), step(resumed, gradients))


@pytest.mark.parametrize("options", [*ESTIMATES[:3], MARINA[1]], ids=str)
def test_descent_to_a_minimum_that_is_no_ranks_own(options: dict[str, Any]) -> None:
    """Each of 4 ranks has a quadratic function of its own; the distance falls by the same factor in
    the same steps, where without error feedback it stays."""

    def descend(steps: int, **options: Any) -> float:
        generator = torch.Generator().manual_seed(0)
        targets = torch.randn(4, 4096, generator=generator)
        x, world = torch.zeros(4096), ranks(4, **options)
        for _ in range(steps):
            x = x - 0.03 * step(world, x - targets)
        return relative(x, targets.mean(0))

    half, whole = descend(300, **options), descend(600, **options)
    assert whole < 0.01
    assert whole < 0.2 * half
    assert descend(600, keep=1 / 8, select="leader", low_pass=1e-6) > 0.3


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_bytes_on_the_wire(options: dict[str, Any]) -> None:
    """As without error feedback, with 8 for the turn of each tensor, and 16 for the history; the
    first step of MARINA is one of whole gradients."""
    if isinstance(options.get("bits"), DynamicBits):
        options = options | {"bits": 6}
    world, numels = ranks(4, **options), [64 * 4096, 10_007, 33]
    world.means([[(str(n), torch.randn(n)) for n in numels] for _ in range(4)])
    whole = options in MARINA
    assert world.stats.compressed_bytes_on_wire == wire_bytes_of(
        Options(**options), numels, 4, whole=whole
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"error_feedback": "residual"}, "error_feedback='residual' has no effect"),
        ({"error_feedback": "ef21", "bits": "auto"}, "'ef21' does not go with bits='auto'"),
        ({"error_feedback": "ef21", "hierarchy": "node"}, "does not go with error_feedback='ef21'"),
        ({"keep": 1 / 8, "error_feedback": "ef"}, "error_feedback must be one of"),
        ({"keep": 1 / 8, "error_feedback": "ef21", "low_pass": 0.5}, "no effect with error_feed"),
        ({"error_feedback": "ef21", "exchange": "gather"}, "leave exchange out"),
        (
            {"error_feedback": "ef21", "exchange": "two_phase", "bits": BlockBits(4)},
            "does not go with error_feedback='ef21' and bits=BlockBits",
        ),
        ({"keep": 1 / 8, "error_feedback": "ef21", "dither": "exponential"}, "leave dither out"),
        ({"keep": 1 / 8, "error_feedback": "ef21", "norm": "l2"}, "takes norm='max', got"),
        (
            {"keep": 1 / 8, "error_feedback": "residual", "exchange": "one_phase"},
            "leave exchange out",
        ),
        ({"keep": 1 / 8, "exchange": "reduce_scatter"}, "reduce_scatter"),
        ({"error_feedback": "marina"}, "error_feedback='marina' has no effect with keep=1"),
        ({"keep": 1 / 8, "full_every": 8}, "full_every=8 has no effect with error_feedback=None"),
        (
            {"keep": 1 / 8, "error_feedback": "marina", "full_every": 1},
            "full_every must be from 2 to 65536",
        ),
        ({"keep": 1 / 8, "error_feedback": "marina", "select": "leader"}, "which is biased: pass"),
        ({"keep": 1 / 8, "error_feedback": "marina", "exchange": "two_phase"}, "leave exchange"),
    ],
    ids=str,
)
def test_options_that_are_not_possible(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(**options)


def test_error_feedback_needs_names_of_parameters() -> None:
    with pytest.raises(
        ValueError, match=r"simulate\(\) takes no error feedback, as it does not get"
    ):
        simulate(torch.randn(2, 100), keep=1 / 8, error_feedback="ef21")
    with pytest.raises(ValueError, match=r"pass GlobalQSGD\(named_parameters"):
        GlobalQSGD(keep=1 / 8, error_feedback="residual")
    named = nn.Linear(2, 2).named_parameters()
    compressor = GlobalQSGD(keep=1 / 8, error_feedback="residual", named_parameters=named)
    assert compressor.ddp_state().options == compressor.options
    assert "select='random', error_feedback='residual'" in repr(compressor)


@pytest.mark.parametrize(("bits", "comes"), [(4, True), (3, False)])
def test_levels_that_bring_estimates_nearer(
    bits: int, comes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 levels a side do, and 1 does not, which is an error where it is asked for."""
    rows, options = torch.randn(3, 8192), {"keep": 1 / 8, "error_feedback": "ef21", "bits": bits}
    options["exchange"] = "allreduce"
    if not comes:
        with pytest.raises(
            ValueError, match=r"lanes of 3 bits have 1 for 3 ranks: leave exchange out, or pass 4"
        ):
            step(ranks(3, **options), rows)
        monkeypatch.setattr(selected, "LEAST_LEVELS", 1)
    world = ranks(3, **options)
    errors = [relative(step(world, rows), rows.mean(0)) for _ in range(80)]
    assert (errors[-1] < 0.1) == comes
    assert (errors[-1] > 0.8) != comes


def test_the_narrowest_lanes_count() -> None:
    """Of a schedule, and of blocks."""
    world = ranks(3, error_feedback="ef21", bits=BlockBits(4))
    with pytest.raises(ValueError, match=r"pass 4 or more as min_bits of BlockBits"):
        step(world, torch.randn(3, 8192))
    step(ranks(3, error_feedback="ef21", bits=BlockBits(6, min_bits=4)), torch.randn(3, 8192))
    dynamic = DynamicBits(6, total_steps=60, min_bits=3)
    world = ranks(3, error_feedback="ef21", bits=dynamic, exchange="allreduce")
    with pytest.raises(ValueError, match=r"pass 4 or more as min_bits of DynamicBits"):
        step(world, torch.randn(3, 8192))
    # In two phases lanes of 3 bits have 3 levels.
    step(ranks(3, error_feedback="ef21", bits=dynamic), torch.randn(3, 8192))
