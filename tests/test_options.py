"""Every option: what is accepted, and what one is told otherwise."""

from __future__ import annotations

import dataclasses
import inspect
import re
import typing
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from hvd_gqsgd import BlockBits, DynamicBits, GlobalQSGD, allreduce, simulate
from hvd_gqsgd.codecs import check_device
from hvd_gqsgd.frontends.ddp import DDPState, GQSGDState
from hvd_gqsgd.frontends.parameter_names import ParameterNames
from hvd_gqsgd.option_types import OptionKeywords
from hvd_gqsgd.options import OF_FEEDBACK, Options, digest

MEGABYTES = "bucket_mb must be above 0 and at most 2048 megabytes, got "
WEIGHT = torch.ones(3)
INT64 = "from -9223372036854775808 to 9223372036854775807"


def test_defaults() -> None:
    """As documented for ``GlobalQSGD``."""
    assert dataclasses.asdict(Options()) == {
        "bits": 8,
        "dither": "linear",
        "exchange": "auto",
        "norm": "max",
        "block_size": 1024,
        "correlated": True,
        "seed": 0,
        "min_numel": 4096,
        "bucket_mb": 25,
        "hierarchy": "auto",
        "error": None,
        "plan": None,
        "keep": 1,
        "select": "random",
        "error_feedback": None,
        "low_pass": 1,
        "full_every": None,
        "rounding": "stochastic",
    }


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("bits", [2, 3, 15, 16]),
        ("block_size", [1, 7, 2**31 - 1, None]),
        ("correlated", [True, False]),
        ("seed", [0, -1, 2**63 - 1, -(2**63)]),
        ("min_numel", [0, 1, 2**63 - 1]),
        ("bucket_mb", [25, 0.5, 1e-9, 2048, 2048.0]),
    ],
)
def test_accepted(name: str, values: list[Any]) -> None:
    """Both ends of each range are in it."""
    for value in values:
        assert getattr(Options(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "bits",
            1,
            "bits must be from 2 to 16, DynamicBits(...), BlockBits(...) or 'auto', got 1",
        ),
        (
            "bits",
            17,
            "bits must be from 2 to 16, DynamicBits(...), BlockBits(...) or 'auto', got 17",
        ),
        (
            "bits",
            -8,
            "bits must be from 2 to 16, DynamicBits(...), BlockBits(...) or 'auto', got -8",
        ),
        ("block_size", 0, "block_size must be from 1 to 2147483647 or None"),
        ("block_size", -1, "(one norm per tensor), got -1"),
        ("block_size", 2**31, "got 2147483648"),
        ("seed", 2**63, f"seed must be {INT64}, got 9223372036854775808"),
        ("seed", -(2**63) - 1, f"seed must be {INT64}, got -9223372036854775809"),
        ("min_numel", -1, "min_numel must be from 0 to 9223372036854775807, got -1"),
        ("bucket_mb", 0, MEGABYTES + "0"),
        ("bucket_mb", -0.5, MEGABYTES + "-0.5"),
        ("bucket_mb", 2048.5, MEGABYTES + "2048.5"),
        (
            "bucket_mb",
            float("inf"),
            MEGABYTES + "inf",
        ),
        (
            "bucket_mb",
            float("nan"),
            MEGABYTES + "nan",
        ),
        ("dither", "cubic", "dither must be one of ('linear', 'exponential'), got 'cubic'"),
        ("norm", "l1", "norm must be one of ('max', 'l2'), got 'l1'"),
        ("exchange", "post", "exchange must be one of ("),
    ],
)
def test_out_of_range(name: str, value: Any, message: str) -> None:
    """The option, its range and the value are named."""
    with pytest.raises(ValueError, match=re.escape(message)):
        Options(**{name: value})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("bits", "8", "bits must be an int, DynamicBits(...), BlockBits(...) or 'auto', got '8'"),
        ("bits", 8.0, "bits must be an int, DynamicBits(...), BlockBits(...) or 'auto', got 8.0"),
        (
            "bits",
            True,
            "bits must be an int, DynamicBits(...), BlockBits(...) or 'auto', got True",
        ),
        (
            "bits",
            None,
            "bits must be an int, DynamicBits(...), BlockBits(...) or 'auto', got None",
        ),
        (
            "block_size",
            1024.0,
            "block_size must be an int or None (one norm per tensor), got 1024.0",
        ),
        ("block_size", False, "block_size must be an int or None (one norm per tensor), got False"),
        ("correlated", 1, "correlated must be True or False, got 1"),
        ("correlated", None, "correlated must be True or False, got None"),
        ("seed", 0.5, "seed must be an int, got 0.5"),
        ("seed", None, "seed must be an int, got None"),
        ("min_numel", 1e4, "min_numel must be an int, got 10000.0"),
        ("bucket_mb", "25", "bucket_mb must be a number of megabytes, got '25'"),
        ("bucket_mb", None, "bucket_mb must be a number of megabytes, got None"),
        ("bucket_mb", True, "bucket_mb must be a number of megabytes, got True"),
        ("dither", None, "dither must be one of ('linear', 'exponential'), got None"),
    ],
)
def test_wrong_type(name: str, value: Any, message: str) -> None:
    """The option, what it takes and the value are named."""
    with pytest.raises(TypeError, match=re.escape(message)):
        Options(**{name: value})


def test_what_exponential_codes_cannot_do() -> None:
    with pytest.raises(ValueError, match=r"bits must be 4 or 8 for dither='exponential', got 5"):
        Options(dither="exponential", bits=5)
    with pytest.raises(ValueError, match=r"whose codes cannot be added, got 'allreduce'"):
        Options(dither="exponential", exchange="allreduce")


@pytest.mark.parametrize(
    ("pairs", "error", "message"),
    [
        ([WEIGHT], TypeError, "must be (name, parameter) pairs as from model.named_parameters()"),
        ([("a", WEIGHT), ("b", "c")], TypeError, "got ('b', 'c')"),
        ([("a", WEIGHT), ("a", WEIGHT + 1)], ValueError, "must be unique. Found duplicates: a"),
    ],
)
def test_named_parameters(pairs: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        ParameterNames(pairs)


def test_a_device_without_kernels() -> None:
    with pytest.raises(NotImplementedError, match="got a tensor on meta; this build has kernels"):
        check_device("GlobalQSGD got a tensor", torch.ones(3, device="meta"))


def test_frozen() -> None:
    """Ranks have compared them; they cannot change any more."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        Options().bits = 4  # type: ignore[misc]


def test_bucket_bytes() -> None:
    """Megabytes are of 2^20 bytes."""
    assert Options().bucket_bytes == 25 * 2**20
    assert Options(bucket_mb=0.5).bucket_bytes == 2**19
    assert Options(bucket_mb=4096 / 2**20).bucket_bytes == 4096


def test_digest() -> None:
    """Fits an int32, and tells any two options apart."""
    others = [
        {"bits": 4},
        {"block_size": 1000},
        {"block_size": None},
        {"correlated": False},
        {"seed": 1},
        {"seed": -1},
        {"min_numel": 0},
        {"bucket_mb": 24},
    ]
    digests = [Options(**other).digest() for other in [{}, *others]]
    assert len(set(digests)) == len(digests)
    assert all(0 <= d < 2**31 for d in digests)
    assert Options().digest() == Options(bits=8).digest() == digests[0]


def test_equal_options_have_equal_digests() -> None:
    """25 and 25.0 megabytes are the same."""
    assert Options(bucket_mb=25) == Options(bucket_mb=25.0)
    assert Options(bucket_mb=25).digest() == Options(bucket_mb=25.0).digest()


def test_digest_is_the_same_in_all_processes() -> None:
    """Unlike ``hash``, which Python salts: these numbers cross the wire."""
    assert digest(("weight", 0, 1000, "torch.float32")) == 1547748690


def test_reduce_scatter_is_for_exponential_codes() -> None:
    Options(dither="exponential", exchange="reduce_scatter")
    for options in ({}, {"dither": "exponential", "norm": "l2"}):
        with pytest.raises(ValueError, match="goes with dither='exponential' and norm='max'"):
            Options(exchange="reduce_scatter", **options)


# --- what each front end takes -------------------------------------------------------------------

ROWS = torch.ones(2, 3)
# Those of DDPState and allreduce, which need other ranks, are in ranks/test_front_ends.py.
FRONT_ENDS: dict[str, Callable[..., Any]] = {
    "simulate()": lambda **options: simulate(ROWS, **options),
    "GlobalQSGD()": GlobalQSGD,
}


def test_keywords_are_the_options() -> None:
    """What editors complete, by name and by type."""
    assert typing.get_type_hints(OptionKeywords) == typing.get_type_hints(Options)
    assert OptionKeywords.__required_keys__ == frozenset()


@pytest.mark.parametrize(
    ("function", "missing"),
    [
        (GlobalQSGD, set()),
        (DDPState, {"bucket_mb"}),
        (simulate, {"error", "plan", *OF_FEEDBACK}),
        (allreduce, {"bucket_mb", "min_numel", "error", "plan", *OF_FEEDBACK}),
    ],
)
def test_signatures_show_the_options(function: Callable[..., Any], missing: set[str]) -> None:
    """With their defaults, as ``help`` does; just those that have an effect."""
    parameters = inspect.signature(function).parameters
    for option in dataclasses.fields(Options):
        if option.name in missing:
            assert option.name not in parameters
        else:
            assert parameters[option.name].default == option.default
    assert not any(p.kind == p.VAR_KEYWORD for p in parameters.values())


@pytest.mark.parametrize(
    "given",
    [
        {"rounding": "nearest"},
        {"keep": 1 / 8, "full_every": 8},
        {"keep": 1 / 8, "low_pass": 0.5},
        {"keep": 1 / 8, "select": "leader", "low_pass": 0.5},
        {"error_feedback": "residual", "rounding": "nearest"},
    ],
    ids=str,
)
def test_one_error_for_all_options_of_error_feedback(given: dict[str, Any]) -> None:
    """That names all to be left out; their defaults are accepted."""
    leave = " and ".join(f"{name}={value!r}" for name, value in given.items() if name != "keep")
    with pytest.raises(
        ValueError, match=rf"simulate\(\) takes no error feedback, .*: leave {leave} out"
    ):
        simulate(ROWS, **given)
    defaults: dict[str, Any] = {n: getattr(Options(), n) for n in given}
    assert torch.equal(simulate(ROWS, **defaults), simulate(ROWS))


@pytest.mark.parametrize("name", FRONT_ENDS)
@pytest.mark.parametrize(
    ("option", "suggestion"),
    [
        ("bit", "did you mean 'bits'? "),
        ("blocksize", "did you mean 'block_size'? "),
        ("colour", " Options are: bits, dither, exchange, norm, "),
    ],
)
def test_unknown_options(name: str, option: str, suggestion: str) -> None:
    """Named with the front end and, if there is one, the option that was meant."""
    with pytest.raises(TypeError) as caught:
        FRONT_ENDS[name](**{option: 4})
    message = str(caught.value)
    assert message.startswith(f"{name} got an unknown option {option!r}")
    assert suggestion in message
    assert ("did you mean" in message) == ("did you mean" in suggestion)


def test_arguments_of_the_front_end_are_suggested_too() -> None:
    with pytest.raises(TypeError, match="did you mean 'step'"):
        simulate(ROWS, steps=3)  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="did you mean 'named_parameters'"):
        GlobalQSGD(named_params=[])  # type: ignore[call-arg]


def test_simulate_takes_the_options_of_a_training() -> None:
    """Those about buckets do not change a mean, and are checked."""
    assert torch.equal(simulate(ROWS, bucket_mb=1, min_numel=0), simulate(ROWS))
    with pytest.raises(ValueError, match="bucket_mb must be above 0"):
        simulate(ROWS, bucket_mb=0)


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_reduce_scatter_is_for_mpi(name: str) -> None:
    message = r"for hvd_gqsgd\.allreduce on an mpi4py communicator; take exchange='two_phase' for "
    with pytest.raises(ValueError, match=message + re.escape(name)):
        FRONT_ENDS[name](dither="exponential", exchange="reduce_scatter")


def test_named_parameters_that_are_used_up() -> None:
    """As when one iterator is given to Horovod and to the compressor."""
    named = nn.Linear(3, 2).named_parameters()
    GlobalQSGD(named_parameters=named)
    for nothing in (named, [], nn.ReLU().named_parameters()):
        with pytest.raises(
            ValueError, match=r"yield nothing: pass a new .*, or leave the argument out"
        ):
            GlobalQSGD(named_parameters=nothing)


@pytest.mark.parametrize("process_set", [0, [0, 1], "all"])
def test_what_is_no_process_set(process_set: Any) -> None:
    with pytest.raises(TypeError, match=re.escape(f"or None (all ranks), got {process_set!r}")):
        GlobalQSGD(process_set=process_set)


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_exchanges_that_it_has_are_offered(name: str) -> None:
    """Neither the one over MPI alone nor, but for ``simulate``, that of FSDP."""
    more = ", 'one_phase'" if name == "simulate()" else ""
    offered = f"exchange must be one of ('auto', 'allreduce', 'two_phase'{more}), got "
    for other in ("ring", *(["one_phase"] if not more else [])):
        with pytest.raises(ValueError, match=re.escape(f"{offered}{other!r}")):
            FRONT_ENDS[name](exchange=other)


def test_one_phase_has_no_dynamic_bits() -> None:
    assert Options(exchange="one_phase", bits=BlockBits(4)).exchange_for(3) == "one_phase"
    with pytest.raises(ValueError, match=r"for exchange='one_phase', as a rank .*, got Dynamic"):
        simulate(ROWS, exchange="one_phase", bits=DynamicBits(4))


@pytest.mark.parametrize("bits", [8, DynamicBits(6)])
@pytest.mark.parametrize("state", [None, [], "x"])
def test_what_is_no_state_of_a_schedule(bits: Any, state: Any) -> None:
    with pytest.raises(TypeError, match=f"must be a dict, got {re.escape(repr(state))}"):
        GlobalQSGD(bits).load_state_dict({"step": 3, "schedule": state})


def test_repr() -> None:
    """All options, and what is special about this one."""
    assert repr(GlobalQSGD(4, seed=7)) == (
        "GlobalQSGD(bits=4, dither='linear', exchange='auto', norm='max', block_size=1024, "
        "correlated=True, seed=7, min_numel=4096, bucket_mb=25.0, hierarchy='auto')"
    )
    named = GlobalQSGD(DynamicBits(5), named_parameters=nn.Linear(3, 2).named_parameters())
    assert repr(named).startswith("GlobalQSGD(bits=DynamicBits(budget=5.0, ")
    assert repr(named).endswith("hierarchy='auto', named_parameters=<2 of them>)")


@pytest.mark.parametrize(
    ("options", "ranks", "expected"),
    [
        ({}, 4, "allreduce on 4 ranks, levels per side: 31"),
        ({}, 64, "two_phase on 64 ranks, levels per side: 127"),
        ({"exchange": "allreduce"}, 64, "allreduce on 64 ranks, levels per side: 1"),
        ({"dither": "exponential", "bits": 4}, 2, "two_phase on 2 ranks, levels per side: 7"),
        ({"bits": DynamicBits(9)}, 4, "allreduce on 4 ranks, levels per side: 1 to 8191"),
        ({"bits": DynamicBits(9, min_bits=8, max_bits=15)}, 4,
         "allreduce on 4 ranks, levels per side: 31 to 511"),
    ],
)  # fmt: skip
def test_description(options: dict[str, Any], ranks: int, expected: str) -> None:
    """Widths that a schedule never takes are not counted: 12 bits cost as much as 11."""
    assert Options(**options).describe(ranks) == expected


def test_the_name_that_pytorch_would_give() -> None:
    assert GQSGDState is DDPState
