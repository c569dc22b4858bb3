"""The networks that the performance model takes: by name, by size, or from a module."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

import pytest
from torch import nn

from hvd_gqsgd.bench import predict
from hvd_gqsgd.bench.digits import Digits
from hvd_gqsgd.bench.gradients import MODELS, layers_of, shapes_of
from hvd_gqsgd.bench.networks import Network, number_of
from hvd_gqsgd.tools.cost_model import Gradients

SCRIPT = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleList(nn.Linear(100, 100) for _ in range(3))
        self.head = nn.Linear(100, 10)
        self.head.bias.requires_grad_(False)

class Nets:
    make = Net

def real():
    print("a line of a user")
    built = Net()
    built.head.weight.sum().item()  # which a tensor on the meta device does not have
    return built

def device():
    assert torch.empty(1).is_meta
    return Net()

def fails():
    raise RuntimeError("no data")

def lazy():
    return nn.LazyLinear(3)

def argument(size):
    return nn.Linear(size, size)

def quits():
    raise SystemExit("usage: ...")

def __getattr__(name):
    if name == "Optional":
        raise RuntimeError("a library is missing")
    raise AttributeError(name)

instance = nn.Linear(100, 100)
frozen = nn.Linear(2, 2).requires_grad_(False)
"""


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the current directory."""
    (tmp_path / "nets_of_a_user.py").write_text(SCRIPT)
    (tmp_path / "broken_of_a_user.py").write_text("import argparse, sys\nsys.exit('usage: ...')")
    (tmp_path / "folder.png").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "nets_of_a_user", raising=False)
    return "nets_of_a_user"


@pytest.mark.parametrize("function", ["Net", "Nets.make", "real", "device"])
def test_a_module(script: str, function: str) -> None:
    """On the meta device where that works; frozen parameters have no gradients."""
    path = list(sys.path)
    network = Network.of_function(f"{script}:{function}")
    assert sys.path == path
    assert network.gradients == Gradients(3 * 10_100 + 1000, 7, 300 + 1000, 4)
    assert network.module_sizes == [10_100] * 3 + [1000]
    assert list(map(tuple, network.shapes[-2:])) == [(100,), (10, 100)]


def test_an_instance(script: str) -> None:
    assert Network.of_function(f"{script}:instance").gradients.elements == 10_100


def test_python() -> None:
    """``Gradients.of`` takes parameters, and sizes as before."""
    model = nn.Sequential(nn.Linear(100, 100), nn.Linear(100, 10))
    model[1].bias.requires_grad_(False)
    assert Gradients.of(model.parameters()) == Gradients.of([10_000, 100, 1000])
    assert Gradients.of(model.parameters(), 0).small_tensors == 0
    assert Gradients.of([]) == Gradients(0, 0)
    for wrong in (["10"], [True], [1.5], model.named_parameters()):
        with pytest.raises(TypeError, match=r"must be tensors, as of model.parameters\(\), or"):
            Gradients.of(wrong)
    with pytest.raises(ValueError, match="must be at least 0, got -1"):
        Gradients.of([-1])
    with pytest.raises(ValueError, match="none of 4 parameters has requires_grad=True: pass"):
        Gradients.of(model.requires_grad_(False).parameters())


@pytest.mark.parametrize(("parameters", "tensors"), [(350_000_000, 300), (7, 3), (5, 5), (1, 1)])
def test_a_size(parameters: int, tensors: int) -> None:
    network = Network.of_size(parameters, tensors)
    gradients = network.gradients
    assert (gradients.elements, gradients.tensors) == (parameters, tensors)
    assert sum(network.module_sizes) == parameters
    assert len(network.modules) == -(-tensors // 10)


def test_the_digits_are_those_of_the_example(monkeypatch: pytest.MonkeyPatch) -> None:
    named = [(name, tuple(p.shape)) for name, p in Digits(rank=0).named_parameters()]
    assert named == shapes_of("digits")
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    digits = importlib.import_module("digits")
    assert repr(Digits(rank=0).layers) == repr(digits.make_model())


@pytest.mark.parametrize("name", MODELS)
def test_a_name(name: str) -> None:
    """Its modules for FSDP2 are the layers that ``bench step`` shards."""
    network = Network.of_model(name)
    assert [len(module) for module in network.modules] == [len(layer) for layer in layers_of(name)]


@pytest.mark.parametrize(("text", "number"), [
    ("25557032", 25_557_032), ("350M", 350_000_000), ("1.3B", 1_300_000_000),
    ("1.5g", 1_500_000_000), ("12K", 12_000), ("7e9", 7_000_000_000), ("1", 1),
])  # fmt: skip
def test_numbers(text: str, number: int) -> None:
    assert number_of(text) == number


@pytest.mark.parametrize("text", ["", "x", "0", "-3", "0.4", "nan", "1e400", "1e15K", "350 MB"])
def test_no_numbers(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"from 1 to 1e15, such as .* got "):
        number_of(text)


def test_command(script: str, capsys: pytest.CaptureFixture[str]) -> None:
    predict.main(["--parameters", "350M", "--tensors", "300"])
    printed = capsys.readouterr().out
    assert "network of 350M parameters on 8 ranks" in printed
    assert "350,000,000 parameters in 300 tensors" in printed
    assert "Compression pays on links of any speed." in printed  # copies of float32 cost more
    predict.main(["--parameters", "10M", "--compute", "500"])
    assert "Compression pays on links of up to " in capsys.readouterr().out
    predict.main(["--module", f"{script}:Net", "--json"])
    steps = json.loads(capsys.readouterr().out)["steps"]
    assert steps["8 bits, two phases"]["levels"] == 127
    assert 0.01 < steps["8 bits, two phases"]["relative_error"] < 0.02
    assert steps["8 bits exponential, two phases"]["relative_error"] > 0.2
    predict.main(["--module", f"{script}:real", "--json"])  # which prints
    json.loads(capsys.readouterr().out)
    predict.main(["--parameters", "3"])
    assert "3 parameters in 3 tensors" in capsys.readouterr().out


@pytest.mark.parametrize(("given", "said"), [
    (["--module", "nets_of_a_user"], "--module must be package.module:function, got 'nets_of_a_u"),
    (["--module", "nets_of_a_user:"], "--module must be package.module:function, got"),
    (["--module", "missing_of_a_user:f"], "cannot be imported (ModuleNotFoundError: No module"),
    (["--module", "missing_of_a_user:f"], "it must be on the Python path or in the current direct"),
    (["--module", "broken_of_a_user:f"], "cannot be imported (SystemExit: usage: ...)"),
    (["--module", "nets_of_a_user:Nettt"], "there is no 'Nettt' in nets_of_a_user"),
    (["--module", "nets_of_a_user:fails"], "failed (RuntimeError: no data): it must be a function"),
    (["--module", "nets_of_a_user:quits"], "failed (SystemExit: usage: ...): it must be a func"),
    (["--module", "nets_of_a_user:Optional"], "can be imported (RuntimeError: a library is miss"),
    (["--plot", "folder.png"], "'folder.png' cannot be written, as it is a directory"),
    (["--module", "nets_of_a_user:argument"], "it must be a function that takes no arguments"),
    (["--module", "os:getcwd"], "os:getcwd: it must return a torch.nn.Module, got str"),
    (["--module", "nets_of_a_user:lazy"], "parameter 'weight' has no shape yet: pass a batch"),
    (["--module", "nets_of_a_user:frozen"], "has no parameter with requires_grad=True"),
    (["--module", "x:y", "--model", "dlrm"], "--model: not allowed with argument --module"),
    (["--module", "x:y", "--parameters", "3"], "not allowed with argument"),
    (["--parameters", "many"], "must be a number from 1 to 1e15, such as 25557032, 350M or 1.3B"),
    (["--tensors", "3"], "--tensors 3 goes with --parameters: pass both, or neither"),
    (["--parameters", "5", "--tensors", "6"], "--tensors must be from 1 to 5, got 6"),
    (["--parameters", "5", "--tensors", "0"], "--tensors must be from 1 to 5, got 0"),
    (["--parameters", "1B", "--tensors", "1000001"], "--tensors must be from 1 to 1,000,000, got"),
    (["--parameters", "5", "--measured", "x.json"], "--measured has the network of its measurem"),
    (["--module", "x:y", "--measured", "x.json"], "--measured has the network of its measurement"),
])  # fmt: skip
def test_wrong_arguments(
    script: str, given: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What failed, the value, what is accepted; and no traceback."""
    with pytest.raises(SystemExit, match="2"):
        predict.main(given)
    assert said in capsys.readouterr().err
