"""Which parameter a gradient belongs to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from torch import Tensor

from hvd_gqsgd.bucket import kind_of
from hvd_gqsgd.engine.bucketing import BucketPlan
from hvd_gqsgd.options import Options, digest

__all__ = ["ParameterNames"]


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
        self._pairs = list(
            {id(parameter): (name, parameter) for name, parameter in self._pairs}.values()
        )
        # Gradients come about in reverse order, and in the same order as in the step before: the
        # one after the last one found is the first guess.
        self._pairs.reverse()
        self._guess = 0

    def digest(self) -> int:
        """31 bits that tell these names, in this order, from others."""
        return digest(tuple(name for name, _ in self._pairs))

    def find(self, tensor: Tensor) -> str | None:
        """The name of the parameter with this very gradient; None if there is none."""
        count = len(self._pairs)
        for i in range(self._guess, self._guess + count):
            name, parameter = self._pairs[i % count]
            if parameter.grad is tensor:
                self._guess = (i + 1) % count
                return name
        return None

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
