"""The tables of measured steps in the documentation, and the file that they are made from."""

from __future__ import annotations

import json
from typing import Any

import pytest

from hvd_gqsgd.tools.measured_page import BLOCK, FILE, PAGES, add, tables_of, with_tables

RECORDS = json.loads(FILE.read_text())


def result(**changes: Any) -> dict[str, Any]:
    """As ``bench step --json`` prints it, as far as it is used."""
    arms = {
        "Horovod fp32": {"ms": 1000.04, "times_faster": 1.0, "rounds_ms": [1000.04]},
        "GlobalQSGD 8 bits": {"ms": 250.0, "times_faster": 4.00016, "rounds_ms": [250.0]},
        "DDP fp32": {"error": "does not run"},
    }
    machine = {"processor": "P", "instruction_set": "x86-64-v3", "commit": "abc"}
    what = {"what": "step", "rate": "1gbit", "model": "resnet50", "ranks": 2, "hosts": 2}
    return machine | what | {"command": "hvd-gqsgd bench step", "arms": arms} | changes


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_are_those_of_the_records(page: Any) -> None:
    """Run ``python -m hvd_gqsgd.tools.measured_page`` if not."""
    text = page.read_text()
    assert BLOCK.search(text)
    assert with_tables(text, RECORDS) == text
    assert with_tables(text, add(RECORDS, result())) != text or "few arms" in text


def test_records_name_processor_commit_and_command() -> None:
    for record in RECORDS:
        assert all(record[key] for key in ("processor", "instruction_set", "commit", "command"))
        assert not record["commit"].endswith("+")


def test_a_result_replaces_that_of_its_kind() -> None:
    records = add(add([], result()), result(rate="200mbit"))
    assert len(records) == 2
    records = add(records, result(commit="def"))
    assert [(record["rate"], record["commit"]) for record in records] == [
        ("200mbit", "abc"), ("1gbit", "def"),
    ]  # fmt: skip
    assert len(add(records, result(processor="Q"))) == 3


def test_table() -> None:
    records = add(add([], result()), result(what="exchange", arms={"Horovod fp32": {
        "ms": 900, "times_faster": 1.0}}))  # fmt: skip
    assert tables_of("step 1gbit, exchange 1gbit, step 200mbit", records) == (
        "| P, AVX2 | step, 1 Gbit/s: ms | speedup | exchange, 1 Gbit/s: ms | speedup | "
        "step, 200 Mbit/s: ms | speedup |\n"
        "|---|---|---|---|---|---|---|\n"
        "| Horovod fp32 | 1000 | 1.0 | 900 | 1.0 |  |  |\n"
        "| GlobalQSGD 8 bits | 250 | 4.0 |  |  |  |  |"
    )
