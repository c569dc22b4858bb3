"""The bytes of a bucket on the wire, by the formulas of ``hvd_gqsgd/docs/THEORY.md``."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from hvd_gqsgd import layout
from hvd_gqsgd.bench.block_bits import bytes_of_codes
from hvd_gqsgd.codecs.block_bits import BlockBits
from hvd_gqsgd.engine.agreement import HEADER
from hvd_gqsgd.exchanges.contribution import MARKS
from hvd_gqsgd.exchanges.differences import of_whole_steps
from hvd_gqsgd.layout import FLAG
from hvd_gqsgd.options import Options
from hvd_gqsgd.selections import LeaderSelection, selection_of

__all__ = ["wire_bytes", "wire_bytes_of"]


def wire_bytes(
    numels: Sequence[int], *, bits: int | BlockBits = 8, block_size: int | None = 1024,
    two_phase: bool = False, l2: bool = False, double: bool = False, ranks: int = 4,
    gathered: bool = False, owing: bool = False,
) -> int:  # fmt: skip
    """Bytes of a bucket of tensors, as in ``Stats`` but without probes and filled slots.

    Args:
        numels: elements of each tensor; of float64 if ``double``.
        bits, block_size, two_phase, l2: the options.
        double: whether the tensors are float64.
        ranks: number of ranks.
        gathered: whether ranks gather codes of different elements.
        owing: whether owners of two phases keep what they owe.
    """
    norm = 8 if double else 4
    if isinstance(bits, BlockBits):
        blocks = sum(-(-numel // bits.block_size) for numel in numels)
        norm_dtype = layout.norm_dtype(torch.float64 if double else torch.float32)
        if gathered:  # a flag and the codes of each rank, without marks; an Allgather counts half
            own = bytes_of_codes(numels, bits, norm_dtype, 1, two_phase=False)
            codes = ranks * (4 * FLAG + own - 8 * MARKS) // 2
        else:
            codes = bytes_of_codes(numels, bits, norm_dtype, ranks, two_phase)
        return norm * (HEADER + blocks) + (8 * blocks if l2 else 0) + codes
    word = 4 if 32 % bits == 0 else 8
    lanes, unit = 8 * word // bits, max(norm, word)
    blocks, words, means = 0, 0, ranks * unit
    tiles: list[int] = []
    for numel in numels:
        block = block_size or max(numel, 1)
        sizes = [min(block, numel - i) for i in range(0, numel, block)]
        blocks += len(sizes)
        for size in sizes:
            for tile in (min(layout.TILE, size - i) for i in range(0, size, layout.TILE)):
                bytes_of_words = -(-tile // lanes) * word
                words += bytes_of_words
                tiles.append(bytes_of_words)
                means += unit + -(-bytes_of_words // unit) * unit
    if owing:
        ends = [len(tiles) * rank // ranks for rank in range(ranks + 1)]
        of_ranks = [tiles[begin:end] for begin, end in itertools.pairwise(ends)]
        means = sum(8 + _in_eights(norm * len(own)) + _in_eights(sum(own)) for own in of_ranks)
    total = norm * (HEADER + blocks) + (8 * blocks if l2 else 0)
    if gathered:
        return total + ranks * (word * FLAG + words) // 2
    return total + (words // 2 + means // 2 if two_phase else 16 * word + words)


def _in_eights(count: int) -> int:
    return -(-count // 8) * 8


def wire_bytes_of(options: Options, numels: Sequence[int], ranks: int, whole: bool = False) -> int:
    """``wire_bytes`` of float32 with these options.

    Args:
        options, numels, ranks: of the exchange.
        whole: whether it is in a step of whole gradients, with ``error_feedback="marina"``.
    """
    if whole:
        options = of_whole_steps(options)
    bits = options.bits if isinstance(options.bits, BlockBits) else options.most_bits
    two_phase = options.exchange_for(ranks) == "two_phase"
    chosen = 0
    if options.selected:
        selection = selection_of(options, 0, ranks)
        # The header is a message of its own, in words of 8 bytes in place of 4.
        turns = len(numels) if options.error_feedback is not None else 0
        chosen = 8 * (HEADER + turns + 2 * options.estimates) - 4 * HEADER
        if isinstance(selection, LeaderSelection):
            chosen += 4 * selection.words(numels)
        numels = [selection.groups(numel).kept for numel in numels]
    return chosen + wire_bytes(
        numels, bits=bits, block_size=options.block_size, two_phase=two_phase,
        l2=options.norm == "l2", ranks=ranks, gathered=options.disjoint,
        owing=two_phase and options.feeds_rounding,
    )  # fmt: skip
