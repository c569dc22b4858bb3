"""Compares settings in three domains: vision, language and recommendation.

    python examples/compare.py                  # everything; takes the better part of an hour
    python examples/compare.py --quick          # a few steps of each, to see that all of it works
    python examples/compare.py --domains language --seeds 0 1

Each run is ``vision.py``, ``language.py`` or ``recommender.py`` on 4 ranks of this machine, and its
result a JSON file in ``--folder``. What is there already is not run again, so that a comparison can
be interrupted. It ends with a table in Markdown, ``comparison.md``, and a figure,
``comparison.png``: the metric against the bytes of a step, and against the time that
``hvd_gqsgd.tools.cost_model`` predicts for the exchange of a step on a link of 200 Mbit/s.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import signal
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from hvd_gqsgd.options import Options
from hvd_gqsgd.tools.cost_model import PRESETS, Gradients, exchange_seconds
from hvd_gqsgd.tools.launch import LAUNCHERS, LaunchError, run_ranks
from hvd_gqsgd.tools.settings import FP16, FP32, Setting

HERE = Path(__file__).parent
TIMEOUT = 600  # seconds a run; on an idle machine it takes less than one minute
LINK = "200mbit"

SETTINGS: dict[str, list[str]] = {
    "fp32": ["--compression", "none"],
    "fp16": ["--compression", "fp16"],
    "linear, 8 bits": ["--bits", "8"],
    "linear, 4 bits": ["--bits", "4"],
    "exponential, 8 bits": ["--bits", "8", "--dither", "exponential"],
    "DQ-SGD, 5 bits": ["--bits", "dynamic", "--budget", "5"],
    "authors' scheme, 8 bits": ["--compression", "authors"],
}
# Only where there are embedding tables.
SPARSE: dict[str, list[str]] = {
    "fp32, sparse tables": ["--compression", "none", "--sparse"],
    "linear, 8 bits, sparse tables": ["--bits", "8", "--sparse"],
}


@dataclass(frozen=True)
class Domain:
    """A script, and what it measures."""

    name: str
    metric: str
    format: str
    quick: tuple[str, ...]
    """Arguments for a run of some seconds."""


DOMAINS = (
    Domain("vision", "accuracy", ".2%", ("--epochs", "3")),
    Domain(
        "language",
        "perplexity",
        ".3f",
        ("--steps", "60", "--width", "64", "--layers", "2", "--lr", "5e-3"),
    ),
    Domain("recommender", "AUC", ".4f", ("--epochs", "1", "--batch-size", "16384", "--lr", "0.01")),
)
QUICK = {
    "vision": ("DQ-SGD, 5 bits",),
    "language": ("fp32", "exponential, 8 bits"),
    "recommender": ("linear, 8 bits, sparse tables",),
}


@dataclass(frozen=True)
class Job:
    """One run."""

    domain: Domain
    setting: str
    seed: int
    arguments: tuple[str, ...]

    @property
    def file(self) -> str:
        setting = "".join(c if c.isalnum() else "-" for c in self.setting)
        return f"{self.domain.name}_{setting}_{self.seed}.json"


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    names = [domain.name for domain in DOMAINS]
    parser.add_argument("--folder", type=Path, default=Path("comparison"), help="for all results")
    parser.add_argument("--domains", nargs="+", choices=names, default=names, metavar="DOMAIN")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--ranks", type=int, default=4, help="at least 2")
    parser.add_argument("--launcher", choices=tuple(LAUNCHERS), default="mpi")
    parser.add_argument(
        "--quick", action="store_true", help="2 ranks, 1 seed, some settings, a few steps"
    )
    args = parser.parse_args()
    if args.quick:
        args.ranks, args.seeds = 2, args.seeds[:1]
    if args.ranks < 2:
        parser.error(f"--ranks must be at least 2, got {args.ranks}: one rank exchanges nothing")
    return args


def make_jobs(args: argparse.Namespace) -> list[Job]:
    """Seed by seed, so that a comparison that is interrupted has a bit of everything."""
    jobs = []
    for seed in args.seeds:
        for domain in DOMAINS:
            settings = SETTINGS | (SPARSE if domain.name == "recommender" else {})
            for setting, arguments in settings.items():
                if domain.name not in args.domains:
                    continue
                if args.quick and setting not in QUICK[domain.name]:
                    continue
                quick = domain.quick if args.quick else ()
                jobs.append(Job(domain, setting, seed, (*arguments, *quick, "--seed", str(seed))))
    return jobs


# --- running -------------------------------------------------------------------------------------


def finished(job: Job, args: argparse.Namespace) -> dict[str, Any] | None:
    """The result that is there of the very same run."""
    try:
        saved = json.loads((args.folder / job.file).read_text())
    except FileNotFoundError:
        return None
    same = saved["arguments"] == list(job.arguments) and saved["ranks"] == args.ranks
    return saved if same else None


def run(job: Job, args: argparse.Namespace) -> dict[str, Any]:
    """Runs a job, and saves its result."""
    path = args.folder / job.file
    output, raw = path.with_suffix(".log"), path.with_suffix(".result")
    command = [sys.executable, str(HERE / f"{job.domain.name}.py"), *job.arguments]
    try:
        with output.open("wb") as log:
            run_ranks(
                [*command, "--json", str(raw)],
                ranks=args.ranks, timeout=TIMEOUT, launcher=args.launcher, output=log,
            )  # fmt: skip
    except LaunchError as error:
        said = output.read_text(errors="replace")[-3000:]
        sys.exit(f"{said}\n{shlex.join(command)}\n{error}; all that it said is in {output}")
    result = json.loads(raw.read_text()) | {"arguments": list(job.arguments)}
    raw.write_text(json.dumps(result, indent=2) + "\n")
    raw.replace(path)  # in one go, as who finds it takes it for finished
    output.unlink()
    return result


def run_all(jobs: Sequence[Job], args: argparse.Namespace) -> dict[Job, dict[str, Any]]:
    args.folder.mkdir(parents=True, exist_ok=True)
    results = {job: result for job in jobs if (result := finished(job, args)) is not None}
    console = Console(stderr=True)
    columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("{task.fields[now]}"))  # fmt: skip
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("runs", total=len(jobs), completed=len(results), now="")
        for job in jobs:
            if job in results:
                continue
            now = f"{job.domain.name}, {job.setting}, seed {job.seed}"
            progress.update(task, now=now)
            results[job] = result = run(job, args)
            metric = format(result[job.domain.metric], job.domain.format)
            print(f"{now}: {metric}, {result['seconds']:.0f} s of training", flush=True)
            progress.advance(task)
    return {job: results[job] for job in jobs}


# --- what came out -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A setting in a domain, over all seeds."""

    domain: Domain
    setting: str
    metrics: list[float]
    step_bytes: float
    """On the wire, of a rank."""
    seconds: float
    """The exchange of a step on the link, by the model."""
    difference: float
    """Between replicas."""

    @property
    def mean(self) -> float:
        return statistics.fmean(self.metrics)

    @property
    def deviation(self) -> float:
        """Of the sample; not a number for a single seed."""
        return statistics.stdev(self.metrics) if len(self.metrics) > 1 else math.nan


def make_rows(results: dict[Job, dict[str, Any]]) -> list[Row]:
    groups: dict[tuple[Domain, str], list[dict[str, Any]]] = {}
    for job, result in results.items():
        groups.setdefault((job.domain, job.setting), []).append(result)
    return [
        Row(
            domain,
            setting,
            [result[domain.metric] for result in group],
            statistics.fmean(result["bytes_on_wire"] / result["steps"] for result in group),
            statistics.fmean(modelled_seconds(result) for result in group),
            max(result["replica_difference"] for result in group),
        )
        for (domain, setting), group in groups.items()
    ]


def modelled_seconds(result: dict[str, Any]) -> float:
    """What the exchange of a step takes on ``LINK``, by ``hvd_gqsgd.tools.cost_model``."""
    ranks, link, numels = result["ranks"], PRESETS[LINK], result["dense_numels"]
    gathered = 0.0
    if result["sparse_bytes"]:  # the tables go by an Allgather
        each = result["sparse_bytes"] / result["steps"]
        gathered = link.operation + (ranks - 1) * (link.alpha + each / link.beta)
    gradients = Gradients.of(numels, Options().min_numel)
    if result["compression"] == "authors":  # all in one bucket
        setting = Setting("authors", 8, block_size=sum(numels))
        gradients = Gradients(sum(numels), 1)
    elif result["compression"] == "gqsgd":
        bits = 32 * result["compressed_bytes_on_wire"] / result["compressed_bytes_before"]
        setting = Setting("gqsgd", bits, two_phase=result["exchange"] == "two_phase")
    else:
        setting = FP16 if result["compression"] == "fp16" else FP32
    return gathered + exchange_seconds(setting, gradients, ranks, link)


def mean_and_deviation(numbers: Sequence[float], style: str) -> str:
    """The deviation is that of the sample: there is none for a single seed."""
    mean = format(statistics.fmean(numbers), style)
    return f"{mean} ± {statistics.stdev(numbers):{style[-3:]}}" if len(numbers) > 1 else mean


def markdown(rows: Sequence[Row], ranks: int) -> str:
    """A table for each domain."""
    lines = []
    for domain in DOMAINS:
        here = [row for row in rows if row.domain == domain]
        if not here:
            continue
        seeds = len(here[0].metrics)
        reference = next((row for row in here if row.setting == "fp32"), here[0])
        lines += [
            f"**{domain.name.capitalize()}**, {ranks} ranks, {seeds} seed{'s' * (seeds > 1)}",
            "",
            f"| | {domain.metric} | to {reference.setting}, seed by seed | kB a step | times fewer "
            f"| exchange at {LINK}, ms | times faster |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in here:
            pairs = zip(row.metrics, reference.metrics, strict=True)
            differences = [metric - plain for metric, plain in pairs]
            lines.append(
                f"| {row.setting} | {mean_and_deviation(row.metrics, domain.format)} "
                f"| {mean_and_deviation(differences, '+' + domain.format)} "
                f"| {row.step_bytes / 1e3:.1f} "
                f"| {reference.step_bytes / row.step_bytes:.2f} | {row.seconds * 1e3:.1f} "
                f"| {reference.seconds / row.seconds:.2f} |"
            )
        lines.append("")
    return "\n".join(lines)


def draw(rows: Sequence[Row], path: Path) -> None:
    """For each domain, the metric against bytes and against time, with deviations over seeds."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    domains = [domain for domain in DOMAINS if any(row.domain == domain for row in rows)]
    settings = [*SETTINGS, *SPARSE]
    figure = Figure(figsize=(9, 3.2 * len(domains) + 0.7), layout="constrained")
    grid = figure.subplots(len(domains), 2, sharey="row", squeeze=False)
    handles: dict[str, Any] = {}
    for (left, right), domain in zip(grid, domains, strict=True):
        for row in (row for row in rows if row.domain == domain):
            number = settings.index(row.setting)
            error = 0 if math.isnan(row.deviation) else row.deviation
            for axes, x in ((left, row.step_bytes / 1e3), (right, row.seconds * 1e3)):
                handles[row.setting] = axes.errorbar(
                    x, row.mean, error, fmt="osD^v<>ph"[number], color="0.0", capsize=3,
                    markerfacecolor=("0.0", "white", "0.6")[number % 3],
                )  # fmt: skip
        better = "lower" if domain.metric == "perplexity" else "higher"
        left.set(xscale="log", xlabel="kB on the wire a step",
                 ylabel=f"{domain.name}: {domain.metric}\n({better} is better)")  # fmt: skip
        right.set(xscale="log", xlabel=f"exchange of a step at {LINK}, modelled, ms")
        left.ticklabel_format(axis="y", useOffset=False)
        for axes in (left, right):  # plain numbers, and few enough to be read
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=100)


def main() -> None:
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("terminated"))  # ends the ranks too
    rows = make_rows(run_all(make_jobs(args), args))
    table = markdown(rows, args.ranks)
    (args.folder / "comparison.md").write_text(table)
    draw(rows, args.folder / "comparison.png")
    print(f"\n{table}")
    print(f"table and figure are in {args.folder}: comparison.md, comparison.png")
    differ = [f"{row.domain.name}, {row.setting}" for row in rows if row.difference != 0]
    if differ:
        sys.exit(f"FAILED: the replicas differ: {'; '.join(differ)}")


if __name__ == "__main__":
    main()
