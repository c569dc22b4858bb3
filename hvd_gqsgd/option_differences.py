"""Which options ranks differ in.

Where there is room for it, each option has a digest of its own. The header of a bucket has room for
two words, which are reduced to the maximum: a word with a mark of one or two bits for each option,
and its complement. A mark is 0 for the default, and depends on a hash otherwise. From the maxima
the ranks know the largest and the smallest word of a rank. An option whose marks differ there is
one that ranks differ in. If an option has the default on one rank and another value on another
rank, at least one such option is named; on two ranks, all of them are. Other differences may have
no name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hvd_gqsgd.options import WIRE_VERSION, Options, digest

__all__ = ["DIGESTS", "apart", "digests", "mark_words", "marked_apart", "message"]

DIGESTS = 64
"""How many ``digests`` there are in every build, so that those of two builds can be compared."""
BITS = 31  # of a word; headers may be of 32 bits
_FULL = 2**BITS - 1


def digests(options: Options) -> list[int]:
    """``DIGESTS`` numbers of 31 bits: for the build, for each option, and zeros."""
    values = options.values()
    build = digest(("build", WIRE_VERSION, *values))
    numbers = [build, *(digest(repr(value)) for value, _ in values.values())]
    assert len(numbers) <= DIGESTS
    return numbers + [0] * (DIGESTS - len(numbers))


def apart(options: Options, same: Sequence[bool]) -> list[str]:
    """The options that ranks differ in; an empty name alone, if they have different builds.

    Args:
        options: of this rank.
        same: for each number of ``digests``, whether all ranks have the same.
    """
    same_build, *same_options = same
    if not same_build:
        return [""]
    each = zip(options.values(), same_options, strict=False)
    return [name for name, is_same in each if not is_same]


def mark_words(options: Options) -> list[int]:
    """The word of a rank, and its complement; 31 bits each."""
    word = 0
    for (value, default), bits in zip(options.values().values(), _widths(options), strict=True):
        mark = 0 if value == default else 1 + digest(repr(value)) % (2**bits - 1)
        word = word << bits | mark
    return [word, _FULL - word]


def marked_apart(options: Options, words: Sequence[int]) -> list[str]:
    """The options that ranks differ in, as far as the maxima of ``mark_words`` tell."""
    differing, found = words[0] ^ (_FULL - words[1]), []
    for name, bits in reversed([*zip(options.values(), _widths(options), strict=True)]):
        if differing & (2**bits - 1):
            found.append(name)
        differing >>= bits
    return found[::-1]


def message(options: Options, names: Sequence[str]) -> str:
    """An error message for ranks that differ in options.

    Args:
        options: of this rank.
        names: as from ``apart`` or ``marked_apart``.
    """
    remedy = "pass the same options on all ranks. This rank has"
    if [*names] == [""]:
        return "the ranks use different builds of hvd_gqsgd: install the same one on all hosts"
    if not names:
        return (
            "the ranks use different options, or builds that exchange in different ways: "
            f"{remedy} {options.keywords()}"
        )
    given = ", ".join(f"{name}={getattr(options, name)!r}" for name in names)
    return f"the ranks use different options: {', '.join(names)}; {remedy} {given}"


def _widths(options: Options) -> Iterator[int]:
    """Bits of the mark of each option."""
    count = len(options.values())
    return (BITS // count + (place < BITS % count) for place in range(count))
