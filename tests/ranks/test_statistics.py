"""Over real ranks the mean is unbiased, and its error is what theory and ``simulate`` say.

False alarms: data and dither come from fixed seeds, so a given version passes always or never. Over
the choice of seeds, an unbiased quantizer would fail with a probability below 1e-7 per test.
"""

from __future__ import annotations

import horovod.torch as hvd
import pytest
import torch
from helpers import gradients

from hvd_gqsgd import GlobalQSGD, simulate
from hvd_gqsgd.codecs.linear import levels_for

TRIALS, NUMEL, BLOCK = 30, 4096, 256

# Student's t with 29 degrees of freedom is beyond 8 with a probability of 8e-9.
T_LIMIT = 8.0


def levels_of(everyone):
    """The distance between two levels, for each element."""
    norms = everyone.double().abs().amax(0).view(-1, BLOCK).amax(1).repeat_interleave(BLOCK)
    return norms / levels_for(8, len(everyone))


def rounded(everyone):
    """Round-to-nearest on the same levels."""
    level = levels_of(everyone)
    return ((everyone / level).round() * level).float()


def worst_bias(errors, everyone):
    """Largest |t| of the mean error along directions in which quantizers are biased.

    ``errors`` is (trials, numel), in units of the levels: upwards as for floor without dither, away
    from zero, and as round-to-nearest errs.
    """
    mean = everyone.double().mean(0)
    directions = torch.stack(
        [torch.ones(NUMEL), mean.sign(), rounded(everyone).double().mean(0) - mean]
    )
    directions[2] /= levels_of(everyone)
    along = errors @ directions.double().t()
    return (along.mean(0).abs() / (along.std(0) / len(along) ** 0.5)).max().item()


def exchange(gradients_, rank, mean, **options):
    """Errors of the mean over many steps, (trials, numel), in units of the levels' distance."""
    compressor = GlobalQSGD(block_size=BLOCK, **options)
    results = [hvd.allreduce(gradients_[rank], compression=compressor) for _ in range(TRIALS)]
    return torch.stack(results).double() - mean


@pytest.mark.parametrize("correlated", [True, False])
def test_unbiased_and_within_the_variance_bound(rank, size, correlated, several):
    everyone = gradients(size, NUMEL, seed=5)
    mean, level = everyone.double().mean(0), levels_of(everyone)
    errors = exchange(everyone, rank, mean, correlated=correlated) / level
    assert worst_bias(errors, everyone) < T_LIMIT

    # One rank's rounding has a variance of at most 1/4 of a level squared, and ranks average.
    assert errors.square().mean() <= 1 / (4 * size)

    # Other steps draw other dither of the same law.
    options = {"block_size": BLOCK, "correlated": correlated}
    simulated = [simulate(everyone, step=1000 + step, **options) for step in range(TRIALS)]
    expected = ((torch.stack(simulated).double() - mean) / level).square().mean().item()
    assert errors.square().mean().item() == pytest.approx(expected, rel=0.05)


def test_round_to_nearest_is_found_biased(rank, size):
    """The negative control: the same exchange of gradients that were rounded to the levels."""
    everyone = gradients(size, NUMEL, seed=5)
    errors = exchange(rounded(everyone), rank, everyone.double().mean(0)) / levels_of(everyone)
    assert worst_bias(errors + 1e-9 * torch.randn(TRIALS, NUMEL), everyone) > 10 * T_LIMIT


def test_error_falls_as_one_over_the_square_root_of_the_trials(rank, size):
    everyone = gradients(size, NUMEL, seed=6)
    errors = exchange(everyone, rank, everyone.double().mean(0)) / levels_of(everyone)
    one = errors.square().mean().sqrt().item()
    averaged = errors.mean(0).square().mean().sqrt().item()
    assert averaged == pytest.approx(one / TRIALS**0.5, rel=0.15)
