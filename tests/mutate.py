"""Proves that the tests notice a wrong rounding rule: python tests/mutate.py [NAME...]

Each mutant is one change to a copy of the sources. It is built, and every set of tests that is
named with it must fail; the copy without a change must pass them all. Tests that compare native
code with the reference, bit by bit, are not among them: they would notice anything, but not what is
wrong in both. So what is proved is that tests of behaviour do: bias, bounds, variance, overflow.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory

from launch import environment, mpirun

ROOT = Path(__file__).parents[1]
COPIED = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "native", "hvd_gqsgd", "tests")
LIMIT = 600  # seconds for a build, or a set of tests
WORKERS = min(4, os.cpu_count() or 1)

# Sets of tests, as pytest's arguments, and on how many ranks (0: without MPI).
UNBIASED = ("tests/test_simulate.py -k test_unbiased", 0)
EACH_UNBIASED = ("tests/test_simulate.py -k test_each_element_is_unbiased", 0)
OPERATORS = ("tests/test_theory.py -k test_unbiased", 0)
BOUNDS = ("tests/test_theory.py -k 'test_no_error_exceeds_its_sure_bound'", 0)
EXPECTED = ("tests/test_theory.py -k 'errors_are_below_their_bounds'", 0)
VARIANCE = ("tests/test_simulate.py -k variance", 0)
PROBE = "hvd_gqsgd/frontends/horovod_probe.py"
LEVEL = ("tests/test_simulate.py -k test_error_is_less_than_a_level", 0)
OVERFLOW = ("tests/test_simulate.py -k test_equal_maxima_never_overflow", 0)
MAXIMA = ("tests/test_kernels.py -k test_maxima_are_never_moved", 0)
WIDTHS = ("tests/test_simulate.py -k test_most_ranks_for_each_width", 0)
CORRELATED = ("tests/test_simulate.py -k 'test_equal_inputs or test_correlated'", 0)
NOT_FINITE = ("tests/test_simulate.py -k test_not_finite", 0)
TRIALS = ("tests/test_simulate.py -k test_error_falls", 0)
DITHER = ("tests/test_dither.py -k 'test_codes'", 0)
STREAMS = ("tests/test_dither.py -k test_each_of_them_counts", 0)
CUT_OFF = ("tests/test_norms.py -k test_values_beyond", 0)
EXPONENTIAL = ("tests/test_exponential.py -k 'unbiased or worst_variance'", 0)
COMBINED = ("tests/test_combine.py -k test_native_sums", 0)
TWO_PHASE = ("tests/test_two_phase.py -k 'unbiased or dither_of_its_own'", 0)
BLOCKS = ("tests/test_block_bits.py -k 'test_widths or test_same_bits'", 0)
RANKS = ("tests/ranks/test_statistics.py", 2)
SUMS = ("tests/ranks/test_allreduce.py -k test_linear_reductions", 2)
JOIN = ("tests/ranks/test_join.py", 3)
WEIGHTS = ("tests/ranks/test_fsdp_weights.py -k test_the_backward_pass", 2)
WEIGHTS_UNBIASED = ("tests/ranks/test_fsdp_weights.py -k test_unbiased", 2)

LINEAR = "native/core/linear.h"
HASH = "native/core/hash.h"
BLOCK_BITS = "native/core/block_bits.h"
EXPONENTIAL_H = "native/core/exponential.h"
NORMS = "native/cpu/norms_inl.h"
LEVELS = "hvd_gqsgd/levels.py"


@dataclass(frozen=True)
class Mutant:
    """A change, and the sets of tests that each must notice it."""

    name: str
    file: str
    old: str
    new: str
    killers: tuple[tuple[str, int], ...]


DRAWN = "static_cast<int32_t>(dither >> (32 - fraction))"
MUTANTS = [
    Mutant("floor instead of dither", LINEAR, DRAWN, "0", (UNBIASED, OPERATORS, RANKS)),
    Mutant("to nearest instead of dither", LINEAR, DRAWN, "(1 << (fraction - 1))",
           (UNBIASED, EACH_UNBIASED, OPERATORS, RANKS)),
    Mutant("half of the dither", LINEAR, DRAWN, f"({DRAWN} >> 1)", (UNBIASED, DITHER, RANKS)),
    Mutant("s + 1 levels", LEVELS, "// (2 * summands)\n", "// (2 * summands) + 1\n", (OVERFLOW,)),
    Mutant("levels for n - 1 ranks", LEVELS, "// (2 * summands)\n",
           "// (2 * max(summands - 1, 1))\n",
           (OVERFLOW,)),
    Mutant("levels for n + 1 ranks", LEVELS, "// (2 * summands)\n",
           "// (2 * (summands + 1))\n",
           (WIDTHS, VARIANCE)),
    Mutant("no upper clip", LINEAR, "  place = place < limit ? place : limit;\n", "", (CUT_OFF,)),
    Mutant("no lower clip", LINEAR, "  place = place > -limit ? place : -limit;\n", "",
           (CUT_OFF,)),
    Mutant("the maximum may be moved", LINEAR, "< one ? next_up(scale) : scale",
           "< one ? scale : scale", (MAXIMA,)),
    Mutant("n s not subtracted", LINEAR, "static_cast<int32_t>(contributors * args.levels)", "0",
           (LEVEL, UNBIASED)),
    Mutant("(n - 1) s subtracted", LINEAR, "(contributors * args.levels)",
           "((contributors - 1) * args.levels)", (LEVEL, UNBIASED)),
    Mutant("means over n + 1 ranks", "native/cpu/two_phase_inl.h",
           "static_cast<double>(received.ranks)", "static_cast<double>(received.ranks + 1)",
           (BOUNDS, TWO_PHASE)),
    Mutant("the same dither on all ranks", HASH, "rank_offset(rank, world_size)}", "0}",
           (CORRELATED,)),
    Mutant("strata for n + 1 ranks", HASH, "<< 32) / world_size)", "<< 32) / (world_size + 1))",
           (CORRELATED,)),
    Mutant("independent ranks share dither", HASH, "1 + uint64_t{rank}", "uint64_t{1}",
           (STREAMS, VARIANCE)),
    Mutant("dither without seed", HASH, "mix64(seed + odd)", "mix64(odd)", (STREAMS,)),
    Mutant("dither without step", HASH, "(step + odd)", "odd", (STREAMS, TRIALS, UNBIASED, RANKS)),
    Mutant("dither without tensor", HASH, "(number + 2 * odd)", "(2 * odd)", (STREAMS,)),
    Mutant("dither without tile", HASH, "mix64(key + tile)", "mix64(key)", (STREAMS, TWO_PHASE)),
    Mutant("dither without element", HASH, "uint32_t x = index + ", "uint32_t x = 0 * index + ",
           (STREAMS, DITHER)),
    Mutant("both elements of a pair have one dither", HASH, "first ^ (first << 16)", "first",
           (STREAMS,)),
    Mutant("NaN dropped", NORMS, "most = bits > most ? bits : most;",
           "most = bits > most && load(in[i]) == load(in[i]) ? bits : most;", (NOT_FINITE,)),
    Mutant("norm of the block before", NORMS, "    norms[b] = norm_from_magnitude(",
           "    norms[b > begin ? b - 1 : b] = norm_from_magnitude(", (LEVEL,)),
    Mutant("exponential: half the probability", EXPONENTIAL_H, "(dither >> 9)", "(dither >> 10)",
           (OPERATORS, EXPONENTIAL, TWO_PHASE)),
    Mutant("exponential: sign lost", EXPONENTIAL_H, ">> 23 | sign << (kBits - 1);", ">> 23;",
           (OPERATORS, EXPONENTIAL)),
    Mutant("exponential: wrong probability of a sum", EXPONENTIAL_H,
           "same_sign ? apart : apart - 1", "apart", (COMBINED,)),
    Mutant("widths per block: cut instead of rounded", BLOCK_BITS,
           "offset + weight + (1 << (kWeightPlaces - 1))", "offset + weight", (BLOCKS,)),
    Mutant("widths per block: norms that are not finite have codes", BLOCK_BITS,
           "norm > 0 && is_finite_norm(norm)", "norm > 0", (BLOCKS,)),
    Mutant("Average is not divided", PROBE, "self.slots[0] / contributors",
           "self.slots[0]", (SUMS, RANKS)),
    Mutant("weights change before their backward pass", "hvd_gqsgd/frontends/fsdp_weights.py",
           "if torch._C._current_graph_task_id() == -1:", "if True:", (WEIGHTS,)),
    Mutant("weights have one dither in all steps", "hvd_gqsgd/frontends/fsdp_groups.py",
           "pipeline.begin_step(step)", "pipeline.begin_step(0)", (WEIGHTS, WEIGHTS_UNBIASED)),
    Mutant("Sum is divided", PROBE, "return exact", "return 1 / world_size",
           (SUMS,)),
    Mutant("scale of n + 1 ranks", "hvd_gqsgd/simulation.py", "share = 1 / len(self._ranks)",
           "share = 1 / (len(self._ranks) + 1)", (LEVEL, UNBIASED)),
    Mutant("contributors that have left are counted", "hvd_gqsgd/exchanges/allreduce.py",
           "count = self.contribution.count\n", "count = 3\n", (JOIN,)),
    Mutant("L2: the largest sum instead of all", "hvd_gqsgd/exchanges/base.py",
           "yield Sum(\"squares\", squares)", "yield Max(\"squares\", squares)",
           (EXPECTED,)),
]  # fmt: skip


class Failure(Exception):
    """The proof did not succeed."""


class Tree:
    """A copy of the sources, built in place."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, folder / name)
        # One instruction set and less optimization: what is tested is the rule, not the speed.
        self.replace("native/cpu/kernels_x86_64_v3.cc", "#if defined(", "#if 0 && defined(")
        self.replace("native/cpu/kernels_x86_64_v4.cc", "#if defined(", "#if 0 && defined(")
        self.replace("setup.py", '    "-O3",\n', '    "-O1",\n')
        self.build()

    def replace(self, file: str, old: str, new: str) -> str:
        """Replaces what must be there once; returns the text as it was."""
        text = (self.folder / file).read_text()
        if text.count(old) != 1:
            raise Failure(f"{file} has {old!r} {text.count(old)} times instead of once")
        (self.folder / file).write_text(text.replace(old, new))
        return text

    @contextmanager
    def mutated(self, mutant: Mutant) -> Iterator[None]:
        """With the change, built."""
        text = self.replace(mutant.file, mutant.old, mutant.new)
        try:
            self.build()
            yield
        finally:
            (self.folder / mutant.file).write_text(text)

    def build(self) -> None:
        """Only what changed; the part for MPI, in which no rounding rule is, stays as it is."""
        status, output = self._run(
            [sys.executable, "setup.py", "build_ext", "--inplace"], {"MPICXX": "", "MAX_JOBS": "2"}
        )
        if status:
            raise Failure(f"the build failed:\n{output[-4000:]}")

    def test(self, tests: str, ranks: int) -> str | None:
        """The first test that fails, if one does."""
        pytest = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider"]
        command = [*(mpirun(ranks) if ranks else []), *pytest, *shlex.split(tests)]
        status, output = self._run(command, {"PYTHONPATH": str(self.folder)})
        failed = re.search(
            r"^FAILED (.+?)(?: - |$)|^rank \d+ of \d+: (.+) failed$", output, re.MULTILINE
        )
        if status and failed:
            return (failed[1] or failed[2]).removeprefix("tests/")
        if status or not re.search(r"\d+ passed", output):
            raise Failure(f"pytest {tests} did not run:\n{output[-4000:]}")
        return None

    def _run(self, command: list[str], more: dict[str, str]) -> tuple[int, str]:
        done = subprocess.run(
            command, cwd=self.folder, env=environment() | more, timeout=LIMIT, check=False,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        return done.returncode, done.stdout


def kill(tree: Tree, mutant: Mutant) -> list[str]:
    """What each set of tests says of it: the first failing test, or that there is none."""
    assert mutant.killers
    with tree.mutated(mutant):
        return [tree.test(*killer) or f"SURVIVES {killer[0]}" for killer in mutant.killers]


def main(names: Sequence[str]) -> None:
    """Prints a line for each mutant; the exit status is 1 if one survives."""
    mutants = [one for one in MUTANTS if not names or any(name in one.name for name in names)]
    began = time.monotonic()
    trees: SimpleQueue[Tree] = SimpleQueue()  # those that nobody works with

    @contextmanager
    def a_tree() -> Iterator[Tree]:
        tree = trees.get()
        try:
            yield tree
        finally:
            trees.put(tree)

    def check(killer: tuple[str, int]) -> None:
        with a_tree() as tree:
            failed = tree.test(*killer)
        if failed is not None:  # then it would prove nothing
            raise Failure(f"{failed} fails without a change")

    def work(mutant: Mutant) -> tuple[Mutant, list[str], float]:
        with a_tree() as tree:
            start = time.monotonic()
            return mutant, kill(tree, mutant), time.monotonic() - start

    with TemporaryDirectory() as folder, ThreadPoolExecutor(WORKERS) as pool:
        try:
            for tree in pool.map(lambda i: Tree(Path(folder) / str(i)), range(WORKERS)):
                trees.put(tree)
            killers = dict.fromkeys(killer for mutant in mutants for killer in mutant.killers)
            list(pool.map(check, killers))
            print(f"without a change all tests pass (after {time.monotonic() - began:.0f} s)")
            survived = 0
            for mutant, found, seconds in pool.map(work, mutants):
                print(f"{mutant.name} | {'; '.join(found)} | {seconds:.0f} s", flush=True)
                survived += any(one.startswith("SURVIVES") for one in found)
        except Failure as failure:
            pool.shutdown(cancel_futures=True)
            sys.exit(f"mutate.py: {failure}")
    print(f"{len(mutants) - survived} of {len(mutants)} mutants killed "
          f"in {time.monotonic() - began:.0f} s")  # fmt: skip
    sys.exit(survived > 0)


if __name__ == "__main__":
    main(sys.argv[1:])
