"""A measure of bias that finds quantizers which are not unbiased."""

from __future__ import annotations

import torch

TRIALS = 30
T_LIMIT = 8.0  # Student's t with 29 degrees of freedom is beyond with a probability of 8e-9


def worst_bias(errors, everyone, level):
    """Largest |t| of the mean error along directions in which quantizers are biased: upwards, away
    from zero, and as round-to-nearest errs.

    Args:
        errors: a row for each of the trials, in units of a level.
        everyone: what is averaged, a row for each rank.
        level: of each element.
    """
    # Where nothing is random, nothing would vary.
    noise = torch.randn(errors.shape, generator=torch.Generator().manual_seed(0))
    mean = everyone.double().mean(0)
    nearest = rounded(everyone, level).double().mean(0) - mean
    directions = torch.stack([torch.ones_like(mean), mean.sign(), nearest / level])
    along = (errors + 1e-9 * noise) @ directions.t()
    return (along.mean(0).abs() / (along.std(0) / len(along) ** 0.5)).max().item()


def rounded(everyone, level):
    """To the nearest level."""
    return ((everyone.double() / level).round() * level).float()
