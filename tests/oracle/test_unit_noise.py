"""The multipliers of gates against sampling from their definitions, their KL against quadrature, and the extremes."""

import copy
import math

import mpmath as mp
import pytest
import torch
from torch import nn

import vardrop as vd
from vardrop.noise import DependentGate

DRAWS = 400_000


def gate_of(method, inputs=3, **values):
    """A gate on the inputs of a linear layer, with its parameters set, ready to be drawn from."""
    layer = vd.convert(nn.Linear(inputs, 2), method)
    with torch.no_grad():
        for name, value in values.items():
            getattr(layer.gate, name).copy_(torch.as_tensor(value))
    return layer, layer.gate


def assert_moments(sample, mean, variance):
    """Mean and variance of the columns of a sample, to six standard errors."""
    sample = sample.double()
    spread = sample - sample.mean(0)
    error_of_variance = ((spread.square() - spread.square().mean(0)).square().mean(0) / len(sample)).sqrt()
    error_of_mean = sample.std(0) / len(sample) ** 0.5
    assert ((sample.mean(0) - mean).abs() <= 6 * error_of_mean + 1e-6).all()
    assert ((sample.var(0) - variance).abs() <= 6 * error_of_variance + 1e-6).all()


@torch.no_grad()
def test_truncated_lognormal_draws_have_the_moments_of_their_density():
    mu, log_sigma = [-3.0, -0.1, 0.5], [0.0, -2.0, -0.5]
    _, gate = gate_of(vd.StructuredBP(draws="example"), mu=mu, log_sigma=log_sigma)
    moments = []
    for center, log_scale in zip(mu, log_sigma, strict=True):

        def density(x, center=center, log_scale=log_scale):
            return mp.exp(-((x - center) ** 2) / (2 * mp.exp(2 * log_scale)))

        points = [-20, -12, center - 1, min(center, -0.01), 0]
        mass = mp.quad(density, points)
        first, second = (mp.quad(lambda x, k=k: mp.exp(k * x) * density(x), points) / mass for k in (1, 2))
        moments.append((float(first), float(second - first**2)))
    mean, variance = torch.tensor(moments, dtype=torch.float64).T
    assert_moments(gate.sample(DRAWS // 4), mean, variance)
    torch.testing.assert_close(gate.mean().double(), mean, rtol=1e-5, atol=0)
    shared = gate_of(vd.StructuredBP())[1].sample(5)
    assert shared.shape == (1, 3)


@torch.no_grad()
def test_beta_bernoulli_draws_are_on_as_often_as_the_posterior_says():
    raw_a, raw_b = [0.5, 2.0, -1.0], [0.5413, 1.5, 2.0]
    _, gate = gate_of(vd.BetaBernoulli(temperature=1e-3), raw_a=raw_a, raw_b=raw_b)
    rows = torch.cat([gate.sample(4) for _ in range(20_000)]).double()
    expected = []
    for a, b in zip(gate.a.tolist(), gate.b.tolist(), strict=True):
        density = lambda x, a=a, b=b: a * b * x**a * (1 - x**a) ** (b - 1)  # noqa: E731
        expected.append(float(mp.quad(density, [0, 0.5, 1])))
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(gate.mean().double(), expected, rtol=1e-5, atol=0)
    by_batch = rows.view(-1, 4, 3).mean(1)
    error = by_batch.std(0) / len(by_batch) ** 0.5
    assert ((by_batch.mean(0) - expected).abs() <= 5 * error).all()
    # one pi for a minibatch: its examples are alike, more than independent ones would be
    independent = expected * (1 - expected) / 4
    assert (by_batch.var(0) > 1.05 * independent).all()


@torch.no_grad()
def test_gaussian_and_concrete_draws():
    _, gate = gate_of(vd.StructuredVBD(), center=[1.0, -0.5, 0.0], log_std=[-4.5, 0.0, 1.0])
    assert_moments(gate.sample(DRAWS), gate.center.double(), torch.exp(2 * gate.log_std.double()))
    _, gate = gate_of(vd.GaussianDropout(rate=0.2, on="inputs"))
    assert_moments(gate.sample(DRAWS), torch.ones(3), torch.full((3,), 0.25, dtype=torch.float64))
    _, gate = gate_of(vd.ConcreteDropout(init_rate=0.3, temperature=1e-3))
    assert_moments(gate.sample(DRAWS), torch.ones(3), torch.full((3,), 0.3 / 0.7, dtype=torch.float64))


@pytest.mark.parametrize("make", [lambda: nn.Linear(6, 3), lambda: nn.LSTM(6, 3)], ids=["linear", "lstm"])
def test_a_rate_of_zero_is_the_plain_layer_and_draws_nothing(make):
    plain = make()
    layer = vd.convert(copy.deepcopy(plain), vd.BernoulliDropout(rate=0.0)).train()
    x = torch.randn(4, 2, 6)
    before = torch.get_rng_state()
    torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), before)


@torch.no_grad()
def test_noise_on_inputs_correlates_the_outputs_and_noise_on_weights_does_not():
    """Type A and type B of arXiv:1506.02557 have the same marginals; only A has a covariance between outputs."""
    x = torch.tensor([[1.0, -2.0, 0.5]])
    covariances = {}
    for on in ("inputs", "weights"):
        torch.manual_seed(1)
        layer = vd.convert(nn.Linear(3, 2, bias=False), vd.GaussianDropout(rate=0.5, on=on))
        layer.weight.copy_(torch.tensor([[1.0, 0.5, -1.0], [0.3, 1.0, 2.0]]))
        covariances[on] = torch.cov(layer.train()(x.expand(DRAWS, 3)).T)
    products = (x.square() * layer.weight[0] * layer.weight[1]).sum()
    for covariance in covariances.values():
        torch.testing.assert_close(covariance.diag(), (x.square() * layer.weight.square()).sum(1), rtol=0.02, atol=0)
    assert covariances["inputs"][0, 1] == pytest.approx(products.item(), abs=0.05)
    assert covariances["weights"][0, 1] == pytest.approx(0.0, abs=0.05)


@torch.no_grad()
def test_dependent_draws_and_the_quiet_multiplier_follow_equations_21_and_25():
    method = vd.DependentBetaBernoulli(temperature=1e-3, threshold=0.3)
    layer = vd.convert(vd.convert(nn.Linear(3, 2), vd.BetaBernoulli(init_a=4.0, init_b=2.0)), method).eval()
    gate = layer.gate
    gate.shift.copy_(torch.tensor([0.4, 0.1, 0.9]))
    gate.scale.copy_(torch.tensor([0.3, -0.2, 0.5]))
    gate.log_std.fill_(-1.0)
    gate.running_mean.copy_(torch.tensor([0.5, -1.0, 2.0]))
    gate.running_var.copy_(torch.tensor([4.0, 0.25, 1.0]))
    x = torch.tensor([[1.0, -1.2, 1.0]])
    center = gate.scale * (x - gate.running_mean) / (gate.running_var + 1e-3).sqrt() + gate.shift
    pi = vd.functional.kumaraswamy_mean(gate.a, gate.b)
    quiet = pi * center.clamp(1e-6, 1 - 1e-6)
    quiet = torch.where(quiet <= 0.3, 0.0, quiet)
    torch.testing.assert_close(gate.multiplier(x, -1), quiet)
    assert (quiet == 0).tolist() == [[False, True, True]]
    # the mean over beta, pi and z, by the normal integral of the clip
    std = gate.log_std.exp().double()
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)
    m = center.double()
    low, high = (1e-6 - m) / std, (1 - 1e-6 - m) / std
    density = lambda z: torch.exp(normal.log_prob(z))  # noqa: E731
    expected = pi.double() * (
        1e-6 * normal.cdf(low)
        + (1 - 1e-6) * normal.cdf(-high)
        + m * (normal.cdf(high) - normal.cdf(low))
        + std * (density(low) - density(high))
    )
    gate.on = True
    draws = torch.cat([gate.multiplier(x.expand(4, 3), -1).mean(0, keepdim=True) for _ in range(20_000)]).double()
    assert ((draws.mean(0) - expected).abs() <= 5 * draws.std(0) / len(draws) ** 0.5).all()


def test_running_statistics_are_those_of_the_inputs():
    layer = vd.convert(vd.convert(nn.Conv2d(2, 3, 3), vd.BetaBernoulli(place="input")), vd.DependentBetaBernoulli())
    gate = layer.gate
    assert isinstance(gate, DependentGate)
    x = torch.randn(64, 2, 5, 5) * torch.tensor([2.0, 0.5]).view(2, 1, 1) + torch.tensor([1.0, -3.0]).view(2, 1, 1)
    for _ in range(700):
        layer.train()(x)
    means = x.mean((2, 3))
    torch.testing.assert_close(gate.running_mean, means.mean(0), rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(gate.running_var, means.var(0, correction=0), rtol=1e-2, atol=1e-3)
    before = gate.running_mean.clone()
    layer.eval()(x + 100)
    with vd.noise(layer, on=True):
        layer(x + 100)
    assert torch.equal(gate.running_mean, before)
    x.requires_grad_()
    layer.train()(x).sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize(
    ("method", "values", "expected"),
    [
        (vd.StructuredVBD(), {"center": [1.0, 0.0, 2.0], "log_std": [0.0, 1.0, -1.0]}, "gaussian"),
        (vd.VariationalDropout(on="inputs", alpha="input"), {"shared_log_alpha": [-1.0, -2.0, -0.5]}, "log-uniform"),
        (vd.ConcreteDropout(init_rate=0.2, length_scale=0.7), {}, "concrete"),
    ],
)
def test_kl_is_a_sum_over_units_paid_once_whatever_the_batch(method, values, expected):
    layer, _ = gate_of(method, **values)
    total = vd.kl(layer).item()
    if expected == "gaussian":
        pairs = zip(values["center"], values["log_std"], strict=True)
        want = sum(min_over_variance(mean, math.exp(log_std)) for mean, log_std in pairs)
    elif expected == "log-uniform":
        want = sum(log_uniform(math.exp(log_alpha)) for log_alpha in values["shared_log_alpha"])
    else:
        rate, energy = 0.2, layer.weight.detach().double().square().sum().item()
        entropy = -rate * math.log(rate) - (1 - rate) * math.log(1 - rate)
        want = 0.7**2 * energy / (2 * (1 - rate)) - 3 * entropy
    assert total == pytest.approx(want, rel=1e-5)
    layer(torch.randn(50, 3))
    assert vd.kl(layer).item() == pytest.approx(total)


def min_over_variance(mean, std):
    """KL of N(mean, std^2) to the best N(0, v): v found by search, square and entropy by quadrature."""

    def expectation(function):
        weight = lambda x: mp.exp(-((x - mean) ** 2) / (2 * std**2)) / (std * mp.sqrt(2 * mp.pi))  # noqa: E731
        return float(mp.quad(lambda x: weight(x) * function(x), mp.linspace(mean - 9 * std, mean + 9 * std, 7)))

    square = expectation(lambda x: x * x)
    negative_entropy = expectation(lambda x: -((x - mean) ** 2) / (2 * std**2)) - math.log(std)
    low, high = -6.0, 6.0
    for _ in range(60):
        third = (high - low) / 3
        values = [log_v / 2 + square / (2 * math.exp(log_v)) for log_v in (low + third, high - third)]
        low, high = (low, high - third) if values[0] < values[1] else (low + third, high)
    return negative_entropy + low / 2 + square / (2 * math.exp(low))


def log_uniform(alpha):
    """KL of N(1, alpha) to 1 / |x|, normalised to vanish for large alpha: minus log alpha / 2 plus E log |x|, and C."""
    std = math.sqrt(alpha)
    density = lambda x: mp.exp(-((x - 1) ** 2) / (2 * alpha)) / (std * mp.sqrt(2 * mp.pi))  # noqa: E731
    mean_log = mp.quad(lambda x: density(x) * mp.log(abs(x)), [1 - 12 * std, -0.1, 0, 0.1, 1, 1 + 12 * std])
    return float(-mp.log(alpha) / 2 + mean_log + (mp.euler + mp.log(2)) / 2)


EXTREMES = [
    (vd.StructuredBP(), {"mu": [-20.0, 5.0, 5.0], "log_sigma": [-20.0, -20.0, 5.0]}),
    (vd.StructuredBP(draws="example"), {"mu": [0.0, 0.1, 3.0], "log_sigma": [-5.0, -5.0, -20.0]}),
    (vd.BetaBernoulli(), {"raw_a": [-10.0, 60.0, -10.0], "raw_b": [-10.0, 50.0, 50.0]}),
    (vd.StructuredVBD(), {"center": [0.0, 1e18, -1e-30], "log_std": [-20.0, -20.0, 20.0]}),
    (vd.ConcreteDropout(), {"logit_rate": [-60.0]}),
    (vd.ConcreteDropout(), {"logit_rate": [60.0]}),
]


@pytest.mark.parametrize(("method", "values"), EXTREMES, ids=str)
def test_values_and_gradients_stay_finite_in_float32_at_the_extremes(method, values):
    layer, gate = gate_of(method, **values)
    draws = gate.sample(50)
    assert torch.isfinite(draws).all() and torch.isfinite(gate.mean()).all()
    total = vd.kl(layer) / 1e6 + draws.clamp(-1e6, 1e6).sum() + gate.mean().sum()
    assert torch.isfinite(total)
    total.backward()
    for name, parameter in gate.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name
    scores = method.score(gate, layer.weight)
    assert scores is None or not scores.isnan().any()


def test_dependent_gate_is_finite_at_the_edges_of_its_clip():
    net = vd.convert(nn.Linear(3, 2), vd.BetaBernoulli(init_a=5e-5))
    layer = vd.convert(net, vd.DependentBetaBernoulli()).train()
    with torch.no_grad():
        layer.gate.shift.copy_(torch.tensor([10.0, -10.0, 0.5]))
    x = torch.cat([torch.zeros(3, 3), torch.full((1, 3), 1e6)])
    (layer(x).sum() + vd.kl(layer)).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in layer.parameters())
    assert torch.isfinite(layer(torch.randn(1, 3))).all()


def test_gaussian_noise_on_inputs_is_of_each_element_and_gives_the_variance_of_independent_weights():
    """arXiv:1506.02557, section 3.2: type A and type B have the same marginals, here at each position of a map."""
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(3, 2, 3, padding=1)
    x = torch.randn(1, 3, 6, 6)
    quiet = layer(x).detach()
    expected = torch.nn.functional.conv2d(x.square(), layer.weight.detach().square(), padding=1)
    net, count = vd.convert(layer, vd.GaussianDropout(rate=0.5, on="inputs")), 20_000
    with torch.no_grad(), vd.noise(net, on=True, generator=torch.Generator().manual_seed(1)):
        drawn = net(x.expand(count, -1, -1, -1))
    spread = (expected / count).sqrt()
    assert ((drawn.mean(dim=0) - quiet).abs() <= 5 * spread).all()
    assert ((drawn.var(dim=0) / expected - 1).abs() <= 6 * (2 / count) ** 0.5).all()
    net.gate.mask = torch.tensor([True, False, True])
    with torch.no_grad(), vd.noise(net, on=True):
        masked = x.clone()
        masked[:, 1] = 0.0
        assert (net(x.expand(count, -1, -1, -1)).mean(dim=0) - layer_of(net, masked)).abs().max() <= 0.1


def layer_of(net, x):
    """What the plain convolution gives."""
    return torch.nn.functional.conv2d(x, net.weight, net.bias, padding=1)[0]


@torch.no_grad()
@pytest.mark.parametrize(
    "method", [vd.GaussianDropout(on="inputs"), vd.VariationalDropout(on="inputs", init_log_alpha=0.0)], ids=repr
)
@pytest.mark.parametrize("layer", [nn.Conv1d(1, 1, 1, bias=False), nn.Linear(1, 1, bias=False)], ids=["conv", "linear"])
def test_the_positions_of_an_input_have_draws_of_their_own(layer, method):
    x = torch.ones(DRAWS, *((1, 2) if isinstance(layer, nn.Conv1d) else (2, 1)))
    y = vd.convert(nn.Sequential(copy.deepcopy(layer)), method).train()(x).flatten(1) / layer.weight.flatten()
    torch.testing.assert_close(torch.cov(y.T), torch.eye(2), rtol=0, atol=0.05)
