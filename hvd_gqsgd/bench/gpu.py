"""Times the kernels on a GPU: ``python -m hvd_gqsgd.bench.kernels --device cuda [--json]``.

The kernels are limited by memory bandwidth, so each is compared with a copy from device to device
in the same run. All together are compared with the same steps in plain PyTorch, one after the
other, as in the code of the authors of Global-QSGD.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hvd_gqsgd import layout
from hvd_gqsgd._native import nccl as native_nccl
from hvd_gqsgd._native import ops
from hvd_gqsgd.bench.table import show_table
from hvd_gqsgd.codecs import CodeKind, ExponentialCodec, LinearCodec

__all__ = ["measure", "passes_on", "show"]

RANKS = 8
"""Number of ranks whose codes ``requantize`` averages."""
GROUP = 64
"""Elements of a group, of which ``block_argmax`` finds the largest: that of ``keep=1/64``."""


def measure(
    numel: int, bits: int, dtype: torch.dtype, block_size: int, repeats: int
) -> dict[str, Any]:
    """Times all kernels on the current GPU.

    Returns:
        The GPU and all settings; for each pass ``ms``, the median of ``repeats`` rounds,
        ``gb_per_s``, and ``share_of_copy``; and ``times_plain_torch``, the time of the same steps
        in plain PyTorch over the time of the kernels.

    Raises:
        RuntimeError: there is no GPU, or this build has no kernels for it.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("--device cuda needs a GPU that PyTorch can use, and found none")
    if "cuda" not in ops.devices():
        raise RuntimeError(
            "--device cuda needs hvd_gqsgd built with CUDA: install nvcc, and build again"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    x = torch.randn(numel, device=device).to(dtype)
    passes, moved = passes_on(x, bits, block_size)
    milliseconds = _interleaved(passes, repeats)

    def speed(name: str) -> dict[str, float]:
        rate = moved[name] / milliseconds[name] / 1e6
        copy = moved["copy"] / milliseconds["copy"] / 1e6
        return {"ms": milliseconds[name], "gb_per_s": rate, "share_of_copy": rate / copy}

    ours = sum(milliseconds[name] for name in ("block_max", "quantize", "dequantize"))
    return {
        "gpu": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "numel": numel,
        "bits": bits,
        "dtype": str(dtype).removeprefix("torch."),
        "block_size": block_size,
        "repeats": repeats,
        "passes": {name: speed(name) for name in moved},
        "allreduce_ms": milliseconds.get("allreduce"),
        "plain_torch_ms": milliseconds["plain torch"],
        "times_plain_torch": milliseconds["plain torch"] / ours,
    }


def show(result: dict[str, Any]) -> None:
    """Prints the result of ``measure`` as a table."""
    print(
        f"{result['numel']:,} elements of {result['dtype']}, {result['bits']} bits, blocks of "
        f"{result['block_size']}\n{result['gpu']}, torch {result['torch']}; medians of "
        f"{result['repeats']} rounds"
    )
    rows = [
        [
            name, f"{speed['ms']:.3f}", f"{speed['gb_per_s']:.0f}",
            "1" if name == "copy" else f"{speed['share_of_copy']:.0%}",
        ]
        for name, speed in result["passes"].items()
    ]  # fmt: skip
    show_table(["pass", "ms", "GB/s", "share of a copy"], rows)
    if result["allreduce_ms"] is not None:
        print(f"the whole allreduce over NCCL, of one rank: {result['allreduce_ms']:.3f} ms")
    print(
        f"norm, codes and back in plain torch: {result['plain_torch_ms']:.3f} ms, "
        f"{result['times_plain_torch']:.1f} times as long as block_max, quantize and dequantize"
    )


def passes_on(
    x: Tensor, bits: int, block_size: int
) -> tuple[dict[str, Callable[[], object]], dict[str, int]]:
    """The passes over a tensor, by name, and the bytes that the kernels and the copy move."""
    numel, device = x.numel(), x.device
    levels = LinearCodec.levels_for(bits, 1)
    code = (CodeKind.LINEAR, bits, levels)
    norm_type, word_type = layout.norm_dtype(x.dtype), layout.word_dtype(bits)
    place = (0, 0, 0, 0, 1, True)  # seed, step, tensor, rank, world size, correlated
    out, norms = torch.empty_like(x), torch.empty(
        -(-numel // block_size), dtype=norm_type, device=device
    )  # fmt: skip
    words = torch.empty(layout.words_for(numel, block_size, bits), dtype=word_type, device=device)
    tiles = layout.tiles_for(numel, block_size)
    means = torch.empty(
        layout.means_before(tiles, numel, block_size, bits, norm_type),
        dtype=layout.means_dtype(bits, norm_type), device=device,
    )  # fmt: skip
    places = torch.empty(-(-numel // GROUP), dtype=torch.uint8, device=device)
    ops.block_max(x, block_size, norms)
    ops.quantize(x, norms, words, block_size, *code, *place)
    received = words.expand(RANKS, -1)
    codes, data = words.nbytes + norms.nbytes, x.nbytes
    calls: dict[str, tuple[Callable[[], object], int]] = {
        "copy": (lambda: out.copy_(x), 2 * data),
        "block_max": (lambda: ops.block_max(x, block_size, norms), data + norms.nbytes),
        f"block_argmax, {GROUP}": (
            lambda: ops.block_argmax(x, GROUP, places),
            data + places.nbytes,
        ),
        "quantize": (
            lambda: ops.quantize(x, norms, words, block_size, *code, *place),
            data + codes,
        ),
        "dequantize": (
            lambda: ops.dequantize(words, norms, out, block_size, *code, 1, 1.0),
            codes + data,
        ),
        "requantize": (
            lambda: ops.requantize(
                received, norms, means, numel, block_size, *code, 0, tiles, 0, 0, 0
            ),
            RANKS * words.nbytes + norms.nbytes + means.nbytes,
        ),
        "dequantize_means": (
            lambda: ops.dequantize_means(
                means, norms, out, block_size, *code, 0, tiles, 1.0
            ),
            means.nbytes + norms.nbytes + data,
        ),
    }  # fmt: skip
    if bits in (4, 8):
        exponential = (CodeKind.EXPONENTIAL, bits, ExponentialCodec.levels_for(bits, 1))
        calls["quantize, exponential"] = (
            lambda: ops.quantize(x, norms, words, block_size, *exponential, *place),
            data + codes,
        )
        other = words.clone().view(torch.uint8)
        calls["combine, exponential"] = (
            lambda: ops.combine(other, words.view(torch.uint8), bits, 0),
            3 * words.nbytes,
        )
    passes = {name: call for name, (call, _) in calls.items()}
    if native_nccl.built():
        group = native_nccl.communicator(native_nccl.unique_id(), 0, 1, device)
        passes["allreduce"] = lambda: group.allreduce(
            x, out, norms, None, words, block_size, *code, 0, 0, 0, True, 1.0
        )
    passes["plain torch"] = lambda: _plain(x, levels)
    return passes, {name: moved for name, (_, moved) in calls.items()}


def _plain(x: Tensor, levels: int) -> Tensor:
    """Quantizes to int8 with one norm and random rounding, and decodes."""
    norm = x.abs().max()
    scaled = x.div(norm).mul_(levels)
    rounded = scaled.add_(torch.rand_like(scaled).sub_(0.5)).round_()
    return rounded.to(torch.int8).to(x.dtype).mul_(norm / levels)


def _interleaved(
    passes: dict[str, Callable[[], object]], repeats: int
) -> dict[str, float]:  # fmt: skip
    """Milliseconds of each pass, the median of all rounds; passes take turns."""
    times: dict[str, list[float]] = {name: [] for name in passes}
    for repeat, (name, call) in itertools.product(range(-3, repeats), passes.items()):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(500_000)  # until the host has enqueued the call
        begin.record()
        call()
        end.record()
        end.synchronize()
        if repeat >= 0:  # the first rounds warm up
            times[name].append(begin.elapsed_time(end))
    return {name: statistics.median(each) for name, each in times.items()}
