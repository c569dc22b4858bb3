"""The performance model: its formulas, its limits, and what it recommends."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import horovod.torch as hvd
import pytest

from hvd_gqsgd import BlockBits, GlobalQSGD
from hvd_gqsgd.bench import measured, operators, predict
from hvd_gqsgd.bench.gradients import MODELS, shapes_of
from hvd_gqsgd.bench.link_plot import POWER_SGD, power_sgd_seconds
from hvd_gqsgd.bench.measured import against
from hvd_gqsgd.bench.networks import Network
from hvd_gqsgd.bench.prediction import predict as predicted
from hvd_gqsgd.bench.prediction import predict_sharded
from hvd_gqsgd.options import Options
from hvd_gqsgd.tools import advice, node_model
from hvd_gqsgd.tools import cost_model as model
from hvd_gqsgd.tools import sharded_model as sharded
from hvd_gqsgd.tools.accuracy import squared_error
from hvd_gqsgd.tools.cost_model import PRESETS, Machine
from hvd_gqsgd.tools.node_model import Cluster
from hvd_gqsgd.tools.settings import FP32, LINEAR_8, SETTINGS, Setting, possible

LINK = Machine(alpha=1e-3, beta=1e8, gamma=1e9)


def test_formulas() -> None:
    """By hand: 4 ranks, 8 MB."""
    ring = 6 * 1e-3 + 0.75 * 8e6 * (2 / 1e8 + 1 / 1e9)
    assert model.allreduce_seconds(8e6, 4, LINK) == pytest.approx(ring)
    assert model.allreduce_seconds(8, 4, LINK) == pytest.approx(2e-3, rel=1e-3)  # doubling
    tree = 2 * (2e-3 + 2 * 8e6 / 1e8 + 8e6 / 1e9)
    assert model.tree_seconds(8e6, 4, LINK) == pytest.approx(tree)
    assert model.two_phase_seconds(8e6, 4, LINK) == pytest.approx(6e-3 + 1.5 * 8e6 / 1e8)
    assert model.allreduce_seconds(8e6, 1, LINK) == 0


@pytest.mark.parametrize(
    ("name", "tensors", "parameters"),
    [
        ("resnet50", 161, 25_557_032),
        ("transformer", 253, 63_082_496),
        ("dlrm", 38, 17_114_913),
        ("resnet20", 59, 269_722),
        ("digits", 8, 151_306),
    ],
)
def test_shapes(name: str, tensors: int, parameters: int) -> None:
    """ResNet-50's as everywhere in the literature, and the others as they were counted once."""
    shapes = shapes_of(name)
    assert len(shapes) == len({name for name, _ in shapes}) == tensors
    assert sum(math.prod(shape) for _, shape in shapes) == parameters
    gradients = Network.of_model(name).gradients
    assert (gradients.tensors, gradients.elements) == (tensors, parameters)
    assert (
        0 < gradients.small_elements < parameters / (10 if name in ("resnet20", "digits") else 100)
    )


@pytest.mark.parametrize("setting", [FP32, LINEAR_8])
def test_computing_that_holds_up_what_travels(setting: Setting) -> None:
    """With no core to spare a step takes longer, by at most all that is computed."""
    gradients, compute = Network.of_model("resnet50").gradients, (0.02, 0.04)
    spare, none = (
        model.step_seconds(setting, gradients, 2, dataclasses.replace(LINK, exposed=e), *compute)
        for e in (0.0, 1.0)
    )
    kernels = gradients.elements * (LINK.norm + LINK.quantize + LINK.dequantize)
    tensors = gradients.tensors * LINK.compressed_tensor
    assert spare + 0.5 * compute[1] < none < spare + compute[1] + kernels + tensors


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ranks", [1, 2, 8, 1024])
@pytest.mark.parametrize("preset", PRESETS)
def test_predictions_are_sane(preset: str, ranks: int, name: str) -> None:
    """A step takes no less than its computing and its bytes, and the advice fits the numbers."""
    gradients, machine = Network.of_model(name).gradients, PRESETS[preset]
    result = predicted(gradients, ranks, machine, 0.1)
    for setting in SETTINGS:
        if setting.name not in result["steps"]:
            assert setting.quantized and not setting.two_phase and ranks > 4
            continue
        step = result["steps"][setting.name]["ms"] / 1e3
        sent = gradients.elements * setting.bits / 8 * (ranks - 1) / ranks
        assert step >= max(0.1, (sent + 0.0) / machine.beta)
    best = max(
        (step["times_faster"], name) for name, step in result["steps"].items() if name != FP32.name
    )
    if ranks == 1 or best[0] < 1 / (1 - advice.MARGIN):
        assert result["advice"].startswith("Do not compress")
    else:
        assert result["advice"].startswith("Use ")


def test_sharded_formulas() -> None:
    """By hand: two modules of 2 M elements on 4 ranks."""
    stock, bf16, eight, *_, both = sharded.SHARDED_SETTINGS
    m, numel = dataclasses.replace(LINK, norm=1e-9, quantize=2e-9, dequantize=4e-9), 2_000_000

    def gradients(setting: sharded.ShardedSetting) -> float:
        return sharded.gradient_seconds(setting, [numel] * 2, Cluster(4, 1), m)

    assert gradients(stock) == pytest.approx(2 * model.allreduce_seconds(8e6, 4, m))
    assert gradients(bf16) == pytest.approx(2 * model.allreduce_seconds(4e6, 4, m))
    norms = model.allreduce_seconds(128, 4, m) + model.allreduce_seconds(4 * numel / 1024, 4, m)
    codes = 3e-3 + 0.75 * numel / 1e8
    assert gradients(eight) == gradients(both) == pytest.approx(2 * (norms + codes + 0.014))

    def weights(setting: sharded.ShardedSetting) -> float:
        return sharded.weight_seconds(setting, [numel], Cluster(4, 1), m)

    assert weights(stock) == weights(eight) == pytest.approx(2 * (3e-3 + 0.75 * 8e6 / 1e8))
    sent = 3e-3 + 0.75 * (numel + 4 * numel / 1024) / 1e8
    header = model.allreduce_seconds(128, 4, m)
    assert weights(both) == pytest.approx(2 * (header + sent + 0.008 + 0.006 / 4))


@pytest.mark.parametrize("preset", ["1gbe", "200mbit"])
def test_predictions_for_fsdp(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With less bytes a step is faster, and gradients at 8 bits at least 2.5 times."""
    modules = Network.of_model("transformer").module_sizes
    result = predict_sharded(modules, 2, PRESETS[preset], 0.1)
    found, both_ways = result["steps"], "GlobalQSGD(bits=8).fsdp(model, weight_bits=8): a step of "
    assert result["advice"].startswith(f"FSDP2: use {both_ways}")
    stock, _, eight, *_, both = (found[setting.name] for setting in sharded.SHARDED_SETTINGS)
    assert stock["gradient_ms"] > 2.5 * eight["gradient_ms"]
    assert stock["ms"] > eight["ms"] > both["ms"] > 100
    assert stock["times_faster"] == 1
    predict.main(["--preset", preset, "--model", "transformer", "--ranks", "2"])
    assert "weights" in capsys.readouterr().out
    result = predict_sharded(modules, 1, PRESETS[preset], 0.1)
    assert result["advice"].startswith("FSDP2: do not compress")
    alone = result["steps"]
    assert all(step["gradient_ms"] == step["weight_ms"] == 0 for step in alone.values())


def test_sharded_steps_against_what_was_measured() -> None:
    arms = {"FSDP2 fp32": {"ms": 900.0, "gradient_ms": 300.0, "weight_ms": 500.0}}
    arms["FSDP2 bf16 gradients"] = {"error": "no"}  # type: ignore[dict-item]
    measured = {"model": "dlrm", "ranks": 2, "what": "step", "compute_ms": 50.0, "arms": arms}
    found = against(measured, LINK)
    names = ["FSDP2 fp32", "FSDP2 fp32, gradients", "FSDP2 fp32, weights"]
    assert list(found) == names
    assert [found[name]["measured_ms"] for name in names] == [900, 300, 500]
    assert found[names[0]]["predicted_ms"] > sum(found[name]["predicted_ms"] for name in names[1:])


def test_of_two_as_fast_the_more_accurate_is_recommended() -> None:
    """Widths per block in place of one width, for the same bytes but for norms."""
    gradients = Network.of_model("resnet50").gradients
    for preset in ("1gbe", "200mbit"):
        steps = model.steps_of(gradients, 8, PRESETS[preset], 0.03, 0.07)
        assert advice.recommend(steps, 8).startswith("Use 4 bits per block, two phases, ")


def test_break_even() -> None:
    """Below it quantization is recommended, and above it is not."""
    gradients = Network.of_model("resnet50").gradients

    def steps_on(machine: Machine) -> dict[Setting, float]:
        return model.steps_of(gradients, 8, machine, 0.03, 0.07)

    machine = PRESETS["10gbe"]
    beta = advice.break_even(steps_on, 8, machine)
    assert 1e8 < beta < 1e10
    for factor, said in ((0.9, "Use"), (1.1, "Do not compress")):
        there = dataclasses.replace(machine, beta=beta * factor)
        assert advice.recommend(steps_on(there), 8).startswith(said)


@pytest.mark.parametrize("ranks", [2, 4, 16])
@pytest.mark.parametrize("preset", PRESETS)
def test_recommends_no_less_accurate_setting_that_is_as_fast(preset: str, ranks: int) -> None:
    gradients, machine = Network.of_model("resnet50").gradients, PRESETS[preset]
    result = predicted(gradients, ranks, machine, 0.1)
    if result["advice"].startswith("Do not"):
        return
    chosen = next(s for s in SETTINGS if s.name == result["recommended"])
    assert f"Use {chosen.name}, compression={chosen.compressor}: " in result["advice"]
    ms = {name: step["ms"] for name, step in result["steps"].items()}
    for setting in SETTINGS[1:]:
        if ms.get(setting.name, math.inf) <= ms[chosen.name]:
            errors = [squared_error(each, ranks) for each in (chosen, setting)]
            assert errors[0] <= errors[1]


def test_an_arm_that_took_two_phases() -> None:
    """As 8 bits do by exchange='auto' on 8 ranks."""
    arms = {name: {"ms": 10.0} for name in ("GlobalQSGD 8 bits", "GlobalQSGD 8 bits two-phase")}
    measured = {"model": "resnet50", "ranks": 8, "what": "exchange", "arms": arms}
    found = against(measured, LINK)
    assert found["GlobalQSGD 8 bits"] == found["GlobalQSGD 8 bits two-phase"]
    measured["ranks"] = 4
    found = against(measured, LINK)
    assert found["GlobalQSGD 8 bits"] != found["GlobalQSGD 8 bits two-phase"]


def test_narrow_lanes() -> None:
    """8 bits in an Allreduce are for as many ranks as exchange='auto' gives them."""
    eight = next(setting for setting in SETTINGS if setting.name == "8 bits")
    assert possible(eight, 4) and not possible(eight, 5)
    assert Options().exchange_for(4) == "allreduce" and Options().exchange_for(5) == "two_phase"
    with pytest.raises(ValueError, match="8 bits is too narrow for 200 ranks"):
        model.exchange_seconds(eight, Network.of_model("dlrm").gradients, 200, LINK)


def test_power_sgd() -> None:
    """A matrix costs its factors of rank 4, a vector all of its bytes."""
    machine = Machine(alpha=0, beta=1e9, gamma=1e30)

    def sent(*shape: int) -> float:
        seconds = power_sgd_seconds([shape], 2, machine, 1.0) - 1.0
        return (seconds - POWER_SGD * math.prod(shape)) * machine.beta

    assert sent(1000) == pytest.approx(4 * 1000)
    assert sent(1000, 500) == pytest.approx(4 * 4 * 1500)
    assert sent(8, 8) == pytest.approx(4 * 64)  # its factors are no smaller


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It prints a table, JSON, and a figure."""
    predict.main(["--preset", "1gbe", "--ranks", "4"])
    assert "times faster than fp32" in capsys.readouterr().out
    machine = tmp_path / "machine.json"
    machine.write_text(json.dumps(dataclasses.asdict(LINK)))
    figure = tmp_path / "figure.png"
    predict.main(["--machine", str(machine), "--json", "--plot", str(figure)])
    assert json.loads(capsys.readouterr().out)["steps"]["fp32"]["times_faster"] == 1
    assert figure.read_bytes()[:4] == b"\x89PNG"
    figure.unlink()
    predict.main(["--machine", str(machine), "--ranks", "4", "--plot-links", str(figure)])
    assert figure.read_bytes()[:4] == b"\x89PNG"
    assert "resnet50 on 4 ranks" in capsys.readouterr().out
    for wrong in (["--ranks", "0"], ["--compute", "-1"]):
        with pytest.raises(SystemExit):
            predict.main(wrong)
        assert "must be at least 1" in capsys.readouterr().err
    machine.write_text('{"alpha": 1}')
    with pytest.raises(SystemExit):
        predict.main(["--machine", str(machine)])
    assert "beta" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "content", "said"), [
    ("--machine", None, "No such file"),
    ("--machine", "{", "it is no JSON"),
    ("--machine", "[1, 2]", "one JSON object, got list"),
    ("--machine", '{"alpha": 1, "beta": "fast"}', "beta must be a number from 0 on, got 'fast'"),
    ("--machine", '{"alpha": 1, "beta": 0}', "beta must be above 0"),
    ("--machine", '{"alpha": 1, "beta": 1, "delta": 1}', "it has delta, which a machine has not"),
    ("--measured", None, "No such file"),
    ("--measured", "", "it is no JSON"),
    ("--measured", "3", "one JSON object, got int"),
    ("--measured", "{}", "must be the output of hvd-gqsgd bench step --json (KeyError"),
    ("--measured", '{"model": "dlrm", "ranks": 2, "what": "step", "arms": 1}', "(AttributeError"),
    ("--measured", '{"model": "x", "ranks": 2, "what": "step", "arms": {}}', "(KeyError: 'x')"),
])  # fmt: skip
def test_files_that_are_something_else(
    option: str, content: str | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error that names the option and the file, and no traceback."""
    file = tmp_path / "file.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(SystemExit, match="2"):
        predict.main([option, str(file)])
    printed = capsys.readouterr().err
    assert str(file) in printed
    assert said in printed


@pytest.mark.parametrize(("given", "said"), [
    (["--compute", "nan"], "--compute a number of at least 0, got 8 and nan"),
    (["--compute", "inf"], "--compute a number of at least 0, got 8 and inf"),
    (["--measured", "x.json", "--plot", "x.png"], "--plot draws predictions for many ranks"),
    (["--ranks", "8", "--per-node", "3"], "--per-node must be a number that divides --ranks, got"),
    (["--keep", "1"], "--keep: must be a share from 1/2 to 1/65536, as 1/64, or 64 for 1 of 64"),
    (["--keep", "0.3"], "got '0.3'"),
    (["--keep", "1/0"], "got '1/0'"),
    (["--keep", "1/70000"], "or 64 for 1 of 64 elements, got '1/70000'"),
    (["--measured", "x.json", "--keep", "64"], "pass it without --keep"),
    (["--per-node", "0"], "--per-node must be a number that divides --ranks, got 0 and 8"),
    (["--per-node", "2", "--plot", "x.png"], "--plot and --plot-links draw one rank a node"),
    (["--measured", "x.json", "--plot-nodes", "x.png"], "--plot draws predictions for many ranks"),
])  # fmt: skip
def test_arguments_without_a_meaning(
    given: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        predict.main(given)
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("share", ["1/64", "64", "0.015625"])
def test_a_part_of_the_elements(share: str, capsys: pytest.CaptureFixture[str]) -> None:
    """As a share or the number of elements; a dash stands where there is no number."""
    predict.main(["--keep", share, "--preset", "200mbit"])
    printed = capsys.readouterr().out
    rows = {"1/64 at random", "1/64 by a leader", "1/64 as a permutation, 4 bits"}
    assert all(row in printed for row in rows)
    assert "790%" in printed
    assert "e+0" not in printed
    assert "- with a leader, whose error feedback" in printed
    predict.main(["--preset", "200mbit"])
    assert "leader" not in capsys.readouterr().out


def test_one_rank(capsys: pytest.CaptureFixture[str]) -> None:
    predict.main(["--ranks", "1"])
    printed = capsys.readouterr().out
    assert "resnet50 on 1 rank, " in printed
    assert "Do not compress: one rank exchanges nothing." in printed


@pytest.mark.parametrize("what", ["step", "exchange"])
def test_against_what_was_measured(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a table and as JSON; of arms that the model knows and that did run."""
    measured = {
        "model": "dlrm", "what": what, "ranks": 2, "compute_ms": 30.0,
        "arms": {
            "Horovod fp32": {"ms": 1000.0},
            "GlobalQSGD 8 bits": {"error": "no"},
            "DDP fp32": {"ms": 900.0},
        },
    }  # fmt: skip
    file = tmp_path / "measured.json"
    file.write_text(json.dumps(measured))
    predict.main(["--measured", str(file), "--preset", "1gbe", "--json"])
    ((name, row),) = json.loads(capsys.readouterr().out).items()
    assert (name, row["measured_ms"]) == ("Horovod fp32", 1000)
    gradients, machine = Network.of_model("dlrm").gradients, PRESETS["1gbe"]
    seconds = model.exchange_seconds(FP32, gradients, 2, machine)
    if what == "step":
        seconds = model.step_seconds(FP32, gradients, 2, machine, 0.01, 0.02)
    assert row["predicted_ms"] == pytest.approx(1e3 * seconds)
    assert row["off"] == pytest.approx(seconds - 1)
    predict.main(["--measured", str(file), "--preset", "1gbe"])
    printed = capsys.readouterr().out
    assert f"dlrm, {what}, 2 ranks" in printed
    assert f"{row['off']:+.0%}" in printed


@pytest.mark.parametrize("cluster", [Cluster(4, 1), Cluster(8, 1), Cluster(4, 4)])
def test_the_advised_compressor_has_the_setting(cluster: Cluster) -> None:
    """Each expression makes a compressor with the exchange that was predicted."""
    for setting in node_model.steps_of(
        Network.of_model("resnet20").gradients, cluster, LINK, 0.1, 0.2
    ):
        made = eval(setting.compressor, {"GlobalQSGD": dict, "BlockBits": BlockBits, "hvd": hvd})  # noqa: S307
        if not setting.quantized:
            assert made is {16: hvd.Compression.fp16, 32: hvd.Compression.none}[int(setting.bits)]
            continue
        options = Options(**made)
        assert GlobalQSGD(**made).stats().steps == 0
        assert options.exchange_for(cluster.ranks) == (
            "two_phase" if setting.two_phase else "allreduce"
        )
        assert options.hierarchy == ("node" if setting.by_node else "flat")
        assert options.block_size == setting.block_size
        assert options.dither == setting.dither


def test_fsdp_calls() -> None:
    calls = [setting.call for setting in sharded.SHARDED_SETTINGS]
    assert calls[:3] == [
        "MixedPrecisionPolicy(reduce_dtype=torch.float32)",
        "MixedPrecisionPolicy(reduce_dtype=torch.bfloat16)",
        "GlobalQSGD(bits=8).fsdp(model)",
    ]
    assert len(set(calls)) == len(calls)


def test_names_are_those_of_measured_arms() -> None:
    assert {*measured.ARMS, *measured.FLAT_ARMS} <= {*operators.ARMS}
    assert [setting.name for setting in sharded.SHARDED_SETTINGS] == [*operators.FSDP_ARMS]
