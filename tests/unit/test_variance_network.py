"""Variance networks: the law of their outputs, where they stand among the other methods, and what they refuse."""

import pytest
import torch
from torch import nn

import vardrop as vd
from vardrop.errors import InvalidValueError

SHARED = ("layer", "input", "output", "weight")


def draws(net, x, count=4000, seed=0):
    with vd.noise(net, on=True, generator=torch.Generator().manual_seed(seed)), torch.no_grad():
        return net(x.expand(count, *x.shape).reshape(-1, *x.shape[1:])).unflatten(0, (count, len(x)))


@pytest.mark.parametrize("kind", ["linear", "conv"])
@pytest.mark.parametrize("fast", [False, True])
def test_outputs_are_normal_with_the_bias_for_mean_and_the_squared_weights_for_variance(kind, fast):
    torch.manual_seed(0)
    layer = nn.Linear(6, 5) if kind == "linear" else nn.Conv2d(2, 5, 3)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    net = vd.convert(nn.Sequential(layer), vd.VarianceNetwork())
    if fast:
        vd.fast(net, variance="float32", compiled=False)
    x = torch.randn(1, 6) if weight.dim() == 2 else torch.randn(1, 2, 3, 3)
    found = draws(net, x).flatten(2)[:, 0].double()
    variance = (x.flatten() * weight.flatten(1)).double().square().sum(dim=1)
    z = (found - bias.double()) / variance.sqrt()
    assert (z.mean(0).abs() < 4.5 / 4000**0.5).all()
    assert (z.var(0) - 1).abs().max() < 4.5 * (2 / 4000) ** 0.5
    assert ((z**4).mean(0) - 3).abs().max() < 4.5 * (96 / 4000) ** 0.5
    assert torch.equal(net.eval()(x).flatten(), bias)


def test_it_is_the_limit_of_an_infinite_alpha():
    """``mean * (1 + sqrt(alpha) eps)`` with the mean divided by ``sqrt(alpha)``, under the same noise."""
    torch.manual_seed(0)
    limit = vd.convert(nn.Linear(6, 5), vd.VarianceNetwork())
    x = torch.randn(1, 6)
    expected = draws(limit, x, 10)
    for log_alpha in (12.0, 24.0):
        shared = vd.convert(nn.Linear(6, 5), vd.VarianceNetwork(parameterisation="layer", init_log_alpha=log_alpha))
        shared.load_state_dict(limit.state_dict(), strict=False)
        with torch.no_grad():
            shared.weight.mul_(torch.tensor(-0.5 * log_alpha).exp())
        difference = (draws(shared, x, 10) - expected).abs().max()
        assert 0 < difference < 3 * torch.tensor(-0.5 * log_alpha).exp()


@pytest.mark.parametrize("parameterisation", SHARED)
def test_shared_rates_cost_what_variational_dropout_costs_and_are_not_bounded(parameterisation):
    layer = nn.Conv2d(4, 6, 3, groups=2)
    net = vd.convert(layer, vd.VarianceNetwork(parameterisation=parameterisation, init_log_alpha=-2.0))
    plain = nn.Conv2d(4, 6, 3, groups=2)
    other = vd.convert(plain, vd.VariationalDropout(alpha=parameterisation, init_log_alpha=-2.0))
    torch.testing.assert_close(vd.kl(net), vd.kl(other))
    with torch.no_grad():
        net.noise.shared_log_alpha.fill_(11.5)
    net.train()(torch.randn(2, 4, 5, 5))
    assert (net.noise.shared_log_alpha == 11.5).all()
    assert 0 <= vd.kl(net) / layer.weight.numel() < 1e-4


def test_the_additive_form_costs_what_sparse_vd_costs():
    layer = nn.Linear(6, 5)
    net = vd.convert(layer, vd.VarianceNetwork(parameterisation="additive"))
    price = vd.kl(net)
    twin = vd.convert(vd.strip(net), vd.SparseVD())
    torch.testing.assert_close(price, vd.kl(twin))


def test_a_zero_mean_net_costs_nothing_prunes_nothing_and_strips_to_its_biases():
    net = vd.convert(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), vd.VarianceNetwork())
    assert vd.kl(net).item() == 0.0
    assert not [name for name, _ in net.named_parameters() if "noise" in name]
    assert vd.prune(net).compression == 1.0
    with pytest.raises(InvalidValueError, match="VarianceNetwork has no pruning rule"):
        vd.prune(net, threshold=1.0)
    assert vd.summary(net).rows[0].log_alpha == float("inf")
    assert "inf" in str(vd.summary(net))
    x = torch.randn(4, 6)
    expected = net.eval()(x)
    assert torch.equal(vd.strip(net)(x), expected) and not net[0].weight.any()


def test_it_learns_what_no_mean_could_tell():
    """Classes that differ in scale alone: at chance in eval mode, known to the ensemble."""
    torch.manual_seed(0)
    y = torch.arange(200) % 2
    x = (1.0 + 9.0 * y[:, None]) * torch.ones(200, 1)
    net = vd.convert(nn.Sequential(nn.Linear(1, 8), nn.ReLU(), nn.Linear(8, 2)), vd.VarianceNetwork(), include="0")
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-2)
    for _ in range(150):
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (net.eval()(x).argmax(dim=1) == y).double().mean() == 0.5
    assert (vd.predict(net, x, samples=50).argmax(dim=1) == y).double().mean() > 0.95


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"parameterisation": "neuron"}, r"parameterisation='neuron'\): must be one of 'zero-mean', 'layer', 'input'"),
        ({"rule": "snr"}, r"VarianceNetwork\(rule='snr', threshold=None\): must both be None"),
        ({"threshold": 3.0}, r"threshold=3.0\): must both be None, since a rule judges a weight by its mean"),
        ({"init_log_alpha": float("inf")}, r"init_log_alpha=inf\): a first value must be finite"),
        ({"init_log_alpha": 50.0}, r"init_log_alpha=50.0\): must be at most 40"),
        ({"init_log_std": -50.0}, r"init_log_std=-50.0\): must satisfy"),
    ],
)
def test_bad_fields(fields, message):
    with pytest.raises(InvalidValueError, match=message):
        vd.VarianceNetwork(**fields)


def test_log_alpha_may_learn_at_a_rate_of_its_own():
    net = vd.convert(nn.Linear(6, 5), vd.VarianceNetwork(parameterisation="layer", alpha_lr=0.1))
    groups = vd.parameter_groups(net, lr=0.001)
    assert {group["lr"]: sum(map(torch.Tensor.numel, group["params"])) for group in groups} == {0.001: 35, 0.1: 1}
    with pytest.raises(InvalidValueError, match="alpha_lr"):
        vd.VarianceNetwork(parameterisation="layer", alpha_lr=0.0)
    with pytest.raises(InvalidValueError, match="'zero-mean' weights, which have no alpha to learn"):
        vd.VarianceNetwork(alpha_lr=0.1)


@pytest.mark.parametrize(
    "method",
    [vd.SparseVD(init_log_std=-9.0), vd.VarianceNetwork(parameterisation="layer", init_log_alpha=11.5)],
    ids=["small", "large"],
)
def test_variances_of_a_net_made_half_are_formed_in_float32(method):
    net = vd.convert(nn.Linear(4, 30), method).half()
    variance = net.noise.variance(net.weight)
    assert variance.dtype == torch.float32 and variance.isfinite().all() and (variance > 0).all()
