"""Weights for PyTorch's FSDP2, gathered as codes.

FSDP gathers a module's parameters in one message: the concatenated shards of all of them. Each
rank rounds its own shard, stochastically and unbiased, and all ranks compute with the decoded
codes, the owner too. The sharded parameters, which the optimizer updates, are not rounded.

FSDP may gather a module twice in a step, in the forward pass and in the backward pass. Dither
depends on the step, so both times the codes are the same.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hvd_gqsgd.auto.conductor import Conductor
from hvd_gqsgd.codecs import is_compressible
from hvd_gqsgd.engine.bucketing import BucketPlan
from hvd_gqsgd.engine.steps import Steps
from hvd_gqsgd.frontends.compiling import opaque
from hvd_gqsgd.frontends.fsdp_groups import Allocates, Groups, Shard
from hvd_gqsgd.frontends.fsdp_options import ShardedOptions
from hvd_gqsgd.stats import Stats

__all__ = ["AllGather", "Part", "WeightStep", "parts_of", "plan_of"]

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_WRAPPERS = re.compile(r"\b(_orig_mod|_checkpoint_wrapped_module)\.")
_SAME_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Part:
    """A parameter in the flat shard of its module."""

    name: str
    numel: int
    """Of one rank's shard, with the padding."""
    exact: bool
    """Whether it is gathered as it is."""


def parts_of(
    model: nn.Module, modules: Sequence[Any], options: ShardedOptions
) -> dict[Any, list[Part]]:
    """The parameters of each module of ``fully_shard``, in the order in which FSDP gathers them.

    Parameters of less than two dimensions (norms, biases), and those of less than ``min_numel``
    elements, are gathered as they are.

    Raises:
        ValueError: a pattern matches no parameter, or all parameters match one.
    """
    prefixes = {module: name for name, module in model.named_modules()}
    found: dict[Any, list[Part]] = {}
    names: list[str] = []
    rounded = 0
    for module in modules:
        group = module._get_fsdp_state()._fsdp_param_group  # None: all are in modules within it
        for each in [] if group is None else group.fsdp_params:
            info, parameter = each._module_info, each.sharded_param
            name = _WRAPPERS.sub("", f"{prefixes[info.module]}.{info.param_name}".lstrip("."))
            small = parameter.dim() < 2 or parameter.numel() < options.min_numel
            excepted = any(fnmatch.fnmatchcase(name, p) for p in options.weight_exceptions)
            names.append(name)
            rounded += not excepted
            if numel := each._sharded_param_data.numel():
                found.setdefault(module, []).append(Part(name, numel, small or excepted))
    for pattern in options.weight_exceptions:
        if not fnmatch.filter(names, pattern):
            raise ValueError(
                f"weight_exceptions has {pattern!r}, which is the name of no parameter: they are "
                f"{', '.join(names[:8])}{', ...' * (len(names) > 8)}"
            )
    if options.weight_exceptions and not rounded:
        raise ValueError(
            f"weight_exceptions={options.weight_exceptions} leaves no parameter to round: leave "
            "out weight_bits, or some of them"
        )
    return found


def plan_of(parts: dict[Any, list[Part]]) -> BucketPlan:
    """A bucket for each module."""
    places: dict[Hashable, tuple[int, int]] = {
        part.name: (number, position)
        for number, each in enumerate(parts.values())
        for position, part in enumerate(each)
    }
    return BucketPlan(places, [len(each) for each in parts.values()])


class WeightStep:
    """The number of the step that weights are gathered for."""

    def __init__(self, steps: Steps | Conductor) -> None:
        self._steps = steps
        self._forward = steps.coming

    def __call__(self) -> int:
        """The coming step's; within a backward pass, which may have begun it, the one of the
        forward pass before."""
        if torch._C._current_graph_task_id() == -1:
            self._forward = self._steps.coming
        return self._forward


class AllGather(Allocates):
    """The all-gather of one module; in PyTorch's words an ``AllGather``.

    Args:
        groups: the exchanges of the model.
        parts: the module's parameters.
        step: that of the model.
        stats: counts what is gathered.
    """

    def __init__(
        self, groups: Groups, parts: Sequence[Part], step: WeightStep, stats: Stats
    ) -> None:
        self._groups = groups
        self._parts = parts
        self._numel = sum(part.numel for part in parts)
        self._step = step
        self._stats = stats

    @opaque
    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        async_op: bool = False,
    ) -> None:
        """Gathers the shards of all ranks to ``output_tensor``, in the order of the ranks."""
        if not self._is_coded(input_tensor, group):
            _all_gather(output_tensor, input_tensor, group=group)
            self._stats.weight_bytes_before += output_tensor.nbytes
            self._stats.weight_bytes_on_wire += output_tensor.nbytes
            return
        rows = output_tensor.view(-1, input_tensor.numel())
        integers = _SAME_SIZE[input_tensor.element_size()]
        shards, end = [], 0
        for part in self._parts:
            begin, end = end, end + part.numel
            x, out = input_tensor[begin:end], rows[:, begin:end]
            if part.exact:
                x, out = x.view(integers), out.view(integers)
            shards.append(Shard(part.name, x, out))
        self._groups.of(group).gather(shards, self._step())

    def _is_coded(self, x: Tensor, group: dist.ProcessGroup) -> bool:
        """Not where there is nothing to round; where types are mixed, which FSDP gathers as bytes;
        or where ``reshard_after_forward`` has sharded the decoded weights among less ranks."""
        return (
            not all(part.exact for part in self._parts)
            and is_compressible(x.dtype)
            and group in self._groups
            and x.numel() == self._numel
        )
