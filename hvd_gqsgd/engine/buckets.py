"""Tensors that travel together."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hvd_gqsgd import layout
from hvd_gqsgd.codecs import Codec
from hvd_gqsgd.codecs.bit_schedule import Schedule
from hvd_gqsgd.engine.streams import Stream, hand_in
from hvd_gqsgd.errors import REFUSED, AgreementError
from hvd_gqsgd.options import digest
from hvd_gqsgd.transports.base import Handle

if TYPE_CHECKING:
    from hvd_gqsgd.exchanges.segments import Segments

__all__ = [
    "AGREEMENT",
    "Agreement",
    "Bucket",
    "Contribution",
    "Item",
    "digest_header",
    "everyone",
    "kind_of",
    "rank_weight",
    "read_digest",
    "refusal",
]

# Words of what ranks must agree on, often before the norms, and before the codes. Both are longer
# than what they hold, so that the data behind them starts on a cache line.
AGREEMENT = 16
CODE_HEADER = 16

_FULL = 2**31 - 1

Kind = tuple[torch.dtype, torch.device]


def kind_of(dtype: torch.dtype, device: torch.device) -> Kind:
    """Tensors of one kind may share a bucket: their norms have one type and lie on one device."""
    return layout.norm_dtype(dtype), device


@dataclass(frozen=True)
class Contribution:
    """Which ranks added their codes to a payload: sums over them, told by the payload itself.

    A rank that left by ``hvd.join()`` adds zeros to everything, and so is not in here.
    """

    count: int
    ranks: int
    weights: int


@functools.cache
def rank_weight(rank: int) -> int:
    """16 random bits, so that hardly any other ranks have the mean that all ranks have."""
    return digest(("rank", rank)) >> 15


@functools.lru_cache(maxsize=8)
def everyone(world_size: int) -> Contribution:
    """The contribution of all ranks."""
    ranks = range(world_size)
    return Contribution(world_size, sum(ranks), sum(map(rank_weight, ranks)))


@dataclass(frozen=True)
class Agreement:
    """What the ranks settle on for a bucket: the elementwise maximum of what each proposes."""

    step: int
    bits: int
    schedule: tuple[int, ...]
    """State of the bit width's schedule; see ``Schedule.state``."""
    all_here: bool = True
    """Whether no rank has left by ``hvd.join()``: such a rank puts 0 where the others put -1."""


@dataclass
class Item:
    """One tensor of a bucket."""

    x: Tensor | None  # flat and contiguous; dropped once decoded
    numel: int
    dtype: torch.dtype
    device: torch.device
    position: int  # tensors lie in a bucket in this order
    identity: int  # 31 bits to recognize it by on another rank, and to draw its dither from
    scale: float | None = None  # of the sum over the ranks, where it is known before the end
    out: Tensor | None = None  # where to decode it to; x itself is fine
    norms: slice = field(default_factory=lambda: slice(0))
    words: slice = field(default_factory=lambda: slice(0))
    place: int = 0  # among the tensors of its bucket


class Bucket:
    """Some tensors, and the messages in which they are exchanged.

    What ranks must agree on is Max-reduced, before the norms in their message or in one of its own:
    a digest k travels as the pair k and 2^31 - 1 - k, whose maxima add up to 2^31 - 1 if and only
    if all ranks have the same k. All ranks see the same maxima, so all come to the same verdict. A
    rank that has joined contributes zeros, which change neither.
    """

    def __init__(self, name: str, kind: Kind, stream: Stream = None) -> None:
        self.name = name
        self.kind = kind
        self.items: list[Item] = []
        self.nbytes = 0
        self.undecoded = 0
        self.failure: Exception | None = None
        # Which collective it is in, counted as by its exchange; -1 while it fills.
        self.stage = -1
        self.handle: Handle | None = None
        self.codec: Codec | None = None
        self.agreement: Agreement | None = None
        self.contribution: Contribution | None = None  # once it can be decoded
        self.header: Tensor | None = None
        self.norms: Tensor | None = None
        self.squares: Tensor | None = None
        self.words: Tensor | None = None
        self.means: Tensor | None = None
        self.segments: Segments | None = None
        self.stream = stream

    def add(self, item: Item) -> None:
        """Puts a tensor in; the bucket must still be filling."""
        assert self.stage < 0 and item.x is not None
        hand_in(item.x, self.stream)
        self.items.append(item)
        self.undecoded += 1
        self.nbytes += item.numel * item.dtype.itemsize

    def release(self) -> None:
        """Lets go of all messages."""
        self.header = self.norms = self.squares = self.words = self.means = None

    def abandon(self) -> None:
        """Lets go of everything; the exception too, whose traceback leads back here."""
        self.release()
        self.handle = self.failure = None
        self.items.clear()

    def close(self) -> None:
        """Puts the tensors in their order; no more will come."""
        self.items.sort(key=lambda item: item.position)
        for place, item in enumerate(self.items):
            item.place = place

    def lay_out_norms(self, codec: Codec, header: int) -> int:
        """Gives every tensor its place in the norm message, which begins after ``header`` words;
        returns the message's length."""
        end = header
        for item in self.items:
            item.norms = slice(end, end + codec.num_norms(item.numel))
            end = item.norms.stop
        return end

    def lay_out_words(self, codec: Codec, header: int) -> int:
        """The same for the codes, which begin after ``header`` words."""
        end = header
        for item in self.items:
            item.words = slice(end, end + codec.num_words(item.numel))
            end = item.words.stop
        return end

    def write_agreement(self, options: int, wanted: Agreement) -> None:
        """What ranks must agree on, and what the largest of all ranks' is taken of."""
        assert self.header is not None
        layout = digest(tuple((item.identity, item.scale, item.device.type) for item in self.items))
        _write(
            self.header,
            [
                *(*_pair(options), *_pair(layout)),
                *(-1, wanted.step, wanted.bits, *wanted.schedule),
            ],
            AGREEMENT,
        )

    def read_agreement(self) -> tuple[bool, bool, Agreement]:
        """Whether options agree, whether tensors agree, and what was settled on; from the reduced
        header.

        Raises:
            AgreementError: a rank has sent a refusal.
        """
        assert self.header is not None
        numbers = self.header.tolist()
        layout, no_layout, absent, step, bits, *more = numbers[2:]
        schedule = tuple(more[: Schedule.STATE_WORDS])
        return (
            _agrees(numbers),
            layout + no_layout == _FULL,
            Agreement(step, bits, schedule, absent < 0),
        )

    def write_code_header(self, rank: int) -> None:
        """This rank's mark that it took part."""
        assert self.words is not None
        _write(self.words, [1, rank, rank_weight(rank)], CODE_HEADER)

    def read_code_header(self) -> Contribution:
        """Who took part; from summed words."""
        assert self.words is not None
        return Contribution(*self.words[:3].tolist())


def refusal() -> Tensor:
    """What a rank sends in place of its agreement if it cannot take part."""
    return _header([_FULL, _FULL])  # no number and its complement


def digest_header(number: int) -> Tensor:
    """A message that says whether all ranks have the same number of 31 bits, and no more."""
    return _header(_pair(number))


def read_digest(header: Tensor) -> bool:
    """Whether all ranks have the same first number, from the maxima.

    Raises:
        AgreementError: a rank has sent a refusal.
    """
    return _agrees(header.tolist())


def _agrees(header: list[int]) -> bool:
    number, complement = header[:2]
    if number == complement == _FULL:
        raise AgreementError(REFUSED)
    return number + complement == _FULL


def _pair(number: int) -> list[int]:
    return [number, _FULL - number]


def _header(numbers: list[int]) -> Tensor:
    message = torch.empty(AGREEMENT, dtype=torch.int64, device="cpu")
    _write(message, numbers, AGREEMENT)
    return message


def _write(message: Tensor, header: list[int], length: int) -> None:
    assert len(header) <= length
    padded = header + [0] * (length - len(header))
    numbers = torch.tensor(padded, dtype=message.dtype, device="cpu")
    message[:length].copy_(numbers, non_blocking=True)
