"""The settings that the performance model compares."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from hvd_gqsgd.levels import ENOUGH_LEVELS, LEAST_LEVELS, levels_of

__all__ = [
    "BLOCKS_4",
    "EXPONENTIAL_8",
    "FP16",
    "FP32",
    "LINEAR_4",
    "LINEAR_8",
    "SETTINGS",
    "TWO_PHASE_8",
    "Setting",
    "kept",
    "levels",
    "mean_over_steps",
    "possible",
]


@dataclass(frozen=True)
class Setting:
    """A way to exchange gradients."""

    name: str
    bits: float
    """Bits per element on the wire."""
    two_phase: bool = False
    quantized: bool = True
    block_size: int = 1024
    gain: float = 1
    """Squared error of one width in all blocks of 1024, relative to that of this setting."""
    dither: str = "linear"
    mantissa: int = 23
    """Explicit bits of the significand on the wire, without quantization."""
    options: str = ""
    """Arguments of ``GlobalQSGD`` for this setting."""
    by_node: bool = False
    """Whether codes travel between nodes only; see ``node_model``."""
    keep: float = 1
    """Share of the elements that is exchanged."""
    led: bool = False
    """Whether a leader chooses them, and the others are told."""
    disjoint: bool = False
    """Whether each rank sends other elements, and all ranks gather them."""
    differences: bool = False
    """Whether ranks exchange differences to tensors that they keep."""
    whole_every: int = 0
    """In the mean once in so many steps all elements are exchanged, by an Allreduce; 0: never."""

    @property
    def compressor(self) -> str:
        """Expression for the argument ``compression`` of Horovod's ``DistributedOptimizer``."""
        if self.quantized:
            return f"GlobalQSGD({self.options})"
        return f"hvd.Compression.{'fp16' if self.bits == 16 else 'none'}"


FP32 = Setting("fp32", 32, quantized=False)
FP16 = Setting("fp16", 16, quantized=False, mantissa=10)
LINEAR_8 = Setting("8 bits", 8, options="bits=8")
TWO_PHASE_8 = Setting(
    "8 bits, two phases", 8, two_phase=True, options='bits=8, exchange="two_phase"'
)
LINEAR_4 = Setting("4 bits, two phases", 4, two_phase=True, options="bits=4")
BLOCKS_4 = Setting(
    "4 bits per block, two phases", 4, two_phase=True, block_size=256, gain=15,
    options="bits=BlockBits(4)",
)  # fmt: skip
EXPONENTIAL_8 = Setting(
    "8 bits exponential, two phases", 8, two_phase=True, dither="exponential",
    options='bits=8, dither="exponential"',
)  # fmt: skip
SETTINGS = (FP32, FP16, LINEAR_8, TWO_PHASE_8, LINEAR_4, BLOCKS_4, EXPONENTIAL_8)
"""The settings that are compared."""


def levels(setting: Setting, ranks: int) -> int | None:
    """Levels a side of zero; None without quantization.

    With a width per block, the levels of the mean width.

    Args:
        setting: the setting.
        ranks: number of ranks that an Allreduce sums.
    """
    if not setting.quantized:
        return None
    return levels_of(int(setting.bits), 1 if setting.two_phase else ranks)


def possible(setting: Setting, ranks: int) -> bool:
    """Whether lanes hold the sum of the codes of all ranks, with ``ENOUGH_LEVELS`` or more, or, of
    differences, ``LEAST_LEVELS`` or more."""
    found = levels(of_whole_steps(setting) if setting.whole_every else setting, ranks)
    least = LEAST_LEVELS if setting.differences else ENOUGH_LEVELS
    return found is None or (setting.two_phase and not setting.whole_every) or found >= least


def of_whole_steps(setting: Setting) -> Setting:
    """The setting of the steps in which all elements are exchanged."""
    return replace(setting, keep=1, disjoint=False, two_phase=False, whole_every=0)


def mean_over_steps(setting: Setting, seconds: Callable[[Setting], float]) -> float:
    """The mean of ``seconds`` over the steps of a setting, which may be of two kinds."""
    if not setting.whole_every:
        return seconds(setting)
    part = seconds(replace(setting, whole_every=0))
    return part + (seconds(of_whole_steps(setting)) - part) / setting.whole_every


def kept(keep: float, ranks: int, bits: int = 8) -> tuple[Setting, Setting, Setting, Setting]:
    """The settings that exchange a share of the elements: at random, as a permutation, by a leader,
    and as a permutation with MARINA.

    The model does not recommend them, as a step makes less progress.

    Args:
        keep: the share.
        ranks: number of ranks, which decides between an Allreduce and two phases.
        bits: of the elements that are exchanged.
    """
    size = round(1 / keep)
    width, options = "", f"keep=1/{size}"
    if bits != LINEAR_8.bits:
        width, options = f", {bits} bits", f"bits={bits}, {options}"
    random = Setting(
        f"1/{size} at random{width}", bits,
        two_phase=not possible(replace(LINEAR_8, bits=bits), ranks), keep=keep, options=options,
    )  # fmt: skip
    permutation = replace(
        random, name=f"1/{size} as a permutation{width}", two_phase=True, disjoint=True,
        options=f'{options}, select="permutation"',
    )  # fmt: skip
    names = "named_parameters=model.named_parameters()"
    led = replace(
        random, name=f"1/{size} by a leader{width}", led=True,
        options=f'{options}, select="leader", {names}',
    )  # fmt: skip
    return random, permutation, led, replace(
        permutation, name=f"{permutation.name}, MARINA", differences=True, whole_every=size,
        options=f'{permutation.options}, error_feedback="marina", {names}',
    )  # fmt: skip
