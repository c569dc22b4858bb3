"""The tables of measurements in the documentation, and the file that they are made from."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from hvd_gqsgd.bench.networks import Network
from hvd_gqsgd.bench.prediction import predict
from hvd_gqsgd.tools.cost_model import PRESETS
from hvd_gqsgd.tools.measured_page import (
    BLOCK,
    FILE,
    PAGES,
    add,
    dumped,
    tables_of,
    with_tables,
)

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
    assert with_tables(text, json.loads(FILE.read_text().replace("4", "3"))) != text


def test_benchmarks_has_no_other_tables_of_numbers() -> None:
    (page,) = [page for page in PAGES if page.name == "BENCHMARKS.md"]
    text = page.read_text()
    number = re.compile(r"\| [-+]?\d[\d.e-]* (?=\|)")
    assert len(number.findall(text)) > 300
    assert number.findall(BLOCK.sub("", text)) == []


def test_pages_show_all_records() -> None:
    contents = [match[2] for page in PAGES for match in BLOCK.finditer(page.read_text())]
    for record in RECORDS:
        others = [each for each in RECORDS if each is not record]
        if "table" in record:
            assert f"table {record['table']}" in contents
        else:
            shown = [part for part in contents if not part.startswith("table ")]
            assert any(tables_of(part, others) != tables_of(part, RECORDS) for part in shown)


def test_records_name_processor_and_command() -> None:
    """A commit is one without changes."""
    for record in RECORDS:
        assert record["processor"] and record["command"]
        assert not record.get("commit", "").endswith("+")
    assert dumped(RECORDS) == FILE.read_text()


def test_predicted_nodes_are_those_of_the_model() -> None:
    (record,) = [each for each in RECORDS if each.get("table") == "nodes predicted"]
    gradients = Network.of_model("resnet50").gradients
    for row in record["rows"]:
        nodes, per_node = map(int, row["nodes"].split(" × "))
        machine = PRESETS[row["link"].split("`")[1]]
        steps = predict(gradients, nodes * per_node, machine, 0.0, per_node)["steps"]
        summed = nodes * per_node <= 4
        found = {
            "fp32": "fp32",
            "8 bits flat": "8 bits, flat" if summed else "8 bits, two phases, flat",
            "8 bits by node": "8 bits, two phases, by node",
            "4 bits flat": "4 bits, two phases, flat",
            "4 bits by node": "4 bits, two phases, by node",
        }
        assert {key: row[key] for key in found} == {
            key: round(steps[name]["ms"]) for key, name in found.items()
        }


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


def test_columns_of_hosts_of_several_ranks_and_of_fsdp() -> None:
    plain, ours = {"ms": 20.04, "times_faster": 1.0}, {"ms": 10.0, "times_faster": 2.0}
    nodes = {"Horovod fp32": plain | {"link_megabytes": 8.04, "megabytes": 9}}
    parts = {"gradient_ms": 4.0, "gradient_times_faster": 3.0, "gradient_megabytes": 9}
    records = add([], result(what="exchange", ranks=4, arms=nodes))
    records = add(records, result(model="transformer", arms={"FSDP2 fp32": ours | parts}))
    assert records[0]["arms"] == {"Horovod fp32": {"ms": 20.0, "times_faster": 1.0,
                                                   "link_megabytes": 8.0}}  # fmt: skip
    assert tables_of("exchange 1gbit 2x2", records) == (
        "| P, AVX2 | exchange, 1 Gbit/s: ms | speedup | MB on a link |\n"
        "|---|---|---|---|\n"
        "| Horovod fp32 | 20 | 1.0 | 8.0 |"
    )
    assert tables_of("step 1gbit transformer", records).splitlines()[2] == (
        "| FSDP2 fp32 | 10 | 2.00 | 4 | 3.00 |  |  |"
    )


def test_table_with_columns_of_its_own() -> None:
    columns = [["", {"name": ""}], ["bits", {"bits": "g"}], ["error", {"error": ".1e"}],
               ["AUC", {"auc": ".2f %", "difference": "+.2f %"}]]  # fmt: skip
    rows: list[dict[str, Any]] = [
        {"name": "fp32", "bits": 32, "auc": [70, 0.5]},
        {"name": "8 bits", "bits": 8.05, "error": 5.9e-4, "difference": [0, 0.25]},
    ]
    record = {"table": "widths", "processor": "P", "command": "hvd-gqsgd bench frontier"}
    assert tables_of("table widths", [record | {"columns": columns, "rows": rows}]) == (
        "|  | bits | error | AUC |\n"
        "|---|---|---|---|\n"
        "| fp32 | 32 |  | 70.00 ± 0.50 % |\n"
        "| 8 bits | 8.05 | 5.9e-4 | +0.00 ± 0.25 % |\n"
        "\nP: `hvd-gqsgd bench frontier`"
    )
