"""The baselines, held to their papers' definitions by hand, and on digits through the whole road."""

import dataclasses

import pytest
import torch
from torch import nn

import vardrop as vd
from vardrop.cli import make_method
from vardrop.compress import Job, compress
from vardrop.errors import InvalidValueError
from vardrop.train import Schedule


def layer(method, values):
    plain = nn.Linear(len(values), 1, bias=False)
    plain.weight.data.copy_(torch.tensor([values]))
    return vd.convert(plain, method)


class Last(nn.Sequential):
    """Not known to be the last layer of a net, so that its outputs may have a gate."""


def step(net, epoch):
    next(vd.sites(net)).method.step(net.noise, net.weight, epoch)


def test_magnitude_pruning_drops_the_smallest_round_by_round_and_never_takes_back():
    net = layer(vd.MagnitudePruning(sparsity=0.75, start=1, every=2, rounds=2), [0.1, -0.4, 0.3, -0.2])
    step(net, 0)
    assert net.noise.mask is None
    step(net, 1)  # 1 - 0.25^(1/2) = 0.5
    assert net.noise.mask.tolist() == [[False, True, True, False]]
    net.weight.data[0, 0] = 9.0
    step(net, 2)
    assert net.noise.mask.tolist() == [[False, True, True, False]]
    step(net, 3)
    assert net.noise.mask.tolist() == [[False, True, False, False]]
    assert vd.prune(net).alive == 1 and net.noise.mask[0, 1]
    net(torch.ones(1, 4)).sum().backward()
    assert net.weight.grad.tolist() == [[0.0, 1.0, 0.0, 0.0]]


def test_surgery_keeps_between_the_thresholds_splices_above_and_lets_the_dead_learn():
    net = layer(vd.DynamicNetworkSurgery(c=1.0, margin=0.1, gamma=0.0), [1.0, -1.0, 3.0, -3.0])
    assert net.noise.low.item() == pytest.approx(2.7)  # mean 2, std 1: t = 3
    assert net.noise.high.item() == pytest.approx(3.3)
    step(net, 0)
    assert net.noise.mask.tolist() == [[False, False, True, True]]
    net.weight.data.copy_(torch.tensor([[3.0, -3.4, 2.8, -2.6]]))
    step(net, 0)
    assert net.noise.mask.tolist() == [[False, True, True, False]]
    output = net.train()(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert output.item() == pytest.approx(-6.8 + 8.4, abs=1e-5)
    output.sum().backward()
    assert net.weight.grad.tolist() == [[1.0, 2.0, 3.0, 4.0]]
    assert net.noise.steps.item() == 2


def test_the_masks_of_surgery_change_ever_more_rarely():
    torch.manual_seed(0)
    method = vd.DynamicNetworkSurgery(gamma=1.0, power=1.0)
    net = layer(method, [1.0, 3.0])
    changed = 0
    for _ in range(2000):
        net.noise.steps.fill_(3)  # probability 1 / 4
        net.noise.mask = None
        step(net, 0)
        changed += net.noise.mask is not None
    assert abs(changed / 2000 - 0.25) < 5 * (0.25 * 0.75 / 2000) ** 0.5


@pytest.mark.parametrize(
    ("build", "place", "groups"),
    [
        (lambda: nn.Linear(6, 5), "auto", lambda w: [w[:, i] for i in range(6)]),
        (lambda: nn.Linear(6, 5), "output", lambda w: [w[i] for i in range(5)]),
        (lambda: nn.Conv2d(3, 4, 3), "auto", lambda w: [w[i, :, :, :] for i in range(4)]),
        (lambda: nn.Conv2d(3, 4, 3), "input", lambda w: [w[:, i, :, :] for i in range(3)]),
        (lambda: nn.Conv2d(4, 6, 3, groups=2), "input", lambda w: [w[3 * (i // 2) :, i % 2][:3] for i in range(4)]),
        (
            lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
            "output",
            lambda w: [w[2 * (i // 3) :, i % 3][:2] for i in range(6)],
        ),
        (lambda: nn.Embedding(7, 4), "auto", lambda w: [w[i] for i in range(7)]),
    ],
)
def test_group_lasso_is_the_sum_of_the_norms_of_the_groups(build, place, groups):
    layer = vd.convert(Last(build()), vd.StructuredSparsityLearning(place=place, strength=2.0))[0]
    expected = 2.0 * sum(group.square().sum().sqrt() for group in groups(layer.weight))
    torch.testing.assert_close(vd.kl(layer), expected)
    gradient, wanted = (torch.autograd.grad(value, layer.weight)[0] for value in (vd.kl(layer), expected))
    torch.testing.assert_close(gradient, wanted)
    with torch.no_grad():
        groups(layer.weight)[1].mul_(0.0)
    assert torch.isfinite(torch.autograd.grad(vd.kl(layer), layer.weight)[0]).all()
    vd.prune(layer)
    dead = [bool((group == 0).all()) for group in groups(layer.gate.masked(layer.weight))]
    assert dead == [i == 1 for i in range(len(dead))] == (~layer.gate.mask).tolist()


def test_a_unit_without_its_weights_keeps_its_bias():
    net = nn.Sequential(nn.Conv2d(1, 3, 1), nn.ReLU(), nn.Conv2d(3, 2, 1))
    with torch.no_grad():
        net[0].weight[1] = 1e-5
        net[0].bias.fill_(0.5)
    vd.convert(net, vd.StructuredSparsityLearning(), include="0")
    x = torch.randn(2, 1, 3, 3)
    before = net.eval()(x)
    assert vd.prune(net).units == "2"
    torch.testing.assert_close(net(x), before, rtol=0, atol=1e-4)
    small = vd.compact(net, x)
    assert small[0].out_channels == 2
    torch.testing.assert_close(small(x), net(x))


def test_the_objective_moves_masks_in_training_only():
    net = layer(vd.MagnitudePruning(sparsity=0.5, start=0, rounds=1), [1.0, 2.0])
    elbo = vd.ELBO(num_data=1)
    elbo.step_epoch()
    elbo(net.eval(), net(torch.ones(1, 2)).sum())
    assert net.noise.mask is None
    elbo(net.train(), net(torch.ones(1, 2)).sum())
    assert net.noise.mask.tolist() == [[False, True]]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("magnitude-pruning", ["sparsity=0.9", "start=3", "every=2", "rounds=2"]),
        ("dynamic-network-surgery", ["c=1.5"]),
        ("structured-sparsity-learning", ["strength=1", "threshold=0.02"]),
        ("bernoulli-dropout", ["rate=0"]),  # no dropout: the plain net
    ],
)
def test_the_whole_road_on_digits(name, settings, tmp_path):
    schedule = Schedule(epochs=10, batch_size=50, lr=3e-3, decay_from=5, warmup_epochs=0)
    method = make_method(name, settings)
    job = Job(net="lenet-300-100", data="digits", method=method, schedule=schedule)
    if name == "dynamic-network-surgery":  # its thresholds are those of trained weights
        job = dataclasses.replace(job, pretrain=5)
    run = compress(job, tmp_path / "run")
    assert run["pruned"]["error"] == run["compacted"]["error"] < 0.3
    assert run["compacted"]["largest_difference"] < 1e-4
    if name == "magnitude-pruning":
        assert run["pruned"]["compression"] == pytest.approx(10.0, rel=1e-2)
    elif name == "bernoulli-dropout":
        assert run["pruned"]["compression"] == 1.0
    elif name == "structured-sparsity-learning":
        assert all(run["pruned"]["alive"][site] < total for site, total in run["layers"].items())
        assert run["pruned"]["units"] == "-".join(str(alive) for alive in run["pruned"]["alive"].values())
    else:
        assert run["pruned"]["compression"] > 3.0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: vd.MagnitudePruning(sparsity=1.0), r"MagnitudePruning\(sparsity=1.0\)"),
        (lambda: vd.MagnitudePruning(rounds=0), r"rounds=0"),
        (lambda: vd.MagnitudePruning(every=0), r"every=0"),
        (lambda: vd.MagnitudePruning(start=-1), r"start=-1"),
        (lambda: vd.MagnitudePruning().cutoff(1.0), r"threshold=1.0: must be a sparsity"),
        (lambda: vd.DynamicNetworkSurgery(c=float("nan")), r"c=nan.*finite"),
        (lambda: vd.DynamicNetworkSurgery(margin=1.0), r"margin=1.0"),
        (lambda: vd.DynamicNetworkSurgery(gamma=-1.0), r"gamma=-1.0"),
        (lambda: vd.DynamicNetworkSurgery(power=-1.0), r"power=-1.0"),
        (lambda: vd.DynamicNetworkSurgery().cutoff(0.0), r"threshold=0.0.*factor"),
        (lambda: vd.StructuredSparsityLearning(strength=-1.0), r"StructuredSparsityLearning\(strength=-1.0\)"),
        (lambda: vd.StructuredSparsityLearning(strength=float("inf")), r"strength=inf"),
        (lambda: make_method("magnitude-pruning", ["rounds=2.5"]), r"--set rounds=2.5: must be a whole number"),
    ],
)
def test_bad_values_are_refused(make, message):
    with pytest.raises(InvalidValueError, match=message):
        make()
