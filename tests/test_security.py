"""Nothing that was received is run: no pickles, no shell made of strings; and images without keys.

``make check`` holds most of it, by the rules S and TID251 of ruff. Here is what ruff has no rules
for.
"""

from __future__ import annotations

import ast
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import audit
import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    [*ROOT.glob("*.py"), *(file for folder in ("hvd_gqsgd", "examples", "tests", "docker")
                           for file in (ROOT / folder).rglob("*.py"))]
)  # fmt: skip
SCRIPTS = sorted([*(ROOT / "docker").rglob("*.sh"), *(ROOT / "hvd_gqsgd").rglob("*.sh")])
DOCKERFILES = sorted((ROOT / "docker").rglob("Dockerfile"))

pytestmark = pytest.mark.skipif(not DOCKERFILES, reason="only in a checkout: an image has less")

# mpi4py's methods in lower case pickle what they send; those with a capital send buffers.
PICKLING = {
    "allgather", "allreduce", "alltoall", "bcast", "bsend", "exscan", "gather", "ibsend", "irecv",
    "isend", "issend", "mrecv", "recv", "reduce", "scan", "scatter", "send", "sendrecv", "ssend",
}  # fmt: skip
NOT_MPI4PY = {"dist", "functools", "group", "hvd", "hvd_gqsgd", "native_mpi", "ops"}


def unsafe(source: str) -> Iterator[str]:
    """Calls that unpickle what they get."""
    tree = ast.parse(source)
    with_mpi4py = "from mpi4py import MPI" in source
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        called, keywords = ast.unparse(node.func), {k.arg: k.value for k in node.keywords}
        if called == "torch.load" and ast.unparse(keywords.get("weights_only", node)) != "True":
            yield f"{node.lineno}: torch.load without weights_only=True"
        if called.endswith(".load") and "allow_pickle" in keywords:
            yield f"{node.lineno}: {called} with allow_pickle"
        receiver, _, method = called.rpartition(".")
        if with_mpi4py and method in PICKLING and receiver.split(".")[0] not in NOT_MPI4PY:
            yield f"{node.lineno}: {called} of mpi4py pickles"


# What they save themselves, in memory: models with a hook, as users do.
LOAD_THEIR_OWN = {"test_ddp_uses.py", "test_hook_citizen.py"}


def test_nothing_received_is_unpickled() -> None:
    assert len(SOURCES) > 100
    others = [file for file in SOURCES if file.name not in LOAD_THEIR_OWN]
    found = {str(file): list(unsafe(file.read_text())) for file in others}
    assert not {file: lines for file, lines in found.items() if lines}


@pytest.mark.parametrize(
    "line",
    [
        "comm.bcast(x)",
        "MPI.COMM_WORLD.allreduce(x)",
        "self.comm.recv(source=0)",
        "torch.load(file)",
        "torch.load(file, weights_only=False)",
        "np.load(file, allow_pickle=True)",
    ],
)
def test_what_unpickles_is_found(line: str) -> None:
    assert list(unsafe(f"from mpi4py import MPI\n{line}"))


def test_scripts_run_no_strings_and_make_no_files_that_others_foresee() -> None:
    assert len(SCRIPTS) > 5
    for script in SCRIPTS:
        code = re.sub(r"(^|\s)#.*", "", script.read_text())
        assert "set -euo pipefail" in code, script
        for bad in (r"\beval\b", r"[^-\w]/tmp/", r"mktemp -u", r"(curl|wget)[^|\n]*\|\s*(ba)?sh\b"):
            assert not re.search(bad, code), (script, bad)


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda file: file.parent.name)
def test_images_run_without_root_and_hold_no_keys(file: Path) -> None:
    """``docker/test.sh`` looks into the image itself."""
    text = file.read_text().replace("\\\n", " ")
    last_stage = text[text.rindex("\nFROM ") :]
    (user,) = re.findall(r"^USER (.*)$", last_stage, re.MULTILINE)
    assert int(user) >= 1000
    copied = re.findall(r"^(?:COPY|ADD) (.*)$", text, re.MULTILINE)
    assert len(copied) > 5
    for line in copied:
        assert not re.search(r"\.ssh|id_|_key|\.pem|\.git|(^| )\.{1,2}/? ", line), line
    assert not re.search(r"^(ARG|ENV) .*(PASSWORD|SECRET|TOKEN)", text, re.MULTILINE)
    # What is copied comes from a list of what may be.
    ignored = [
        line for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] != "#"
    ]
    assert ignored[0] == "*"


@pytest.fixture
def pypi(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, list[dict[str, Any]]]]:
    """A server that says of these packages what PyPI would, and 404 of all others."""
    known: dict[str, list[dict[str, Any]]] = {}

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            _, _, name, version, _ = self.path.split("/")
            assert version == audit.pinned()[name]
            self.send_response(200 if name in known else 404)
            self.end_headers()
            self.wfile.write(json.dumps({"vulnerabilities": known.get(name)}).encode())

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever).start()
        monkeypatch.setattr(audit, "PYPI", f"http://127.0.0.1:{server.server_port}")
        yield known
        server.shutdown()


BAD = {"id": "PYSEC-1", "aliases": ["CVE-1"], "fixed_in": ["9.9"], "withdrawn": None}


@pytest.mark.parametrize(
    ("said", "status", "printed"),
    [
        ([], 0, "vulnerabilities: 0 in 2 packages"),
        ([BAD | {"withdrawn": "2026"}], 0, "vulnerabilities: 0 in 2 packages"),
        ([BAD | {"aliases": [*audit.ACCEPTED]}], 0, "vulnerabilities: 0 in 2 packages"),
        ([BAD, BAD], 1, f"pytest {pytest.__version__}: PYSEC-1, CVE-1; fixed in: 9.9"),
    ],
    ids=["none", "withdrawn", "accepted", "two"],
)
def test_known_vulnerabilities_are_found(
    pypi: dict[str, list[dict[str, Any]]], capsys: pytest.CaptureFixture[str],
    said: list[dict[str, Any]], status: int, printed: str,
) -> None:  # fmt: skip
    """``make check`` asks for those of all that is pinned."""
    assert {"torch", "numpy", "pytest", "ruff"} <= audit.pinned().keys()
    pypi |= {"torch": [], "pytest": said}
    with pytest.raises(SystemExit) as exit_:
        audit.main()
    assert exit_.value.code == status
    assert printed in capsys.readouterr().out


def test_without_a_connection_nothing_is_said_to_be_safe(
    pypi: dict[str, list[dict[str, Any]]], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    for address in (audit.PYPI, "http://127.0.0.1:9"):  # which knows nothing; which is nobody's
        monkeypatch.setattr(audit, "PYPI", address)
        with pytest.raises(SystemExit) as exit_:
            audit.main()
        assert not exit_.value.code
        printed = capsys.readouterr().out
        assert printed.count("not checked") == 1
        assert "0 in 0 packages" in printed
