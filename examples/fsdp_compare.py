"""Compares stock FSDP2, quantized gradients, and quantized gradients and weights.

    python examples/fsdp_compare.py                      # 3 seeds on 4 ranks of this machine
    python examples/fsdp_compare.py --seeds 0 1 --arguments "--steps 100 --layers 3"

Each run is ``fsdp_language.py``, and its result a JSON file in ``--folder``. What is there already,
by the same arguments, is not run again. It prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
SETTINGS: dict[str, list[str]] = {
    "FSDP2": ["--bits", "0"],
    "8-bit gradients": ["--bits", "8"],
    "8-bit gradients and weights": ["--bits", "8", "--weight-bits", "8"],
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--arguments", default="", help="more of them for fsdp_language.py")
    parser.add_argument("--folder", type=Path, default=Path("fsdp_results"))
    return parser.parse_args()


def run(args: argparse.Namespace, setting: str, seed: int) -> Any:
    """The result of a run, which is done unless there is one."""
    name = f"{setting} seed {seed} ranks {args.ranks} {args.arguments}"
    output = (args.folder / "".join(c if c.isalnum() else "_" for c in name)).with_suffix(".json")
    if not output.exists():
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        script = [f"--nproc-per-node={args.ranks}", str(HERE / "fsdp_language.py")]
        given = ["--seed", str(seed), *SETTINGS[setting], *shlex.split(args.arguments)]
        command = [*torchrun, *script, *given, "--output", str(output)]
        job = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if job.returncode:
            sys.exit(f"{shlex.join(command)} failed:\n{job.stdout[-5000:]}")
    return json.loads(output.read_text())


def table(args: argparse.Namespace, results: dict[str, list[Any]]) -> str:
    """Perplexity of each seed, and bytes handed to the collectives of a rank in a run."""
    gradients, weights = (
        results["8-bit gradients and weights"][0][f"{kind}_bytes"][0]
        for kind in ("gradient", "weight")
    )
    columns = [
        *(f"seed {seed}" for seed in args.seeds),
        "mean",
        "deviation",
        "gradients",
        "weights",
    ]
    lines = [f"| | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for setting, runs in results.items():
        values = [result["perplexity"] for result in runs]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        sent = [
            result[1] if result and result[1] else before
            for result, before in (
                (runs[0].get("gradient_bytes"), gradients), (runs[0].get("weight_bytes"), weights),
            )
        ]  # fmt: skip
        cells = [f"{value:.3f}" for value in (*values, statistics.mean(values), spread)]
        cells += [f"{nbytes / 1e6:,.1f} MB" for nbytes in sent]
        lines.append(f"| {setting} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    args = parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[Any]] = {}
    for seed in args.seeds:
        for setting in SETTINGS:
            result = run(args, setting, seed)
            results.setdefault(setting, []).append(result)
            print(
                f"{setting}, seed {seed}: {result['perplexity']:.3f}", file=sys.stderr, flush=True
            )
    print(table(args, results))


if __name__ == "__main__":
    main()
