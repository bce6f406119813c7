"""What a field says reaches what it is for: prices by quadrature for fields that are not the defaults, and the like."""

import math

import mpmath as mp
import pytest
import scipy.stats
import torch
from torch import nn

import vardrop as vd
from vardrop import functional as F
from vardrop import fused, lrt
from vardrop.train import Schedule
from vardrop.zoo import build_net, load_data, text

MEANS, LOG_STDS = (0.3, -0.05), (-1.0, -0.5)


def divergence(log_posterior, log_prior, points) -> float:
    """KL of two densities given by their logs, by quadrature."""
    return float(mp.quad(lambda x: mp.exp(log_posterior(x)) * (log_posterior(x) - log_prior(x)), points))


def gaussian(mean, std):
    return lambda x: -((x - mean) ** 2) / (2 * std**2) - mp.log(std * mp.sqrt(2 * mp.pi))


def kumaraswamy(a, b):
    return lambda x: mp.log(a * b) + (a - 1) * mp.log(x) + (b - 1) * mp.log(1 - x**a)


def truncated(mu, sigma, low, high):
    def density(x):
        return mp.exp(-((x - mu) ** 2) / (2 * sigma**2))

    mass = mp.quad(density, [low, high])
    return lambda x: mp.log(density(x) / mass)


def dependent_gate():
    net = vd.convert(vd.convert(nn.Linear(3, 2), vd.BetaBernoulli()), vd.DependentBetaBernoulli(prior_std=0.7))
    shifts, log_stds = (0.5, -1.0, 2.0), (-1.0, 0.2, 0.7)
    with torch.no_grad():
        net.gate.shift.copy_(torch.tensor(shifts))
        net.gate.log_std.copy_(torch.tensor(log_stds))
    spans = [(shift, math.exp(log_std)) for shift, log_std in zip(shifts, log_stds, strict=True)]
    prior = gaussian(0, 0.7)
    return net, sum(divergence(gaussian(m, s), prior, [m - 12 * s, m, m + 12 * s]) for m, s in spans)


def beta_gate():
    net, k = vd.convert(nn.Linear(3, 2), vd.BetaBernoulli(alpha_over_k=0.3)), 0.3
    with torch.no_grad():
        net.gate.raw_a.copy_(torch.tensor([0.5, 1.0, 2.0]))
        net.gate.raw_b.copy_(torch.tensor([0.3, 1.0, 2.5]))
    points = [0, mp.mpf("1e-6"), 0.01, 0.5, 0.99, 1]
    pairs = zip(net.gate.a.tolist(), net.gate.b.tolist(), strict=True)
    return net, sum(divergence(kumaraswamy(a, b), lambda x: mp.log(k) + (k - 1) * mp.log(x), points) for a, b in pairs)


def log_normal_gate():
    net, mus, log_sigmas = (
        vd.convert(nn.Linear(3, 2), vd.StructuredBP(low=-1.0, high=0.5)),
        (-0.5, 0.2, 1.5),
        (-1, 0, 0.4),
    )
    with torch.no_grad():
        net.gate.mu.copy_(torch.tensor(mus))
        net.gate.log_sigma.copy_(torch.tensor(log_sigmas))
    pairs = [(mu, math.exp(log_sigma)) for mu, log_sigma in zip(mus, log_sigmas, strict=True)]
    prior = -mp.log(1.5)
    return net, sum(divergence(truncated(mu, s, -1.0, 0.5), lambda x: prior, [-1.0, 0.5]) for mu, s in pairs)


def two_weights(method):
    net = vd.convert(nn.Linear(2, 1, bias=False), method)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([MEANS]))
        net.noise.log_std.copy_(torch.tensor([LOG_STDS]))
    return net


def weights(method, log_prior):
    spans = [(mean, math.exp(log_std)) for mean, log_std in zip(MEANS, LOG_STDS, strict=True)]
    total = sum(divergence(gaussian(m, s), log_prior, [m - 12 * s, -0.5, m, 0.5, m + 12 * s]) for m, s in spans)
    return two_weights(method), total


STUDENT = scipy.stats.t(1.6, scale=math.sqrt(0.25))
CASES = {
    "dependent": dependent_gate,
    "beta": beta_gate,
    "truncated": log_normal_gate,
    "student": lambda: weights(vd.StudentT(a=0.8, b=0.2), lambda w: STUDENT.logpdf(float(w))),
    "bounded": lambda: weights(vd.VBD(low=4.0, high=9.0), gaussian(0, 2.0)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_price_of_a_method_is_the_integral_for_its_own_fields(case):
    net, expected = CASES[case]()
    assert vd.kl(net).item() == pytest.approx(expected, rel=2e-4)


def test_forms_and_hyper_priors_reach_the_price():
    mean, log_std = torch.tensor([MEANS]), torch.tensor([LOG_STDS])
    for method, expected in (
        (vd.SparseVD(form="sigmoid"), F.log_uniform_kl(mean, log_std, form="sigmoid")),
        (vd.GammaARD(a=0.8, b=0.1, max_log_std=0.0), F.gamma_ard_kl(mean, log_std, 0.8, 0.1)),
    ):
        torch.testing.assert_close(vd.kl(two_weights(method)), expected.sum(), rtol=1e-6, atol=0)
    for form in ("exact", "sigmoid", "cubic"):
        net = vd.convert(nn.Linear(2, 1), vd.VariationalDropout(init_log_alpha=-2.0, form=form))
        expected = 2 * F.log_uniform_kl_from_log_alpha(torch.tensor(-2.0), form=form)
        torch.testing.assert_close(vd.kl(net), expected, rtol=1e-6, atol=0)


def test_the_score_of_a_truncated_gate_is_that_of_its_own_interval():
    net = vd.convert(nn.Linear(3, 2), vd.StructuredBP(low=-1.0, high=0.5, init_log_sigma=0.0))
    log_density = truncated(0.0, 1.0, -1.0, 0.5)
    first, second = (mp.quad(lambda x, k=k: mp.exp(k * x + log_density(x)), [-1.0, 0.5]) for k in (1, 2))
    score = net.gate.method.score(net.gate, net.weight)[0].item()
    assert score == pytest.approx(float(first / mp.sqrt(second - first**2)), rel=1e-6)


def test_a_gaussian_gate_dies_at_its_log_alpha():
    net = vd.convert(nn.Linear(3, 2), vd.StructuredVBD(threshold=1.0))
    with torch.no_grad():
        net.gate.center.fill_(1.0)
        net.gate.log_std.copy_(torch.tensor([0.1, 0.4, 0.5]))
    vd.prune(net)
    assert net.gate.mask.tolist() == [True, True, False]


def test_the_usual_thresholds_are_those_of_the_papers():
    net = vd.convert(nn.Linear(2, 1, bias=False), vd.ARD())
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[0.0099, 0.0101]]))
    vd.prune(net)
    assert net.noise.mask.tolist() == [[False, True]]
    assert vd.StructuredBP().cutoff() == math.nextafter(1.0, 2.0)


def test_a_schedule_gives_factor_and_warm_up_to_the_objective():
    elbo, betas = Schedule(kl_factor=0.5, warmup_start=2, warmup_epochs=4).elbo(10), []
    for _ in range(6):
        elbo.step_epoch()
        betas.append(elbo.beta)
    assert betas == [0.0, 0.0, 0.0, 0.25, 0.5, 0.5]


@pytest.mark.parametrize("columns", [256, 257, 32768, 32769])
def test_sparse_storage_holds_at_the_ends_of_its_integers(columns, tmp_path):
    net = nn.Linear(columns, 3, bias=False)
    with torch.no_grad():
        net.weight.zero_()
        net.weight[:, -1], net.weight[1, 0] = 1.5, 2.0
    vd.save(net, tmp_path / "a", sparse=True)
    assert torch.equal(vd.load(tmp_path / "a", lambda: nn.Linear(columns, 3, bias=False)).weight, net.weight)


def test_the_variance_of_a_layer_is_formed_in_float32_under_autocast():
    x, mean = torch.rand(64, 784), torch.zeros(30, 784)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = lrt.output_moments(nn.functional.linear, x, mean, torch.full_like(mean, 1e-3), None)[1]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, x.square() @ torch.full((784, 30), 1e-3), rtol=1e-5, atol=0)


def test_a_float64_layer_keeps_its_digits_on_the_fast_path():
    net, x = vd.convert(nn.Linear(6, 4), vd.SparseVD(init_log_std=-1.0)).double(), torch.randn(3, 6).double()

    def run():
        with vd.noise(net, on=True, generator=torch.Generator().manual_seed(1)):
            return net(x)

    plain = run()
    vd.fast(net, variance="bfloat16", compiled=False)
    torch.testing.assert_close(run(), plain, rtol=1e-10, atol=1e-12)


def test_every_random_word_gives_a_finite_normal_number():
    share = fused._share_of_range(torch.tensor([0, 255, -1, -256, 2**31 - 1, -(2**31)], dtype=torch.int32))
    assert (share > 0).all() and (share <= 1).all() and share.log().isfinite().all()


def test_each_image_has_an_adversarial_budget_of_its_own_in_a_convolution():
    net = vd.convert(nn.Conv2d(1, 1, 1, bias=False), vd.AdversarialDropout(rate=0.0, budget=0.25))
    net.noise.begin()
    net(torch.stack([torch.full((1, 2, 2), 100.0), torch.ones(1, 2, 2)]))
    net.noise.turn([-torch.ones_like(net.noise.first[0].product)])
    assert (net.noise.second[0] == 0).flatten(1).sum(1).tolist() == [1, 1]


def test_masks_of_surgery_become_rare_with_the_power():
    method, changed = vd.DynamicNetworkSurgery(gamma=1.0, power=3.0), 0
    net = vd.convert(nn.Linear(2, 1, bias=False), method)
    for _ in range(2000):
        net.noise.steps.fill_(1)  # a probability of an eighth
        net.noise.mask = None
        method.step(net.noise, net.weight, 0)
        changed += net.noise.mask is not None
    assert abs(changed / 2000 - 1 / 8) < 5 * (7 / 64 / 2000) ** 0.5


def test_the_peak_of_a_dependent_gate_rises_at_once():
    net = vd.convert(vd.convert(nn.Linear(2, 2), vd.BetaBernoulli()), vd.DependentBetaBernoulli(momentum=0.01))
    net.gate.peak.fill_(-5.0)
    net.gate._record(torch.tensor([[2.0, -5.0]]))
    assert net.gate.peak.tolist() == [2.0, -5.0]


def test_the_word_lstm_reads_every_word():
    net = build_net("word-lstm-8", input_shape=(5,), num_classes=2).eval()
    first, *others = (net(torch.tensor([x])) for x in ([1, 2, 3, 4, 5], [1, 2, 3, 4, 6], [9, 2, 3, 4, 5]))
    assert not any(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("name", ["lenet-300-100", "lenet-500-300", "mlp-50", "conv-small", "lenet-5"])
def test_nets_are_not_linear(name):
    torch.manual_seed(0)
    net, x = build_net(name, input_shape=(1, 28, 28), num_classes=10).eval(), torch.randn(4, 1, 28, 28)
    assert ((net(x) + net(-x)) / 2 - net(0 * x)).abs().max() > 1e-5 * net(x).abs().max()


def test_dense_lenets_start_as_their_authors_do():
    net = build_net("lenet-300-100", input_shape=(1, 28, 28), num_classes=10)
    assert net[1].weight.std().item() == pytest.approx(0.01, rel=0.02) and not net[1].bias.any()


def test_long_texts_keep_their_first_words_and_rare_words_share_a_number(monkeypatch):
    monkeypatch.setattr(text, "LONGEST", 3)
    monkeypatch.setattr(text, "VOCABULARY", 4)
    found = text.classified(["a a b b c d"], ["d a b a"])
    assert [tensor.tolist() for tensor in found] == [[[2, 2, 3]], [[1, 2, 3]]]


def test_test_labels_are_drawn_at_random_too():
    assert (load_data("digits:random-labels").test.y == load_data("digits").test.y).float().mean() < 0.2
