"""Truncated log-normal and Kumaraswamy against quadrature in many digits, far outside their intervals too."""

import math

import mpmath as mp
import pytest
import torch

from vardrop import functional as F
from vardrop.errors import InvalidValueError

LOW, HIGH = -20.0, 0.0
GRID = [(mu, log_sigma) for mu in (-25.0, -20.0, -10.0, -3.0, -0.1, 0.0, 0.05, 1.0, 5.0) for log_sigma in (-8.0, -5.0, -2.0, 0.0, 2.0, 5.0)]


def truncated(mu: float, log_sigma: float) -> tuple[float, float, float]:
    """KL, mean and SNR by quadrature over ``log theta``, from the density at the nearer end of the interval."""
    with mp.workdps(40):
        mu_, sigma = mp.mpf(mu), mp.exp(mp.mpf(log_sigma))
        peak = min(max(mu_, mp.mpf(LOW)), mp.mpf(HIGH))
        slope = abs(mu_ - peak) / sigma**2
        scale = min(sigma, 1 / slope) if slope else sigma
        ends = [mp.mpf(LOW), mp.mpf(HIGH)]
        points = sorted({*ends, *(p for k in (1, 4, 12, 40) for p in (peak - k * scale, peak + k * scale) if LOW < p < HIGH), peak})

        def log_density(x):
            return -((x - mu_) ** 2 - (peak - mu_) ** 2) / (2 * sigma**2)

        mass = mp.quad(lambda x: mp.exp(log_density(x)), points)
        log_mass = mp.log(mass)
        kl = mp.quad(lambda x: mp.exp(log_density(x)) / mass * (log_density(x) - log_mass), points) + mp.log(HIGH - LOW)
        first = mp.quad(lambda x: mp.exp(log_density(x) + x) / mass, points)
        second = mp.quad(lambda x: mp.exp(log_density(x)) / mass * (mp.exp(x) - first) ** 2, points)
        return float(kl), float(first), float(first / mp.sqrt(second))


@pytest.fixture(scope="module")
def oracle():
    return {point: truncated(*point) for point in GRID}


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-8), (torch.float32, 1e-5)])
def test_truncated_lognormal_kl_mean_and_snr(oracle, dtype, error):
    mu, log_sigma = torch.tensor(GRID, dtype=dtype).unbind(1)
    kl = F.truncated_lognormal_kl(mu, log_sigma)
    mean = F.truncated_lognormal_mean(mu, log_sigma)
    snr = F.truncated_lognormal_snr(mu, log_sigma)
    for index, point in enumerate(GRID):
        expected_kl, expected_mean, expected_snr = oracle[point]
        assert kl[index].item() == pytest.approx(expected_kl, rel=error, abs=error), point
        assert mean[index].item() == pytest.approx(expected_mean, rel=error), point
        if expected_snr < 1e3:
            assert snr[index].item() == pytest.approx(expected_snr, rel=100 * error), point
        assert (snr[index].item() > 1.0) == (expected_snr > 1.0), point


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_truncated_lognormal_gradients_are_finite_and_right(oracle, dtype):
    grid = torch.tensor(GRID, dtype=dtype)
    mu, log_sigma = (column.clone().requires_grad_() for column in grid.unbind(1))
    u = torch.linspace(0.01, 0.99, len(GRID), dtype=dtype)
    for function in (F.truncated_lognormal_kl, F.truncated_lognormal_mean, lambda m, s: F.truncated_lognormal_icdf(u, m, s)):
        gradients = torch.autograd.grad(function(mu, log_sigma).sum(), (mu, log_sigma))
        for gradient in gradients:
            bad = (~torch.isfinite(gradient)).nonzero()[:, 0]
            assert not len(bad), [GRID[i] for i in bad]
    by_mu, by_log_sigma = torch.autograd.grad(F.truncated_lognormal_kl(mu, log_sigma).sum(), (mu, log_sigma))
    for index in range(0, len(GRID), 7):
        at, width = GRID[index]
        step = 1e-4 * math.exp(min(width, 0.0))
        slope = (truncated(at + step, width)[0] - truncated(at - step, width)[0]) / (2 * step)
        assert by_mu[index].item() == pytest.approx(slope, rel=2e-3, abs=2e-4), GRID[index]
        slope = (truncated(at, width + 1e-4)[0] - truncated(at, width - 1e-4)[0]) / 2e-4
        assert by_log_sigma[index].item() == pytest.approx(slope, rel=2e-3, abs=2e-4), GRID[index]


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-7), (torch.float32, 3e-4)])
def test_truncated_lognormal_quantiles_have_the_right_cdf(dtype, error):
    for mu, log_sigma in GRID:
        for u in (1e-3, 0.2, 0.5, 0.9):
            theta = F.truncated_lognormal_icdf(*(torch.tensor([v], dtype=dtype) for v in (u, mu, log_sigma)))
            with mp.workdps(40):
                sigma = mp.exp(mp.mpf(log_sigma))
                x = mp.log(mp.mpf(theta.item()))
                bottom, top, here = (mp.ncdf((p - mu) / sigma) for p in (mp.mpf(LOW), mp.mpf(HIGH), x))
                if mu < LOW:
                    bottom, top, here = (-mp.ncdf(-(p - mu) / sigma) for p in (mp.mpf(LOW), mp.mpf(HIGH), x))
                found = (here - bottom) / (top - bottom)
                outside = max(mu - HIGH, LOW - mu, 0.0)
                width = float(min(sigma, sigma**2 / outside)) if outside else float(sigma)
            rounding = torch.finfo(dtype).eps * (1 + abs(float(x))) / width
            assert float(found) == pytest.approx(u, abs=error + 4 * rounding), (mu, log_sigma, u)


def test_truncated_lognormal_limits():
    assert F.truncated_lognormal_kl(torch.tensor([-10.0]).double(), torch.tensor([12.0]).double()).item() == pytest.approx(0.0, abs=1e-7)
    assert F.truncated_lognormal_mean(torch.tensor([-10.0]).double(), torch.tensor([12.0]).double()).item() == pytest.approx(0.05, abs=1e-6)
    with pytest.raises(InvalidValueError, match="low=1.0, high=0.0"):
        F.truncated_lognormal_kl(torch.zeros(1), torch.zeros(1), 1.0, 0.0)


KUMARASWAMY = [(a, b) for a in (1e-4, 1e-3, 0.05, 0.3133, 1.0, 2.127, 20.0) for b in (0.05, 0.5, 1.0, 3.0, 30.0)]
PRIOR = 1e-4


def kumaraswamy(a: float, b: float) -> tuple[float, float]:
    """KL to Beta(k, 1) and mean, as integrals over ``w = -log(u) / b`` of the uniform `u` behind pi, in log space."""
    with mp.workdps(25):

        def log_pi(w):
            return mp.log(-mp.expm1(-w)) / a

        def log_ratio(w):
            log_q = mp.log(a * b) + (a - 1) * log_pi(w) - (b - 1) * w
            return log_q - mp.log(PRIOR) - (PRIOR - 1) * log_pi(w)

        points = [0, mp.mpf(10) ** -20, mp.mpf(10) ** -6, 0.01, 1, 10, 50, 50 / mp.mpf(b) + 60, mp.inf]
        integrals = (mp.quad(lambda w, f=f: f(w) * b * mp.exp(-b * w), points) for f in (log_ratio, lambda w: mp.exp(log_pi(w))))
        return tuple(float(value) for value in integrals)


@pytest.mark.parametrize(("dtype", "error", "mean_error"), [(torch.float64, 1e-7, 1e-7), (torch.float32, 2e-5, 1e-6)])
def test_kumaraswamy_kl_and_mean(dtype, error, mean_error):
    for a, b in KUMARASWAMY:
        expected_kl, expected_mean = kumaraswamy(a, b)
        parameters = torch.tensor([a], dtype=dtype), torch.tensor([b], dtype=dtype)
        assert F.kumaraswamy_beta_kl(*parameters, PRIOR).item() == pytest.approx(expected_kl, rel=error, abs=error), (a, b)
        assert F.kumaraswamy_mean(*parameters).item() == pytest.approx(expected_mean, rel=mean_error, abs=1e-12), (a, b)


def test_kumaraswamy_kl_vanishes_at_the_prior_only_and_has_finite_gradients():
    a = torch.tensor([PRIOR, 2 * PRIOR, 1.0], dtype=torch.float64)
    kl = F.kumaraswamy_beta_kl(a, torch.ones(3).double(), PRIOR)
    assert kl[0].abs() < 1e-10 and (kl[1:] > 0.1).all()
    for dtype in (torch.float32, torch.float64):
        a, b = (column.clone().requires_grad_() for column in torch.tensor(KUMARASWAMY, dtype=dtype).unbind(1))
        u = torch.linspace(0.0, 1.0, len(KUMARASWAMY), dtype=dtype)
        for value in (F.kumaraswamy_beta_kl(a, b, PRIOR), F.kumaraswamy_mean(a, b), F.kumaraswamy_logit_icdf(u, a, b)):
            for gradient in torch.autograd.grad(value.sum(), (a, b)):
                assert torch.isfinite(gradient).all()


def test_kumaraswamy_kl_gradcheck():
    a = torch.tensor([0.01, 0.3, 2.0], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: F.kumaraswamy_beta_kl(a, b, PRIOR), (a, b))
    assert torch.autograd.gradcheck(F.kumaraswamy_mean, (a, b))


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_kumaraswamy_quantiles_invert_the_distribution(dtype, error):
    for a, b in ((0.3133, 1.0), (2.0, 0.5), (1.5, 7.0)):
        u = torch.tensor([0.01, 0.3, 0.5, 0.97], dtype=dtype)
        pi = F.kumaraswamy_icdf(u, torch.tensor(a, dtype=dtype), torch.tensor(b, dtype=dtype))
        torch.testing.assert_close((1 - pi**a) ** b, u, atol=error, rtol=error)


def test_logit_stays_finite_where_pi_underflows():
    a, b = torch.tensor(1e-3), torch.tensor(1.0)
    assert F.kumaraswamy_icdf(torch.tensor(0.9), a, b) == 0.0
    logit = F.kumaraswamy_logit_icdf(torch.tensor(0.9), a, b)
    assert logit.item() == pytest.approx(1e3 * math.log(0.1), rel=1e-4)
    ordinary = F.kumaraswamy_icdf(torch.tensor(0.3), torch.tensor(0.8), torch.tensor(2.0))
    logit = F.kumaraswamy_logit_icdf(torch.tensor(0.3), torch.tensor(0.8), torch.tensor(2.0))
    torch.testing.assert_close(logit, torch.logit(ordinary))
    with pytest.raises(InvalidValueError, match="alpha_over_k=0"):
        F.kumaraswamy_beta_kl(a, b, 0.0)
