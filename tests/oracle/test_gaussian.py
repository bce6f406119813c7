"""Weight divergences against quadrature of their definitions: values, gradients, extremes."""

import itertools
import math

import mpmath as mp
import pytest
import scipy.integrate
import scipy.optimize
import scipy.special
import scipy.stats
import torch

from vardrop import functional as F
from vardrop.errors import InvalidValueError

RATIOS = [0.0, 1e-6, 1e-3, 0.05, 0.3, 0.7, 1.0, 1.5, 2.5, 4.0, 5.5, 8.0, 20.0, 1e3]
LIMIT = 0.5 * (0.5772156649015329 + math.log(2.0))


def expected_log(t: float, power: int) -> float:
    """``E (z - t)^power log |z|`` for ``z ~ N(t, 1)``, by quadrature split at the singularity."""
    points = sorted({-mp.inf, mp.mpf(t) - 9, mp.mpf(0), mp.mpf(t), mp.mpf(t) + 9, mp.inf})

    def integrand(z):
        return mp.npdf(z, t) * (z - t) ** power * mp.log(abs(z)) if z else mp.mpf(0)

    return float(mp.quad(integrand, points))


@pytest.fixture(scope="module")
def log_uniform():
    """``KL = E log|z| - E log|z at t = 0|`` and its derivative by t, at every ratio."""
    with mp.workdps(20):
        base = expected_log(0.0, 0)
        return {t: (expected_log(t, 0) - base, expected_log(t, 1)) for t in RATIOS}


def with_gradients(function, mean, log_std, dtype):
    mean = torch.as_tensor(mean, dtype=dtype).clone().requires_grad_()
    log_std = torch.as_tensor(log_std, dtype=dtype).clone().requires_grad_()
    value = function(mean, log_std)
    by_mean, by_log_std = torch.autograd.grad(value.sum(), (mean, log_std))
    return value.detach(), by_mean, by_log_std


@pytest.mark.parametrize(
    ("dtype", "value_error", "slope_error"), [(torch.float64, 1e-8, 5e-8), (torch.float32, 5e-7, 6e-7)]
)
@pytest.mark.parametrize("log_std", [-8.0, -5.0, 1.0])
def test_exact_log_uniform_kl_and_gradients(log_uniform, dtype, value_error, slope_error, log_std):
    std = math.exp(log_std)
    means = [t * std for t in RATIOS]
    value, by_mean, by_log_std = with_gradients(F.log_uniform_kl, means, [log_std] * len(means), dtype)
    for index, t in enumerate(RATIOS):
        kl, slope = log_uniform[t]
        assert value[index].item() == pytest.approx(kl, rel=value_error, abs=value_error)
        assert by_mean[index].item() * std == pytest.approx(slope, rel=slope_error, abs=slope_error)
        assert by_log_std[index].item() == pytest.approx(-t * slope, rel=slope_error, abs=slope_error)


def test_tiny_log_uniform_kl_keeps_its_relative_precision():
    t = torch.tensor([1e-3, 1e-5], dtype=torch.float32)
    torch.testing.assert_close(F.log_uniform_kl(t, torch.zeros(2)), 0.5 * t.square(), rtol=5e-7, atol=0)


def dawson_kl(u: float) -> tuple[float, float]:
    """KL as the integral of Dawson's function over ``[0, sqrt u]``, twice, and its derivative by log alpha."""
    root = math.sqrt(u)
    edges = [0.0, *(edge for edge in (1.0, 3.0, 10.0, 100.0, 1e4) if edge < root), root]
    pieces = (
        scipy.integrate.quad(scipy.special.dawsn, low, high, epsabs=0, epsrel=1e-12, limit=200)[0]
        for low, high in itertools.pairwise(edges)
    )
    return 2.0 * sum(pieces), -root * scipy.special.dawsn(root)


def test_exact_form_between_the_nodes_of_its_fit():
    log_alpha = torch.linspace(-18.0, 18.0, 301, dtype=torch.float64, requires_grad=True)
    value = F.log_uniform_kl_from_log_alpha(log_alpha)
    (slope,) = torch.autograd.grad(value.sum(), log_alpha)
    expected = [dawson_kl(0.5 * math.exp(-x)) for x in log_alpha.tolist()]
    kl, by_log_alpha = torch.tensor(expected, dtype=torch.float64).unbind(1)
    torch.testing.assert_close(value.detach(), kl, rtol=1e-8, atol=0)
    torch.testing.assert_close(slope, by_log_alpha, rtol=5e-8, atol=0)
    assert 0.6415 < slope.abs().max().item() < 0.64245
    single = F.log_uniform_kl_from_log_alpha(log_alpha.detach().float())
    torch.testing.assert_close(single.double(), kl, rtol=2e-6, atol=0)


@pytest.mark.parametrize("exact", [True, False])
def test_gradients_beyond_the_largest_ratio(exact):
    function = F.log_uniform_kl if exact else F.ard_kl
    means = [1.0, -1e-3, 0.0, 3.0, 1e15]
    value, by_mean, by_log_std = with_gradients(function, means, [-100.0] * 5, torch.float32)
    assert torch.isfinite(value).all()
    torch.testing.assert_close(by_mean, torch.tensor([1.0, -1e3, 0.0, 1 / 3, 1e-15]), rtol=1e-5, atol=0)
    torch.testing.assert_close(by_log_std, torch.tensor([-1.0, -1.0, 0.0, -1.0, -1.0]), rtol=1e-5, atol=0)
    value, by_mean, by_log_std = with_gradients(function, means[:4], [60.0] * 4, torch.float32)
    assert all((result.abs() < 1e-30).all() for result in (value, by_mean, by_log_std))


def test_fits_keep_their_known_errors(log_uniform):
    log_alpha = torch.linspace(-10, 10, 401, dtype=torch.float64)
    exact = F.log_uniform_kl_from_log_alpha(log_alpha)
    sigmoid = F.log_uniform_kl_from_log_alpha(log_alpha, form="sigmoid")
    assert (sigmoid - exact).abs().max().item() == pytest.approx(0.009375, abs=2e-6)
    low = log_alpha <= 0
    cubic = F.log_uniform_kl_from_log_alpha(log_alpha, form="cubic")
    error = (exact - cubic)[low]
    assert error.max().item() == pytest.approx(0.04034, abs=2e-5)
    assert error.min() > -1e-6
    assert (cubic[~low] == F.log_uniform_kl_from_log_alpha(torch.zeros(1).double(), form="cubic")).all()


def test_the_gap_between_log_uniform_and_ard_is_bounded_and_shrinks_with_alpha():
    log_alpha = torch.linspace(-30, 20, 401, dtype=torch.float64)
    gap = F.log_uniform_kl_from_log_alpha(log_alpha) - F.ard_kl_from_log_alpha(log_alpha)
    assert (gap >= -1e-9).all() and (gap <= LIMIT + 1e-8).all()
    assert (gap.diff() <= 1e-9).all()
    assert gap[0].item() == pytest.approx(LIMIT, abs=1e-8)


def gaussian_kl(mean: float, std: float, precision: float) -> float:
    """``KL(N(mean, std^2) || N(0, 1 / precision))`` by quadrature."""

    def integrand(z):
        posterior = -0.5 * z * z - math.log(std)
        prior = -0.5 * precision * (mean + std * z) ** 2 + 0.5 * math.log(precision)
        return math.exp(-0.5 * z * z) / math.sqrt(2 * math.pi) * (posterior - prior)

    return scipy.integrate.quad(integrand, -12, 12, epsabs=1e-13, epsrel=1e-12)[0]


MOMENTS = [(0.0, -3.0), (0.02, -4.0), (-0.3, -1.0), (1.0, 0.0), (-0.05, -5.0), (0.5, -6.0)]


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-8), (torch.float32, 2e-6)])
def test_ard_kl_is_the_least_over_the_prior_precision(dtype, error):
    for mean, log_std in MOMENTS:
        std = math.exp(log_std)
        centre = -math.log(mean**2 + std**2)
        best = scipy.optimize.minimize_scalar(
            lambda log_tau, mean=mean, std=std: gaussian_kl(mean, std, math.exp(log_tau)),
            bounds=(centre - 3, centre + 3),
            method="bounded",
            options={"xatol": 1e-9},
        )
        value = F.ard_kl(torch.tensor([mean], dtype=dtype), torch.tensor([log_std], dtype=dtype))
        assert value.item() == pytest.approx(best.fun, rel=error, abs=error)


@pytest.mark.parametrize(("low", "high"), [(0.01, 0.5), (0.0, 1e-3), (4.0, math.inf)])
def test_bounded_vbd_kl_is_the_least_over_the_prior_variance_in_the_interval(low, high):
    for mean, log_std in MOMENTS:
        std = math.exp(log_std)
        best = scipy.optimize.minimize_scalar(
            lambda log_v, mean=mean, std=std: gaussian_kl(mean, std, math.exp(-log_v)),
            bounds=(math.log(max(low, 1e-6)), math.log(min(high, 1e3))),
            method="bounded",
            options={"xatol": 1e-11},
        )
        value = F.vbd_kl(torch.tensor([mean]).double(), torch.tensor([log_std]).double(), low, high)
        assert value.item() == pytest.approx(best.fun, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(("a", "b"), [(0.505, 1e-8), (0.52, 1e-4), (1.0, 0.1), (2.0, 1.0)])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-7), (torch.float32, 4e-6)])
def test_gamma_ard_kl_is_minus_the_best_of_log_hyper_prior_minus_kl(a, b, dtype, error):
    for mean, log_std in MOMENTS:
        std = math.exp(log_std)

        def loss(log_tau, mean=mean, std=std):
            return gaussian_kl(mean, std, math.exp(log_tau)) - scipy.stats.gamma(a, scale=1 / b).logpdf(
                math.exp(log_tau)
            )

        centre = math.log((2 * a - 1) / (mean**2 + std**2 + 2 * b))
        best = scipy.optimize.minimize_scalar(
            loss, bounds=(centre - 2, centre + 2), method="bounded", options={"xatol": 1e-9}
        )
        value = F.gamma_ard_kl(torch.tensor([mean], dtype=dtype), torch.tensor([log_std], dtype=dtype), a, b)
        assert value.item() == pytest.approx(best.fun, rel=error, abs=10 * error)


@pytest.mark.parametrize("a", [0.505, 0.8, 1.0])
def test_gamma_ard_without_a_rate_leaves_out_its_infinite_constant(a):
    mean, log_std = (column.double() for column in torch.tensor(MOMENTS).unbind(1))
    small = F.gamma_ard_kl(mean, log_std, a, 1e-14) + a * math.log(1e-14)
    torch.testing.assert_close(F.gamma_ard_kl(mean, log_std, a, 0.0), small, rtol=0, atol=1e-8)


def test_gamma_ard_at_one_and_zero_has_the_gradients_of_ard():
    means, log_stds = zip(*MOMENTS, strict=True)
    _, *gamma = with_gradients(lambda m, s: F.gamma_ard_kl(m, s, 1.0, 0.0), means, log_stds, torch.float64)
    _, *ard = with_gradients(F.ard_kl, means, log_stds, torch.float64)
    torch.testing.assert_close(gamma, ard)


@pytest.mark.parametrize(("a", "b"), [(0.01, 0.01), (0.505, 1e-8), (0.5, 0.5), (2.0, 1.0), (1.0, 1e-4)])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 5e-8), (torch.float32, 5e-6)])
def test_student_t_kl_and_gradients(a, b, dtype, error):
    prior = scipy.stats.t(2 * a, scale=math.sqrt(b / a))

    def kl(mean, log_std):
        posterior = scipy.stats.norm(mean, math.exp(log_std))
        edges = [mean - 12 * math.exp(log_std), mean, mean + 12 * math.exp(log_std)]
        for scale in (1.0, 30.0, 1e3):
            edges += [sign * scale * math.sqrt(2 * b) for sign in (-1, 1)]
        low, high = edges[0], edges[2]
        edges = sorted({*(e for e in edges if low <= e <= high), *([0.0] if low < 0 < high else [])})
        pieces = itertools.pairwise(edges)
        return sum(
            scipy.integrate.quad(
                lambda w: posterior.pdf(w) * (posterior.logpdf(w) - prior.logpdf(w)),
                p,
                q,
                epsabs=1e-11,
                limit=200,
            )[0]
            for p, q in pieces
        )

    means, log_stds = zip(*MOMENTS, strict=True)
    value, by_mean, by_log_std = with_gradients(lambda m, s: F.student_t_kl(m, s, a, b), means, log_stds, dtype)
    for index, (mean, log_std) in enumerate(MOMENTS):
        assert value[index].item() == pytest.approx(kl(mean, log_std), rel=error, abs=error)
        step = 1e-3
        slope = (kl(mean, log_std + step) - kl(mean, log_std - step)) / (2 * step)
        assert by_log_std[index].item() == pytest.approx(slope, abs=2e-4)
        step = 1e-3 * math.exp(log_std)
        slope = (kl(mean + step, log_std) - kl(mean - step, log_std)) / (2 * step)
        assert by_mean[index].item() * math.exp(log_std) == pytest.approx(slope * math.exp(log_std), abs=2e-4)


def test_student_t_kl_may_be_derived_twice():
    mean = torch.tensor([-1.0, 0.0, 0.3], dtype=torch.float64, requires_grad=True)
    log_std = torch.tensor([-2.0, -0.5, 0.4], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda m, s: F.student_t_kl(m, s, 1.5, 0.1), (mean, log_std))


@pytest.mark.parametrize(("a", "b"), [(1.0, 1.0), (0.6, 0.01), (1.0, 1e-3), (1.0, 1e6)])
@pytest.mark.parametrize(
    ("mean", "log_std"), [(1.0, 5.0), (0.0, 10.0), (-3.0, 20.0), (2e4, 0.0), (1e6, 9.0), (1.0, 40.0)]
)
def test_student_t_kl_stays_near_and_grows_beyond_what_the_quadrature_covers(a, b, mean, log_std):
    def kl(log_std):
        std, half = mp.exp(log_std), mp.sqrt(2 * mp.mpf(b))
        center = mp.mpf(mean) / std
        edges = sorted(
            {-14, 0, 14, *(-center + sign * half * mp.mpf(10) ** k / std for sign in (-1, 1) for k in (0, 3, 9))}
        )
        edges = [edge for edge in edges if -14 <= edge <= 14]
        expected = mp.quad(lambda z: mp.npdf(z) * mp.log1p((mean + std * z) ** 2 / (2 * b)), edges)
        log_norm = mp.loggamma(a + 0.5) - mp.loggamma(a) - mp.log(2 * mp.pi * b) / 2
        return float((a + 0.5) * expected - log_std - mp.log(2 * mp.pi * mp.e) / 2 - log_norm)

    value, by_mean, by_log_std = with_gradients(
        lambda m, s: F.student_t_kl(m, s, a, b), (mean,), (log_std,), torch.float64
    )
    assert -1e-6 <= value.item() - kl(log_std) <= 0.036 * (a + 0.5) * math.sqrt(min(1.0, b)) + 1e-6
    slope = (kl(log_std + 1e-3) - kl(log_std - 1e-3)) / 2e-3
    assert by_log_std.item() == pytest.approx(slope, abs=0.04 * math.sqrt(min(1.0, b)) * (a + 0.5) + 1e-4)
    assert math.isfinite(by_mean.item())
    for found in with_gradients(lambda m, s: F.student_t_kl(m, s, a, b), (mean,), (log_std,), torch.float32):
        assert found.isfinite().all()


def test_student_t_one_draw_is_an_unbiased_estimate():
    mean, log_std = torch.full((1,), 0.3), torch.full((1,), -1.0)
    draws = torch.randn(200_000)
    estimates = F.student_t_kl(mean, log_std, 0.6, 0.01, draw=draws)
    error = estimates.std() / len(draws) ** 0.5
    assert (estimates.mean() - F.student_t_kl(mean, log_std, 0.6, 0.01)).abs() < 5 * error


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-8), (torch.float32, 2e-6)])
def test_normal_kl(dtype, error):
    for mean, log_std in MOMENTS:
        value = F.normal_kl(torch.tensor([mean], dtype=dtype), torch.tensor([log_std], dtype=dtype), 0.3)
        assert value.item() == pytest.approx(gaussian_kl(mean, math.exp(log_std), 1 / 0.3), rel=error, abs=error)


DIVERGENCES = {
    "exact": F.log_uniform_kl,
    "sigmoid": lambda m, s: F.log_uniform_kl(m, s, form="sigmoid"),
    "cubic": lambda m, s: F.log_uniform_kl(m, s, form="cubic"),
    "ard": F.ard_kl,
    "vbd": lambda m, s: F.vbd_kl(m, s, 0.1, 10.0),
    "gamma": lambda m, s: F.gamma_ard_kl(m, s, 0.505, 1e-8),
    "student": lambda m, s: F.student_t_kl(m, s, 0.51, 1e-8),
    "normal": lambda m, s: F.normal_kl(m, s, 1.0),
    "log_alpha": F.log_alpha,
}


@pytest.mark.parametrize("name", DIVERGENCES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients_are_finite_at_the_extremes(name, dtype):
    means = [0.0, 1e-30, 1e-10, -1e-3, 0.1, -1.0, 50.0]
    grid = [(mean, log_std) for mean in means for log_std in (-40.0, -20.0, -5.0, 0.0, 3.0, 20.0)]
    value, by_mean, by_log_std = with_gradients(DIVERGENCES[name], *zip(*grid, strict=True), dtype)
    for result in (value, by_mean, by_log_std):
        assert torch.isfinite(result).all(), [grid[i] for i in (~torch.isfinite(result)).nonzero()[:, 0]]


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name != "log_alpha"])
def test_gradcheck(name):
    mean = torch.tensor([0.0, 0.3, -1.2, 2.0], dtype=torch.float64, requires_grad=True)
    log_std = torch.tensor([-1.0, -0.5, 0.2, -2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(DIVERGENCES[name], (mean, log_std), atol=1e-5)


@pytest.mark.parametrize("name", ["exact", "ard", "sigmoid", "vbd", "gamma", "normal"])
def test_second_derivatives(name):
    mean = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64, requires_grad=True)
    log_std = torch.tensor([-0.5, 0.2, -2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(DIVERGENCES[name], (mean, log_std))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_narrow_inputs_and_autocast_are_computed_in_float32(name):
    function = DIVERGENCES[name]
    mean, log_std = torch.tensor([0.02, 0.5]), torch.tensor([-5.0, -2.0])
    for dtype in (torch.bfloat16, torch.float16):
        narrow = function(mean.to(dtype), log_std.to(dtype))
        assert narrow.dtype == torch.float32
        torch.testing.assert_close(narrow, function(mean.to(dtype).float(), log_std.to(dtype).float()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(function(mean, log_std), function(mean, log_std))
        assert function(mean, log_std).dtype == torch.float32


@pytest.mark.parametrize("name", DIVERGENCES)
def test_compile_vmap_and_broadcasting(name):
    function = DIVERGENCES[name]
    mean, log_std = torch.randn(3, 4), torch.randn(3, 4)
    expected = function(mean, log_std)
    torch.testing.assert_close(torch.compile(function, fullgraph=True, backend="aot_eager")(mean, log_std), expected)
    torch.testing.assert_close(torch.vmap(function)(mean, log_std), expected)
    one_sided = torch.vmap(function, in_dims=(0, None))(mean, log_std[0])
    torch.testing.assert_close(one_sided, function(mean, log_std[0]))
    if name == "log_alpha":
        return
    gradients = torch.func.grad(lambda m, s: function(m, s).sum(), argnums=(0, 1))
    torch.testing.assert_close(
        torch.vmap(gradients)(mean, log_std), tuple(with_gradients(function, mean, log_std, mean.dtype)[1:])
    )
    torch.testing.assert_close(function(mean, log_std[0]), function(mean, log_std[0].expand(3, 4)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: F.gamma_ard_kl(x, x, 0.5, 1e-8), "a=0.5: .*a > 1/2"),
        (lambda x: F.gamma_ard_kl(x, x, 0.6, -1.0), "b=-1.0"),
        (lambda x: F.gamma_ard_kl(x, x, 1.5, 0.0), "b=0.0.*a > 1 .a=1.5"),
        (lambda x: F.student_t_kl(x, x, 0.0, 1.0), "a=0.0"),
        (lambda x: F.student_t_kl(x, x, 1.0, 0.0), "b=0.0"),
        (lambda x: F.normal_kl(x, x, 0.0), "prior_variance=0.0"),
        (lambda x: F.vbd_kl(x, x, 2.0, 1.0), "low=2.0, high=1.0"),
        (lambda x: F.log_uniform_kl(x, x, form="other"), "form='other'"),
    ],
)
def test_bad_parameters_are_refused(call, message):
    with pytest.raises(InvalidValueError, match=message):
        call(torch.zeros(1))
