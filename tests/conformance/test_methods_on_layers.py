"""What every method must do on every layer."""

import copy

import pytest
import torch
from cases import LAYERS, VARIANTS

import vardrop as vd

pytestmark = [
    pytest.mark.parametrize("method", VARIANTS.values(), ids=VARIANTS.keys()),
    pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS.keys()),
]


def converted(case, method):
    return vd.convert(case.net(), method)


def test_eval_is_the_plain_layer_and_the_parameters_stay_the_same_objects(case, method):
    plain = case.net()
    x = case.input()
    expected = plain(x)
    before = dict(plain.named_parameters())
    net = vd.convert(plain, method).eval()
    torch.testing.assert_close(net(x), expected)
    assert all(dict(net.named_parameters())[name] is parameter for name, parameter in before.items())


def test_training_is_noisy_and_its_mean_is_the_plain_output(case, method):
    net = converted(case, method)
    x = case.input()
    draws = torch.stack([net.train()(x) for _ in range(100)]).detach()
    assert draws.std(dim=0).max() > 0
    if not case.linear_in_the_weight:
        return
    standard_error = draws.std(dim=0) / draws.shape[0] ** 0.5
    assert ((draws.mean(dim=0) - net.eval()(x)).abs() <= 5.5 * standard_error + 1e-6).all()


def test_every_parameter_gets_a_finite_gradient(case, method):
    net = converted(case, method)
    loss = net(case.input()).square().mean() + vd.kl(net) / 100
    loss.backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


def test_kl_is_a_finite_sum_in_float32_under_autocast(case, method):
    net = converted(case, method)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = vd.kl(net)
        output = net(case.input())
    assert total.dtype == torch.float32 and total.dim() == 0
    torch.testing.assert_close(total, vd.kl(net))
    assert torch.isfinite(output).all()


def test_state_dict_and_deepcopy_round_trip_also_when_pruned(case, method):
    net = converted(case, method)
    with torch.no_grad():
        for site in vd.sites(net):
            site.weight.view(-1)[::2] *= 1e-4
    vd.prune(net)
    other = converted(case, method)
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
    result = converted(case, method).load_state_dict(dense, strict=False)
    assert not result.unexpected_keys
    assert all(".noise." in key for key in result.missing_keys)


def test_prune_marks_by_score_and_strip_gives_the_plain_class_with_the_same_output(case, method):
    net = converted(case, method)
    scores = {site: site.method.score(site.noise, site.weight) for site in vd.sites(net)}
    counted = vd.prune(net)
    for site, score in scores.items():
        row = counted.layers[site.name]
        alive = site.weight.numel() if score is None else max(1, int((score >= site.method.cutoff()).sum()))
        assert (row.alive, row.total) == (alive, site.weight.numel())
    x = case.input()
    expected = net.eval()(x)
    stripped = vd.strip(copy.deepcopy(net))
    assert type(stripped[0]) is type(case.build())
    assert set(stripped.state_dict()) == set(case.net().state_dict())
    torch.testing.assert_close(stripped(x), expected)


def test_training_moves_the_noise_and_the_same_seed_gives_the_same_run(case, method):
    def run():
        torch.manual_seed(3)
        net = converted(case, method)
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
        elbo = vd.ELBO(num_data=10)
        for _ in range(3):
            elbo.step_epoch()
            loss = elbo(net, net(case.input()).square().mean())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return net.state_dict()

    first, second = run(), run()
    start = converted(case, method).state_dict()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name
    learned = {name for name, _ in converted(case, method).named_parameters()}
    assert any(not torch.equal(first[name], start[name]) for name in learned)


def test_float64_stays_float64(case, method):
    net = converted(case, method).double()
    output = net(case.input(torch.float64))
    assert output.dtype == torch.float64
    assert vd.kl(net).dtype == torch.float64 or vd.kl(net).item() == 0.0
