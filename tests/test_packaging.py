"""What is built from the sources: the source distribution, and wheels where something is missing.

Nothing is compiled here, as that takes minutes: ``make dist`` builds, installs and runs the rest.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

import hvd_gqsgd

pytestmark = pytest.mark.launches

ROOT = Path(__file__).parents[1]
if not (ROOT / "setup.py").is_file():
    pytest.skip("images have no setup.py", allow_module_level=True)
PROJECT = (ROOT / "pyproject.toml").read_text()
(VERSION,) = re.findall(r'^version = "(.+)"$', PROJECT, re.MULTILINE)

# What a setup.py finds in an environment that lacks something.
PRETEND = {
    "another PyTorch": "import torch; torch.__version__ = '2.0.1+cpu'",
    "no PyTorch": "import sys; sys.modules['torch'] = None",
}
SETUP = (
    "import runpy, sys; sys.argv[0] = 'setup.py'; runpy.run_path('setup.py', run_name='__main__')"
)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository, without what was built in it."""
    folder = tmp_path_factory.mktemp("sources") / "hvd_gqsgd"
    ignored = shutil.ignore_patterns(".*", "*.so", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, folder, ignore=ignored)
    shutil.copy(ROOT / ".clang-format", folder)
    return folder


def run(command: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a command where no compiler is on the ``PATH``."""
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=200, check=False,
        env=dict(os.environ, PATH=str(Path(sys.executable).parent), MPICXX="") | variables,
    )  # fmt: skip


@pytest.fixture(scope="module")
def wheel(sources: Path) -> Path:
    """A wheel of a machine without a compiler, by pip."""
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    done = run([*pip, "-w", "dist", "."], sources)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (sources / "dist").glob("*.whl")
    return wheel


def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as file:
        return message_from_bytes(file.read(f"hvd_gqsgd-{VERSION}.dist-info/METADATA"))


def test_a_wheel_without_a_compiler(wheel: Path) -> None:
    """It fits every platform, and every PyTorch from the oldest on."""
    assert wheel.name == f"hvd_gqsgd-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    wanted = {"py.typed", "docs/API.md", "bench/hosts.sh", "reference/linear.py"}
    assert {f"hvd_gqsgd/{name}" for name in wanted} <= names
    assert not any(name.startswith(("tests/", "examples/", "native/")) for name in names)
    found = metadata(wheel)
    assert found["Version"] == VERSION
    assert found["Requires-Python"] == ">=3.10"
    required = {line.split(">=")[0] for line in found.get_all("Requires-Dist", [])[:2]}
    assert required == {"numpy", "torch"}
    assert found["License-Expression"] == "Apache-2.0"


def test_it_runs_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    """Without the sources: the version is that of the wheel, and results are right."""
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "installed")  # noqa: S202 (made above)
    code = (
        "import torch, hvd_gqsgd; print(hvd_gqsgd.__version__, hvd_gqsgd.__file__);"
        "print(hvd_gqsgd.simulate(torch.ones(2, 3)).tolist())"
    )
    done = run([sys.executable, "-c", code], tmp_path, PYTHONPATH=str(tmp_path / "installed"))
    version, file, mean = done.stdout.split(maxsplit=2)
    assert version == VERSION
    assert Path(file).is_relative_to(tmp_path)
    assert mean.strip() == "[1.0, 1.0, 1.0]"


def test_the_source_distribution(sources: Path) -> None:
    """It needs no PyTorch, and has all that a build and the tests need."""
    code = f"{PRETEND['no PyTorch']}; {SETUP}"
    done = run([sys.executable, "-c", code, "-q", "sdist"], sources)
    assert done.returncode == 0, done.stderr
    with tarfile.open(sources / "dist" / f"hvd_gqsgd-{VERSION}.tar.gz") as file:
        names = {name.partition("/")[2] for name in file.getnames()}
        information = file.extractfile(f"hvd_gqsgd-{VERSION}/PKG-INFO")
        assert information is not None
        assert "Dynamic: requires-dist" in information.read().decode()
    kept = ("native", "tests", "examples", "docker", "hvd_gqsgd/docs", "hvd_gqsgd/bench")
    for folder in kept:
        files = [path for path in (sources / folder).rglob("*") if path.is_file()]
        assert {str(path.relative_to(sources)) for path in files} <= names, folder
    assert {"Makefile", "LICENSE", "requirements-dev.txt", "CITATION.cff", "noxfile.py"} <= names
    assert not any(name.endswith((".so", ".pyc")) for name in names)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("no PyTorch", "pip install torch setuptools wheel && pip install --no-build-isolation"),
        ("another PyTorch", "hvd_gqsgd needs PyTorch 2.4 or newer; 2.0.1+cpu is installed"),
    ],
)
def test_a_build_that_cannot_be(missing: str, message: str, sources: Path) -> None:
    """It says what to do, before anything is compiled."""
    done = run([sys.executable, "-c", f"{PRETEND[missing]}; {SETUP}", "bdist_wheel"], sources)
    assert done.returncode == 1
    assert message in done.stderr


def test_a_compiler_that_is_asked_for(sources: Path) -> None:
    for variable, why in (("CXX", "none-such was not found"), ("MPICXX", "no C++ compiler")):
        done = run([sys.executable, "setup.py", "build"], sources, **{variable: "none-such"})
        assert done.returncode == 1, variable
        assert f"{variable} is set, but {why}" in done.stderr


def test_one_version() -> None:
    """That of pyproject.toml stands in the citation, and begins the changes."""
    assert hvd_gqsgd.__version__ == VERSION
    assert f"\nversion: {VERSION}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {VERSION} - " in (ROOT / "CHANGELOG.md").read_text()


def test_bounds_are_the_ends_of_the_matrix() -> None:
    """The oldest versions that `make matrix` tries, and no row in the table that it does not."""
    rows = re.findall(r'Row\("([\w-]+)", "([\d.]+)", "([\d.]+)"', (ROOT / "noxfile.py").read_text())
    table = (ROOT / "hvd_gqsgd" / "docs" / "COMPATIBILITY.md").read_text()
    found = re.findall(r"^\| ([\w-]+) \| ([\d.]+) \| ([\d.]+)", table, re.MULTILINE)
    assert {name for name, _, _ in found} <= {name for name, _, _ in rows}
    assert len(found) > 2

    def least(texts: Iterable[str]) -> str:
        return min(texts, key=lambda text: [int(part) for part in text.split(".")])

    assert f'requires-python = ">={least(python for _, python, _ in rows)}"' in PROJECT
    oldest = least(torch for _, _, torch in rows).split(".")
    assert f"LEAST_TORCH = ({oldest[0]}, {oldest[1]})" in (ROOT / "setup.py").read_text()
    classified = re.findall(r"Python :: (3\.\d+)", PROJECT)
    assert set(classified) == {python for _, python, _ in rows}


def test_the_readme_claims_what_the_matrix_tried() -> None:
    """Python and PyTorch by their minor versions."""
    table = (ROOT / "hvd_gqsgd" / "docs" / "COMPATIBILITY.md").read_text()
    rows = re.findall(r"^\| [\w-]+ \| 3\.\d+\.\d+ \|.*$", table, re.MULTILINE)
    cells = [row.split(" | ") for row in rows]
    readme = (ROOT / "README.md").read_text()
    for name, column, pattern in (
        ("Python", 1, r"\d+\.\d+"), ("PyTorch", 2, r"\d+\.\d+"), ("MPI", 4, r"[\d.]+\d")
    ):  # fmt: skip
        tried = {found[0] for row in cells if (found := re.search(pattern, row[column]))}
        (claimed,) = re.findall(rf"^\| {name} \| ([^;|]*)", readme, re.MULTILINE)
        assert set(re.findall(r"[\d.]+\d", claimed)) == tried, name
