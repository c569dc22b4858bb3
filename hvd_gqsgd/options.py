"""The options: checks and error messages."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, get_args

from hvd_gqsgd.checks import MOST_GROUP, check_choice, check_int, check_number, checked_keep
from hvd_gqsgd.codecs.bit_schedule import MAX_BITS, MIN_BITS, DynamicBits, Schedule
from hvd_gqsgd.codecs.block_bits import BlockBits
from hvd_gqsgd.codecs.by_name import CODECS
from hvd_gqsgd.levels import ENOUGH_LEVELS, LEAST_LEVELS, levels_of
from hvd_gqsgd.option_types import (
    Bits,
    Dither,
    ErrorFeedback,
    Exchange,
    Hierarchy,
    Norm,
    Plan,
    Rounding,
    Select,
)
from hvd_gqsgd.plan import check_plan
from hvd_gqsgd.selection_rules import check_selection

__all__ = ["Options", "digest"]

# Part of what ranks compare: a release has another one if bytes on the wire change their meaning.
WIRE_VERSION = 5

BLOCK_SIZE = 1024  # unless bits=BlockBits(...)


@dataclass(frozen=True)
class Options:
    """The options of a compressor, as keywords of ``GlobalQSGD``, ``DDPState``, ``allreduce`` and
    ``simulate``.

    All ranks must use the same options. A difference is an error on all ranks. The operators are
    those of Global-QSGD (arXiv 2305.18627).

    Args:
        bits: lane width on the wire, from 2 to 16 bits per element; 4 or 8 for exponential
            dithering. ``DynamicBits(...)`` chooses the width of each step, as in DQ-SGD;
            ``BlockBits(...)`` that of each block, by its global norm, and
            ``BlockBits(DynamicBits(...))`` both. ``"auto"`` starts uncompressed, measures steps,
            and takes the fastest of no compression, 16 bits, 8 bits and ``BlockBits(4)``; see
            ``docs/OPTIONS.md``.
        dither: ``"linear"`` has evenly spaced levels. ``"exponential"`` has levels each twice the
            one below, so that small elements keep their relative precision. ``register_codec`` adds
            others.
        exchange: ``"allreduce"`` sums codes as integers in an ordinary Allreduce, with
            ``(2**bits - 1) // (2 * world_size)`` levels per side. ``"two_phase"`` is an Alltoall of
            codes, a mean on the rank that owns a segment, and an Allgather of means; it has
            ``2**(bits - 1) - 1`` levels per side for any world size. ``"auto"`` takes two phases
            for codes that cannot be added and for ``BlockBits``, and where an Allreduce would have
            fewer than 31 levels and two phases have more. With error feedback of the rounding
            (estimates, or ``rounding="nearest"``) it takes two phases where an Allreduce would have
            fewer than 2 levels, and an Allreduce for ``BlockBits`` and ``"marina"``.
            ``"one_phase"`` ends with the mean on the rank that owns a shard, and rounds once: the
            exchange of ``GlobalQSGD.fsdp``, accepted by ``simulate`` alone. ``"gather"`` is that of
            the weights of ``GlobalQSGD.fsdp``, and is not an option of users.
            ``"reduce_scatter"`` sums exponential codes by an MPI operator, and rounds at each sum:
            for ``allreduce`` over MPI alone, to compare with the paper.
        norm: the norm of a block over all ranks: ``"max"``, its largest magnitude, or ``"l2"``.
        block_size: number of consecutive elements that share a norm, at least 1; None for one norm
            per tensor. ``BlockBits(block_size=...)`` has its own.
        correlated: whether the ranks draw their dither from strata of one shared number, so that
            their rounding errors cancel (arXiv 2203.04925). If False, their dither is independent.
        seed: seed of the dither, an int of 64 bits. The same seed and gradients give the same bits.
        min_numel: smallest number of elements to compress, at least 0. Smaller tensors are reduced
            uncompressed by Horovod, unless it cannot reduce them (bfloat16, not contiguous).
            Smaller buckets of DDP, and modules of FSDP with fewer gradients, are not compressed;
            with error feedback, smaller gradients of DDP.
        bucket_mb: size of the buckets in which gradients are exchanged under Horovod, in MiB,
            above 0 and at most 2048.
        hierarchy: ``"node"`` sums gradients in full precision within each node, and exchanges codes
            between nodes alone, as many as there would be with one rank a node. ``"flat"``
            exchanges codes between all ranks. ``"auto"`` goes by node in place of two phases, with
            two nodes or more of two ranks or more each. A tuple has the number of ranks of each
            node in order of rank, as ``(8, 8)``, where host names do not tell.
        error: for ``bits="auto"``, the largest squared rounding error of an element of the mean,
            relative to the squared norm of its block, that a setting may have; None for no limit.
        plan: for ``bits="auto"``, the settings of a former run, as
            ``state_dict()["schedule"]["plan"]`` has them: pairs of a step and a setting. With a
            plan no time is measured, and the same gradients give the same bits.
        keep: share of the elements of a gradient that is exchanged, 1 divided by an int up to
            65,536, as 1/64; 1 exchanges all of them.
        select: how these elements are chosen. ``"random"`` takes runs of 32 elements
            by the hash of the dither, and multiplies them by ``1 / keep``, which is unbiased.
            ``"permutation"`` takes other runs on each rank, as far as there are others: with
            ``keep=1/n`` on n ranks, each element is sent by one of them (PermK, arXiv 2110.03300).
            ``"leader"`` takes the elements that are largest on one rank, in turn, and needs error
            feedback, as it is biased (ScaleCom, arXiv 2104.11125).
        error_feedback: how a rank makes up for the elements that it did not send. ``"residual"``
            adds them to its next gradient; ``"ef21"`` sends the differences between gradients and
            their estimates, and the result is the mean of all estimates (arXiv 2106.05203);
            ``"econtrol"`` does both (arXiv 2311.05645). These two go with ``keep=1`` too.
            ``"marina"`` adds the differences between successive gradients, chosen at random or as a
            permutation, to an estimate, and sends whole gradients once in ``full_every`` steps
            (arXiv 2102.07845). None is ``"residual"`` with ``select="leader"``, and no error
            feedback otherwise. With error feedback other than ``"marina"``, random runs take turns,
            and are not multiplied.
        low_pass: weight of a step in the residual of ``error_feedback="residual"``, above 0 and at
            most 1: ScaleCom's low-pass filter ``beta``. 1 does not filter.
        full_every: the steps of ``error_feedback="marina"`` in which whole gradients are exchanged
            are one in so many in the mean, from 2 to 65,536; None: one in ``1 / keep``.
        rounding: ``"stochastic"`` rounds by dither, which is unbiased. ``"nearest"`` rounds linear
            codes to the nearest level, which is biased and needs error feedback. The error of each
            element is then at most its magnitude, so that one level a side is enough: 2 bits for
            any number of ranks.

    Raises:
        TypeError: an option has the wrong type.
        ValueError: an option is out of range, or incompatible with another option.
    """

    bits: Bits = 8
    dither: Dither = "linear"
    exchange: Exchange = "auto"
    norm: Norm = "max"
    block_size: int | None = BLOCK_SIZE
    correlated: bool = True
    seed: int = 0
    min_numel: int = 4096
    bucket_mb: float = 25
    hierarchy: Hierarchy = "auto"
    error: float | None = None
    plan: Plan | None = None
    keep: float = 1
    select: Select = "random"
    error_feedback: ErrorFeedback | None = None
    low_pass: float = 1
    full_every: int | None = None
    rounding: Rounding = "stochastic"

    def __post_init__(self) -> None:
        if not isinstance(self.bits, DynamicBits | BlockBits) and self.bits != "auto":
            others = ", DynamicBits(...), BlockBits(...) or 'auto'"
            check_int("bits", self.bits, MIN_BITS, MAX_BITS, others)
        check_choice("dither", self.dither, tuple(CODECS))
        check_choice("exchange", self.exchange, get_args(Exchange))
        check_choice("norm", self.norm, get_args(Norm))
        codec = CODECS[self.dither]
        if codec.widths is not None and self.bits not in (*codec.widths, "auto"):
            *widths, last = map(str, codec.widths)
            either = f"{', '.join(widths)} or {last}" if widths else last
            raise ValueError(f"bits must be {either} for dither={self.dither!r}, got {self.bits}")
        if self.exchange == "allreduce" and not codec.added:
            raise ValueError(
                f"exchange must be 'two_phase' or 'auto' for dither={self.dither!r}, whose codes "
                "cannot be added, got 'allreduce'"
            )
        if self.exchange == "reduce_scatter" and (self.dither, self.norm) != ("exponential", "max"):
            raise ValueError(
                "exchange='reduce_scatter' goes with dither='exponential' and norm='max', got "
                f"dither={self.dither!r} and norm={self.norm!r}"
            )
        if self.exchange == "one_phase" and self.dynamic is not None:
            raise ValueError(
                "bits must not be DynamicBits(...) for exchange='one_phase', as a rank knows the "
                f"mean of its own shard alone, got {self.bits}, which follows the whole norm"
            )
        if self.block_size is not None:
            check_int("block_size", self.block_size, 1, 2**31 - 1, " or None (one norm per tensor)")
        if isinstance(self.bits, BlockBits):
            self._check_block_bits(self.bits)
        if not isinstance(self.correlated, bool):
            raise TypeError(f"correlated must be True or False, got {self.correlated!r}")
        check_int("seed", self.seed, -(2**63), 2**63 - 1)
        check_int("min_numel", self.min_numel, 0, 2**63 - 1)
        bucket_mb = check_number("bucket_mb", self.bucket_mb, "a number of megabytes")
        if not 0 < bucket_mb <= 2048:
            raise ValueError(
                f"bucket_mb must be above 0 and at most 2048 megabytes, got {self.bucket_mb!r}"
            )
        object.__setattr__(self, "bucket_mb", bucket_mb)  # 25 and 25.0 are the same
        self._check_hierarchy()
        self._check_auto()
        self._check_keep()

    def _check_auto(self) -> None:
        if self.bits != "auto":
            for name in OF_AUTO:
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name} has no effect with bits={self.bits!r}: pass bits='auto', or leave "
                        f"{name} out"
                    )
        if self.error is not None:
            error = check_number("error", self.error, "a relative squared error, or None")
            if not 0 < error < math.inf:
                raise ValueError(f"error must be a number above 0, got {self.error!r}")
            object.__setattr__(self, "error", error)
        if self.plan is not None:
            object.__setattr__(self, "plan", check_plan(self.plan))

    def _check_keep(self) -> None:
        object.__setattr__(self, "keep", checked_keep(self.keep))
        low_pass = check_number("low_pass", self.low_pass, "a weight, as 0.1")
        if not 0 < low_pass <= 1:
            raise ValueError(f"low_pass must be above 0 and at most 1, got {low_pass}")
        object.__setattr__(self, "low_pass", low_pass)
        check_choice("select", self.select, get_args(Select))
        check_choice("rounding", self.rounding, get_args(Rounding))
        if self.error_feedback is not None:
            check_choice("error_feedback", self.error_feedback, get_args(ErrorFeedback), "None")
        if self.full_every is not None:
            check_int("full_every", self.full_every, 2, MOST_GROUP, ", or None")
        check_selection(self)
        if self.error_feedback == "marina" and self.full_every is None:
            object.__setattr__(self, "full_every", round(1 / self.keep))
        if self.select == "leader" and self.error_feedback is None:
            object.__setattr__(self, "error_feedback", "residual")

    def _check_block_bits(self, bits: BlockBits) -> None:
        if self.block_size not in (BLOCK_SIZE, bits.block_size):
            raise ValueError(
                "block_size must be left out for bits=BlockBits(...), got "
                f"{self.block_size}: pass BlockBits(block_size={self.block_size})"
            )
        object.__setattr__(self, "block_size", bits.block_size)

    def _check_hierarchy(self) -> None:
        if isinstance(self.hierarchy, list | tuple):
            for size in self.hierarchy:
                check_int("the ranks of each node of hierarchy", size, 1, 2**31 - 1)
            object.__setattr__(self, "hierarchy", tuple(self.hierarchy))
        else:
            sizes = "the number of ranks of each node, as (8, 8)"
            check_choice("hierarchy", self.hierarchy, ("auto", "flat", "node"), sizes)
        by_node = self.hierarchy not in ("auto", "flat")
        if by_node and self.exchange not in ("auto", "allreduce", "two_phase"):
            raise ValueError(
                f"hierarchy={self.hierarchy!r} has no effect with exchange={self.exchange!r}: "
                "pass hierarchy='flat', or leave it out"
            )

    @property
    def width(self) -> int | DynamicBits | BlockBits:
        """The option ``bits`` of an exchange, which has one."""
        assert self.bits != "auto"
        return self.bits

    @property
    def dynamic(self) -> DynamicBits | None:
        """The schedule of widths or budgets; None if they are the same in all steps."""
        if isinstance(self.bits, BlockBits):
            return self.bits.dynamic
        return self.bits if isinstance(self.bits, DynamicBits) else None

    @property
    def least_bits(self) -> int:
        """The narrowest lanes, or the smallest budget, of a step."""
        return self._lane_bits if self.dynamic is None else self.dynamic.min_bits

    @property
    def most_bits(self) -> int:
        """The widest lanes, or the largest budget, of a step."""
        return self._lane_bits if self.dynamic is None else self.dynamic.max_bits

    @property
    def _lane_bits(self) -> int:
        """The target of the mean width, as a whole number."""
        bits = self.width
        if isinstance(bits, DynamicBits):
            return int(bits.budget)
        return bits.lane_bits if isinstance(bits, BlockBits) else bits

    @property
    def selected(self) -> bool:
        """Whether there is a ``SelectedExchange``: for a part of the elements, or error feedback
        of the rounding."""
        return self.keep < 1 or self.feeds_rounding

    @property
    def disjoint(self) -> bool:
        """Whether each rank sends other elements."""
        return self.select == "permutation"

    @property
    def estimates(self) -> bool:
        """Whether the result is the mean of estimates of gradients."""
        return self.error_feedback in ("ef21", "econtrol", "marina")

    @property
    def feeds_rounding(self) -> bool:
        """Whether error feedback makes up for rounding too."""
        return self.estimates or self.rounding == "nearest"

    def exchange_for(self, world_size: int) -> Exchange:
        """Returns the exchange for a world size, with ``"auto"`` resolved.

        Exponential codes cannot be added. Linear ones of one width are, unless the lanes leave less
        than 31 levels a side to the ranks, and more without a sum to hold. Those of a width per
        block have more levels for the same bytes in two phases, and take these. With error feedback
        of the rounding, which two phases have for one width alone, few levels are enough.
        MARINA's steps of all elements are an Allreduce.
        """
        if self.exchange != "auto":
            return self.exchange
        if self.error_feedback == "marina":
            return "allreduce"
        if self.feeds_rounding:
            summed = levels_of(self.least_bits, world_size) >= LEAST_LEVELS
            return "allreduce" if summed or isinstance(self.bits, BlockBits) else "two_phase"
        if not CODECS[self.dither].added or isinstance(self.bits, BlockBits):
            return "two_phase"
        levels, of_one = (levels_of(self._lane_bits, ranks) for ranks in (world_size, 1))
        return "two_phase" if levels < min(ENOUGH_LEVELS, of_one) else "allreduce"

    def describe(self, world_size: int, of: str = "ranks") -> str:
        """Describes the exchange and its levels per side for a world size, counted in ``of``."""
        exchange = "allgather" if self.disjoint else str(self.exchange_for(world_size))
        summands = world_size if exchange == "allreduce" else 1
        bits = self.width
        if isinstance(bits, DynamicBits):
            widths = Schedule(bits).usable(summands)
        else:
            widths = [*bits.rule(summands)[1:3]] if isinstance(bits, BlockBits) else [bits]
        levels_for = CODECS[self.dither].levels_for
        levels = sorted({levels_for(width, summands) for width in (widths[0], widths[-1])})
        return f"{exchange} on {world_size} {of}, levels per side: {' to '.join(map(str, levels))}"

    @property
    def bucket_bytes(self) -> int:
        """Gradient bytes at which a bucket is full."""
        return int(self.bucket_mb * 2**20)

    def values(self) -> dict[str, tuple[Any, Any]]:
        """The value and the default of each option, those of subclasses too."""
        return {f.name: (getattr(self, f.name), f.default) for f in dataclasses.fields(self)}

    def digest(self) -> int:
        """Returns 31 bits that differ between different options, with probability 1 - 2^-31."""
        return digest(("options", WIRE_VERSION, *dataclasses.astuple(self)))

    def keywords(self, without: Iterable[str] = ()) -> str:
        """Returns the text of the options as keyword arguments, without some of them."""
        of_auto = () if self.bits == "auto" else OF_AUTO
        of_keep = () if self.selected else OF_KEEP
        names = (name for name in OPTIONS if name not in (*without, *of_auto, *of_keep))
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


OF_AUTO = ("error", "plan")
"""Options that go with ``bits="auto"`` alone."""
OF_KEEP = ("keep", "select", "error_feedback", "low_pass", "full_every", "rounding")
"""Options that have an effect if a part of the elements is exchanged, or with error feedback."""
OF_FEEDBACK = ("error_feedback", "low_pass", "full_every", "rounding")
"""Options of error feedback, which takes the gradients of parameters one by one."""
OPTIONS = tuple(f.name for f in dataclasses.fields(Options))


def digest(value: object) -> int:
    """A 31-bit digest of the ``repr`` of a value made of plain numbers, strings and tuples."""
    hashed = hashlib.blake2b(repr(value).encode(), digest_size=4).digest()
    return int.from_bytes(hashed, "little") >> 1
