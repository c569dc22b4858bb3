"""What Hypothesis draws: tensors of all shapes, types, layouts and magnitudes, and options."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hvd_gqsgd.codecs import levels_for
from hvd_gqsgd.options import Options

__all__ = ["drawn", "layouts", "magnitudes", "numbers", "operators", "ranks"]

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
T = TypeVar("T")

SEEDS = st.integers(-(2**63), 2**63 - 1)

ranks = st.sampled_from([*range(1, 10), 16, 65, 130])


def numbers(
    generator: torch.Generator, kind: int, shape: tuple[int, ...], dtype: torch.dtype
) -> Tensor:
    """Heavy-tailed; of all bit patterns; of another magnitude in each row and stretch; or the
    last of these with some special values."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    info = torch.finfo(dtype)
    if kind == 0:
        normal = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
        return (normal[0] * normal[1].exp()).to(dtype)
    if kind == 1:
        low, high = torch.iinfo(integers).min, torch.iinfo(integers).max
        bits = torch.randint(low, high, shape, generator=generator, dtype=integers)
        x = bits.view(dtype)
        return torch.where(x.isfinite(), x, torch.zeros((), dtype=dtype))
    # Before they overflow, and down to where they vanish.
    exponents = torch.randint(-160, 128, shape, generator=generator).flatten()
    exponents = exponents[torch.arange(exponents.numel()) // 37].view(shape)
    x = (torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5) * 2.0**exponents
    x = x.to(dtype).clamp(-info.max, info.max)
    if kind == 3 and x.numel():
        tiny = info.smallest_normal * info.eps
        special = [torch.nan, torch.inf, -torch.inf, -0.0, info.max, info.min, tiny, -tiny]
        special = torch.tensor(special, dtype=torch.float64).to(dtype)
        at = torch.randint(0, x.numel(), (1 + x.numel() // 700,), generator=generator)
        x.view(-1)[at] = special[torch.randint(0, 8, at.shape, generator=generator)]
    return x


@st.composite
def magnitudes(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
    """Numbers of one kind and type."""
    dtype = dtype or draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    return numbers(generator, draw(st.integers(0, 3)), shape, dtype)


def layouts(x: Tensor, kind: str) -> Tensor:
    """The same numbers, but for "expanded", elsewhere in memory."""
    if kind == "transposed":
        backwards = tuple(reversed(range(x.dim())))
        return x.permute(backwards).contiguous().permute(backwards)
    if kind == "expanded":
        return x[:1].expand(x.shape) if x.dim() else x
    if kind == "strided":
        return x.unsqueeze(-1).repeat(*[1] * x.dim(), 3)[..., 1]
    if kind == "offset":
        return torch.cat([x.new_zeros(5), x.flatten()])[5:].view(x.shape)
    return x


LAYOUTS = st.sampled_from(["contiguous", "transposed", "expanded", "strided", "offset"])


@st.composite
def operators(draw: st.DrawFn, n: int) -> dict[str, Any]:
    """Options that go together, and leave levels to n ranks."""
    dither = draw(st.sampled_from(["linear", "linear", "exponential"]))
    exponential = dither == "exponential"
    exchanges = ["auto", "two_phase"]
    bits = draw(st.sampled_from([4, 8]) if exponential else st.integers(2, 16))
    if not exponential and (2 * n).bit_length() <= bits:
        exchanges.append("allreduce")
    options = {
        "bits": bits,
        "dither": dither,
        "exchange": draw(st.sampled_from(exchanges)),
        "norm": draw(st.sampled_from(["max", "l2"])),
        "block_size": draw(
            st.one_of(st.integers(1, 70), st.sampled_from([1000, 1023, 1024, 1025, 2500, None]))
        ),
        "correlated": draw(st.booleans()),
        "seed": draw(SEEDS),
    }
    if Options(**options).exchange_for(n) == "allreduce":  # by the options' own checks
        levels_for(bits, n)
    return options


def drawn(strategy: st.SearchStrategy[T], count: int) -> list[T]:
    """Examples for tests on several ranks, which Hypothesis must not run: to repeat a failing
    example is no use where the other ranks do not."""
    examples: list[T] = []

    @settings(settings.get_profile("repeatable"), max_examples=count, phases=[Phase.generate])
    @given(strategy)
    def collect(example: T) -> None:
        examples.append(example)

    collect()
    return examples
