"""The performance model of nodes: its formulas, its limits, and its command."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from hvd_gqsgd.bench import predict
from hvd_gqsgd.bench.measured import against
from hvd_gqsgd.bench.networks import Network
from hvd_gqsgd.bench.prediction import predict as predicted
from hvd_gqsgd.bench.prediction import predict_sharded
from hvd_gqsgd.nodes import nodes_of_sizes
from hvd_gqsgd.tools import advice, cost_model, node_model
from hvd_gqsgd.tools.cost_model import PRESETS, Gradients, Machine
from hvd_gqsgd.tools.node_model import Cluster
from hvd_gqsgd.tools.settings import (
    FP32,
    LINEAR_4,
    LINEAR_8,
    SETTINGS,
    TWO_PHASE_8,
    Setting,
    kept,
    possible,
)

RESNET = Network.of_model("resnet50").gradients
LINK = Machine(alpha=1e-3, beta=1e8, gamma=1e9, inside=1e9)
SHAPES = [(2, 2), (2, 4), (3, 5), (8, 8), (16, 2)]
two_phase = pytest.mark.parametrize("setting", [s for s in SETTINGS if s.two_phase])


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 100])
@pytest.mark.parametrize("by_node", [False, True])
def test_one_rank_a_node(ranks: int, preset: str, by_node: bool) -> None:
    """It is the model of ranks, whichever way the options say."""
    machine, cluster = PRESETS[preset], Cluster(ranks, 1)
    for setting in SETTINGS:
        if not possible(setting, ranks):
            continue
        found = node_model.exchange_seconds(setting, RESNET, cluster, machine, by_node)
        expected = cost_model.exchange_seconds(setting, RESNET, ranks, machine)
        assert found == pytest.approx(expected, rel=1e-12)
        found = node_model.step_seconds(setting, RESNET, cluster, machine, by_node, 0.03, 0.07)
        expected = cost_model.step_seconds(setting, RESNET, ranks, machine, 0.03, 0.07)
        assert found == pytest.approx(expected, rel=1e-12)


def test_formulas() -> None:
    """By hand: 2 nodes of 4 ranks, 8 MB."""
    cluster, slow = Cluster(2, 4), dataclasses.replace(LINK, inside=1e8)
    ring = 14e-3 + 7 / 8 * 8e6 * (2 / 1e8 + 1 / 1e9)
    assert node_model.allreduce_seconds(8e6, cluster, slow) == pytest.approx(ring)
    doubling = 3e-3 + 4 * 800 / 1e8 + 2 * 800 / 1e9 + 3 * 800 / 1e9
    assert node_model.allreduce_seconds(800, cluster, LINK) == pytest.approx(doubling)
    sums = 2 * (2e-3 + 3 * 8e6 / 1e9) + 2e-3 + 1 / 2 * 8e6 * (2 / 1e8 + 1 / 1e9)
    assert node_model.allreduce_seconds(8e6, cluster, LINK) == pytest.approx(sums)
    phases = 14e-3 + 4 * 4 / 8 * 8e6 / 1e8 + 7 / 8 * 8e6 / 1e8
    assert node_model.two_phase_seconds(8e6, cluster, LINK) == pytest.approx(phases)
    within = 14e-3 + 2 * 7 / 8 * 8e6 / 1e9
    assert node_model.two_phase_seconds(8e6, Cluster(1, 8), LINK) == pytest.approx(within)
    assert node_model.allreduce_seconds(8e6, Cluster(1, 1), LINK) == 0


def test_an_exchange_by_node() -> None:
    """By hand: one bucket of 2 M elements in one tensor, on 2 nodes of 4 ranks."""
    each = 2_000_000
    m = dataclasses.replace(LINK, copy=1e-10, norm=1e-9, quantize=2e-9, dequantize=4e-9)

    def allreduce(bytes_: float) -> float:
        return node_model.allreduce_seconds(bytes_, Cluster(2, 4), m)

    operations = 7 * m.operation + m.tensor + 2 * m.compressed_tensor
    small = allreduce(8 * 8) + allreduce(4 * each / 1024) + allreduce(cost_model.PROBE_BYTES)
    inside = 2 * 3e-3 + 3 / 4 * (4 * each + each) / 1e9
    between = 2e-3 + 2 / 2 * each / 1e8
    added = 4 * each * 1e-10 + 3 / 4 * 4 * each / 1e9
    kernels = each / 4 * (3e-9 + 4e-9) + each / 8 * 2e-9 + each * 4e-9
    found = node_model.exchange_seconds(TWO_PHASE_8, Gradients(each, 1), Cluster(2, 4), m, True)
    assert found == pytest.approx(operations + small + inside + between + added + kernels)


@two_phase
@pytest.mark.parametrize(("nodes", "per_node"), SHAPES)
def test_bytes_on_a_link(nodes: int, per_node: int, setting: Setting) -> None:
    """Those of each message from a rank of the first node to one of another."""
    numel, ranks = 840_000, nodes * per_node
    node = nodes_of_sizes([per_node] * nodes, ranks).node
    crossing = [(a, b) for a in range(ranks) for b in range(ranks) if node(a) == 0 != node(b)]

    def sent(setting: Setting, by_node: bool) -> float:
        return node_model.link_bytes(setting, numel, Cluster(nodes, per_node), by_node)

    alltoall, owners = len(crossing), sum(a % per_node == b % per_node for a, b in crossing)
    ring = sum((a + 1) % ranks == b for a, b in crossing)
    assert sent(setting, False) * ranks == pytest.approx(numel * (alltoall + ring * (ranks - 1)))
    assert sent(setting, True) == pytest.approx(2 * owners * numel / per_node / nodes)
    assert sent(FP32, False) == sent(FP32, True) == sent(LINEAR_8, False) == sent(setting, True)
    assert sent(setting, True) < sent(setting, False)
    assert node_model.link_bytes(setting, numel, Cluster(1, per_node), True) == 0


def test_sharded_steps_on_nodes() -> None:
    """With one rank a node as on ranks; with several, codes cross the link of a node often."""
    modules, machine = Network.of_model("transformer").module_sizes, PRESETS["1gbe"]
    alone = predict_sharded(modules, 8, machine, 0.1)["steps"]
    shared = predict_sharded(modules, 8, machine, 0.1, per_node=4)["steps"]
    one_node = predict_sharded(modules, 8, machine, 0.1, per_node=8)["steps"]
    for name, step in alone.items():
        assert one_node[name]["ms"] < step["ms"]
        assert one_node[name]["relative_error"] == shared[name]["relative_error"]
    codes, plain = "FSDP2 GlobalQSGD 8 bits", "FSDP2 fp32"
    assert shared[codes]["gradient_ms"] > 2 * alone[codes]["gradient_ms"]
    assert shared[plain]["weight_ms"] == pytest.approx(alone[plain]["weight_ms"])


@two_phase
@pytest.mark.parametrize(("nodes", "per_node"), SHAPES)
@pytest.mark.parametrize("preset", ["1gbe", "200mbit"])
def test_by_node_is_faster_over_slow_links(
    preset: str, nodes: int, per_node: int, setting: Setting
) -> None:
    """And takes no less than its bytes on the link."""
    cluster, machine = Cluster(nodes, per_node), PRESETS[preset]
    flat, by_node = (
        node_model.exchange_seconds(setting, RESNET, cluster, machine, way) for way in (False, True)
    )
    codes = (RESNET.elements - RESNET.small_elements) * setting.bits / 8
    assert node_model.link_bytes(setting, codes, cluster, True) / machine.beta < by_node < flat


def test_flat_is_faster_over_fast_links() -> None:
    """Where the operations of Horovod and the bytes within a node take longer than the link."""
    for preset in ("nvlink", "pcie"):
        flat, by_node = (
            node_model.exchange_seconds(LINEAR_4, RESNET, Cluster(2, 2), PRESETS[preset], way)
            for way in (False, True)
        )
        assert flat < by_node


@pytest.mark.parametrize("preset", ["1gbe", "200mbit"])
def test_advice(preset: str) -> None:
    steps = node_model.steps_of(RESNET, Cluster(2, 8), PRESETS[preset], 0.03, 0.07)
    assert "8 bits, flat" not in {setting.name for setting in steps}  # too narrow for 16 ranks
    assert advice.recommend(steps, 16).startswith(
        "Use 4 bits per block, two phases, by node, compression=GlobalQSGD(bits=BlockBits(4), "
    )


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows flat and by node, those of FSDP2, and JSON."""
    predict.main(["--ranks", "8", "--per-node", "4"])
    printed = capsys.readouterr().out
    assert "resnet50 on 8 ranks, 4 on each node, " in printed
    for row in ("8 bits, two phases, flat", "8 bits, two phases, by node", "fp16", "Use "):
        assert row in printed
    assert "FSDP2" in printed
    predict.main(["--ranks", "4", "--per-node", "2", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["steps"]["fp32"]["times_faster"] == 1
    assert "8 bits, flat" in result["steps"] and "8 bits, by node" not in result["steps"]
    assert result["break_even"] > 0 and "fsdp2" in result
    predict.main(["--ranks", "4", "--per-node", "4", "--json"])
    assert not any("by node" in name for name in json.loads(capsys.readouterr().out)["steps"])
    figure = tmp_path / "figure.png"
    for more in ([], ["--ranks", "8", "--per-node", "4"]):
        predict.main(["--plot-nodes", str(figure), *more])
        assert figure.read_bytes()[:4] == b"\x89PNG"
        figure.unlink()


@pytest.mark.parametrize("inside", [0, "fast"])
def test_a_machine_has_a_rate_within_nodes(
    inside: object, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "machine.json"
    file.write_text(json.dumps({"alpha": 1e-4, "beta": 1e8, "inside": inside}))
    with pytest.raises(SystemExit, match="2"):
        predict.main(["--machine", str(file)])
    assert "inside must be " in capsys.readouterr().err
    times = []
    for rate in (1e8, 1e10):
        file.write_text(json.dumps({"alpha": 1e-4, "beta": 1e8, "inside": rate}))
        predict.main(["--machine", str(file), "--per-node", "4", "--json"])
        steps = json.loads(capsys.readouterr().out)["steps"]
        times.append(steps["8 bits, two phases, by node"]["ms"])
    assert times[0] > times[1]


@pytest.mark.parametrize("what", ["step", "exchange"])
def test_against_what_was_measured(what: str) -> None:
    """Two phases are by node where a host has several ranks, but for arms named flat; 8 bits are an
    Allreduce on 4 ranks."""
    names = ("Horovod fp32", "GlobalQSGD 8 bits", "GlobalQSGD 4 bits", "GlobalQSGD 4 bits flat")
    settings = (FP32, LINEAR_8, LINEAR_4, LINEAR_4)
    arms = {name: {"ms": 1000.0} for name in (*names, "FSDP2 fp32")}
    measured = {"model": "resnet50", "ranks": 4, "hosts": 2, "what": what, "compute_ms": 30.0}
    found = against(measured | {"arms": arms}, LINK)
    assert found.pop("FSDP2 fp32")["predicted_ms"] > 0
    assert tuple(found) == names
    for name, setting, by_node in zip(names, settings, (False, False, True, False), strict=True):
        given = (setting, RESNET, Cluster(2, 2), LINK, by_node)
        seconds = node_model.exchange_seconds(*given)
        if what == "step":
            seconds = node_model.step_seconds(*given, 0.01, 0.02)
        assert found[name]["predicted_ms"] == pytest.approx(1e3 * seconds)
    for hosts in (1, 4):  # each rank has a link, if only the memory of one machine
        found = against(measured | {"hosts": hosts, "arms": arms}, LINK)
        for name, setting in zip(names, settings, strict=True):
            seconds = cost_model.exchange_seconds(setting, RESNET, 4, LINK)
            if what == "step":
                seconds = cost_model.step_seconds(setting, RESNET, 4, LINK, 0.01, 0.02)
            assert found[name]["predicted_ms"] == pytest.approx(1e3 * seconds)


@pytest.mark.parametrize(("hosts", "said"), [
    (3, "each host must have as many ranks, got 4 on 3 hosts"),
    (0, "ZeroDivisionError"),
    ("two", "TypeError"),
])  # fmt: skip
def test_hosts_that_cannot_be(
    hosts: object, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "measured.json"
    measured = {"model": "dlrm", "ranks": 4, "hosts": hosts, "what": "step", "arms": {}}
    file.write_text(json.dumps(measured))
    with pytest.raises(SystemExit, match="2"):
        predict.main(["--measured", str(file)])
    printed = capsys.readouterr().err
    assert str(file) in printed
    assert said in printed


def test_marina_takes_the_mean_of_its_steps() -> None:
    """Of a permutation in 15 of 16 steps, and 8 bits in the other, and copies in all; up to 63
    ranks, on nodes too."""
    gradients = Gradients(10**6, 10)  # one bucket
    _, permutation, _, marina = kept(1 / 16, 4)

    def seconds(machine: Machine) -> float:
        part, whole, both = (
            cost_model.exchange_seconds(setting, gradients, 4, machine)
            for setting in (permutation, LINEAR_8, marina)
        )
        return both - (15 * part + whole) / 16

    free = dataclasses.replace(PRESETS["200mbit"], copy=0, norm=0, operation=0, alpha=0)
    assert 0 < seconds(free) < 1e-3
    copies = 4 * 10**6 * (3 + 11) * 1e-10
    assert seconds(dataclasses.replace(free, copy=1e-10)) == pytest.approx(copies, rel=0.1)
    assert [possible(marina, ranks) for ranks in (63, 64)] == [True, False]
    cluster, passes = Cluster(2, 2), (0.01, 0.02)
    (flat,) = node_model.steps_of(gradients, cluster, PRESETS["1gbe"], *passes, [marina]).items()
    assert flat[0].name.endswith("MARINA, flat")
    steps = predicted(gradients, 4, PRESETS["1gbe"], 0.1, keep=1 / 16)["steps"]
    assert steps[marina.name]["relative_error"] is None
