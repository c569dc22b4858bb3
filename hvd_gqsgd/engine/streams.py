"""Streams of a GPU, on which the work of a bucket is enqueued. On the CPU there are none, and all
of this does nothing.

Buckets that are in flight together have different streams. Each waits for the gradients of its own
bucket alone, so that the host, where it must look at a number that came over the network, does not
wait for the rest of the backward pass. A bucket gets the same one in each step, as PyTorch keeps
freed memory for the stream that it was taken on.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor

__all__ = ["Stream", "Streams", "hand_in", "hand_out", "on"]

Stream = torch.cuda.Stream | None


class Streams:
    """``most`` for each GPU, dealt out in turn."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._made: dict[tuple[torch.device, int], torch.cuda.Stream] = {}

    def take(self, device: torch.device, number: int) -> Stream:
        """For the bucket of this number in its step."""
        if device.type != "cuda":
            return None
        key = (device, number % self._most)
        if key not in self._made:
            self._made[key] = torch.cuda.Stream(device)
        return self._made[key]


def on(stream: Stream) -> AbstractContextManager[None]:
    """Enqueues the work of a ``with`` block on the stream, in any thread."""
    return _NOWHERE if stream is None else _on(stream)


_NOWHERE = nullcontext()


@contextmanager
def _on(stream: torch.cuda.Stream) -> Iterator[None]:
    # The device too: threads that are not PyTorch's own begin with the first one, and to go back to
    # a stream of that would make them use it.
    with torch.cuda.device(stream.device), torch.cuda.stream(stream):
        yield


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
