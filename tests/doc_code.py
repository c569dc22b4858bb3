"""Runs the Python blocks of the README and the pages: mpirun -n 2 python tests/doc_code.py

Blocks of the README are complete. Those of the pages are given the names that they use: a small
model, and libraries. A comment ``<!-- not run: reason -->`` directly above a block leaves it out.
Rank 0 prints a line of JSON with the output of all blocks.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import os
import re
import socket
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "hvd_gqsgd" / "docs").glob("*.md"))
FOLDERS = [ROOT / folder / "README.md" for folder in ("docker", "examples", "native", "tests")]
FILES = [README, ROOT / "CONTRIBUTING.md", *FOLDERS, *PAGES]

BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<reason>[^\n]*) -->\n)?"
    r"^```python\n(?P<code>.*?)^```\n"
    r"(?P<output>\n(?:^ {4}[^\n]*\n)+)?",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A Python block of a file."""

    file: Path
    line: int
    code: str
    reason: str
    """The reason that the block is not run; empty if it is."""
    output: str
    """The indented lines that follow the block in the README: the output of rank 0."""

    @property
    def name(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line}"


def blocks(file: Path) -> list[Block]:
    text = file.read_text()
    return [
        Block(
            file, text.count("\n", 0, found.start("code")), found["code"], found["reason"] or "",
            re.sub(r"^ {4}", "", (found["output"] or "").lstrip("\n"), flags=re.MULTILINE),
        )
        for found in BLOCK.finditer(text)
    ]  # fmt: skip


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Lets a block make the default process group of PyTorch, and destroys it."""
    import numpy as np
    import torch.distributed as dist
    from mpi4py import MPI

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = np.array([free.getsockname()[1]])
    MPI.COMM_WORLD.Bcast(port)
    os.environ |= {
        "RANK": str(MPI.COMM_WORLD.rank), "WORLD_SIZE": str(MPI.COMM_WORLD.size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port[0]),
    }  # fmt: skip
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def names(code: str) -> dict[str, Any]:
    """The names that blocks of the pages use."""
    import horovod.torch as hvd
    import torch
    from mpi4py import MPI
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    import hvd_gqsgd

    hvd.init()
    torch.distributed.init_process_group("gloo")
    model: torch.nn.Module = torch.nn.Linear(128, 128)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    statements = ast.unparse(ast.parse(code))  # without comments
    if "register_comm_hook" in statements and "DistributedDataParallel(" not in statements:
        model = DistributedDataParallel(model)
    if ".fsdp(" in statements and "fully_shard(" not in statements:
        model = fully_shard(model)
    folder = tempfile.TemporaryDirectory()  # deleted with the names
    return {
        "checkpoints": Path(folder.name), "_folder": folder,
        "DistributedDataParallel": DistributedDataParallel, "MPI": MPI, "comm": MPI.COMM_WORLD,
        "fully_shard": fully_shard, "hvd": hvd, "model": model, "optimizer": sgd, "sgd": sgd,
        "torch": torch, "x": torch.randn(5000),
        **{name: getattr(hvd_gqsgd, name) for name in hvd_gqsgd.__all__},
    }  # fmt: skip


def run(block: Block) -> str:
    """Returns the output of a block."""
    compiled = compile("\n" * block.line + block.code, str(block.file), "exec")
    with process_group(), contextlib.redirect_stdout(io.StringIO()) as output:
        exec(compiled, {} if block.file == README else names(block.code))  # noqa: S102
    return output.getvalue()


def main() -> None:
    """Runs all blocks that have no reason not to be run."""
    from mpi4py import MPI

    runs = [block for file in FILES for block in blocks(file) if not block.reason]
    outputs = {}
    for block in runs:
        try:
            outputs[block.name] = run(block)
        except BaseException:
            print(f"the block {block.name} failed", file=sys.stderr)
            raise
    if MPI.COMM_WORLD.rank == 0:
        print(json.dumps(outputs))


if __name__ == "__main__":
    main()
