"""GlobalQSGD for PyTorch's FSDP2: the reduction of the gradients of each module of ``fully_shard``,
and the all-gather of its weights.

FSDP hands in the gradients of one module after another, in one order on all ranks, and goes on with
the result.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hvd_gqsgd.auto.conductor import Conductor
from hvd_gqsgd.engine.steps import Steps
from hvd_gqsgd.errors import AgreementError
from hvd_gqsgd.front_end import FrontEnd
from hvd_gqsgd.frontends.auto_fsdp import AutoGroup
from hvd_gqsgd.frontends.compiling import opaque
from hvd_gqsgd.frontends.fsdp_groups import Allocates, Group, Groups, refuse_options
from hvd_gqsgd.frontends.fsdp_options import ShardedOptions
from hvd_gqsgd.frontends.fsdp_weights import AllGather, WeightStep, parts_of, plan_of
from hvd_gqsgd.frontends.reduce_op import reduction
from hvd_gqsgd.options import Options
from hvd_gqsgd.stats import Stats
from hvd_gqsgd.transports.process_groups import check_group

__all__ = ["attach"]

_NOT_ITS = {
    "bucket_mb": "FSDP reduces a module at a time; apply fully_shard to larger or smaller ones",
    "named_parameters": "FSDP identifies its parameters itself; leave it out",
    "process_set": "that is Horovod's; the model's device mesh says which ranks take part",
    "hierarchy": "shard within nodes and pass replicate_group, the ranks with the same shard",
    "patience": "FSDP waits for the timeout of its process group; give that to the group",
}
REPLICATED = FrontEnd(
    "GlobalQSGD.fsdp()",
    own=("replicate_group", "weight_bits", "weight_exceptions"),
    without=_NOT_ITS,
    trains=True,
)
SHARDED = dataclasses.replace(
    REPLICATED,
    without=_NOT_ITS | {"exchange": "a reduce-scatter has one way to go; leave it out"},
)
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
FIRST_TORCH = "2.9"
"""The first release whose ``FSDPModule`` has ``set_custom_reduce_scatter``."""


def attach(
    model: nn.Module,
    given: Mapping[str, Any],
    stats: Stats,
    steps: Steps | Conductor,
    *,
    replicate_group: dist.ProcessGroup | None = None,
    weight_bits: int | None = None,
    weight_exceptions: Iterable[str] = (),
) -> None:
    """Takes over the reduction of the gradients of a model, of ``GlobalQSGD.fsdp``, and the
    gathering of its weights.

    Each ``FSDPModule`` in the model gets a reduce-scatter of codes: global block norms, an Alltoall
    of codes, and a sum in float by the owner of the shard, which rounds nothing again.
    ``min_numel`` is compared with all gradients of a module. The mean or the sum is taken, as FSDP
    asks for it, with its divide factors. All ranks must call this together.

    With ``weight_bits``, each gets an all-gather of codes too, as in QSDP (arXiv 2302.02390). A
    rank rounds its shard of each parameter without a bias, in ``2**(weight_bits - 1) - 1`` evenly
    spaced levels a side, on norms of blocks of ``block_size``. All ranks compute with the decoded
    codes, in the forward pass and in its backward pass the same. The sharded parameters stay exact.
    Parameters with less than two dimensions (norms, biases) or less than ``min_numel`` elements are
    gathered as they are, and so are those of ``weight_exceptions``, in the same message.

    A second call, for the same model or a part of it, replaces the first.

    For HSDP, apply ``fully_shard`` on a mesh of one dimension, as the ranks of a host, and give
    the group of ranks that hold the same shard. Shards are then averaged over that group as small
    integers, by ``exchange``, and PyTorch reduce-scatters within the mesh.

    Args:
        model: with ``fully_shard`` applied to it or to modules in it.
        given: the keywords of the user.
        stats: counts messages and modules.
        steps: the state of the training.
        replicate_group: the ranks that hold the same shard; None: there are none.
        weight_bits: lane width of weights, from 2 to 16; None: weights are gathered as they are.
        weight_exceptions: names of parameters that are gathered as they are, or patterns of
            ``fnmatch``, as ``("*embed*", "head.weight")``.

    Raises:
        TypeError: the model is none of ``fully_shard``, an option is unknown or has no effect
            here, or one has the wrong type.
        ValueError: an option is out of range, ``bits`` is ``DynamicBits``, the model is on a
            mesh of two dimensions that replicates it, ranks of ``replicate_group`` hold different
            shards, or ``weight_exceptions`` has no effect, or leaves nothing to round.
        NotImplementedError: this PyTorch does not let FSDP's communication be replaced.
        AgreementError: on all ranks, if their options differ; on all other ranks, if one raises an
            error about its options.
    """
    modules = _fsdp_modules(model)
    replicas = [] if replicate_group is None else [check_group(replicate_group)]
    shards = list(dict.fromkeys(_shard_groups(modules)))
    groups = list(dict.fromkeys([*replicas, *shards]))
    try:
        _check_replicas(replicas, shards)
        together = _together(replicas, shards) if given.get("bits") == "auto" else None
        options = _options(REPLICATED if replicas else SHARDED, given)
        options = ShardedOptions.of(options, weight_bits, weight_exceptions)
        parts = parts_of(model, modules, options) if weight_bits is not None else {}
    except (TypeError, ValueError):
        refuse_options(groups)
        raise
    if not replicas:
        options = dataclasses.replace(options, exchange="one_phase")
    plan = plan_of(parts)

    def make(group: dist.ProcessGroup) -> Group:
        if isinstance(steps, Conductor):
            return AutoGroup(group, options, stats, steps, plan, together)
        return Group(group, options, stats, steps, plan)

    known = Groups(make)
    for number, group in enumerate(groups, 1):
        try:
            known.of(group)
        except AgreementError:
            refuse_options(groups[number:])
            raise
    step = WeightStep(steps)
    for module in modules:
        _give_back(module)
        if replicas:
            module.set_all_reduce_hook(_ReplicaMean(known.of(replicas[0])))
        else:
            module.set_custom_reduce_scatter(_ReduceScatter(known))
        if module in parts:
            module.set_custom_all_gather(AllGather(known, parts[module], step, stats))


def _together(
    replicas: Sequence[dist.ProcessGroup], shards: Sequence[dist.ProcessGroup]
) -> dist.ProcessGroup | None:
    """The ranks that take one setting of ``bits="auto"``; None: those that exchange gradients.

    Raises:
        ValueError: no process group has them.
    """
    if len(shards) > 1:
        raise ValueError(
            f"bits='auto' needs one process group of all shards, got {len(shards)}: pass a "
            "number of bits for a model on several meshes"
        )
    if not (replicas and shards):
        return None
    ranks, everyone = replicas[0].size() * shards[0].size(), dist.get_world_size()
    if ranks != everyone:
        raise ValueError(
            "bits='auto' with replicate_group needs a model on all ranks of the default process "
            f"group, got {ranks} of {everyone}: pass a number of bits"
        )
    return dist.group.WORLD


def _options(front_end: FrontEnd, given: Mapping[str, Any]) -> Options:
    """Those of gradients."""
    options = front_end.options(given)
    if options.dynamic is not None:
        raise ValueError(
            f"bits must not be DynamicBits(...) for {front_end.name}, as a rank knows the "
            f"mean of its own shard alone, got {options.bits}, which follows the whole norm"
        )
    return options


class _ReduceScatter(Allocates):
    """The reduce-scatter of one module; in PyTorch's words a ``ReduceScatter``."""

    def __init__(self, groups: Groups) -> None:
        self._groups = groups

    @opaque
    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp | dist.ReduceOp.RedOpType,
        async_op: bool = False,
    ) -> None:
        """Reduces the shards in ``input_tensor``, one behind the other, to that of this rank."""
        exchange = self._groups.of(group)
        with exchange.exchanging(self, input_tensor):
            if exchange.bypasses(self, input_tensor):
                _reduce_scatter(output=output_tensor, input=input_tensor, op=op, group=group)
                return
            try:
                scale = _scale(op, exchange.size)
            except Exception:
                exchange.refuse()
                raise
            exchange.reduce(self, input_tensor, output_tensor, scale)


class _ReplicaMean:
    """The mean of a module's shard over the ranks that hold the same one: an all-reduce hook."""

    def __init__(self, group: Group) -> None:
        self._group = group

    @opaque
    def __call__(self, reduce_output: Tensor) -> None:
        """Averages in place."""
        share = 1 / self._group.size
        with self._group.exchanging(self, reduce_output):
            if self._group.bypasses(self, reduce_output):
                dist.all_reduce(reduce_output.mul_(share), group=self._group.group)
                return
            self._group.reduce(self, reduce_output, reduce_output, share)


def _scale(op: Any, size: int) -> float:
    """The factor of the sum that a reduction asks for; that of PREMUL_SUM is in its pickle."""
    if op == dist.ReduceOp.PREMUL_SUM:
        return float(op.__getstate__()[1])
    return 1 / size if reduction(op) == "mean" else 1.0


def _give_back(module: Any) -> None:
    """Undoes an earlier call, which may have replaced what the new one does not."""
    group = module._get_fsdp_state()._fsdp_param_group
    if group is None:  # all parameters are in modules within it
        return
    torch_own = importlib.import_module("torch.distributed.fsdp._fully_shard._fsdp_collectives")
    if isinstance(group._reduce_scatter_comm, _ReduceScatter):
        module.set_custom_reduce_scatter(torch_own.DefaultReduceScatter())
    if isinstance(group._all_gather_comm, AllGather):
        module.set_custom_all_gather(torch_own.DefaultAllGather())
    if isinstance(group._all_reduce_hook, _ReplicaMean):
        module.set_all_reduce_hook(None)


def _check_replicas(
    replicas: Sequence[dist.ProcessGroup], shards: Sequence[dist.ProcessGroup]
) -> None:
    """Checks that the ranks that are to hold the same shard do not hold different ones.

    Raises:
        ValueError: they do.
    """
    for replica in replicas:
        for shard in shards:
            same, parts = (dist.get_process_group_ranks(group) for group in (replica, shard))
            if len(common := sorted({*same} & {*parts})) > 1:
                raise ValueError(
                    "replicate_group must be of ranks that hold the same shard, got ranks "
                    f"{same}, of which {common} hold different shards"
                )


def _fsdp_modules(model: object) -> list[Any]:
    """The modules in a model that ``fully_shard`` was applied to.

    Raises:
        TypeError: there are none.
        NotImplementedError: their communication cannot be replaced.
    """
    fsdp = importlib.import_module("torch.distributed.fsdp")
    kind: Any = getattr(fsdp, "FSDPModule", None)
    seams = ("set_custom_reduce_scatter", "set_custom_all_gather", "set_all_reduce_hook")
    missing = [seam for seam in seams if not hasattr(kind, seam)]
    if missing:
        raise NotImplementedError(
            f"GlobalQSGD.fsdp() needs PyTorch {FIRST_TORCH} or newer, whose FSDPModule."
            f"{missing[0]} replaces FSDP's communication, got PyTorch {torch.__version__}"
        )
    modules = model.modules() if isinstance(model, nn.Module) else ()
    found = [module for module in modules if isinstance(module, kind)]
    if not found:
        old = isinstance(model, fsdp.FullyShardedDataParallel)
        raise TypeError(
            "GlobalQSGD.fsdp() takes a model of torch.distributed.fsdp.fully_shard, got "
            + ("one of FullyShardedDataParallel, its forerunner" if old else f"{type(model)}")
            + ": call fully_shard(model) before"
        )
    for module in found:
        if len(getattr(module._get_fsdp_state(), "_fsdp_param_groups", ())) > 1:
            raise NotImplementedError(
                "GlobalQSGD.fsdp() got a module whose parameters are on several meshes, by "
                "shard_placement_fn: PyTorch does not let its communication be replaced. Apply "
                "fully_shard to modules with the parameters of one mesh each"
            )
    return found


def _shard_groups(modules: Sequence[nn.Module]) -> Iterator[dist.ProcessGroup]:
    """The process groups that parameters are sharded among.

    Raises:
        ValueError: PyTorch reduces among replicas by itself.
    """
    from torch.distributed.tensor import DTensor

    for module in modules:
        for parameter in module.parameters():
            if isinstance(parameter, DTensor):
                mesh = parameter.device_mesh
                if mesh.ndim > 1 and parameter.placements[0].is_replicate():
                    raise ValueError(
                        f"GlobalQSGD.fsdp() got a model on {mesh}, which replicates it (HSDP): "
                        "there PyTorch averages replicas by itself, in full. Call fully_shard with "
                        "a mesh of the sharding dimension alone, as mesh['shard'], and "
                        "fsdp(model, replicate_group=mesh['replicate'].get_group())"
                    )
                yield mesh.get_group(0)
