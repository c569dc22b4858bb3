"""DeepSpeed: ``attach(engine, GlobalQSGD(bits=4))``, for ZeRO stages 0 to 2.

DeepSpeed has no communication hooks. Its buckets pass through a few methods of the engine, or of
the ZeRO optimizer, which ``attach`` replaces on these objects.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from deepspeed import DeepSpeedEngine
from torch import Tensor

from hvd_gqsgd import GlobalQSGD

__all__ = ["attach"]


def attach(engine: DeepSpeedEngine, compressor: GlobalQSGD) -> None:
    """Compresses the gradients of an engine. All ranks must call it before the first backward pass.

    Gradients of experts, whose groups are smaller, stay uncompressed. Codes replace DeepSpeed's
    ``communication_data_type``. Pass ``compressor.state_dict()`` in the ``client_state`` of
    ``engine.save_checkpoint()``.

    Args:
        engine: an engine of ``deepspeed.initialize`` with ZeRO stage 0, 1 or 2.
        compressor: the compressor, whose ``stats()`` has the counts.

    Raises:
        ValueError: ZeRO shards the parameters (stage 3), the engine allreduces no gradients, or the
            compressor has error feedback.
    """
    if (feedback := compressor.options.error_feedback) is not None:
        raise ValueError(
            f"the DeepSpeed adapter does not take error_feedback={feedback!r}, which keeps a part "
            "of the gradient of each parameter: DeepSpeed hands over buckets without parameters; "
            "leave error_feedback and select='leader' out"
        )
    stage = engine.zero_optimization_stage()
    if stage > 2:
        raise ValueError(
            f"the DeepSpeed adapter takes ZeRO stages 0 to 2, got stage {stage}, which shards "
            "parameters: use FSDP2 with GlobalQSGD(...).fsdp(model)"
        )
    if stage and engine.zero_reduce_scatter() and not engine.zero_multi_rank_bucket_allreduce():
        raise ValueError(
            f"the DeepSpeed adapter needs gradients that are allreduced, got ZeRO stage {stage} "
            'with "reduce_scatter": true and "use_multi_rank_bucket_allreduce": false: set the '
            "former to false or the latter to true"
        )
    if not engine.enable_backward_allreduce or engine.is_deepcompile_enabled():
        raise ValueError(
            "the DeepSpeed adapter needs an engine that reduces gradients, got one with a 1-bit "
            "optimizer or DeepCompile: leave these out"
        )
    optimizer, sequence_ranks = engine.optimizer, float(engine.sequence_parallel_size)
    group = engine.seq_data_parallel_group
    state, micro_step = compressor.ddp_state(group), -1
    ranks = float(group.size())
    # DeepSpeed's own reductions, for other groups.
    of_engine: Callable[..., Tensor] = engine.allreduce_bucket
    zero = hasattr(optimizer, "gradient_reduction_w_predivide")
    of_zero: Callable[..., Tensor] = optimizer.allreduce_bucket if zero else of_engine

    def reduce(gradients: Tensor, mean: bool) -> Tensor:
        nonlocal micro_step
        first, micro_step = micro_step != engine.micro_steps, engine.micro_steps
        reduced = state.average(gradients, first).wait()
        return reduced.mul_(sequence_ranks if mean else ranks)

    def engine_bucket(bucket: list[Tensor], dp_group: Any, dp_world_size: Any = None) -> Tensor:
        if dp_group is not group:
            return of_engine(bucket, dp_group, dp_world_size)
        return reduce(engine.flatten(bucket), engine.gradient_average)

    def zero_bucket(
        bucket: list[Tensor], dtype: Any, rank: int | None = None, log: Any = None,
        divide: bool = True, process_group: Any = None,
    ) -> Tensor:  # fmt: skip
        if process_group not in (None, group):
            return of_zero(bucket, dtype, rank, log, divide, process_group)
        return reduce(optimizer.flatten(bucket), divide and optimizer.gradient_average)

    def zero_tensor(tensor: Tensor, dtype: Any) -> Tensor:
        return reduce(tensor, optimizer.gradient_average)

    engine.allreduce_bucket = engine_bucket
    if zero:
        optimizer.allreduce_bucket = zero_bucket
        optimizer.gradient_reduction_w_predivide = zero_tensor
