"""Moments of noisy layers against exact sums and against sampled weights."""

import itertools
from fractions import Fraction

import pytest
import torch

from vardrop import functional as F


def test_linear_moments_are_the_exact_sums():
    x = torch.tensor([[0.5, -1.25, 3.0], [0.0, 2.0, -0.75]], dtype=torch.float64)
    mean = torch.tensor([[1.0, 0.25, -2.0], [0.5, 0.0, 1.5]], dtype=torch.float64)
    variance = torch.tensor([[0.25, 0.5, 1.0], [2.0, 0.125, 0.0625]], dtype=torch.float64)
    bias = torch.tensor([10.0, -4.0], dtype=torch.float64)
    found_mean, found_variance = F.linear_moments(x, mean, 0.5 * variance.log(), bias)
    for n, o in itertools.product(range(2), range(2)):
        exact_mean = Fraction(bias[o].item()) + sum(Fraction(x[n, i].item()) * Fraction(mean[o, i].item()) for i in range(3))
        exact_variance = sum(Fraction(x[n, i].item()) ** 2 * Fraction(variance[o, i].item()) for i in range(3))
        assert found_mean[n, o].item() == pytest.approx(float(exact_mean), rel=1e-14)
        assert found_variance[n, o].item() == pytest.approx(float(exact_variance), rel=1e-14)


@pytest.mark.parametrize("geometry", [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": 2}, {"groups": 2, "padding": "same"}])
def test_conv2d_moments_against_sampled_kernels(geometry):
    groups = geometry.get("groups", 1)
    x = torch.randn(1, 4, 6, 5)
    mean, log_std = torch.randn(2, 4 // groups, 3, 3), torch.randn(2, 4 // groups, 3, 3) - 1.0
    bias = torch.tensor([3.0, -2.0])
    found_mean, found_variance = F.conv2d_moments(x, mean, log_std, bias, **geometry)
    draws = torch.stack(
        [torch.nn.functional.conv2d(x, mean + log_std.exp() * torch.randn_like(mean), bias, **geometry) for _ in range(8000)]
    )
    error = (draws.var(dim=0) / len(draws)).sqrt()
    assert ((draws.mean(dim=0) - found_mean).abs() <= 5 * error).all()
    torch.testing.assert_close(draws.var(dim=0), found_variance, rtol=0.09, atol=1e-6)


def test_variance_stays_in_float32_under_autocast():
    x, mean = torch.rand(8, 784), torch.randn(30, 784) * 0.05
    log_std = torch.full_like(mean, -10.0)
    expected = F.linear_moments(x, mean, log_std)[1]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found_mean, variance = F.linear_moments(x, mean, log_std)
    assert found_mean.dtype == torch.bfloat16 and variance.dtype == torch.float32
    torch.testing.assert_close(variance, expected)
