"""DeepSpeed: ``attach(engine, GlobalQSGD(bits=4))``, for ZeRO stages 0 to 2.

DeepSpeed has no communication hooks. Its buckets pass through one method of the engine (stage 0) or
of the ZeRO optimizer (stages 1 and 2), which ``attach`` replaces on that object.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from torch import Tensor

from hvd_gqsgd import GlobalQSGD

__all__ = ["attach"]


def attach(engine: DeepSpeedEngine, compressor: GlobalQSGD) -> None:
    """Compresses the gradients of an engine. All ranks must call it.

    Gradients of experts, whose groups are smaller, stay uncompressed. Codes replace DeepSpeed's
    ``communication_data_type``. Pass ``compressor.state_dict()`` in the ``client_state`` of
    ``engine.save_checkpoint()``.

    Raises:
        ValueError: ZeRO shards the parameters (stage 3), or reduces each gradient to one rank.
    """
    stage = engine.zero_optimization_stage()
    if stage > 2:
        raise ValueError(
            f"the DeepSpeed adapter takes ZeRO stages 0 to 2, got stage {stage}, which shards "
            "parameters: use FSDP2 with GlobalQSGD(...).fsdp(model)"
        )
    if stage > 0 and engine.zero_reduce_scatter():
        raise ValueError(
            f"the DeepSpeed adapter needs all gradients on all ranks, got ZeRO stage {stage} with "
            '"reduce_scatter": true (the default): set "reduce_scatter": false in '
            '"zero_optimization"'
        )
    group = engine.seq_data_parallel_group
    state, size = compressor.ddp_state(group), dist.get_world_size(group)
    # Ranks of a sequence hold parts of one gradient, whose sum DeepSpeed takes.
    factor = float(engine.sequence_parallel_size if engine.gradient_average else size)
    last: list[int] = []

    def reduced(bucket: Tensor) -> Tensor:
        first, last[:] = last != [engine.micro_steps], [engine.micro_steps]
        mean = state.average(bucket, first=first).wait()
        return mean if factor == 1 else mean.mul_(factor)

    if stage > 0:
        engine.optimizer.gradient_reduction_w_predivide = lambda bucket, dtype: reduced(bucket)
        return
    uncompressed = engine.allreduce_bucket

    def allreduce_bucket(bucket: list[Tensor], dp_group: Any, dp_world_size: Any = None) -> Any:
        if dp_group is not group:
            return uncompressed(bucket, dp_group, dp_world_size)
        return reduced(engine.flatten(bucket))

    engine.allreduce_bucket = allreduce_bucket
