"""The gradients of a bucket of DDP one by one, for error feedback, which keeps a part of each.

DDP makes its buckets anew after the first step, so nothing may be kept for a bucket. A gradient is
identified as under Horovod, and treated alike in every bucket.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from hvd_gqsgd.frontends.parameter_names import ParameterNames

__all__ = ["NamedGradients", "gradients_of"]


class NamedGradients:
    """The gradients of a bucket, those of ``min_numel`` elements or more with their names.

    Args:
        gradients: parameters, each with its gradient, which is a part of the bucket's buffer.
        names: of the parameters.
        min_numel: smaller gradients are averaged uncompressed.
    """

    def __init__(
        self,
        gradients: Sequence[tuple[Tensor, Tensor]],
        names: ParameterNames,
        min_numel: int,
    ) -> None:
        self.named: list[tuple[str, Tensor]] = []
        """Names, and contiguous gradients that the means are to be written to."""
        self.small: list[Tensor] = []
        """Gradients with fewer elements than ``min_numel``."""
        self.error: ValueError | None = None
        """Of this rank alone: a parameter has no name."""
        self._copied: list[tuple[Tensor, Tensor]] = []
        for parameter, gradient in gradients:
            if gradient.numel() < min_numel:
                self.small.append(gradient)
                continue
            name = names.of(parameter)
            if name is None:
                self.error = self.error or ValueError(
                    "error feedback takes the parameters of named_parameters alone, got the "
                    f"gradient of another one, of shape {[*parameter.shape]}: pass the "
                    "named_parameters() of the model that DDP wraps, and of all others with this "
                    "state"
                )
                continue
            contiguous = gradient.contiguous()
            if contiguous is not gradient:
                self._copied.append((gradient, contiguous))
            self.named.append((name, contiguous))

    def small_ones(self) -> Tensor:
        """A flat copy of the small gradients."""
        return torch.cat([gradient.reshape(-1) for gradient in self.small])

    def take_over(self, small: Tensor | None) -> None:
        """Writes means to the buffer that are not there yet.

        Args:
            small: the means of the small gradients; None: there are none.
        """
        for gradient, contiguous in self._copied:
            gradient.copy_(contiguous)
        if small is not None:
            parts = small.split([gradient.numel() for gradient in self.small])
            for gradient, mean in zip(self.small, parts, strict=True):
                gradient.copy_(mean.view(gradient.shape))


def gradients_of(bucket: dist.GradBucket) -> list[tuple[Tensor, Tensor]]:  # type: ignore[name-defined]
    """The parameters of a bucket, each with its gradient, a part of the bucket's buffer; a complex
    one as pairs of real numbers."""
    parameters, buffer = bucket.parameters(), bucket.buffer()
    if buffer.is_sparse:  # the gradient of one parameter
        return [(parameters[0], buffer)]
    # Not by gradients(): of a complex parameter that has the first half.
    parts = buffer.split([p.numel() * (2 if p.is_complex() else 1) for p in parameters])
    return [(p, _in_layout_of(p, part)) for p, part in zip(parameters, parts, strict=True)]


def _in_layout_of(parameter: Tensor, gradient: Tensor) -> Tensor:
    """The gradient with its elements where DDP has put them: as those of the parameter, if these
    are dense, else one after the other."""
    if parameter.is_contiguous() or parameter.is_complex():
        return gradient
    dense = torch.empty_like(parameter, device="meta").stride() == parameter.stride()
    return gradient.as_strided(parameter.shape, parameter.stride()) if dense else gradient
