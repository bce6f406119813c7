"""The objective, its schedules, prediction and pruning."""

import math
import pickle
import warnings

import pytest
import torch
from torch import nn

import vardrop as vd
from vardrop.errors import ConversionError, EmptyLayerWarning, InvalidValueError


def net():
    return vd.convert(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), vd.ARD())


def test_kl_is_divided_by_the_number_of_data_once_and_shown_apart():
    model, nll = net(), torch.tensor(2.5, requires_grad=True)
    elbo = vd.ELBO(num_data=50, kl_factor=0.05)
    loss = elbo(model, nll)
    torch.testing.assert_close(loss.detach(), 2.5 + 0.05 * vd.kl(model).detach() / 50)
    assert elbo.nll.item() == 2.5
    torch.testing.assert_close(elbo.kl, vd.kl(model).detach())
    assert not elbo.kl.requires_grad


def test_kl_counts_every_weight_that_shares_an_alpha():
    shared = vd.convert(nn.Linear(7, 5), vd.VBD(alpha="layer", init_log_alpha=0.0))
    assert vd.kl(shared).item() == pytest.approx(35 * 0.5 * math.log(2.0), rel=1e-6)


@pytest.mark.parametrize("warmup", [20, vd.warmup.constant, lambda epoch: math.nan, lambda epoch: 2.0])
def test_warmup_must_be_a_schedule(warmup):
    with pytest.raises(InvalidValueError, match="must be a function of the epoch"):
        vd.ELBO(10, warmup=warmup)


@pytest.mark.parametrize("nll", [0.5, lambda: None])
def test_nll_must_be_a_tensor(nll):
    with pytest.raises(InvalidValueError, match="must be a scalar tensor"):
        vd.ELBO(10)(net(), nll)


@pytest.mark.parametrize("num_data", [0, -3, float("nan"), float("inf"), "60000", None])
def test_num_data_must_be_positive(num_data):
    with pytest.raises(InvalidValueError, match=f"num_data={num_data!r}.*above 0"):
        vd.ELBO(num_data=num_data)


def test_bad_factor_schedule_and_nll_are_refused():
    with pytest.raises(InvalidValueError, match=r"kl_factor=-1.*at least 0"):
        vd.ELBO(num_data=1, kl_factor=-1.0)
    with pytest.raises(InvalidValueError, match="epochs=5, start=5"):
        vd.warmup.linear(5, start=5)
    with pytest.raises(InvalidValueError, match="must be a scalar"):
        vd.ELBO(num_data=1)(net(), torch.ones(3))


def test_the_first_epoch_is_number_zero_and_the_state_comes_back():
    elbo = vd.ELBO(num_data=1, warmup=vd.warmup.linear(epochs=20, start=5))
    betas = []
    for _ in range(22):
        elbo.step_epoch()
        betas.append(elbo.beta)
    assert betas[:6] == [0.0] * 6
    assert betas[6] == pytest.approx(1 / 15)
    assert betas[19] == pytest.approx(14 / 15)
    assert betas[20:] == [1.0, 1.0]
    again = vd.ELBO(num_data=1, warmup=elbo.warmup)
    again.load_state_dict(elbo.state_dict())
    assert again.epoch == elbo.epoch


def test_a_warm_up_whose_first_epoch_has_not_begun_is_refused_in_training_alone():
    model = net()
    elbo = vd.ELBO(num_data=1, warmup=vd.warmup.linear(epochs=2))
    with pytest.raises(InvalidValueError, match=r"stands still at 0\.0: call elbo\.step_epoch\(\) at the start"):
        elbo(model, torch.ones(()))
    elbo(model.eval(), torch.ones(()))
    vd.ELBO(num_data=1)(model.train(), torch.ones(()))
    elbo.step_epoch()
    assert elbo(model, torch.ones(())) == 1.0


def test_pruning_by_the_epoch_needs_one_that_has_begun():
    model = vd.convert(nn.Linear(4, 2), vd.MagnitudePruning(start=0))
    elbo = vd.ELBO(num_data=1)
    with pytest.raises(InvalidValueError, match=r"MagnitudePruning prunes by the epoch, and none has begun: call elbo"):
        elbo(model, torch.ones(()))
    elbo.step_epoch()
    elbo(model, torch.ones(()))


def test_predict_averages_probabilities_with_batch_norm_in_eval_mode():
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3))
    vd.convert(model, vd.ARD(init_log_std=-1.0)).train()
    statistics = model[1].running_mean.clone()
    x = torch.randn(4, 6)
    probabilities = vd.predict(model, x, samples=50, generator=torch.Generator().manual_seed(1))
    again = vd.predict(model, x, samples=50, generator=torch.Generator().manual_seed(1))
    assert torch.equal(probabilities, again)
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(4))
    assert torch.equal(model[1].running_mean, statistics)
    assert model.training and model[1].training
    assert all(site.noise.on is None and site.noise.generator is None for site in vd.sites(model))
    with pytest.raises(InvalidValueError, match="samples=0"):
        vd.predict(model, x, samples=0)


def test_the_three_switches_are_independent():
    model = net()
    x = torch.randn(4, 6)
    vd.noise(model, on=False)
    assert torch.equal(model.train()(x), model(x))
    vd.noise(model, on=True)
    assert not torch.equal(model.eval()(x), model(x))
    vd.noise(model, on=None)
    assert torch.equal(model.eval()(x), model(x))
    vd.prune(model, threshold=0.2)
    dead = ~model[0].noise.mask
    assert dead.any()
    before = model(x)
    vd.noise(model, on=True)
    with torch.no_grad():
        model[0].weight[dead] += 100.0
        model[0].noise.log_std[dead] += 5.0
    assert (model(x) - before).abs().max() < 5.0


def test_prune_counts_keeps_the_best_weight_of_a_dead_layer_and_says_so():
    model = net()
    best = model[2].weight.detach().abs().flatten().argmax()
    with pytest.warns(EmptyLayerWarning, match=r"layer '\d': all \d+ weights are dead"):
        counted = vd.prune(model, threshold=10.0)
    assert counted.alive == 2 and counted.total == 45
    assert counted.compression == 22.5
    assert model[2].noise.mask.view(-1)[best]
    vd.unprune(model)
    assert all(site.noise.mask is None for site in vd.sites(model))


@pytest.mark.parametrize("method", [vd.SparseVD(), (vd.BetaBernoulli(), vd.SparseVD())], ids=["noise", "gate"])
def test_the_best_weight_is_kept_in_any_memory_format(method):
    def conv():
        torch.manual_seed(1)
        return nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3))

    found = []
    for net in (conv(), conv().to(memory_format=torch.channels_last)):
        net = vd.convert(net, method)
        with pytest.warns(EmptyLayerWarning):
            vd.prune(net, threshold=-1e9 if method == vd.SparseVD() else 1e9)
        found.append([site.noise.mask for site in vd.sites(net)])
    assert all(torch.equal(left, right) for left, right in zip(*found, strict=True))


def test_a_layer_without_weights_is_pruned_to_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that there is nothing to initialise
        assert vd.prune(vd.convert(nn.Linear(0, 3), vd.ARD())).alive == 0


@pytest.mark.parametrize(
    "method",
    [vd.GaussianDropout(rate=0.5, rule="snr"), vd.VariationalDropout(rule="snr"), vd.VBD(alpha="layer", rule="snr")],
)
def test_an_alpha_that_all_weights_share_kills_none_of_them(method):
    model = vd.convert(nn.Linear(20, 10), method)
    with torch.no_grad():
        model.noise.shared_log_alpha.fill_(5.0)
    assert vd.prune(model).alive == 200
    narrow = vd.convert(nn.Linear(1, 20), vd.VBD(alpha="input", init_log_alpha=8.0))  # an alpha of one input is its own
    with pytest.warns(EmptyLayerWarning):
        assert vd.prune(narrow).alive == 1


def test_prune_refuses_what_it_cannot_judge():
    model = net()
    with pytest.raises(InvalidValueError, match="all 30 weights are dead"):
        vd.prune(model, threshold=10.0, on_empty="refuse")
    assert all(site.noise.mask is None for site in vd.sites(model))
    with pytest.raises(ConversionError, match="no noisy layer"):
        vd.prune(nn.Linear(2, 2))
    with pytest.raises(InvalidValueError, match="on_empty='no'"):
        vd.prune(model, on_empty="no")
    with pytest.raises(InvalidValueError, match="has no pruning rule"):
        vd.prune(vd.convert(nn.Linear(2, 2), vd.GaussianDropout()), threshold=1.0)
    for broken in (model[0].weight, model[0].noise.log_std):
        was = broken.detach().clone()
        broken.data[0, 0] = float("nan")
        with pytest.raises(InvalidValueError, match="layer '0'.*not finite"):
            vd.prune(model)
        broken.data.copy_(was)


def test_rules_follow_their_definitions():
    layer = nn.Linear(3, 1, bias=False)
    std = math.exp(-5.0)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.2 * std, 0.9 * std, 1.1 * std]]))
    for method, expected in [
        (vd.SparseVD(), [False, True, True]),
        (vd.SparseVD(rule="snr"), [False, False, True]),
        (vd.SparseVD(rule="magnitude", threshold=std), [False, False, True]),
        (vd.SparseVD(threshold=0.3), [False, True, True]),
        (vd.SparseVD(threshold=-0.1), [False, False, True]),
    ]:
        model = vd.convert(nn.Linear(3, 1, bias=False), method)
        model.weight.data.copy_(layer.weight)
        vd.prune(model)
        assert model.noise.mask.tolist() == [expected], method


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: vd.GammaARD(a=0.5), r"GammaARD\(a=0.5\): must satisfy 0.5 < a"),
        (lambda: vd.GammaARD(b=0.0), r"GammaARD\(b=0.0\)"),
        (lambda: vd.StudentT(a=-1.0), r"StudentT\(a=-1.0\)"),
        (lambda: vd.StudentT(b=1e-38), r"StudentT\(b=1e-38\): must satisfy 1e-30 <= b < inf"),
        (lambda: vd.BernoulliDropout(rate=1.0), r"must satisfy 0 <= rate < 1"),
        (lambda: vd.BernoulliDropout(rate="1"), r"BernoulliDropout\(rate='1'\): must be a number"),
        (lambda: vd.SparseVD(threshold="3"), r"SparseVD\(threshold='3'\): must be a number"),
        (lambda: vd.MagnitudePruning(rounds=2.5), r"MagnitudePruning\(rounds=2.5\): must be a whole number"),
        (lambda: vd.DependentBetaBernoulli(momentum=1.5), r"must satisfy 0 < momentum <= 1"),
        (lambda: vd.GaussianDropout(rate=1.0), r"GaussianDropout\(rate=1.0\)"),
        (lambda: vd.BernoulliDropout(rate=-0.1), r"BernoulliDropout\(rate=-0.1\)"),
        (lambda: vd.VariationalDropout(init_log_alpha=0.5), r"init_log_alpha=0.5"),
        (lambda: vd.VariationalDropout(alpha="row"), r"alpha='row'.*one of 'layer', 'input'"),
        (lambda: vd.SparseVD(rule="size"), r"rule='size'.*one of 'log_alpha'"),
        (lambda: vd.SparseVD(form="cubic"), r"form='cubic'"),
        (lambda: vd.SparseVD(sampling="both"), r"sampling='both'"),
        (lambda: vd.SparseVD(threshold=float("nan")), r"threshold=nan"),
        (lambda: vd.SparseVD(init_log_std=float("inf")), r"SparseVD\(init_log_std=inf\): a first value must be finite"),
        (lambda: vd.BetaBernoulli(init_a=float("inf")), r"BetaBernoulli\(init_a=inf\): a first value must be finite"),
        (lambda: vd.ARD(init_spread=-0.1), r"ARD\(init_spread=-0.1\)"),
        (lambda: vd.VBD(low=2.0, high=1.0), r"low=2.0, high=1.0"),
        (lambda: vd.VBD(alpha="layer", high=1.0), "need alpha"),
        (lambda: vd.VBD(alpha="layer", train_clip=True), 'train_clip needs alpha="weight"'),
        (lambda: vd.SparseVD(rule=None, threshold=2.0), r"rule=None, threshold=2.0\): a threshold needs a rule"),
    ],
)
def test_hyper_parameters_are_checked_when_a_method_is_made(make, message):
    with pytest.raises(InvalidValueError, match=message):
        make()


@pytest.mark.parametrize("call", [vd.kl, vd.prune, lambda model: vd.ELBO(5)(model, torch.tensor(1.0))])
def test_what_is_no_model_is_refused(call):
    with pytest.raises(InvalidValueError, match=r"model is a Tensor: must be a torch\.nn\.Module"):
        call(torch.tensor(1.0))


@pytest.mark.parametrize(
    "schedule", [None, vd.warmup.constant(), vd.warmup.linear(4), vd.warmup.cubic(4, start=1), vd.warmup.step(2)]
)
def test_an_objective_can_travel_to_another_process(schedule):
    elbo = vd.ELBO(num_data=3, warmup=schedule)
    copy = pickle.loads(pickle.dumps(elbo))
    assert [copy.warmup(epoch) for epoch in range(6)] == [elbo.warmup(epoch) for epoch in range(6)]
