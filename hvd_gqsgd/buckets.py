"""Tensors that travel together, and which ones do."""

from __future__ import annotations

import enum
import functools
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hvd_gqsgd import ops
from hvd_gqsgd.codecs.linear import LinearCodec
from hvd_gqsgd.options import digest
from hvd_gqsgd.transports import Handle

__all__ = ["Bucket", "BucketPlan", "Contribution", "Item", "State", "kind_of"]

# Words before the norms and before the codes. Both are longer than what they hold, so that the data
# behind them starts on a cache line.
NORM_HEADER = 16
CODE_HEADER = 16

_FULL = 2**31 - 1

Kind = tuple[torch.dtype, torch.device]


def kind_of(dtype: torch.dtype, device: torch.device) -> Kind:
    """Tensors of one kind may share a bucket: their norms have one type and lie on one device."""
    return ops.norm_dtype(dtype), device


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


@dataclass
class Item:
    """One tensor of a bucket."""

    x: Tensor | None  # flat and contiguous; dropped once decoded
    numel: int
    dtype: torch.dtype
    device: torch.device
    position: int  # tensors lie in a bucket in this order
    identity: int  # 31 bits to recognize it by on another rank, and to draw its dither from
    norms: slice = field(default_factory=lambda: slice(0))
    words: slice = field(default_factory=lambda: slice(0))


class State(enum.Enum):
    """How far a bucket has come."""

    FILLING = enum.auto()
    NORMS = enum.auto()  # their maximum is being taken
    CODES = enum.auto()  # they are being summed
    DONE = enum.auto()
    ABANDONED = enum.auto()


class Bucket:
    """Some tensors, one norm message and one code message.

    The norm message is Max-reduced. Its header is the agreement between ranks: a digest k travels
    as the pair k and 2^31 - 1 - k, whose maxima add up to 2^31 - 1 if and only if all ranks have
    the same k. All ranks see the same maxima, so all come to the same verdict. A rank that has
    joined contributes zeros, which change neither.

    The code message is Sum-reduced. Its header counts who took part.
    """

    def __init__(self, name: str, kind: Kind) -> None:
        self.name = name
        self.kind = kind
        self.items: list[Item] = []
        self.nbytes = 0
        self.state = State.FILLING
        self.handle: Handle | None = None
        self.failure: Exception | None = None
        self.norms: Tensor | None = None
        self.words: Tensor | None = None
        self.codec: LinearCodec | None = None
        self.contribution: Contribution | None = None
        self.undecoded = 0

    def add(self, item: Item) -> None:
        """Puts a tensor in; the bucket must still be filling."""
        assert self.state is State.FILLING
        self.items.append(item)
        self.undecoded += 1
        self.nbytes += item.numel * item.dtype.itemsize

    def abandon(self) -> None:
        """Lets go of all memory; the exception too, whose traceback leads back here."""
        self.state = State.ABANDONED
        self.handle = self.failure = self.norms = self.words = None
        self.items.clear()

    def lay_out(self, codec: LinearCodec) -> tuple[int, int]:
        """Gives every tensor its place; returns the lengths of the two messages in elements."""
        self.codec = codec
        self.items.sort(key=lambda item: item.position)
        norms, words = NORM_HEADER, CODE_HEADER
        for item in self.items:
            item.norms = slice(norms, norms + codec.num_norms(item.numel))
            item.words = slice(words, words + codec.num_words(item.numel))
            norms, words = item.norms.stop, item.words.stop
        return norms, words

    def write_norm_header(self, options: int, step: int) -> None:
        """What ranks must agree on, and the step, of which the largest counts."""
        assert self.norms is not None
        layout = digest(tuple(item.identity for item in self.items))
        header = [options, _FULL - options, layout, _FULL - layout, step]
        self.norms[:NORM_HEADER] = _padded(header, NORM_HEADER)

    def read_norm_header(self) -> tuple[bool, bool, int]:
        """Whether options agree, whether tensors agree, and the step; from reduced norms."""
        assert self.norms is not None
        options, no_options, layout, no_layout, step = self.norms[:5].tolist()
        return options + no_options == _FULL, layout + no_layout == _FULL, step

    def write_code_header(self, rank: int) -> None:
        """This rank's mark that it took part."""
        assert self.words is not None
        header = [1, rank, rank_weight(rank)]
        self.words[:CODE_HEADER] = _padded(header, CODE_HEADER)

    def read_code_header(self) -> Contribution:
        """Who took part; from summed words."""
        assert self.words is not None
        return Contribution(*self.words[:3].tolist())


@dataclass(frozen=True)
class BucketPlan:
    """Buckets made up front of tensors with names, so that these may come in any order."""

    places: dict[Hashable, tuple[int, int]]
    """Bucket number and position of each name."""
    sizes: Sequence[int]
    """How many tensors each bucket waits for."""

    @classmethod
    def of(cls, tensors: Iterable[tuple[Hashable, Kind, int]], bucket_bytes: int) -> BucketPlan:
        """From (name, kind, bytes) in the order in which gradients are expected."""
        places: dict[Hashable, tuple[int, int]] = {}
        sizes: list[int] = []
        filling: dict[Kind, tuple[int, int]] = {}  # bucket number and bytes so far
        for position, (name, kind, nbytes) in enumerate(tensors):
            if kind not in filling:
                filling[kind] = (len(sizes), 0)
                sizes.append(0)
            number, total = filling[kind]
            places[name] = (number, position)
            sizes[number] += 1
            if total + nbytes >= bucket_bytes:
                del filling[kind]
            else:
                filling[kind] = (number, total + nbytes)
        return cls(places, sizes)


def _padded(header: list[int], length: int) -> Tensor:
    return torch.tensor(header + [0] * (length - len(header)), dtype=torch.int64, device="cpu")
