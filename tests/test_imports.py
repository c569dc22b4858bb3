"""What the package needs: PyTorch and NumPy always, Horovod and mpi4py only where they are used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hvd_gqsgd._native import loader, ops
from hvd_gqsgd._native import mpi as native_mpi

WITHOUT = """
import sys
sys.modules["horovod"] = sys.modules["mpi4py"] = None  # importing them fails
import torch
import torch.distributed as dist
import hvd_gqsgd
from hvd_gqsgd import GlobalQSGD

assert hvd_gqsgd.build_info()["horovod"] is None
assert hvd_gqsgd.simulate(torch.ones(2, 3), bits=4).equal(torch.ones(3))

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
state = GlobalQSGD(min_numel=0).ddp_state()
assert state.average(torch.ones(3), first=True).wait().equal(torch.ones(3))
assert hvd_gqsgd.allreduce(torch.ones(3), dist.group.WORLD).equal(torch.ones(3))

for call in (lambda: GlobalQSGD.compress(torch.ones(5000)), lambda: hvd_gqsgd.allreduce(state)):
    try:
        call()
    except ImportError as error:
        print(error)
"""


def python(code: str) -> str:
    """What another Python prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.timeout(150)
def test_nothing_is_imported_before_it_is_used() -> None:
    code = "import sys, hvd_gqsgd; print({'horovod', 'mpi4py', 'sklearn'} & sys.modules.keys())"
    assert python(code) == "set()"


@pytest.mark.timeout(150)
def test_without_horovod_and_mpi4py() -> None:
    compress, allreduce = python(WITHOUT).splitlines()
    assert compress == "GlobalQSGD.compress needs Horovod"
    assert allreduce == "comm is None, which stands for Horovod, which is missing"


def test_native_parts_that_cannot_be_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """All works without them, and it is said why."""
    rubbish = tmp_path / "rubbish.so"
    rubbish.write_bytes(b"not a library")
    for file in (None, str(rubbish)):
        monkeypatch.setattr(loader, "library_file", lambda name, file=file: file)
        assert ops.devices.__wrapped__() == ("cpu",)
        assert not native_mpi.usable_with.__wrapped__("Open MPI")
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "the kernels for GPUs cannot be used: the native library" in warned[0]
    assert "the native part for MPI cannot be used, and mpi4py is slower" in warned[1]


@pytest.mark.skipif(not native_mpi.built(), reason="there is no part for MPI")
@pytest.mark.timeout(150)
def test_a_part_for_another_mpi_is_not_used() -> None:
    code = "from hvd_gqsgd._native import mpi; print(mpi.usable_with('MPICH 1'))"
    assert python(code) == "False"


@pytest.mark.timeout(150)
def test_a_library_for_another_pytorch_is_refused() -> None:
    """It may load, and crash later."""
    assert ops.built_for_torch().split(".")[:2] == torch.__version__.split(".")[:2]
    refused = python("""
import torch
torch.__version__ = torch.torch_version.TorchVersion("1.13.0")
try:
    import hvd_gqsgd._native.ops
except ImportError as error:
    print(error)
""")
    assert f"was built for PyTorch {ops.built_for_torch()}" in refused
    assert "PyTorch 1.13.0 is installed: run `pip install --no-build-isolation .`" in refused
