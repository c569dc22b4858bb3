"""The settings that ``bits="auto"`` chooses among."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from hvd_gqsgd.codecs.block_bits import BlockBits
from hvd_gqsgd.codecs.schedules import budget_of
from hvd_gqsgd.exchanges import by_node_rule
from hvd_gqsgd.nodes import Nodes
from hvd_gqsgd.options import BLOCK_SIZE, Options
from hvd_gqsgd.plan import FLAT, SETTING_NAMES, WIDTHS
from hvd_gqsgd.tools.accuracy import relative_variance
from hvd_gqsgd.tools.settings import BLOCKS_4, FP32, Setting

__all__ = ["Arm", "arms_of", "different", "widest"]

# float16 is none of them: it rounds to nearest, and overflows. 16 bits have its bytes, and neither.
BITS: dict[str, int | BlockBits] = dict(zip(WIDTHS, (16, 8, BlockBits(4)), strict=True))


class Arm(NamedTuple):
    """A setting."""

    name: str
    setting: Setting
    """For the cost model."""
    options: Options | None
    """Those of its exchange; None leaves gradients uncompressed."""


def arms_of(options: Options, ranks: int, nodes: Nodes | None = None) -> list[Arm]:
    """Returns the settings that are possible with the user's other options and ``error``.

    Args:
        options: those of the user, with ``bits="auto"``.
        ranks: number of ranks.
        nodes: of the ranks; None: all are on one.

    Returns:
        The uncompressed arm, those with fewer and fewer bits, and the flat ones.
    """
    arms = [Arm(FP32.name, FP32, None)]
    for name in SETTING_NAMES[1:]:
        try:
            of_arm = options_of(options, name)
            of_arm.describe(ranks)  # raises where lanes are too narrow for the ranks
        except ValueError:  # other options do not go with this width
            continue
        setting = _setting(name, of_arm, ranks, nodes)
        if options.error is None or relative_variance(setting, ranks) / 4 <= options.error:
            arms.append(Arm(name, setting, of_arm))
    return arms


def different(arms: Sequence[Arm]) -> list[Arm]:
    """Returns the arms without the flat ones whose width is exchanged flat anyway."""
    by_node = {arm.name + FLAT for arm in arms if arm.setting.by_node}
    return [arm for arm in arms if not arm.name.endswith(FLAT) or arm.name in by_node]


def widest(options: Options) -> Arm:
    """Returns the compressed arm with the most bits, for gradients that cannot go uncompressed.

    Raises:
        ValueError: other options go with none of the widths.
    """
    for name in BITS:
        try:
            return Arm(name, FP32, options_of(options, name))
        except ValueError as error:
            last = error
    raise last


def options_of(options: Options, name: str) -> Options:
    """Returns the options of a compressed arm.

    Raises:
        ValueError: other options do not go with its width.
    """
    bits, block_size = BITS[name.removesuffix(FLAT)], options.block_size
    hierarchy = options.hierarchy
    if name.endswith(FLAT):
        if hierarchy != "auto":
            raise ValueError(f"hierarchy={hierarchy!r} leaves no choice")
        hierarchy = "flat"
    if isinstance(bits, BlockBits) and block_size is not None:
        if block_size != BLOCK_SIZE:
            bits = dataclasses.replace(bits, block_size=block_size)
        block_size = bits.block_size
    return dataclasses.replace(
        options, bits=bits, block_size=block_size, hierarchy=hierarchy, error=None, plan=None
    )


def _setting(name: str, options: Options, ranks: int, nodes: Nodes | None) -> Setting:
    assert options.bits != "auto"
    kind = options.exchange_for(ranks)
    takes = by_node_rule(options, ranks)
    by_node = takes is not None and nodes is not None and takes(nodes)
    return Setting(
        name,
        budget_of(options.bits),
        two_phase=by_node or kind == "two_phase",
        block_size=options.block_size or BLOCK_SIZE,
        gain=BLOCKS_4.gain if isinstance(options.bits, BlockBits) else 1,
        dither=options.dither,
        by_node=by_node,
    )
