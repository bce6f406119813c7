"""The baselines, held to their papers' definitions by hand, and on digits through the whole road."""

import copy
import dataclasses

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import vardrop as vd
from vardrop.cli import make_method
from vardrop.compress import Job, compress
from vardrop.errors import InvalidValueError
from vardrop.noise.unit import worst_near
from vardrop.surgery.prune import would_live
from vardrop.train import Schedule


def layer(method, values):
    plain = nn.Linear(len(values), 1, bias=False)
    plain.weight.data.copy_(torch.tensor([values]))
    return vd.convert(plain, method)


class First(nn.Module):
    """The output of a recurrent layer, without its last state."""

    def forward(self, outputs):
        return outputs[0]


class Last(nn.Sequential):
    """Not known to be the last layer of a net, so that its outputs may have a gate."""


def step(net, epoch):
    next(vd.sites(net)).method.step(net.noise, net.weight, epoch)


def test_magnitude_pruning_drops_the_smallest_round_by_round_and_never_takes_back():
    net = layer(vd.MagnitudePruning(sparsity=0.75, start=1, every=2, rounds=2), [0.1, -0.4, 0.3, -0.2])
    step(net, 0)
    assert net.noise.mask.all()
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


def mixture(noise, weight):
    """Components, and their log-responsibilities up to a constant, by torch's own distributions."""
    shares = torch.cat([torch.tensor([0.9]), 0.1 * torch.softmax(noise.logits, 0)]).double()
    means = torch.cat([torch.zeros(1), noise.means]).double()
    normal = torch.distributions.Normal(means, (-0.5 * noise.log_precisions).exp().double())
    return normal, normal.log_prob(weight.double().unsqueeze(-1)) + shares.log()


def shared_layer(**fields):
    net = vd.convert(nn.Linear(9, 4), vd.SoftWeightSharing(components=3, zero_share=0.9, init_std=0.1, **fields))
    with torch.no_grad():
        net.noise.means.copy_(torch.tensor([-0.2, 0.15, 0.3]))
        net.noise.log_precisions.add_(torch.randn(4))
        net.noise.logits.add_(torch.randn(3))
    return net


def test_soft_weight_sharing_pays_for_the_density_of_its_mixture_and_hyper_priors():
    net = shared_layer(tau=0.3)
    gammas = torch.distributions.Gamma(
        torch.tensor([5000.0, 250.0, 250.0, 250.0]).double(), torch.tensor([2.0, 0.1, 0.1, 0.1]).double()
    )
    _, joint = mixture(net.noise, net.weight)
    hyper = gammas.log_prob(net.noise.log_precisions.double().exp())
    expected = -0.3 * (joint.logsumexp(-1).sum() + hyper.sum())
    parameters = [net.weight, *net.noise.parameters()]
    torch.testing.assert_close(vd.kl(net), expected.float())
    for ours, wanted in zip(*(torch.autograd.grad(value, parameters) for value in (vd.kl(net), expected)), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4)


def test_a_pruned_weight_is_the_mean_of_its_likeliest_component():
    net = shared_layer()
    x, plain = torch.randn(2, 9), copy.deepcopy(net.weight.data)
    torch.testing.assert_close(net.eval()(x), nn.functional.linear(x, plain, net.bias))
    vd.prune(net)
    normal, joint = mixture(net.noise, plain)
    expected = normal.mean[joint.argmax(-1)].float()
    assert 0 < int((expected == 0).sum()) < 36
    assert torch.equal(net.noise.mask, expected != 0)
    torch.testing.assert_close(net(x), nn.functional.linear(x, expected, net.bias))
    torch.testing.assert_close(vd.draws(net, x, samples=2), net(x).expand(2, -1, -1))
    torch.testing.assert_close(vd.strip(copy.deepcopy(net)).weight.data, expected)
    torch.testing.assert_close(net.train()(x), nn.functional.linear(x, plain * (expected != 0), net.bias))
    torch.testing.assert_close(vd.unprune(net).eval()(x), nn.functional.linear(x, plain, net.bias))


def test_the_mixture_is_finite_far_from_its_components():
    net = shared_layer()
    with torch.no_grad():
        net.weight.mul_(1e6)
        net.noise.log_precisions.fill_(20.0)
    value = vd.kl(net)
    gradients = torch.autograd.grad(value, [net.weight, *net.noise.parameters()])
    assert all(torch.isfinite(found).all() for found in (value, *gradients))


def test_the_first_means_span_the_weights_and_their_parameters_learn_at_their_own_rates():
    net = vd.convert(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)), vd.SoftWeightSharing(components=4))
    torch.testing.assert_close(net[0].noise.means.min(), net[0].weight.min())
    torch.testing.assert_close(net[0].noise.means.diff(), (net[0].weight.max() - net[0].weight.min()).expand(3) / 3)
    groups = {group["lr"]: group["params"] for group in vd.parameter_groups(net, lr=5e-4)}
    assert groups.keys() == {5e-4, 1e-4, 3e-3}
    own, means, others = (set(map(id, groups[lr])) for lr in (5e-4, 1e-4, 3e-3))
    assert own == {id(parameter) for layer in net for parameter in (layer.weight, layer.bias)}
    assert means == {id(layer.noise.means) for layer in net}
    assert others == {id(parameter) for layer in net for parameter in (layer.noise.log_precisions, layer.noise.logits)}
    optimizer = Schedule(lr=5e-4).optimizer(net)
    assert sorted(group["lr"] for group in optimizer.param_groups) == [1e-4, 5e-4, 3e-3]


@pytest.mark.parametrize("rate", [0.0, 0.4])
def test_adversarial_dropout_adds_the_loss_with_the_worst_mask_near_the_random_one(rate):
    net = vd.convert(nn.Linear(20, 3), vd.AdversarialDropout(rate=rate, budget=0.15, weight=0.7)).double()
    x, y = torch.randn(5, 20, dtype=torch.float64), torch.randint(3, (5,))
    elbo = vd.ELBO(num_data=5)
    with vd.noise(net, generator=torch.Generator().manual_seed(1)):
        loss = elbo(net.train(), lambda: nn.functional.cross_entropy(net(x), y))
    random = (torch.rand(5, 20, generator=torch.Generator().manual_seed(1)) >= rate).double()

    def losses(masks):
        logits = (x * masks / (1 - rate)) @ net.weight.T + net.bias
        return nn.functional.cross_entropy(logits, y, reduction="none")

    worst = random.clone()
    slope = torch.autograd.functional.jacobian(lambda masks: losses(masks).sum(), random)
    for example in range(5):
        flips = [(float(slope[example, i] * (1 - 2 * random[example, i])), i) for i in range(20)]
        for gain, i in sorted(flips, reverse=True)[:3]:  # 0.15 * 20
            if gain > 0:
                worst[example, i] = 1 - random[example, i]
    torch.testing.assert_close(elbo.nll, losses(random).mean().detach())
    torch.testing.assert_close(loss, losses(random).mean() + 0.7 * losses(worst).mean())
    assert (losses(worst) > losses(random)).all()  # the loss is convex in the mask
    (ours,) = torch.autograd.grad(loss, net.weight)
    (wanted,) = torch.autograd.grad(losses(random).mean() + 0.7 * losses(worst).mean(), net.weight)
    torch.testing.assert_close(ours, wanted)


def test_the_worst_mask_is_the_best_of_all_masks_in_reach_to_first_order():
    mask, slope = (torch.rand(4, 6) > 0.5).float(), torch.randn(4, 6)
    found = worst_near(mask, slope, 0.4, 4)  # two of six
    every = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 6)
    for row in range(4):
        near = every[(every - mask[row]).abs().sum(1) <= 2]
        assert (near @ slope[row]).max() == pytest.approx(float(found[row] @ slope[row]))
        assert (found[row] - mask[row]).abs().sum() <= 2
    assert torch.equal(worst_near(mask, slope, 0.0, 4), mask)


def test_adversarial_dropout_is_plain_outside_training_and_refuses_a_loss_without_a_second_pass():
    net = vd.convert(nn.Sequential(nn.LSTM(4, 4, batch_first=True), First(), nn.Linear(4, 2)), vd.AdversarialDropout())
    x, elbo = torch.randn(3, 5, 4), vd.ELBO(num_data=3)
    with pytest.raises(InvalidValueError, match=r"elbo\(net, lambda: cross_entropy"):
        elbo(net.train(), net(x).square().mean())
    passes = []
    assert torch.equal(elbo(net.eval(), lambda: passes.append(1) or net(x).square().mean()), elbo.nll)
    assert len(passes) == 1
    elbo(net.train(), lambda: passes.append(1) or net(x).square().mean()).backward()
    assert len(passes) == 3
    assert all(site.noise.first is None and not site.noise.second for site in vd.sites(net))
    assert all(torch.isfinite(parameter.grad).all() for parameter in net.parameters())


def test_adversarial_dropout_refuses_inputs_that_change_in_place_before_the_second_pass():
    net, x = vd.convert(nn.Linear(4, 2), vd.AdversarialDropout()), torch.randn(3, 4)
    with pytest.raises(RuntimeError, match="changed in place"):
        vd.ELBO(num_data=3)(net.train(), lambda: (net(x).square().mean(), x.add_(1.0))[0])
    assert net.noise.first is None and not net.noise.second


def test_adversarial_dropout_is_the_same_in_a_compiled_net_of_two_layers():
    net = vd.convert(nn.Sequential(nn.Linear(20, 12), nn.ReLU(), nn.Linear(12, 3)), vd.AdversarialDropout(budget=0.2))
    x, y = torch.randn(6, 20), torch.randint(3, (6,))

    def loss(model):
        torch.manual_seed(1)
        return vd.ELBO(num_data=6)(net.train(), lambda: nn.functional.cross_entropy(model(x), y))

    torch.testing.assert_close(loss(torch.compile(net, backend="aot_eager")), loss(net))


def test_the_objective_moves_masks_in_training_only():
    net = layer(vd.MagnitudePruning(sparsity=0.5, start=0, rounds=1), [1.0, 2.0])
    elbo = vd.ELBO(num_data=1)
    elbo.step_epoch()
    elbo(net.eval(), net(torch.ones(1, 2)).sum())
    assert net.noise.mask.all()
    elbo(net.train(), net(torch.ones(1, 2)).sum())
    assert net.noise.mask.tolist() == [[False, True]]


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("magnitude-pruning", ["sparsity=0.9", "start=3", "every=2", "rounds=2"]),
        ("dynamic-network-surgery", ["c=1.5"]),
        ("structured-sparsity-learning", ["strength=1", "threshold=0.02"]),
        ("soft-weight-sharing", ["tau=0.1", "zero_share=0.7", "init_std=0.05"]),
        ("adversarial-dropout", ["rate=0.2"]),
        ("bernoulli-dropout", ["rate=0"]),  # no dropout: the plain net
    ],
)
def test_the_whole_road_on_digits(name, settings, tmp_path):
    schedule = Schedule(epochs=10, batch_size=50, lr=3e-3, decay_from=5, warmup_epochs=0)
    method = make_method(name, settings)
    job = Job(net="lenet-300-100", data="digits", method=method, schedule=schedule)
    if name in ("dynamic-network-surgery", "soft-weight-sharing"):  # they start from trained weights
        job = dataclasses.replace(job, pretrain=5)
    run = compress(job, tmp_path / "run")
    assert run["pruned"]["error"] == run["compacted"]["error"] < 0.3
    assert run["compacted"]["largest_difference"] < 1e-4
    if name == "magnitude-pruning":
        assert run["pruned"]["compression"] == pytest.approx(10.0, rel=1e-2)
    elif name in ("bernoulli-dropout", "adversarial-dropout"):
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
        (lambda: vd.SoftWeightSharing(components=0), r"SoftWeightSharing\(components=0\)"),
        (lambda: vd.SoftWeightSharing(zero_share=1.0), r"zero_share=1.0"),
        (lambda: vd.SoftWeightSharing(tau=-1.0), r"tau=-1.0"),
        (lambda: vd.SoftWeightSharing(means_lr=0.0), r"means_lr=0.0"),
        (lambda: vd.SoftWeightSharing().cutoff(float("nan")), r"threshold=nan"),
        (lambda: vd.AdversarialDropout(rate=1.0), r"AdversarialDropout\(rate=1.0\)"),
        (lambda: vd.AdversarialDropout(budget=1.5), r"budget=1.5"),
        (lambda: vd.AdversarialDropout(weight=-1.0), r"weight=-1.0"),
        (lambda: make_method("magnitude-pruning", ["rounds=2.5"]), r"--set rounds=2.5: must be a whole number"),
    ],
)
def test_bad_values_are_refused(make, message):
    with pytest.raises(InvalidValueError, match=message):
        make()


def test_the_budget_of_an_adversary_is_not_lost_to_rounding():
    changed = worst_near(torch.zeros(1, 100), torch.ones(1, 100), 0.29, 1)
    assert int((changed != 0).sum()) == 29


@pytest.mark.parametrize("method", [vd.MagnitudePruning(start=1, every=1, rounds=1), vd.DynamicNetworkSurgery()])
def test_an_average_of_the_weights_follows_masks_that_change_in_training(method):
    net = vd.convert(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)), method)
    average, elbo = AveragedModel(net), vd.ELBO(num_data=8)
    for _ in range(3):
        elbo.step_epoch()
        elbo(net, net(torch.randn(8, 6)).square().mean()).backward()
        average.update_parameters(net)
        for own, other in zip(vd.sites(net), vd.sites(average.module), strict=True):
            assert torch.equal(own.noise.mask, other.noise.mask)
    assert not net[0].noise.mask.all()


def test_loaded_marks_lie_where_their_layer_lies():
    pruned = vd.convert(nn.Linear(6, 4), vd.MagnitudePruning())
    vd.prune(pruned)
    elsewhere = vd.convert(nn.Linear(6, 4, device="meta"), vd.MagnitudePruning())
    elsewhere.load_state_dict(pruned.state_dict())
    assert elsewhere.noise.mask.device.type == "meta"


def test_what_would_live_of_a_net_that_is_pruned_as_it_trains_is_what_lives():
    net = layer(vd.MagnitudePruning(sparsity=0.75, start=1, every=1, rounds=2), [0.1, -0.4, 0.3, -0.2])
    assert [would_live(net).alive, step(net, 1), would_live(net).alive] == [4, None, 2]
    assert vd.prune(net).alive == 1


def test_adversarial_dropout_whose_noise_is_off_has_no_second_pass():
    net = vd.convert(nn.Linear(6, 3), vd.AdversarialDropout())
    vd.noise(net, on=False)
    elbo, nll = vd.ELBO(num_data=5), net(torch.randn(5, 6)).square().mean()
    assert elbo(net, nll) == elbo(net, lambda: nll) == nll
