"""GlobalQSGD for PyTorch's FSDP2: the reduction of the gradients of each module of ``fully_shard``.

FSDP hands in the gradients of one module after another, in one order on all ranks, and goes on with
the result: so each is waited for, or, over NCCL, enqueued on the current stream.
"""

from __future__ import annotations

import dataclasses
import importlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hvd_gqsgd.codecs import check_device
from hvd_gqsgd.engine.agreement import Ahead, check, refuse
from hvd_gqsgd.engine.pipeline import Pipeline
from hvd_gqsgd.engine.steps import Steps
from hvd_gqsgd.errors import AgreementError
from hvd_gqsgd.frontends.bypass import why_bypassed
from hvd_gqsgd.frontends.compiling import opaque
from hvd_gqsgd.frontends.reduce_op import reduction
from hvd_gqsgd.options import FrontEnd, Options
from hvd_gqsgd.stats import Stats
from hvd_gqsgd.transports.devices import transport_for
from hvd_gqsgd.transports.process_groups import check_group, has_nccl, host_group
from hvd_gqsgd.transports.torch_distributed import TorchDistributedTransport

__all__ = ["attach"]

_NOT_ITS = {
    "bucket_mb": "FSDP reduces a module at a time; apply fully_shard to larger or smaller ones",
    "named_parameters": "FSDP knows its parameters; leave it out",
    "process_set": "that is Horovod's; the model's device mesh says which ranks take part",
    "patience": "FSDP waits for the timeout of its process group; give that to the group",
}
REPLICATED = FrontEnd("GlobalQSGD.fsdp()", own=("replicate_group",), without=_NOT_ITS)
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
    steps: Steps,
    replicate_group: dist.ProcessGroup | None = None,
) -> None:
    """Takes over the reduction of the gradients of a model, of ``GlobalQSGD.fsdp``.

    Each ``FSDPModule`` in the model gets a reduce-scatter of codes: global block norms, an Alltoall
    of codes, and a sum in float by the owner of the shard, which rounds nothing again.
    ``min_numel`` is compared with all gradients of a module. The mean or the sum is taken, as FSDP
    asks for it, with its divide factors. All ranks must call this together.

    For HSDP, apply ``fully_shard`` on a mesh of one dimension, as the ranks of a host, and give
    the group of ranks that hold the same shard. Shards are then averaged over that group as small
    integers, by ``exchange``, and PyTorch reduce-scatters within the mesh.

    Args:
        model: with ``fully_shard`` applied to it or to modules in it.
        given: the keywords of the user.
        stats: counts messages and modules.
        steps: the state of the training.
        replicate_group: the ranks that hold the same shard; None: there are none.

    Raises:
        TypeError: the model is none of ``fully_shard``, or an option is unknown or has no effect
            here.
        ValueError: an option is out of range, ``bits`` is ``DynamicBits``, or the model is on a
            mesh of two dimensions that replicates it.
        NotImplementedError: this PyTorch does not let FSDP's reduction be replaced.
        AgreementError: on all ranks, if their options differ; on all other ranks, if one raises an
            error about its options.
    """
    modules = _fsdp_modules(model)
    if replicate_group is not None:
        replicas = check_group(replicate_group)
        options = _options(REPLICATED, given, [replicas])
        group = _Group(replicas, options, stats, steps)
        for module in modules:
            module.set_all_reduce_hook(_ReplicaMean(group))
        return
    groups = list(dict.fromkeys(_shard_groups(modules)))
    options = _options(SHARDED, given, groups)
    known = _Groups(dataclasses.replace(options, exchange="one_phase"), stats, steps)
    for number, each in enumerate(groups, 1):
        try:
            known.of(each)
        except AgreementError:
            _refuse_options(groups[number:])
            raise
    for module in modules:
        module.set_custom_reduce_scatter(_ReduceScatter(known))


def _options(
    front_end: FrontEnd, given: Mapping[str, Any], groups: Sequence[dist.ProcessGroup]
) -> Options:
    """Those of the user; an error is told to the ranks of the groups, which wait for them."""
    try:
        options = front_end.options(given)
        if options.dynamic is not None:
            raise ValueError(
                f"bits must not be DynamicBits(...) for {front_end.name}, as a rank knows the "
                f"mean of its own shard alone, got {options.bits}, which follows the whole norm"
            )
        return options
    except (TypeError, ValueError):
        _refuse_options(groups)
        raise


def _refuse_options(groups: Sequence[dist.ProcessGroup]) -> None:
    for group in groups:
        refuse(TorchDistributedTransport(host_group(group)), "options")


class _Group:
    """The exchange among the ranks of one process group, a tensor at a time. All of its ranks must
    make it together."""

    def __init__(
        self, group: dist.ProcessGroup, options: Options, stats: Stats, steps: Steps
    ) -> None:
        self._group = weakref.ref(group)
        self._transport = TorchDistributedTransport(host_group(group))
        check(self._transport, options, "options")
        self._nccl = has_nccl(group)
        self.size = self._transport.size
        self.options = options
        self.stats = stats
        self._steps = steps
        self._pipelines: dict[torch.device, Pipeline] = {}
        self._seen: set[object] = set()  # those whose gradients came in this step

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks; None once the process group was destroyed."""
        return self._group()

    def bypasses(self, x: Tensor) -> bool:
        """Whether a tensor goes as it is; then it is counted."""
        self.stats.tensors += 1
        why = why_bypassed(x, self.options.min_numel)
        if why is not None:
            self.stats.bypass(why, x.nbytes, lambda: self._transport.rank)
        return why is not None

    def exchange(self, of: object, x: Tensor, out: Tensor, scale: float) -> None:
        """Writes ``scale`` times the sum over the ranks to ``out``, or this rank's shard of it.

        Args:
            of: what the gradients are of. A step lasts until they are of the same once more.
        """
        try:
            check_device("GlobalQSGD.fsdp() got gradients", x)
            pipeline = self._pipeline(x.device)
            if not self._seen or of in self._seen:
                self._seen.clear()
                for each in self._pipelines.values():
                    each.begin_step()
            self._seen.add(of)
            ticket = pipeline.submit(x, scale=scale, out=out)
        except Exception:
            self.refuse()
            raise
        pipeline.wait(ticket)
        pipeline.decode(ticket, scale)

    def refuse(self) -> None:
        """Tells the other ranks, which may be waiting, that this one does not take part."""
        refuse(self._transport, "header")

    def _pipeline(self, device: torch.device) -> Pipeline:
        if device not in self._pipelines:
            transport = transport_for(device, self._transport, self._nccl)
            self._pipelines[device] = Pipeline(
                self.options, transport, protocol=Ahead, steps=self._steps, stats=self.stats
            )
            self._seen.clear()
        return self._pipelines[device]


class _Groups:
    """The exchanges of a model, whose modules may be on several meshes."""

    def __init__(self, options: Options, stats: Stats, steps: Steps) -> None:
        self._common = options, stats, steps
        self._known: weakref.WeakKeyDictionary[dist.ProcessGroup, _Group]
        self._known = weakref.WeakKeyDictionary()

    def of(self, group: dist.ProcessGroup) -> _Group:
        """That of a group; made when it is first asked for, by all of its ranks."""
        if group not in self._known:
            self._known[group] = _Group(group, *self._common)
        return self._known[group]


class _ReduceScatter:
    """The reduce-scatter of one module; in PyTorch's words a ``ReduceScatter``."""

    def __init__(self, groups: _Groups) -> None:
        self._groups = groups

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for the input or the output."""
        return torch.empty(tuple(size), dtype=dtype, device=device)

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
        if exchange.bypasses(input_tensor):
            _reduce_scatter(output=output_tensor, input=input_tensor, op=op, group=group)
            return
        try:
            scale = _scale(op, exchange.size)
        except Exception:
            exchange.refuse()
            raise
        exchange.exchange(self, input_tensor, output_tensor, scale)


class _ReplicaMean:
    """The mean of a module's shard over the ranks that hold the same one: an all-reduce hook."""

    def __init__(self, group: _Group) -> None:
        self._group = group

    @opaque
    def __call__(self, reduce_output: Tensor) -> None:
        """Averages in place."""
        share = 1 / self._group.size
        if self._group.bypasses(reduce_output):
            dist.all_reduce(reduce_output.mul_(share), group=self._group.group)
            return
        self._group.exchange(self, reduce_output, reduce_output, share)


def _scale(op: Any, size: int) -> float:
    """The factor of the sum that a reduction asks for; that of PREMUL_SUM is in its pickle."""
    if op == dist.ReduceOp.PREMUL_SUM:
        return float(op.__getstate__()[1])
    return 1 / size if reduction(op) == "mean" else 1.0


def _fsdp_modules(model: object) -> list[Any]:
    """The modules in a model that ``fully_shard`` was applied to.

    Raises:
        TypeError: there are none.
        NotImplementedError: their reduction cannot be replaced.
    """
    fsdp = importlib.import_module("torch.distributed.fsdp")
    kind = getattr(fsdp, "FSDPModule", None)
    if kind is None or not hasattr(kind, "set_custom_reduce_scatter"):
        raise NotImplementedError(
            f"GlobalQSGD.fsdp() needs PyTorch {FIRST_TORCH} or newer, whose "
            "FSDPModule.set_custom_reduce_scatter replaces the reduction, got PyTorch "
            f"{torch.__version__}"
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
