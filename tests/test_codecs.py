"""The registry of codecs: a class for each dither, and a kind of codes for each class."""

from __future__ import annotations

import pytest
import torch

from hvd_gqsgd._native import ops
from hvd_gqsgd.codecs import CODECS, Codec, CodeKind, NearestCodec, make_codec
from hvd_gqsgd.options import Options
from hvd_gqsgd.reference.kinds import two_phase_code
from hvd_gqsgd.reference.linear import levels


def codec_of(options: Options, bits: int, summands: int) -> Codec:
    """The codec of rank 2 of 7."""
    return make_codec(options, bits, summands=summands, rank=2, world_size=7)


def test_every_kind_has_a_codec() -> None:
    codecs = [*CODECS.values(), NearestCodec]
    assert sorted(codec.kind for codec in codecs) == list(CodeKind)
    with pytest.raises(ValueError, match="dither must be one of") as refused:
        Options(dither="none")
    assert all(repr(dither) in str(refused.value) for dither in CODECS)


def test_kinds_are_numbered_as_in_the_native_part() -> None:
    x, integers = torch.ones(1), torch.ones(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="kind must be") as refused:
        ops.quantize(x, integers, integers, 1, len(CodeKind), 8, 127, 0, 0, 0, 0, 1, True)
    names = " or ".join(f"{kind:d} ({kind.name.lower()})" for kind in CodeKind)
    assert str(refused.value).startswith(f"kind must be {names}, got {len(CodeKind)}")


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dither", CODECS)
def test_codes_that_are_not_added(dither: str, bits: int) -> None:
    """They have all levels that lanes hold, and what the options say."""
    options = Options(dither=dither, bits=bits, block_size=7, seed=5, correlated=False)
    codec = codec_of(options, bits, summands=1)
    assert codec.code == two_phase_code(dither, bits)
    assert (codec.block_size, codec.seed, codec.correlated) == (7, 5, False)
    assert (codec.rank, codec.world_size) == (2, 7)


def test_lanes_hold_the_sum() -> None:
    """Of linear codes; exponential ones are never added, so that theirs do not change."""
    linear, exponential = Options(), Options(dither="exponential")
    for summands in (1, 2, 7, 100):
        assert codec_of(linear, 8, summands).levels == levels(8, summands)
        assert codec_of(exponential, 8, summands).levels == 127
    with pytest.raises(ValueError, match=r"bits=8 is too narrow for 128 ranks.* at least 9"):
        codec_of(linear, 8, 128)
