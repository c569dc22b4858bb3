"""What the package needs: PyTorch and NumPy always, all else only where it is used.

Horovod and mpi4py may be missing. The native part may be one for another PyTorch: then what needs
it says so, and ``hvd-gqsgd doctor`` says how to mend it. Without one, see ``test_fallback.py``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

import hvd_gqsgd
from hvd_gqsgd._native import loader
from hvd_gqsgd._native import mpi as native_mpi

pytestmark = pytest.mark.launches

PACKAGE = Path(hvd_gqsgd.__file__).parent
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")

LIGHT = """
import sys
import hvd_gqsgd
heavy = {"horovod", "mpi4py", "numpy", "torch"}
shown = {name for name in dir(hvd_gqsgd) if not name.startswith("__")}
print(heavy & sys.modules.keys(), set(hvd_gqsgd.__all__) == shown)
"""

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

WITHOUT_NATIVE = """
import json, sys
sys.modules["horovod"] = None
import torch
import hvd_gqsgd

print(json.dumps(hvd_gqsgd.build_info()))
uses = (
    lambda: hvd_gqsgd.GlobalQSGD(bits=8),
    lambda: hvd_gqsgd.allreduce(torch.ones(3)),
    lambda: hvd_gqsgd.simulate(torch.ones(2, 3)),
)
for use in 2 * uses:  # again, as in a notebook
    try:
        use()
    except ImportError as error:
        print(error)
"""

OTHERS_BROKEN = """
import json, logging
logging.basicConfig(format="%(levelname)s %(message)s")
import torch
import hvd_gqsgd
from hvd_gqsgd._native import mpi, ops

assert ops.devices() == ("cpu",)
assert not mpi.usable_with("Open MPI")
assert hvd_gqsgd.simulate(torch.ones(2, 3), bits=4).equal(torch.ones(3))
print(json.dumps(hvd_gqsgd.build_info()))
"""


def python(*arguments: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs another Python, with the package in ``path``; None: the one that is tested."""
    folder = path or PACKAGE.parent
    done = subprocess.run(
        [sys.executable, *arguments],
        env=dict(os.environ, PYTHONPATH=str(folder)), cwd=folder,
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    # PyTorch 2.9 prints how many ranks Gloo has found.
    done.stdout = re.sub(r"^\[Gloo\] .*\n", "", done.stdout, flags=re.MULTILINE)
    return done


def printed(code: str, path: Path | None = None) -> str:
    """The output of a program that succeeds."""
    done = python("-c", code, path=path)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.timeout(150)
def test_importing_the_package_imports_nothing_else() -> None:
    assert printed(LIGHT) == "set() True"


def test_names() -> None:
    """All resolve, to what their modules define."""
    for name in hvd_gqsgd.__all__:
        assert getattr(hvd_gqsgd, name).__module__.startswith("hvd_gqsgd."), name
        assert name in vars(hvd_gqsgd)  # so that the next use is as fast as any
    assert hvd_gqsgd.__version__ == hvd_gqsgd.build_info()["version"]
    with pytest.raises(AttributeError, match="module 'hvd_gqsgd' has no attribute 'simulat'"):
        hvd_gqsgd.simulat  # noqa: B018


@pytest.mark.timeout(150)
def test_without_horovod_and_mpi4py() -> None:
    compress, allreduce = printed(WITHOUT).splitlines()
    assert compress == "GlobalQSGD.compress needs Horovod"
    assert allreduce == "comm is None, which selects Horovod, but Horovod is not installed"


# --- native libraries that are missing, or cannot be loaded --------------------------------------


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A folder with a copy of the package, without native libraries."""
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(PACKAGE, tmp_path / "hvd_gqsgd", ignore=ignored)
    return tmp_path


def test_version_where_the_package_is_not_installed(copied: Path) -> None:
    """As from a folder on PYTHONPATH; ``-S`` leaves out installed packages."""
    done = python("-S", "-c", "import hvd_gqsgd; print(hvd_gqsgd.__version__)", path=copied)
    assert (done.stdout, done.stderr) == ("0+unknown\n", "")


def corrupt(native: Path) -> str:
    library = native / f"_C{SUFFIX}"
    library.write_bytes(b"not a library")
    return f"the native library {library} was built for another PyTorch than "


def cut_short(native: Path) -> str:
    """Loading it would kill the process."""
    library = native / f"_C{SUFFIX}"
    library.write_bytes((PACKAGE / "_native" / library.name).read_bytes()[:100_000])
    return f"the native library {library} is incomplete"


def for_another_pytorch(native: Path) -> str:
    """Symbols of c10 that this PyTorch does not have."""
    library = native / f"_C{SUFFIX}"
    built = (PACKAGE / "_native" / library.name).read_bytes()
    assert b"_ZN3c10" in built
    library.write_bytes(built.replace(b"_ZN3c10", b"_ZN3c99"))
    return f"the native library {library} was built for another PyTorch than "


def for_another_pytorch_but_loads(native: Path) -> str:
    """It may crash later."""
    library = native / f"_C{SUFFIX}"
    built = (PACKAGE / "_native" / library.name).read_bytes()
    version = loader.built_for_torch("_C")
    another = version.replace(version[0], "9", 1)
    library.write_bytes(built.replace(f"\0{version}\0".encode(), f"\0{another}\0".encode()))
    return f"the native library {library} was built for PyTorch {another}, and PyTorch "


SPOILS = [corrupt, cut_short, for_another_pytorch, for_another_pytorch_but_loads]


@pytest.mark.timeout(150)
@pytest.mark.parametrize("spoil", SPOILS)
def test_without_a_native_part_that_loads(spoil: Callable[[Path], str], copied: Path) -> None:
    """Importing and build_info() work, and each use raises the same error, also the second time."""
    expected = spoil(copied / "hvd_gqsgd" / "_native")
    info, *errors = printed(WITHOUT_NATIVE, copied).splitlines()
    found = json.loads(info)
    assert found["native"]["cpu"]["built"]
    assert not found["native"]["cpu"]["loads"]
    assert found["native"]["cpu"]["error"].startswith(expected)
    assert (found["parts"], found["instruction_sets"], found["instruction_set"]) == ([], [], None)
    assert len(errors) == 6
    assert len(set(errors)) == 1
    assert errors[0].startswith(expected)
    assert "run `pip install --no-build-isolation .` in the repository" in errors[0]
    if spoil is for_another_pytorch:
        assert "undefined symbol: _ZN3c99" in errors[0]


@pytest.mark.timeout(150)
def test_commands_without_a_native_part_that_loads(copied: Path) -> None:
    """Doctor says what to do, and the model and the version work."""
    error = corrupt(copied / "hvd_gqsgd" / "_native")
    doctor = python("-m", "hvd_gqsgd", "doctor", path=copied)
    assert doctor.returncode == 1, doctor.stderr
    assert not doctor.stderr
    assert f"!!  native part: {error}" in doctor.stdout
    assert "\n      run `pip install --no-build-isolation .`" in doctor.stdout
    assert "ok  PyTorch: " in doctor.stdout
    assert not any(what in doctor.stdout for what in ("instruction set", "part for MPI", "2 ranks"))

    model = python("-m", "hvd_gqsgd", "model", "--json", path=copied)
    assert json.loads(model.stdout)["steps"]["fp32"]["times_faster"] == 1
    version = python("-m", "hvd_gqsgd", "--version", path=copied)
    assert version.stdout == f"hvd_gqsgd {hvd_gqsgd.__version__}\n"


@pytest.mark.timeout(150)
def test_predictions_need_no_other_package() -> None:
    """Nothing native is imported for them, nor PyTorch."""
    code = (
        "import sys; from hvd_gqsgd.bench import predict; predict.main(['--json']);"
        "print({'torch', 'numpy', 'horovod', 'hvd_gqsgd._native'} & sys.modules.keys())"
    )
    assert printed(code).splitlines()[-1] == "set()"


@pytest.mark.timeout(150)
def test_native_parts_for_mpi_and_gpus_that_cannot_be_loaded(copied: Path) -> None:
    """All else works without them, and a warning says why."""
    native = copied / "hvd_gqsgd" / "_native"
    shutil.copy(PACKAGE / "_native" / f"_C{SUFFIX}", native)
    for name in ("_mpi", "_cuda"):
        (native / f"{name}{SUFFIX}").write_bytes(b"not a library")
    done = python("-c", OTHERS_BROKEN, path=copied)
    assert done.returncode == 0, done.stderr
    warned = [line for line in done.stderr.splitlines() if line.startswith("WARNING")]
    assert "the kernels for GPUs cannot be used: the native library" in warned[0]
    assert "the native part for MPI cannot be used, and mpi4py is slower" in warned[1]
    info = json.loads(done.stdout)
    assert info["native"]["cpu"] == {"built": True, "loads": True, "error": None}
    cuda = info["native"]["cuda"]
    assert (cuda["built"], cuda["loads"]) == (True, False)
    assert "_cuda" in cuda["error"]
    assert info["native"]["mpi"] == {"built": True, "loads": None, "error": None}


@pytest.mark.skipif(not native_mpi.built(), reason="there is no part for MPI")
@pytest.mark.timeout(150)
def test_a_part_for_another_mpi_is_not_used() -> None:
    code = "from hvd_gqsgd._native import mpi; print(mpi.usable_with('MPICH 1'))"
    assert printed(code) == "False"
