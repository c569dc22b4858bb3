"""Ranks that die, raise or are slow, and links that are cut: no worse than with plain Horovod.

GlobalQSGD and plain Horovod (fp32) have to pass the same tests: a job ends, with an error that
names the cause, and what only delays leaves the result as it is, to the bit.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest
from launch import HERE, gloo, mpirun, run, started

from hvd_gqsgd.bench.hosts import HOSTS

pytestmark = pytest.mark.launches

LIMIT = 60  # seconds; measured: 3 to 10

launchers = pytest.mark.parametrize("launcher", [mpirun, gloo])
# Plain Horovod is what GlobalQSGD is held against; there is no need to do that each time.
compressions = pytest.mark.parametrize(
    "compression", [pytest.param("fp32", marks=pytest.mark.long), "gqsgd"]
)


def faulty(fault: str, *arguments: str) -> list[str]:
    return [sys.executable, str(HERE / "faulty.py"), fault, *arguments]


@pytest.mark.parametrize(
    ("launcher", "ranks", "compression"),
    [
        *(pytest.param(launcher, 2, "fp32", marks=pytest.mark.long) for launcher in (mpirun, gloo)),
        (mpirun, 2, "gqsgd"),
        pytest.param(gloo, 2, "gqsgd", marks=pytest.mark.long),
        (gloo, 3, "node"),
    ],
)
def test_a_rank_is_killed(
    launcher: Callable[[int], list[str]], ranks: int, compression: str
) -> None:
    """Over MPI the launcher ends the others, over Gloo they have an error themselves."""
    job = run(launcher(ranks) + faulty("killed", compression), LIMIT)
    assert job.returncode != 0
    last = ranks - 1
    assert f"rank {last} is at fault in step 6" in job.stdout
    assert f"{compression}: step 6" not in job.stdout
    if launcher is mpirun:
        assert re.search(rf"rank {last} .*\s+signal 9 \(Killed\)", job.stdout)
    else:
        assert f"Process {last} exit with status code 137" in job.stdout
        # The launcher may end one of them before the other one's end reaches it.
        assert survivors(job.stdout) & {*map(str, range(last))}, job.stdout[-5000:]


@compressions
@launchers
def test_a_rank_raises_in_backward(launcher: Callable[[int], list[str]], compression: str) -> None:
    job = run(launcher(2) + faulty("raises", compression), LIMIT)
    assert job.returncode != 0
    assert f"{compression}: step 6" not in job.stdout
    assert "ArithmeticError('on purpose')" in job.stdout
    assert survivors(job.stdout) == {"0"}, job.stdout[-5000:]


def test_a_rank_shuts_down_while_another_one_starts_operations() -> None:
    """Horovod's thread and the one that starts operations must not wait for each other."""
    job = run([*mpirun(2), sys.executable, str(HERE / "shutdowns.py")], LIMIT)
    assert job.returncode == 0, job.stdout[-5000:]
    told = re.search(r"rank 0 was told (\d+) times", job.stdout)
    assert told and int(told[1]) >= 10, job.stdout[-5000:]


def survivors(output: str) -> set[str]:
    """The ranks that were told by Horovod that another one is gone."""
    return set(re.findall(r"rank (\d): HorovodInternalError\(", output))


@launchers
def test_a_slow_rank_only_delays(launcher: Callable[[int], list[str]]) -> None:
    job = run(launcher(2) + faulty("slow", "fp32", "gqsgd"), LIMIT)
    assert job.returncode == 0, job.stdout[-5000:]
    assert job.stdout.count("rank 1 is at fault") == 4
    assert_same_bits(job.stdout, ["fp32", "gqsgd"])


def assert_same_bits(output: str, compressions: list[str]) -> None:
    """Both ranks have the model that they have without the fault."""
    results = re.findall(r"rank (\d), (\w+): (\w{64}) (\w{64})", output)
    assert sorted(result[:2] for result in results) == sorted(
        (r, c) for r in "01" for c in compressions
    )
    for compression in compressions:
        digests = {digest for _, c, *both in results for digest in both if c == compression}
        assert len(digests) == 1, results


# --- links, between emulated hosts ---------------------------------------------------------------


@pytest.fixture
def hosts(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., list[str]]]:
    """Two hosts with a rank each, of a name of their own; makes the command line of hosts.sh."""
    if os.geteuid() != 0:
        pytest.skip("emulated hosts need root")
    missing = [program for program in ("ip", "tc", "nsenter") if shutil.which(program) is None]
    namespaces = ["unshare", "--net", "--uts", "--ipc", "--mount", "true"]
    if missing or subprocess.run(namespaces, capture_output=True).returncode != 0:
        pytest.skip(f"there are no namespaces here, or no {' '.join(missing) or 'right to them'}")
    monkeypatch.setenv("HVD_GQSGD_HOSTS", f"test{os.getpid()}")
    monkeypatch.setenv("PATH", f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}")

    def command(*arguments: str) -> list[str]:
        return [str(HOSTS), *arguments]

    subprocess.run(command("up", "2"), check=True)
    yield command
    subprocess.run(command("down"), check=True)


# Open MPI's daemons notice a dead link by keepalives alone: the first after 10 s without a sign of
# life, then each 5 s, and 2 unanswered ones are the end. By default that takes some 8 minutes.
KEEPALIVE = "time 10", "intvl 5", "probes 2"


def on_hosts(launcher: str) -> list[str]:
    """The launcher of hosts.sh, and its options."""
    if launcher == "gloo":
        return ["gloo"]
    options = " ".join(f"--prtemca oob_tcp_keepalive_{each}" for each in KEEPALIVE)
    return ["mpirun", *options.split(), "-x", "OMP_NUM_THREADS", "-x", "PYTHONPATH"]


@pytest.mark.parametrize("launcher", ["mpirun", "gloo"])
def test_a_link_is_cut_and_restored(launcher: str, hosts: Callable[..., list[str]]) -> None:
    out = 2.0  # seconds
    script = faulty("outside", "gqsgd", "--steps", "40", "--pause", "0.05")
    with started(hosts(*on_hosts(launcher), *script), LIMIT) as job:
        job.wait_for("rank 0: now with the fault")
        job.wait_for("gqsgd: step 6", 2)
        subprocess.run(hosts("link", "h1", "down"), check=True)
        cut = len(job.said)
        time.sleep(out)
        assert job.process.poll() is None
        assert len(re.findall("gqsgd: step", job.said[cut:])) <= 1  # one was done already
        subprocess.run(hosts("link", "h1", "up"), check=True)
        assert job.wait() == 0, job.said[-5000:]
    assert_same_bits(job.said, ["gqsgd"])


@pytest.mark.long
@compressions
@pytest.mark.parametrize("launcher", ["mpirun", "gloo"])
def test_a_link_is_cut_for_good(
    launcher: str, compression: str, hosts: Callable[..., list[str]]
) -> None:
    script = faulty("outside", compression, "--steps", "200", "--pause", "0.05")
    with started(hosts(*on_hosts(launcher), *script), 150) as job:
        job.wait_for("rank 0: now with the fault")
        job.wait_for(f"{compression}: step 6", 2)
        subprocess.run(hosts("link", "h1", "down"), check=True)
        began = time.monotonic()
        status = job.wait()
        print(
            f"{launcher}, {compression}: ended with {status} after {time.monotonic() - began:.1f} s"
        )
    if launcher == "gloo":
        assert status != 0
        assert "HorovodInternalError" in job.said, job.said[-5000:]
    else:  # Open MPI 5.0 ends with 0 then, whatever it runs: what tells is what a job leaves
        assert "lost communication with a remote daemon" in job.said, job.said[-5000:]
    assert not re.search(r"rank \d, \w+: ", job.said)
