"""What every method must do on every layer."""

import copy

import pytest
import torch
from cases import LAYERS, QUIET, VARIANTS, convert

import vardrop as vd
from vardrop.layers import shows_units
from vardrop.noise import DependentGate, Gate, ZeroMeanNoise

PAIRS = {
    f"{layer}-{name}": (case, method)
    for layer, case in LAYERS.items()
    for name, method in VARIANTS.items()
    if case.takes(method)
}
pytestmark = pytest.mark.parametrize(("case", "method"), PAIRS.values(), ids=PAIRS.keys())


def gated(plain, net, x):
    """The plain net's output with the means of the gates of `net` multiplied in by hand, and of weights without."""
    names = {parameter: name for name, parameter in net.named_parameters()}
    for site in vd.sites(net):
        if isinstance(site.noise, ZeroMeanNoise):
            torch.nn.init.zeros_(plain.get_parameter(names[site.weight]))
    for gate in (site.noise for site in vd.sites(net) if isinstance(site.noise, Gate)):
        if not shows_units(plain[0]):
            plain[0].weight.data *= gate.mean().detach().view((-1, 1) if gate.place == "input" else (1, -1))
            return plain(x)
        if gate.place == "input":
            return plain(x * factor(gate, x, plain[0]).detach())
        return plain(x) * factor(gate, plain(x), plain[0]).detach()
    return plain(x)


def factor(gate, value, plain):
    """The quiet multiplier, which for a fresh dependent gate has the statistics 0 and 1."""
    shape = (-1, *[1] * (plain.weight.dim() - 2))
    if not isinstance(gate, DependentGate):
        return gate.mean().view(shape)
    axis = value.dim() - len(shape)
    positions = [dim for dim in range(1, value.dim()) if dim != axis]
    level = (value.mean(positions, keepdim=True) if positions else value) / 1.001**0.5 + gate.shift.view(shape)
    multiplier = gate.mean().view(shape) * level.clamp(1e-6, 1 - 1e-6)
    return torch.where(multiplier > gate.threshold, multiplier, 0.0)


def test_eval_is_the_plain_layer_times_its_gate_and_the_parameters_stay_the_same_objects(case, method):
    net = case.net()
    plain = copy.deepcopy(net)
    x = case.input()
    before = dict(net.named_parameters())
    convert(net, method).eval()
    torch.testing.assert_close(net(x), gated(plain, net, x))
    assert all(dict(net.named_parameters())[name] is parameter for name, parameter in before.items())


def test_a_noisy_pass_draws_and_its_mean_is_the_quiet_output(case, method):
    net = case.converted(method)
    x = case.input()
    with vd.noise(net, on=True):
        draws = torch.stack([net.eval()(x) for _ in range(100)]).detach()
    if all(isinstance(site.noise, QUIET) for site in vd.sites(net)):
        assert (draws == net.eval()(x)).all()
        return
    assert draws.std(dim=0).max() > 0
    if not case.linear_in_the_weight:
        return
    standard_error = draws.std(dim=0) / draws.shape[0] ** 0.5
    assert ((draws.mean(dim=0) - net.eval()(x)).abs() <= 5.5 * standard_error + 1e-6).all()


def test_every_parameter_gets_a_finite_gradient(case, method):
    net = case.converted(method).train()
    loss = net(case.input()).square().mean() + vd.kl(net) / 100
    loss.backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_kl_is_a_finite_sum_in_float32_under_autocast(case, method):
    """Without oneDNN, whose LSTM in bfloat16 does not exist on CPUs that lack AVX-512."""
    net = case.converted(method)
    with torch.backends.mkldnn.flags(enabled=False), torch.autocast("cpu", dtype=torch.bfloat16):
        total = vd.kl(net)
        output = net(case.input())
    assert total.dtype == torch.float32 and total.dim() == 0
    torch.testing.assert_close(total, vd.kl(net))
    assert torch.isfinite(output).all()


def test_state_dict_and_deepcopy_round_trip_also_when_pruned(case, method):
    net = case.converted(method)
    for site in vd.sites(net):
        site.noise.mask = torch.ones(site.noise.mask_shape(site.weight), dtype=torch.bool)
        site.noise.mask.view(-1)[::2] = False
    other = case.converted(method)
    other.load_state_dict(net.state_dict())
    twin = copy.deepcopy(net)
    x = case.input()
    for copied in (other, twin):
        torch.testing.assert_close(copied.eval()(x), net.eval()(x))
        torch.testing.assert_close(vd.kl(copied), vd.kl(net))
    vd.unprune(net)
    other.load_state_dict(net.state_dict())
    torch.testing.assert_close(other.eval()(x), net.eval()(x))


def test_dense_checkpoint_loads_with_only_noise_missing(case, method):
    dense = case.net().state_dict()
    result = case.converted(method).load_state_dict(dense, strict=False)
    assert not result.unexpected_keys
    assert all(".noise." in key or ".gate." in key for key in result.missing_keys)


def test_prune_marks_by_score_and_strip_gives_the_plain_class_with_the_same_output(case, method):
    net = case.converted(method)
    with torch.no_grad():
        for site in vd.sites(net):
            for parameter in site.noise.parameters():
                parameter.add_(3.0 * torch.randn_like(parameter))
    found = [(site, site.method.score(site.noise, site.weight)) for site in vd.sites(net)]
    counted = vd.prune(net)
    for site, scores in found:
        count = counted.layers[site.name]
        if scores is None:
            assert count.alive == count.total
        else:
            assert count.alive == max(1, int((scores >= site.method.cutoff()).sum()))
            assert site.noise.mask.shape == scores.shape == site.noise.mask_shape(site.weight)
    x = case.input()
    expected = net.eval()(x)
    stripped = vd.strip(copy.deepcopy(net))
    assert type(stripped[0]) is type(case.build())
    kept = {name for name in stripped.state_dict() if ".gate." not in name}
    assert kept == set(case.net().state_dict())
    torch.testing.assert_close(stripped(x), expected)
    for parameter in stripped.parameters():
        assert not torch.signbit(parameter[parameter == 0]).any()


def test_training_moves_the_noise_and_the_same_seed_gives_the_same_run(case, method):
    def run():
        torch.manual_seed(3)
        net = case.converted(method)
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        elbo = vd.ELBO(num_data=10)
        for _ in range(3):
            elbo.step_epoch()
            loss = elbo(net, lambda: net(case.input()).square().mean())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return net.state_dict()

    first, second = run(), run()
    torch.manual_seed(3)
    start = case.converted(method)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    names = [name for name, _ in start.named_parameters()]
    noise = [name for name in names if {"noise", "gate"} & set(name.split("."))]
    assert any(not torch.equal(first[name], start.state_dict()[name]) for name in noise or names)


def test_float64_stays_float64(case, method):
    net = case.converted(method).double()
    output = net(case.input(torch.float64))
    assert output.dtype == torch.float64
    assert vd.kl(net).dtype == torch.float64 or vd.kl(net).item() == 0.0
