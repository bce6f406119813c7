"""The fast path held to the plain reference: values and gradients with the same noise, statistics, and behaviour."""

import copy
import importlib
import math
import pickle
import warnings

import pytest
import scipy.stats
import torch
from cases import LAYERS
from torch import nn

import vardrop as vd
from vardrop import functional as F
from vardrop import fused, lrt
from vardrop.elbo import kl
from vardrop.errors import ConversionError, FastPathWarning, InvalidValueError
from vardrop.noise import AdditiveNoise, Layout
from vardrop.zoo import build_net, load_data

fast_room = importlib.import_module("vardrop.fast")
compiler = pytest.mark.usefixtures("has_compiler")


@pytest.fixture(scope="session")
def has_compiler():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FastPathWarning)
        if not fast_room._can_compile(torch.device("cpu")):
            pytest.skip("torch.compile needs a C++ compiler")


METHODS = {
    "sparse-vd": vd.SparseVD(init_log_std=-1.0),
    "clipped-ard": vd.ARD(init_log_std=-1.0, init_spread=2.0, rule="log_alpha", train_clip=True),
    "vbd-bounded": vd.VBD(init_log_std=-1.0, low=0.01, high=1.0),
}


def run(net, x, seed=3):
    """Output, KL, and the gradients of both by input and parameters, under noise from `seed`."""
    x = x.clone().requires_grad_(x.is_floating_point())
    with vd.noise(net, on=True, generator=torch.Generator().manual_seed(seed)):
        output = net(x)
        price = kl(net)
    weights = torch.linspace(-1.0, 1.0, output.numel(), dtype=output.dtype).view(output.shape)
    leaves = [leaf for leaf in (x, *net.parameters()) if leaf.requires_grad]
    found = torch.autograd.grad((output * weights).sum() + 0.1 * price, leaves)
    return output, price, *found


def close(left, right, tolerance):
    for ours, plain in zip(left, right, strict=True):
        assert (ours - plain).norm() <= tolerance * (1e-6 + plain.norm())


def test_threefry_gives_the_published_answers():
    zero, ones = torch.zeros(2, dtype=torch.int32), torch.full((2,), -1, dtype=torch.int32)
    for rounds, words, answer in (
        (13, zero, (0x9D1C5EC6, 0x8BD50731)),
        (13, ones, (0xFD36D048, 0x2D17272C)),
        (20, zero, (0x6B200159, 0x99BA4EFE)),
        (20, ones, (0x1CB996FC, 0xBB002BE7)),
    ):
        found = fused.threefry(words[:1], words[1:], words, rounds)
        assert tuple(int(word) & 0xFFFFFFFF for word in found) == answer


def test_the_noise_is_standard_normal_and_without_memory():
    first = fused.normal(200_000, torch.tensor([1, 2], dtype=torch.int32)).double()
    other = fused.normal(200_000, torch.tensor([1, 3], dtype=torch.int32)).double()
    assert scipy.stats.kstest(first.numpy(), "norm").pvalue > 1e-3
    bound = 4.5 / math.sqrt(len(first))
    for left, right in ((first[1:], first[:-1]), (first[2:], first[:-2]), (first, other), (first**2 - 1, other**2 - 1)):
        assert abs(float((left * right).mean())) < 2 * bound
    assert abs(float((first**4).mean()) - 3.0) < bound * math.sqrt(96)
    assert torch.equal(first, fused.normal(200_000, torch.tensor([1, 2], dtype=torch.int32)).double())


@pytest.mark.parametrize("layer", LAYERS)
def test_uncompiled_it_is_the_reference_with_the_same_noise(layer):
    case = LAYERS[layer]
    torch.manual_seed(0)
    net = vd.convert(case.net(), vd.SparseVD(init_log_std=-1.0))
    plain = run(net, case.input())
    close(run(vd.fast(net, variance="float32", compiled=False), case.input()), plain, 1e-5)
    close(run(vd.fast(net, variance="bfloat16", compiled=False), case.input()), plain, 2e-2)
    close(run(vd.fast(net, on=False), case.input()), plain, 0.0)


@compiler
@pytest.mark.parametrize("name", METHODS)
def test_the_joined_pass_is_the_reference_with_a_mask_and_without(name):
    torch.manual_seed(0)
    weight = torch.randn(7, 5, dtype=torch.float64) * 0.1
    weight[0, 0] = 0.0
    noise = METHODS[name].noise(weight, Layout())
    noise.method = METHODS[name]
    for mask in (None, torch.rand(7, 5) > 0.3):
        noise.mask = mask
        leaf = weight.clone().requires_grad_()
        noise.double()

        def moments(joined, leaf=leaf):
            if joined:
                return fused.weigh(leaf, noise.log_std, noise.mask, noise.method, noise.clip_log_alpha, torch.float64)
            return *noise.moments(leaf), noise.method.kl(noise, leaf)

        def everything(joined, leaf=leaf):
            found = moments(joined)
            total = sum((part * (2.0 + index)).sum() for index, part in enumerate(found))
            return *found, *torch.autograd.grad(total, [leaf, noise.log_std])

        close(everything(True), everything(False), 1e-10)


@compiler
def test_gradcheck_in_float64():
    torch.manual_seed(0)
    mean = (torch.randn(3, 4, dtype=torch.float64)).requires_grad_()
    log_std = torch.full((3, 4), -0.5, dtype=torch.float64).requires_grad_()
    x = torch.randn(2, 4, dtype=torch.float64).requires_grad_()

    def layer(x, mean, log_std):
        noisy, variance, price = fused.weigh(mean, log_std, None, vd.ARD(), None, torch.float64)
        generator = torch.Generator().manual_seed(5)
        output = fused.local_sample(nn.functional.linear, x, noisy, variance, None, compiled=False, generator=generator)
        return output, price

    assert torch.autograd.gradcheck(layer, (x, mean, log_std))


def replay(kernel, channels_last, counts):
    """The compiled draws of `kernel` in place of torch's own; appends to `counts` how many each call draws."""

    def draw(*shape, device=None, dtype=torch.float32, generator=None):
        shape = shape if isinstance(shape[0], int) else tuple(shape[0])
        counts.append(math.prod(shape))
        flat = kernel(counts[-1], fused.draw_key(torch.device("cpu"), generator)).to(dtype)
        if channels_last and len(shape) == 4:
            return flat.view(shape[0], shape[2], shape[3], shape[1]).permute(0, 3, 1, 2)
        return flat.view(shape)

    return draw


@compiler
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_compiled_sample_is_the_reference_with_the_same_noise(channels_last, monkeypatch):
    """The compiled draws are put into the plain reference in place of its own."""
    monkeypatch.setattr(fused, "WORTH_COMPILING", 1)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    x = torch.randn(4, 3, 6, 6)
    if channels_last:
        net, x = net.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    net = vd.fast(vd.convert(net, vd.SparseVD(init_log_std=-2.0)), variance="float32")
    quick = run(net, x)

    monkeypatch.setattr(lrt.torch, "randn", replay(fused.normal, channels_last, []))
    close(quick, run(vd.fast(net, on=False), x), 1e-5)


@compiler
def test_its_outputs_have_the_moments_of_the_layer():
    torch.manual_seed(0)
    net = vd.fast(vd.convert(nn.Linear(40, 6), vd.SparseVD(init_log_std=-1.0)), variance="bfloat16")
    x = torch.randn(1, 40)
    mean, variance = vd.functional.linear_moments(x, net.weight, net.noise.log_std, net.bias)
    draws = net(x.expand(50_000, 40)).double()
    spread = variance.sqrt() / math.sqrt(len(draws))
    assert ((draws.mean(0) - mean).abs() < 5 * spread).all()
    bfloat16, sampling = 2.0**-8, 5 * math.sqrt(2 / len(draws))
    assert ((draws.var(0) / variance - 1).abs() < 2 * bfloat16 + sampling).all()


@compiler
def test_the_same_seed_gives_the_same_run():
    def weights():
        torch.manual_seed(1)
        net = vd.fast(vd.convert(nn.Linear(30, 20), vd.ARD()))
        optimizer = torch.optim.Adam(net.parameters())
        for _ in range(3):
            (net(torch.ones(8, 30)).square().sum() + kl(net)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return net.weight.detach().clone()

    assert torch.equal(weights(), weights())


@compiler
def test_backward_through_layer_and_kl_may_be_apart():
    torch.manual_seed(0)
    net = vd.fast(vd.convert(nn.Linear(6, 4), vd.SparseVD(init_log_std=-1.0)))
    x = torch.randn(3, 6)

    def gradients(apart):
        net.zero_grad()
        torch.manual_seed(2)
        loss, price = net(x).square().sum(), kl(net)
        if apart:
            price.backward()
            loss.backward()
        else:
            (loss + price).backward()
        return net.weight.grad.clone(), net.noise.log_std.grad.clone()

    close(gradients(True), gradients(False), 1e-6)


@compiler
def test_the_kl_found_on_the_way_is_handed_out_once_and_never_stale():
    torch.manual_seed(0)
    net = vd.fast(vd.convert(nn.Linear(6, 4), vd.ARD()))
    x = torch.randn(3, 6)
    net(x)
    first, second = kl(net), kl(net)
    assert first.item() == pytest.approx(second.item(), rel=1e-5)
    net(x)
    with torch.no_grad():
        net.weight.mul_(3.0)
    fresh = kl(net)
    assert fresh.item() == pytest.approx(kl(vd.fast(copy.deepcopy(net), on=False)).item(), rel=1e-6)
    net(x)
    vd.prune(net, threshold=0.2)
    marked = kl(net).item()
    assert marked < fresh.item()
    net(x)
    net.noise.mask[:] = False
    assert kl(net).item() == 0.0


@compiler
def test_the_kl_after_a_step_is_that_of_the_new_parameters_also_where_the_optimiser_tells_no_version():
    net = vd.fast(vd.convert(nn.Linear(6, 4), vd.ARD()))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1, fused=True)
    net(torch.randn(3, 6)).sum().backward()
    optimizer.step()
    assert kl(net).item() == pytest.approx(kl(vd.fast(copy.deepcopy(net), on=False)).item(), rel=1e-6)


@compiler
def test_an_additive_variance_network_takes_the_fast_path():
    net = vd.convert(nn.Linear(40, 6), vd.VarianceNetwork(parameterisation="additive"))
    x = torch.randn(5, 40)
    plain = run(net, x)
    found = run(vd.fast(net, variance="float32"), x)
    assert found[0].shape == plain[0].shape
    torch.testing.assert_close(found[1], plain[1])


@compiler
def test_a_weight_changed_before_its_backward_is_an_error():
    net = vd.fast(vd.convert(nn.Linear(6, 4), vd.ARD()))
    loss = net(torch.randn(3, 6)).sum()
    with torch.no_grad():
        net.weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation|changed in place"):
        loss.backward()


@compiler
def test_a_method_of_ones_own_on_the_base_class_takes_the_fast_path():
    class Mine(vd.Method):
        def noise(self, weight, layout):
            return AdditiveNoise(weight, -3.0)

    net = vd.fast(vd.convert(nn.Linear(6, 4), Mine()))
    x = torch.randn(3, 6)
    net(x).sum().backward()
    torch.testing.assert_close(net.weight.grad, x.sum(dim=0).expand(4, 6))


@compiler
def test_copies_pickles_and_state_after_a_pass():
    net = vd.fast(vd.convert(nn.Linear(6, 4), vd.ARD()))
    net(torch.randn(3, 6))
    twin = copy.deepcopy(net)
    assert twin.noise.fast == net.noise.fast
    assert pickle.loads(pickle.dumps(net.noise)).log_std.shape == (4, 6)
    twin.load_state_dict(net.state_dict())
    assert set(net.state_dict()) == {"weight", "bias", "noise.log_std"}


@compiler
def test_autocast_and_whole_model_compilation_keep_working():
    torch.manual_seed(0)
    net = vd.fast(vd.convert(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2)), vd.SparseVD()))
    x = torch.randn(3, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = net(x)
    (output.float().sum() + kl(net)).backward()
    assert output.dtype == torch.bfloat16
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())
    whole = torch.compile(net, fullgraph=True)
    whole(x).sum().backward()


def test_without_a_compiler_it_says_so_and_works(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(fast_room, "compile_kernel", lambda kernel: broken)
    net = vd.convert(nn.Linear(6, 4), vd.ARD())
    with pytest.warns(FastPathWarning, match="runs uncompiled.*No working C"):
        vd.fast(net)
    net(torch.randn(3, 6)).sum().backward()
    assert net.noise.log_std.grad.isfinite().all()


def test_bad_input():
    with pytest.raises(ConversionError, match="convert"):
        vd.fast(nn.Linear(2, 2))
    with pytest.raises(InvalidValueError, match="variance='half'.*'auto', 'float32' or 'bfloat16'"):
        vd.fast(vd.convert(nn.Linear(2, 2), vd.ARD()), variance="half")


@pytest.mark.slow
def test_the_trained_error_is_that_of_the_reference_within_seed_noise():
    """LeNet-300-100 on the digits, four seeds on each path: the means differ by less than three of their errors."""
    data = load_data("digits")

    def trained(seed, quick):
        torch.manual_seed(seed)
        net = build_net("lenet-300-100", input_shape=data.input_shape, num_classes=data.num_classes)
        vd.convert(net, vd.SparseVD())
        if quick:
            vd.fast(net)
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
        elbo = vd.ELBO(len(data.train.y), warmup=vd.warmup.linear(epochs=60, start=20))
        for _ in range(100):
            elbo.step_epoch()
            for rows in torch.randperm(len(data.train.y)).split(100):
                loss = torch.nn.functional.cross_entropy(net(data.train.x[rows]), data.train.y[rows])
                elbo(net, loss).backward()
                optimizer.step()
                optimizer.zero_grad()
        net.eval()
        vd.prune(net)
        error = (net(data.test.x).argmax(1) != data.test.y).double().mean()
        return 100 * error, vd.summary(net).compression

    found = {quick: torch.tensor([trained(seed, quick) for seed in range(4)]) for quick in (False, True)}
    spread = torch.cat([values - values.mean(0) for values in found.values()]).square().sum(0).div(6).sqrt()
    gap = (found[True].mean(0) - found[False].mean(0)).abs()
    assert (found[True][:, 0] < 12).all(), "neither path may win by not learning"
    assert (gap < 3 * spread * math.sqrt(2 / 4)).all(), (found, spread)


@compiler
@pytest.mark.parametrize("kind", ["linear", "channels-last"])
def test_the_mixture_of_soft_weight_sharing_is_the_plain_one_in_one_pass(kind):
    host = nn.Linear(40, 30) if kind == "linear" else nn.Conv2d(6, 8, 3).to(memory_format=torch.channels_last)
    net = vd.convert(host, vd.SoftWeightSharing(components=5, zero_share=0.3)).double()
    with torch.no_grad():
        net.noise.log_precisions.add_(2.0 * torch.randn(6))
        net.noise.logits.add_(torch.randn(5))
    for pruned in (False, True):
        if pruned:
            assert 0.1 < vd.prune(net).alive / net.weight.numel() < 0.9
        leaves = [net.weight, *net.noise.parameters()]
        plain, quick = ((kl(net), *torch.autograd.grad(kl(net), leaves)) for on in (False, True) if vd.fast(net, on))
        close(quick, plain, 1e-9)
        assert quick[1].stride() == net.weight.stride()


@compiler
def test_the_compiled_mixture_is_finite_far_from_its_components():
    net = vd.fast(vd.convert(nn.Linear(40, 30), vd.SoftWeightSharing(components=5)))
    with torch.no_grad():
        net.weight.mul_(1e6)
        net.noise.log_precisions.fill_(20.0)
    value = kl(net)
    gradients = torch.autograd.grad(value, [net.weight, *net.noise.parameters()])
    assert all(found.isfinite().all() for found in (value, *gradients))


@compiler
@pytest.mark.slow
def test_the_compiled_truncated_log_normal_gate_is_the_plain_one():
    net = vd.convert(nn.Sequential(nn.Linear(30, 20), nn.Linear(20, 5)), vd.StructuredBP())
    with torch.no_grad():
        for site in vd.sites(net):
            site.noise.mu.copy_(torch.linspace(-30.0, 5.0, site.noise.units))
            site.noise.log_sigma.copy_(torch.linspace(1.0, -6.0, site.noise.units).flip(0).roll(3))
    x = torch.randn(8, 30)
    plain = run(net, x)
    assert all(found.isfinite().all() for found in plain)
    for wanted, found in zip(plain, run(vd.fast(net, variance="float32"), x), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(kl(net), plain[1].detach())
    other = vd.fast(vd.convert(nn.Linear(17, 5), vd.StructuredBP()), variance="float32")
    with torch.compiler.set_stance("fail_on_recompile"):  # two sizes were enough to compile for all
        run(other, torch.randn(8, 17))


def test_long_formulas_of_gates_are_compiled_where_the_fast_path_trains(monkeypatch):
    used = []
    monkeypatch.setattr(
        importlib.import_module("vardrop.noise.base"), "compile_kernel", lambda formula: used.append(formula) or formula
    )
    net, x = vd.convert(nn.Linear(3, 2), vd.StructuredBP()), torch.randn(4, 3)
    (net(x).sum() + kl(net)).backward()
    with torch.no_grad(), vd.noise(net, on=True):
        net.gate.fast = fused.Fast(torch.float32, compiled=True)
        net(x), kl(net)
    assert not used
    (net(x).sum() + kl(net)).backward()
    assert used == [vd.functional.truncated_lognormal_icdf, vd.functional.truncated_lognormal_kl]


def test_compiled_uniform_numbers_are_uniform_and_without_memory():
    key, other = torch.tensor([1, 2], dtype=torch.int32), torch.tensor([1, 3], dtype=torch.int32)
    first, second = fused.uniform(200_000, key).double(), fused.uniform(200_000, other).double()
    assert first.min() > 0.0 and first.max() < 1.0
    assert scipy.stats.kstest(first.numpy(), "uniform").pvalue > 1e-3
    for left, right in ((first[1:], first[:-1]), (first, second)):
        assert abs(float(((left - 0.5) * (right - 0.5)).mean())) < 4.5 / 12 / math.sqrt(len(left))


DRAWN = {
    "bernoulli": vd.BernoulliDropout(rate=0.3),
    "adversarial": vd.AdversarialDropout(rate=0.3),
}


@compiler
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("name", DRAWN)
def test_compiled_masks_of_dropout_are_the_plain_ones_with_the_same_noise(name, channels_last, monkeypatch):
    """The compiled draws are put into the plain reference in place of its own."""
    monkeypatch.setattr(fused, "WORTH_DRAWING", 1)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 36, 5))
    x = torch.randn(6, 3, 6, 6)
    if channels_last:
        net, x = net.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    net = vd.fast(vd.convert(net, DRAWN[name]), variance="float32")
    quick = run(net, x)
    assert not torch.equal(quick[0], run(net, x, seed=4)[0])
    counts = []
    monkeypatch.setattr(torch, "rand", replay(fused.uniform, channels_last, counts))
    plain = run(vd.fast(net, on=False), x)
    assert counts
    for ours, wanted in zip(quick, plain, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)


@compiler
def test_compiled_dropout_drops_at_its_rate_and_leaves_small_inputs_to_torch():
    net = vd.fast(vd.convert(nn.Linear(500, 2), vd.BernoulliDropout(rate=0.2)))
    factors = net.noise.factors(torch.Size((400, 500)), torch.ones(400, 500))
    assert factors.unique().tolist() == [0.0, pytest.approx(1.25)]
    assert abs(float((factors == 0.0).double().mean()) - 0.2) < 4.5 * math.sqrt(0.16 / 200_000)
    small = torch.ones(4, 500)
    torch.manual_seed(1)
    found = net.noise.factors(small.shape, small)
    torch.manual_seed(1)
    assert torch.equal(found, (torch.rand(4, 500) >= 0.2) / 0.8)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_frozen_layer_runs_on_the_fast_path(compiled):
    net = vd.convert(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2)), vd.SparseVD())
    net[0].requires_grad_(False)
    elbo = vd.ELBO(num_data=4)
    elbo(net, vd.fast(net, variance="float32", compiled=compiled)(torch.randn(4, 6)).square().mean()).backward()
    torch.testing.assert_close(elbo.kl, vd.kl(vd.fast(net, on=False)).detach())
    assert net[0].weight.grad is None and net[2].noise.log_std.grad.abs().sum() > 0


@pytest.mark.parametrize("fast", [False, True])
def test_convolutions_whose_variances_come_out_below_zero_give_numbers(fast):
    torch.manual_seed(0)
    net = vd.convert(nn.Sequential(nn.Conv2d(16, 32, 3, padding=1)), vd.SparseVD())
    if fast:
        vd.fast(net, compiled=False)
    x = (torch.randn(32, 16, 28, 28) - 2.0).relu()
    with warnings.catch_warnings(), torch.backends.mkldnn.flags(enabled=False):  # then others compute, by Winograd
        warnings.simplefilter("ignore")
        if nn.functional.conv2d(x.square(), torch.full((32, 16, 3, 3), 1e-4), padding=1).min() >= 0:
            pytest.skip("convolutions are done otherwise here")
        assert F.conv2d_moments(x, net[0].weight, net[0].noise.log_std, padding=1)[1].min() >= 0
        output = net(x)
        output.square().sum().backward()
    assert output.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in net.parameters())
