"""Truncated log-normal and Kumaraswamy against quadrature in many digits, far outside their intervals too."""

import functools
import math

import mpmath as mp
import pytest
import torch

from vardrop import functional as F
from vardrop.errors import InvalidValueError

LOW, HIGH = -20.0, 0.0
GRID = [
    (mu, log_sigma)
    for mu in (-25.0, -20.0, -10.0, -3.0, -0.1, 0.0, 0.05, 1.0, 5.0)
    for log_sigma in (-8.0, -5.0, -2.0, 0.0, 2.0, 5.0)
]


@functools.cache
def truncated(mu: float, log_sigma: float, low: float = LOW, high: float = HIGH) -> tuple[float, float, float]:
    """KL, mean and SNR by quadrature over ``log theta``, from the density at the nearer end of the interval."""
    with mp.workdps(40):
        mu_, sigma = mp.mpf(mu), mp.exp(mp.mpf(log_sigma))
        bottom, top = mp.mpf(low), mp.mpf(high)
        peak = min(max(mu_, bottom), top)
        slope = abs(mu_ - peak) / sigma**2
        scale = min(sigma, 1 / slope) if slope else sigma
        inner = (peak + sign * k * scale for k in (1, 4, 12, 40) for sign in (-1, 1))
        points = sorted({bottom, top, peak, *(p for p in inner if bottom < p < top)})

        def log_density(x):
            return -((x - mu_) ** 2 - (peak - mu_) ** 2) / (2 * sigma**2)

        mass = mp.quad(lambda x: mp.exp(log_density(x)), points)
        log_mass = mp.log(mass)
        kl = mp.quad(lambda x: mp.exp(log_density(x)) / mass * (log_density(x) - log_mass), points) + mp.log(
            top - bottom
        )
        first = mp.quad(lambda x: mp.exp(log_density(x) + x) / mass, points)
        second = mp.quad(lambda x: mp.exp(log_density(x)) / mass * (mp.exp(x) - first) ** 2, points)
        return float(kl), float(first), float(first / mp.sqrt(second))


@pytest.fixture(scope="module")
def oracle():
    return {point: truncated(*point) for point in GRID}


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-10), (torch.float32, 5e-6)])
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
    for function in (
        F.truncated_lognormal_kl,
        F.truncated_lognormal_mean,
        lambda m, s: F.truncated_lognormal_icdf(u, m, s),
    ):
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


@pytest.mark.parametrize(("low", "high"), [(-1.0, 0.0), (-0.01, 0.02), (2.0, 9.0)])
def test_truncated_lognormal_on_other_intervals(low, high):
    for mu in (low - 30.0, low - 0.5, 0.5 * (low + high), high, high + 5.0):
        for log_sigma in (-8.0, -1.0, 1.0, 3.0):
            found = torch.tensor([mu]).double(), torch.tensor([log_sigma]).double()
            kl, mean, snr = truncated(*(x.item() for x in found), low, high)
            assert F.truncated_lognormal_kl(*found, low, high).item() == pytest.approx(kl, abs=1e-10, rel=1e-10)
            assert F.truncated_lognormal_mean(*found, low, high).item() == pytest.approx(mean, rel=1e-10)
            assert F.truncated_lognormal_snr(*found, low, high).item() == pytest.approx(min(snr, 1e6), rel=1e-3)


@pytest.mark.parametrize(("low", "high"), [(LOW, HIGH), (-1.0, 0.0), (2.0, 2.5)])
def test_truncated_lognormal_quantiles_by_bisection_of_the_distribution(low, high):
    for mu in (low - 20.0, low - 0.1, 0.5 * (low + high), high, high + 0.3, high + 5.0):
        for log_sigma in (-4.0, -1.0, 0.5, 3.0):
            for u in (1e-5, 0.03, 0.5, 0.999):
                point = torch.tensor([[u], [mu], [log_sigma]], dtype=torch.float64)
                found = F.truncated_lognormal_icdf(*point, low, high).log().item()
                assert found == pytest.approx(bisected(u, mu, log_sigma, low, high), abs=2e-10), (
                    mu,
                    log_sigma,
                    u,
                )


def bisected(u: float, mu: float, log_sigma: float, low: float, high: float) -> float:
    """``log theta`` whose distribution function, the erfc in 60 digits, is `u`."""
    with mp.workdps(60):
        sigma, side = mp.exp(mp.mpf(log_sigma)), (1 if mu > low else -1)

        def cdf(x):
            return side * mp.ncdf(side * (x - mu) / sigma)

        goal = cdf(mp.mpf(low)) + mp.mpf(u) * (cdf(mp.mpf(high)) - cdf(mp.mpf(low)))
        left, right = mp.mpf(low), mp.mpf(high)
        for _ in range(48):
            middle = (left + right) / 2
            left, right = (middle, right) if cdf(middle) < goal else (left, middle)
        return float(left)


def test_truncated_lognormal_gradcheck():
    mu = torch.tensor([-25.0, -20.0, -9.9, -0.1, 0.2, 1.0, 5.0], dtype=torch.float64, requires_grad=True)
    log_sigma = torch.tensor([0.3, -1.0, 2.0, -2.0, -0.5, 1.0, -1.0], dtype=torch.float64, requires_grad=True)
    u = torch.tensor([0.3, 0.6, 0.2, 0.9, 0.5, 0.05, 0.7], dtype=torch.float64, requires_grad=True)
    for function in (F.truncated_lognormal_kl, F.truncated_lognormal_mean, F.truncated_lognormal_snr):
        assert torch.autograd.gradcheck(function, (mu, log_sigma), rtol=1e-5)
    assert torch.autograd.gradcheck(F.truncated_lognormal_icdf, (u, mu, log_sigma), rtol=1e-5)


def test_truncated_lognormal_far_beyond_is_an_exponential_fall():
    mu, log_sigma = torch.tensor([5.0, 5.0]).double(), torch.tensor([-8.0, -20.0]).double()
    rate = mu * torch.exp(-2.0 * log_sigma)
    kl = torch.log(20.0 * rate) - 1.0
    torch.testing.assert_close(F.truncated_lognormal_kl(mu, log_sigma), kl, rtol=0, atol=1e-6)
    torch.testing.assert_close(F.truncated_lognormal_mean(mu, log_sigma), rate / (rate + 1.0))
    assert F.truncated_lognormal_snr(mu, log_sigma).tolist() == [1e6, 1e6]


GATES = {
    "kl": F.truncated_lognormal_kl,
    "mean": F.truncated_lognormal_mean,
    "snr": F.truncated_lognormal_snr,
    "icdf": lambda m, s: F.truncated_lognormal_icdf(torch.full_like(m, 0.3), m, s),
    "beta kl": lambda a, b: F.kumaraswamy_beta_kl(a.exp(), b.exp(), 1e-4),
    "beta mean": lambda a, b: F.kumaraswamy_mean(a.exp(), b.exp()),
    "beta logit": lambda a, b: F.kumaraswamy_logit_icdf(torch.full_like(a, 0.3), a.exp(), b.exp()),
}


@pytest.mark.parametrize("name", GATES)
def test_gates_compile_vmap_broadcast_and_keep_float32(name):
    function = GATES[name]
    first, second = torch.randn(3, 4), torch.randn(3, 4)
    expected = function(first, second)
    assert expected.dtype == torch.float32 and function(first.double(), second.double()).dtype == torch.float64
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(first, second), expected)
    torch.testing.assert_close(torch.vmap(function)(first, second), expected)
    torch.testing.assert_close(function(first, second[0]), function(first, second[0].expand(3, 4)))
    for dtype in (torch.bfloat16, torch.float16):
        narrow = function(first.to(dtype), second.to(dtype))
        assert narrow.dtype == torch.float32 and torch.isfinite(narrow).all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(function(first, second), expected, rtol=0, atol=0)


def test_truncated_lognormal_limits():
    assert F.truncated_lognormal_kl(
        torch.tensor([-10.0]).double(), torch.tensor([12.0]).double()
    ).item() == pytest.approx(0.0, abs=1e-7)
    assert F.truncated_lognormal_mean(
        torch.tensor([-10.0]).double(), torch.tensor([12.0]).double()
    ).item() == pytest.approx(0.05, abs=1e-6)
    with pytest.raises(InvalidValueError, match=r"low=1\.0, high=0\.0"):
        F.truncated_lognormal_kl(torch.zeros(1), torch.zeros(1), 1.0, 0.0)


KUMARASWAMY = [(a, b) for a in (1e-4, 1e-3, 0.05, 0.3133, 1.0, 2.127, 20.0) for b in (0.05, 0.5, 1.0, 3.0, 30.0)]
PRIOR = 1e-4


@functools.cache
def kumaraswamy(a: float, b: float) -> tuple[float, float]:
    """KL to Beta(k, 1) and mean, as integrals over ``w = -log(u) / b`` of the uniform `u` behind pi, in log space."""
    with mp.workdps(25):

        def log_pi(w):
            return mp.log(-mp.expm1(-w)) / a

        def log_ratio(w):
            log_q = mp.log(a * b) + (a - 1) * log_pi(w) - (b - 1) * w
            return log_q - mp.log(PRIOR) - (PRIOR - 1) * log_pi(w)

        points = [0, mp.mpf(10) ** -20, mp.mpf(10) ** -6, 0.01, 1, 10, 50, 50 / mp.mpf(b) + 60, mp.inf]
        integrals = (
            mp.quad(lambda w, f=f: f(w) * b * mp.exp(-b * w), points) for f in (log_ratio, lambda w: mp.exp(log_pi(w)))
        )
        return tuple(float(value) for value in integrals)


@pytest.mark.parametrize(("dtype", "error", "mean_error"), [(torch.float64, 1e-7, 1e-7), (torch.float32, 2e-5, 1e-6)])
def test_kumaraswamy_kl_and_mean(dtype, error, mean_error):
    for a, b in KUMARASWAMY:
        expected_kl, expected_mean = kumaraswamy(a, b)
        parameters = torch.tensor([a], dtype=dtype), torch.tensor([b], dtype=dtype)
        assert F.kumaraswamy_beta_kl(*parameters, PRIOR).item() == pytest.approx(expected_kl, rel=error, abs=error), (
            a,
            b,
        )
        assert F.kumaraswamy_mean(*parameters).item() == pytest.approx(expected_mean, rel=mean_error, abs=1e-12), (a, b)


def test_kumaraswamy_kl_vanishes_at_the_prior_only_and_has_finite_gradients():
    a = torch.tensor([PRIOR, 2 * PRIOR, 1.0], dtype=torch.float64)
    kl = F.kumaraswamy_beta_kl(a, torch.ones(3).double(), PRIOR)
    assert kl[0].abs() < 1e-10 and (kl[1:] > 0.1).all()
    for dtype in (torch.float32, torch.float64):
        a, b = (column.clone().requires_grad_() for column in torch.tensor(KUMARASWAMY, dtype=dtype).unbind(1))
        u = torch.linspace(0.0, 1.0, len(KUMARASWAMY), dtype=dtype)
        for value in (
            F.kumaraswamy_beta_kl(a, b, PRIOR),
            F.kumaraswamy_mean(a, b),
            F.kumaraswamy_logit_icdf(u, a, b),
        ):
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
    small = torch.tensor(0.05)
    near_one = F.kumaraswamy_logit_icdf(torch.tensor(0.3), torch.tensor(2.0), small)
    assert near_one.item() == pytest.approx(-math.log(0.3) / 0.05 + math.log(2.0), rel=1e-6)
    ordinary = F.kumaraswamy_icdf(torch.tensor(0.3), torch.tensor(0.8), torch.tensor(2.0))
    logit = F.kumaraswamy_logit_icdf(torch.tensor(0.3), torch.tensor(0.8), torch.tensor(2.0))
    torch.testing.assert_close(logit, torch.logit(ordinary))
    with pytest.raises(InvalidValueError, match=r"alpha_over_k=0"):
        F.kumaraswamy_beta_kl(a, b, 0.0)
