"""Times the kernels against memcpy: ``python -m hvd_gqsgd.bench.kernels [--json]``.

Block maximum, quantize and dequantize are limited by memory bandwidth, so they are compared with
the C library's ``memcpy`` of the same number of bytes. For float32 at 8 bits an element has 14: 4
read; 4 read and 1 written; 1 read and 4 written. ``ratio_to_memcpy`` is the time of the three
kernels over the time of the copy. The choice of the largest of 64 elements reads each element once,
as block maximum does. Kernels on a GPU are timed in ``bench/gpu.py``.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import torch

from hvd_gqsgd import layout
from hvd_gqsgd._native import ops
from hvd_gqsgd.bench import gpu
from hvd_gqsgd.bench.machine import processor
from hvd_gqsgd.bench.table import show_table
from hvd_gqsgd.codecs import CodeKind, levels_for

__all__ = ["main", "measure"]

DTYPES = {str(d)[6:]: d for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
KERNELS = ("block_max", "quantize", "dequantize")

_c_memcpy = ctypes.CDLL(None).memcpy
_c_memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        prog="python -m hvd_gqsgd.bench.kernels", description="Times the kernels against memcpy."
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--numel", type=int, help=f"elements (default: {2**24}, or {2**26} on a GPU)"
    )
    parser.add_argument("--bits", type=int, default=8, help="lane width (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--block-size", type=int, default=1024, help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=25, help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU (default: %(default)s)")
    parser.add_argument(
        "--instruction-set", help="the instruction set to measure (default: all of this processor)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = vars(parser.parse_args(arguments))
    as_json, on_gpu = options.pop("json"), options.pop("device") == "cuda"
    if options["numel"] is None:
        options["numel"] = 2**26 if on_gpu else 2**24
    for name in ("numel", "block_size", "repeats", "threads"):
        if options[name] < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {options[name]}")
    if not 2 <= options["bits"] <= 16:
        parser.error(f"--bits must be from 2 to 16, got {options['bits']}")
    wanted = options["instruction_set"]
    if on_gpu and wanted is not None:
        parser.error(f"--instruction-set is for --device cpu, got {wanted} with --device cuda")
    if wanted is not None and wanted not in ops.instruction_sets():
        sets = ", ".join(ops.instruction_sets())
        parser.error(f"--instruction-set must be one of {sets}, got {wanted}")
    if on_gpu:
        del options["threads"], options["instruction_set"]
        try:
            result = gpu.measure(**{**options, "dtype": DTYPES[options["dtype"]]})
        except RuntimeError as error:
            parser.exit(1, f"{error}\n")
    else:
        result = measure(**options)
    if as_json:
        print(json.dumps(result))
    else:
        (gpu.show if on_gpu else _show)(result)


def measure(
    numel: int = 2**24,
    bits: int = 8,
    dtype: str = "float32",
    block_size: int = 1024,
    repeats: int = 25,
    threads: int = 1,
    instruction_set: str | None = None,
) -> dict[str, Any]:
    """Times all kernels, for one instruction set or for all of this processor.

    Returns:
        The processor and all settings, the speed of each kernel, and ``ratio_to_memcpy`` of
        ``instruction_set``, or else of the instruction set in use.
    """
    levels = levels_for(bits, 1)
    code = (CodeKind.LINEAR, bits, levels)
    x = torch.randn(numel, generator=torch.Generator().manual_seed(0)).to(DTYPES[dtype])
    # Written here, so that page faults are not timed.
    copy, out = torch.zeros_like(x), torch.zeros_like(x)
    norms = torch.zeros(-(-numel // block_size), dtype=layout.norm_dtype(x.dtype))
    places = torch.zeros(-(-numel // gpu.GROUP), dtype=torch.uint8)
    words = torch.zeros(layout.words_for(numel, block_size, bits), dtype=layout.word_dtype(bits))
    place = (0, 0, 0, 0, 1, True)  # seed, step, tensor, rank, world size, correlated

    size, lane = x.element_size(), words.nbytes / numel
    bytes_per_element = {
        "memcpy": 2 * size,
        "block_max": size,
        "quantize": size + lane,
        "dequantize": lane + size,
        "block_argmax": size,
    }
    calls: dict[str, Callable[[], object]] = {
        "block_max": lambda: ops.block_max(x, block_size, norms),
        "quantize": lambda: ops.quantize(x, norms, words, block_size, *code, *place),
        "dequantize": lambda: ops.dequantize(words, norms, out, block_size, *code, 1, 1.0),
        "block_argmax": lambda: ops.block_argmax(x, gpu.GROUP, places),
    }
    in_use, threads_before = ops.instruction_set(), torch.get_num_threads()
    active = instruction_set or in_use
    sets = [instruction_set] if instruction_set else ops.instruction_sets()
    torch.set_num_threads(threads)
    try:
        with ThreadPoolExecutor(threads) as pool:
            passes: dict[tuple[str, str], Callable[[], object]] = {
                ("", "memcpy"): lambda: _memcpy(copy, x, threads, pool)
            }
            passes |= {(isa, name): calls[name] for isa in sets for name in calls}
            seconds = _interleaved(passes, repeats, threads)
    finally:
        ops.use_instruction_set(in_use)
        torch.set_num_threads(threads_before)

    def speed(isa: str, name: str) -> dict[str, float]:
        nanoseconds = seconds[isa, name] * 1e9 / numel
        return {
            "ns_per_element": nanoseconds,
            "gb_per_s": bytes_per_element[name] / nanoseconds,
        }

    memcpy = speed("", "memcpy")
    moved = sum(bytes_per_element[name] for name in KERNELS)
    kernels: dict[str, dict[str, Any]] = {}
    for isa in sets:
        speeds = {name: speed(isa, name) for name in calls}
        total = sum(speeds[name]["ns_per_element"] for name in KERNELS)
        kernels[isa] = {**speeds, "ratio_to_memcpy": total * memcpy["gb_per_s"] / moved}
    return {
        "ratio_to_memcpy": kernels[active]["ratio_to_memcpy"],
        "instruction_set": active,
        "cpu": processor(),
        "torch": torch.__version__,
        "numel": numel,
        "bits": bits,
        "levels": levels,
        "dtype": dtype,
        "block_size": block_size,
        "repeats": repeats,
        "threads": threads,
        "clock": "CPU time" if threads == 1 else "wall clock",
        "bytes_per_element": moved,
        "memcpy": memcpy,
        "kernels": kernels,
    }


def _memcpy(to: torch.Tensor, x: torch.Tensor, threads: int, pool: Executor) -> None:
    """Copies by the C library; ``Tensor.copy_`` may have a loop of its own."""

    def part(index: int) -> None:
        begin, end = (x.nbytes * i // threads for i in (index, index + 1))
        _c_memcpy(to.data_ptr() + begin, x.data_ptr() + begin, end - begin)

    if threads == 1:  # in this thread, whose CPU time is measured
        part(0)
    else:
        list(pool.map(part, range(threads)))


def _interleaved(
    passes: dict[tuple[str, str], Callable[[], object]], repeats: int, threads: int
) -> dict[tuple[str, str], float]:
    """Seconds of each pass, of its fastest round.

    Passes run in turn, so that a disturbance of some seconds affects all of them. The CPU time of a
    single thread excludes the time of other processes.
    """
    clock = time.thread_time if threads == 1 else time.perf_counter
    least = dict.fromkeys(passes, float("inf"))
    for repeat in range(-1, repeats):  # the first round fills caches and is not counted
        for (isa, name), call in passes.items():
            if isa:
                ops.use_instruction_set(isa)
            start = clock()
            call()
            elapsed = clock() - start
            if repeat >= 0:
                least[isa, name] = min(least[isa, name], elapsed)
    return least


def _show(result: dict[str, Any]) -> None:
    header = ["", "pass", "ns/element", "GB/s", "ratio to memcpy"]
    rows = [["", "memcpy", *_numbers(result["memcpy"]), "1"]]
    for isa, kernel in result["kernels"].items():
        mark = isa + (" (in use)" if isa == result["instruction_set"] else "")
        rows += [[mark, "block maximum", *_numbers(kernel["block_max"]), ""]]
        rows += [["", f"largest of {gpu.GROUP}", *_numbers(kernel["block_argmax"]), ""]]
        rows += [["", name, *_numbers(kernel[name]), ""] for name in ("quantize", "dequantize")]
        rows[-1][-1] = f"{kernel['ratio_to_memcpy']:.2f}"
    print(
        f"{result['numel']:,} elements of {result['dtype']}, {result['bits']} bits "
        f"({result['levels']} levels a side), blocks of {result['block_size']}\n"
        f"{result['cpu']}, {result['threads']} thread(s), torch {result['torch']}; "
        f"{result['clock']}, fastest of {result['repeats']} rounds"
    )
    show_table(header, rows, left=2)
    print(
        f"ratio to memcpy of {result['bytes_per_element']:.3g} bytes an element: "
        f"{result['ratio_to_memcpy']:.2f}"
    )


def _numbers(speed: dict[str, float]) -> list[str]:
    return [f"{speed['ns_per_element']:.3f}", f"{speed['gb_per_s']:.1f}"]


if __name__ == "__main__":
    main()
