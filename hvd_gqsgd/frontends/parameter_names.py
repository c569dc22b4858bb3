"""Names of the parameters that gradients belong to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from hvd_gqsgd.bucket import kind_of
from hvd_gqsgd.engine.bucketing import BucketPlan
from hvd_gqsgd.options import Options, digest

__all__ = ["ParameterNames", "names_in", "pairs"]


def pairs(named_parameters: object) -> list[tuple[str, Tensor]]:
    """Returns the pairs of the argument ``named_parameters``, which may be an iterator.

    Raises:
        TypeError: it is not iterable.
        ValueError: it yields nothing.
    """
    if not isinstance(named_parameters, Iterable):
        raise TypeError(
            "named_parameters must be pairs as from model.named_parameters(), got "
            f"{named_parameters!r}"
        )
    named = list(named_parameters)
    if not named:
        raise ValueError(
            "named_parameters must be pairs, and yield nothing: pass a new "
            "model.named_parameters(), as an iterator cannot be used twice, or leave the "
            "argument out"
        )
    return named


def names_in(given: Mapping[str, Any]) -> ParameterNames | None:
    """Returns the names among the keywords of a user; None if there are none.

    Raises:
        TypeError, ValueError: as raised by ``pairs`` and ``ParameterNames``.
    """
    named = given.get("named_parameters")
    return None if named is None else ParameterNames(pairs(named))


class ParameterNames:
    """Finds the name of the parameter whose ``.grad`` a tensor is.

    A parameter may have several names, as tied weights do in ``remove_duplicate=False``; as in
    Horovod one of them is enough.

    Raises:
        TypeError: not (name, parameter) pairs.
        ValueError: a name comes twice.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, Tensor]]) -> None:
        self._pairs = list(named_parameters)
        for pair in self._pairs:
            if not (
                isinstance(pair, tuple)
                and len(pair) == 2
                and isinstance(pair[0], str)
                and isinstance(pair[1], Tensor)
            ):
                tensor = isinstance(pair, Tensor)
                got = f"a tensor of shape {[*pair.shape]}" if tensor else repr(pair)
                raise TypeError(
                    "named_parameters must be (name, parameter) pairs as from "
                    f"model.named_parameters(), got {got}"
                )
        names = Counter(name for name, _ in self._pairs)
        if repeated := [name for name, count in names.items() if count > 1]:
            raise ValueError(
                "Parameter names in named_parameters must be unique. Found duplicates: "
                + ", ".join(repeated)
            )
        # Gradients come about in reverse order.
        distinct = {id(parameter): (name, parameter) for name, parameter in self._pairs}
        self._pairs = list(distinct.values())[::-1]
        self._places: dict[Tensor | None, int] = {
            parameter: place for place, (_, parameter) in enumerate(self._pairs)
        }
        # In the step before, the one of place ``_after[i]`` followed the one of place ``i``.
        self._after: dict[int, int] = {}
        self._last = -1
        # Places by the identity of a gradient that was seen there, which may be gone; and those
        # where none was seen yet. So the time does not grow with the square of their number.
        self._seen: dict[int, int] = {}
        self._unseen: dict[int, Tensor] = {}

    def digest(self) -> int:
        """31 bits that tell these names, in this order, from others."""
        return digest(tuple(name for name, _ in self._pairs))

    def of(self, parameter: Tensor) -> str | None:
        """The name of a parameter; None if there is none."""
        place = self._places.get(parameter)
        return None if place is None else self._pairs[place][0]

    def find(self, tensor: Tensor) -> str | None:
        """The name of the parameter with this very gradient; None if there is none."""
        for place in self._likely(tensor):
            if 0 <= place < len(self._pairs) and self._pairs[place][1].grad is tensor:
                return self._found(place)
        if not self._look(tensor):
            self._seen, self._unseen = {}, dict(enumerate(p for _, p in self._pairs))
            if not self._look(tensor):
                return None
        return self._found(self._seen[id(tensor)])

    def _likely(self, tensor: Tensor) -> Iterator[int]:
        # Within a backward pass autograd tells the parameter of the gradient.
        node = torch._C._current_autograd_node()
        yield self._places.get(getattr(node, "variable", None), -1)
        yield self._after.get(self._last, self._last + 1)
        yield self._seen.get(id(tensor), -1)

    def _look(self, tensor: Tensor) -> bool:
        """Looks for a gradient where none was seen yet; notes those on the way."""
        seen: list[int] = []
        found = False
        for place, parameter in self._unseen.items():
            gradient = parameter.grad
            if gradient is not None:
                seen.append(place)
                self._seen[id(gradient)] = place
                found = gradient is tensor
                if found:
                    break
        for place in seen:
            del self._unseen[place]
        return found

    def _found(self, place: int) -> str:
        self._after[self._last] = place
        self._last = place
        return self._pairs[place][0]

    def plan(self, options: Options, compresses: Callable[[Tensor], bool]) -> BucketPlan:
        """Buckets of the parameters whose gradients will be compressed."""
        return BucketPlan.of(
            (
                (name, kind_of(p.dtype, p.device), p.numel() * p.dtype.itemsize)
                for name, p in self._pairs
                if p.requires_grad and compresses(p)
            ),
            options.bucket_bytes,
        )
