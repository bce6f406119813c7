"""Moments of noisy layers against exact sums and against sampled weights."""

import itertools
import math
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
        exact_mean = Fraction(bias[o].item()) + sum(
            Fraction(x[n, i].item()) * Fraction(mean[o, i].item()) for i in range(3)
        )
        exact_variance = sum(Fraction(x[n, i].item()) ** 2 * Fraction(variance[o, i].item()) for i in range(3))
        assert found_mean[n, o].item() == pytest.approx(float(exact_mean), rel=1e-14)
        assert found_variance[n, o].item() == pytest.approx(float(exact_variance), rel=1e-14)


@pytest.mark.parametrize(
    "geometry",
    [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": 2}, {"groups": 2, "padding": "same"}],
)
def test_conv2d_moments_against_sampled_kernels(geometry):
    groups = geometry.get("groups", 1)
    x = torch.randn(1, 4, 6, 5)
    mean, log_std = torch.randn(2, 4 // groups, 3, 3), torch.randn(2, 4 // groups, 3, 3) - 1.0
    bias = torch.tensor([3.0, -2.0])
    found_mean, found_variance = F.conv2d_moments(x, mean, log_std, bias, **geometry)
    draws = torch.stack(
        [
            torch.nn.functional.conv2d(x, mean + log_std.exp() * torch.randn_like(mean), bias, **geometry)
            for _ in range(8000)
        ]
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


@pytest.mark.parametrize(
    "geometry",
    [{}, {"stride": (2, 1), "padding": (1, 2)}, {"dilation": 2, "padding": 1}, {"groups": 2, "padding": 1}],
)
def test_conv2d_moments_are_the_sums_written_as_loops(geometry):
    groups = geometry.get("groups", 1)
    stride, padding, dilation = (
        pair if isinstance(pair, tuple) else (pair, pair)
        for pair in (geometry.get(name, default) for name, default in (("stride", 1), ("padding", 0), ("dilation", 1)))
    )
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64)
    mean, log_std = torch.randn(2, 2, 4 // groups, 3, 2, dtype=torch.float64).unbind(0)
    bias = torch.tensor([3.0, -2.0], dtype=torch.float64)
    found_mean, found_variance = F.conv2d_moments(x, mean, log_std, bias, **geometry)
    for n, o, i, j in itertools.product(*(range(size) for size in found_mean.shape)):
        expected_mean, expected_variance = bias[o].item(), 0.0
        for c, k, m in itertools.product(range(4 // groups), range(3), range(2)):
            row, column = (
                i * stride[0] - padding[0] + k * dilation[0],
                j * stride[1] - padding[1] + m * dilation[1],
            )
            if 0 <= row < 6 and 0 <= column < 5:
                entry = x[n, o * groups // 2 * (4 // groups) + c, row, column].item()
                expected_mean += entry * mean[o, c, k, m].item()
                expected_variance += entry**2 * math.exp(2.0 * log_std[o, c, k, m].item())
        assert found_mean[n, o, i, j].item() == pytest.approx(expected_mean, rel=1e-12, abs=1e-12)
        assert found_variance[n, o, i, j].item() == pytest.approx(expected_variance, rel=1e-12)


def test_linear_moments_against_sampled_weights():
    x, mean, log_std = torch.randn(3, 5), torch.randn(2, 5), torch.randn(2, 5) - 1.0
    bias = torch.tensor([1.0, -1.0])
    found_mean, found_variance = F.linear_moments(x, mean, log_std, bias)
    weights = mean + log_std.exp() * torch.randn(200_000, 2, 5)
    draws = torch.einsum("ni,soi->sno", x, weights) + bias
    error = (found_variance / len(draws)).sqrt()
    assert ((draws.mean(dim=0) - found_mean).abs() <= 5 * error).all()
    assert ((draws.var(dim=0) / found_variance - 1.0).abs() <= 5 * (2 / len(draws)) ** 0.5).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_give_a_float32_variance(dtype):
    x, mean, log_std = (
        torch.rand(8, 32).to(dtype),
        torch.randn(4, 32).to(dtype),
        torch.full((4, 32), -10.0).to(dtype),
    )
    found_mean, variance = F.linear_moments(x, mean, log_std)
    assert found_mean.dtype == dtype and variance.dtype == torch.float32
    torch.testing.assert_close(variance, F.linear_moments(x.float(), mean.float(), log_std.float())[1])
    assert (variance > 0.0).all()


def test_moments_compile_and_have_right_gradients():
    x, mean = torch.randn(2, 2, 4, 4), torch.randn(3, 2, 3, 3)
    log_std = torch.randn(3, 2, 3, 3) - 2.0
    compiled = torch.compile(F.conv2d_moments, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, mean, log_std), F.conv2d_moments(x, mean, log_std))
    inputs = [tensor.double().requires_grad_() for tensor in (x[:1, :, :3], mean[:1], log_std[:1])]
    assert torch.autograd.gradcheck(F.conv2d_moments, inputs)
    flat = torch.randn(3, 4, 5)
    weights = torch.randn(2, 5), torch.randn(2, 5)
    batched = torch.vmap(lambda x: F.linear_moments(x, *weights))(flat)
    torch.testing.assert_close(batched, F.linear_moments(flat, *weights))
