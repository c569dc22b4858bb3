"""Streams of a GPU, on which the work of a bucket is enqueued. On the CPU there are none, and all
of this does nothing.

Each bucket has a stream of its own. It waits for the gradients of that bucket alone, so that the
host, where it must look at a number that came over the network, never waits for the rest of the
backward pass.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

__all__ = ["Stream", "hand_in", "hand_out", "make_stream", "on"]

Stream = torch.cuda.Stream | None


def make_stream(device: torch.device) -> Stream:
    """One of the device's."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None


def on(stream: Stream) -> AbstractContextManager[object]:
    """Enqueues there what is done within."""
    return torch.cuda.stream(stream) if stream is not None else nullcontext()


def hand_in(x: Tensor, stream: Stream) -> None:
    """What is enqueued on ``stream`` from now on comes after ``x`` was made, and before its memory
    is used again."""
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream(x.device))
        x.record_stream(stream)


def hand_out(x: Tensor, stream: Stream) -> None:
    """The same for what is enqueued on the current stream, with ``x`` made on ``stream``."""
    if stream is not None:
        current = torch.cuda.current_stream(x.device)
        current.wait_stream(stream)
        x.record_stream(current)
