"""Shrinking while training: same quiet outputs, an optimiser cut to the right rows, and training that goes on."""

from copy import deepcopy

import pytest
import torch
from exactness import TwoHeads, TwoLayers, assert_same, parameters, randomised
from test_gated import METHODS, NETS, lenet
from test_recurrent_cuts import KINDS, WORDS, Tagger
from torch import nn
from torch.nn import functional as F

import vardrop as vd
from vardrop.errors import ConversionError, GraphError, InvalidValueError

X = torch.randn(16, 2, 8, 8, generator=torch.Generator().manual_seed(3))
Y = torch.arange(16) % 3
WEIGHT_METHODS = {
    "sparse-vd": vd.SparseVD(train_clip=True),
    "ard": vd.ARD(),
    "vbd-output": vd.VBD(alpha="output"),
    "vbd-input": vd.VBD(alpha="input"),
    "type-b": vd.VariationalDropout(alpha="weight"),
}


def trained(model, x, y, *, optimizer=None, steps=2):
    """`model` after some steps, with its optimiser, whose state then differs from row to row."""
    optimizer = optimizer or torch.optim.Adam(vd.parameter_groups(model), lr=1e-3)
    elbo = vd.ELBO(num_data=len(x))
    elbo.step_epoch()
    model.train()
    for _ in range(steps):
        out = model(x)
        loss = elbo(model, nn.functional.cross_entropy(out.reshape(len(y), -1), y))
        assert torch.isfinite(loss)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@torch.no_grad()
def kill(model):
    """Marks at random what is dead, whole units among it, so that all sites bear marks."""
    for site in vd.sites(model):
        noise, weight = site.noise, site.weight
        mask = torch.rand(noise.mask_shape(weight)) < (0.6 if site.counts == "units" else 0.9)
        mask[1::3] = False
        if site.counts == "weights":
            mask[:, 1::3] = False
        mask[(0,) * mask.dim()] = True
        noise.mask = mask
    return model.eval()


def check(model, x, y, optimizer):
    """Shrinks `model` and sees that nothing else changes, that it is valid, and that it trains on."""
    kill(model).double()
    for state in optimizer.state.values():
        for key, value in state.items():
            state[key] = value.double() if key != "step" and isinstance(value, torch.Tensor) else value
    inputs = x.double() if x.is_floating_point() else x
    with torch.no_grad():
        expected = model(inputs)
    before, names = parameters(model), [site.name for site in vd.sites(model)]
    done = vd.shrink(model, optimizer, inputs[:2])
    assert (done.parameters_before, done.parameters_after) != (before, before)
    assert parameters(model) < before and [site.name for site in vd.sites(model)] == names
    with torch.no_grad():
        torch.testing.assert_close(model(inputs), expected, rtol=0, atol=1e-10 * float(expected.abs().max() + 1))
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert set(held) == set(model.parameters()) and len(held) == len(set(held))
    assert set(optimizer.state) <= set(held)
    for parameter, state in optimizer.state.items():
        assert all(value.shape == parameter.shape for key, value in state.items() if key != "step")
    small = vd.compact(model, inputs[:2])
    assert_same(model, small, inputs, 1e-10)
    model.float()
    for state in optimizer.state.values():
        for key, value in state.items():
            state[key] = value.float() if isinstance(value, torch.Tensor) else value
    vd.unprune(model)
    trained(model, x, y, optimizer=optimizer)
    assert torch.isfinite(vd.kl(model))
    return done


@pytest.mark.parametrize("method", [*METHODS.values(), *WEIGHT_METHODS.values()], ids=[*METHODS, *WEIGHT_METHODS])
@pytest.mark.parametrize("build", NETS.values(), ids=NETS)
def test_quiet_outputs_stay_and_training_goes_on(build, method):
    model = randomised(build())
    stages = [vd.BetaBernoulli(init_a=2.0), method] if method == METHODS["dependent"] else [method]
    for stage in stages:
        vd.convert(model, stage)
    optimizer = trained(model, X, Y)
    check(model, X, Y, optimizer)


@pytest.mark.parametrize("kind", KINDS)
def test_recurrent_layers_and_embeddings_shrink(kind):
    model = vd.convert(Tagger(kind), {"table": (vd.StructuredBP(), vd.ARD()), "*": vd.ARD()})
    y = torch.arange(15) % 4
    with torch.no_grad():
        for name, parameter in model.rnn.named_parameters():
            if "weight_hh" in name and "noise" not in name:
                parameter.view(-1, 6, 6)[:, torch.arange(6) != 2, 2] = 0
        model.head.weight[:, 2] = 0
    optimizer = torch.optim.Adam(model.parameters(), lr=0.0)

    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, words):
            return self.inner(words).flatten(0, 1)

    flat = Flat()
    trained(flat, WORDS, y, optimizer=optimizer)
    done = vd.shrink(flat, optimizer, WORDS)
    assert model.rnn.hidden_size == 5 and done["inner.head"].inputs == (6, 5)
    assert model.rnn._modules["noise"]["weight_hh_l0"].log_std.shape == model.rnn.weight_hh_l0.shape
    trained(flat, WORDS, y, optimizer=optimizer)


def dense(*, method=None):
    """Six hidden units, of which 1, 2 and 4 are dead by the rule: 1 reads nothing, no one reads 2, 4 is both."""
    net = nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn_like(parameter).sign() * (1 + torch.rand_like(parameter)))
        net[0].weight[[1, 4]] = 1e-4
        net[2].weight[:, [2, 4]] = 1e-4
    return vd.convert(net, method or vd.ARD(init_log_std=-3.0))


LIVING = torch.tensor([0, 3, 5])
OPTIMIZERS = {
    "adam": lambda groups: torch.optim.Adam(groups, amsgrad=True),
    "fused-adamw": lambda groups: torch.optim.AdamW(groups, fused=True),
    "sgd": lambda groups: torch.optim.SGD(groups, lr=1e-3, momentum=0.9),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=1e-4),
    "plain-sgd": lambda groups: torch.optim.SGD(groups, lr=1e-3),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_optimiser_keeps_the_rows_of_living_units_in_the_same_groups(make):
    net = dense()
    x = torch.randn(8, 3)
    optimizer = trained(net, x, torch.arange(8) % 2, optimizer=make(vd.parameter_groups(net, lr=1e-5)), steps=3)
    net(x).sum().backward()
    rows = {"0.weight": 0, "0.bias": 0, "0.noise.log_std": 0, "2.weight": 1, "2.noise.log_std": 1}
    named = dict(net.named_parameters())
    kept = {name: named[name] for name in named if name not in rows}
    places = [
        [names for p in group["params"] for names, q in named.items() if p is q] for group in optimizer.param_groups
    ]
    state = {
        name: {key: value.clone() for key, value in optimizer.state[parameter].items() if value is not None}
        for name, parameter in named.items()
    }
    before = {name: (parameter.detach().clone(), parameter.grad.clone()) for name, parameter in named.items()}
    vd.shrink(net, optimizer, x[:1])
    named = dict(net.named_parameters())
    assert all(named[name] is parameter for name, parameter in kept.items())
    assert places == [
        [names for p in group["params"] for names, q in named.items() if p is q] for group in optimizer.param_groups
    ]
    for name, parameter in named.items():

        def cut(tensor, name=name):
            return tensor.index_select(rows[name], LIVING) if name in rows and tensor.dim() else tensor

        if name != "2.bias":
            assert torch.equal(parameter, cut(before[name][0])), name
        assert torch.equal(parameter.grad, cut(before[name][1])), name
        assert state[name].keys() <= optimizer.state[parameter].keys()
        for key, value in state[name].items():
            assert torch.equal(optimizer.state[parameter][key], cut(value)), (name, key)
    optimizer.step()


def test_a_constant_moves_into_the_bias_by_the_marked_weights_alone():
    net = dense()
    with torch.no_grad():
        net[2].weight[0, 1] = 1e-4
    weight, bias, below = (t.detach().double() for t in (net[2].weight, net[2].bias, net[0].bias))
    optimizer = torch.optim.Adam(net.parameters())
    vd.shrink(net, optimizer, torch.randn(1, 3))
    expected = bias + torch.stack([torch.zeros(()).double(), weight[1, 1] * torch.tanh(below[1])])
    torch.testing.assert_close(net[2].bias.detach().double(), expected, rtol=1e-6, atol=0)


def test_without_marks_the_rule_decides_and_pruning_later_gives_the_same_net():
    net, x = dense(), torch.randn(9, 3)
    unbroken = vd.compact(_pruned(net), x)
    optimizer = torch.optim.Adam(net.parameters())
    cost = vd.kl(net).item()
    vd.shrink(net, optimizer, x)
    assert all(site.noise.mask is None for site in vd.sites(net)) and vd.kl(net).item() < cost
    assert_same(unbroken, _pruned(net), x, 1e-6)
    assert parameters(vd.compact(net, x)) == parameters(unbroken)
    again = vd.shrink(net, optimizer, x)
    assert again.parameters_before == again.parameters_after


def _pruned(net):
    copy = deepcopy(net)
    vd.prune(copy)
    return copy.eval()


def test_a_layer_without_a_bias_keeps_the_constants_before_it():
    net = nn.Sequential(nn.Linear(3, 6), nn.Sigmoid(), nn.Linear(6, 2, bias=False))
    vd.convert(net, vd.ARD(threshold=1e-3))
    with torch.no_grad():
        net[0].weight[:4] = 0
        net[2].weight[:, :2] = 0
    optimizer = torch.optim.Adam(net.parameters())
    done = vd.shrink(net, optimizer, torch.randn(1, 3))
    assert net[0].out_features == 4 and net[2].bias is None and "no bias" in str(done)


def test_a_shrunk_net_is_stored_and_loaded(tmp_path):
    net = vd.convert(randomised(lenet()), (vd.BetaBernoulli(init_a=2.0), vd.VBD(alpha="output")))
    optimizer = trained(net, X, Y)
    kill(net)
    vd.shrink(net, optimizer, X[:2])
    vd.save(net, tmp_path / "net")
    again = vd.load(tmp_path / "net", lenet).eval()
    assert torch.equal(again(X), net(X))
    for here, there in zip(vd.sites(net), vd.sites(again), strict=True):
        plain = (bool, int, float, str, tuple)
        attributes = [
            {key: value for key, value in vars(site.noise).items() if isinstance(value, plain) and key != "training"}
            for site in (here, there)
        ]
        assert attributes[0] == attributes[1]
    torch.manual_seed(1)
    noisy = net.train()(X)
    torch.manual_seed(1)
    assert torch.equal(again.train()(X), noisy)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_fast_path_goes_on(compiled):
    net = vd.fast(dense(), variance="float32", compiled=compiled)
    x, y = torch.randn(8, 3), torch.arange(8) % 2
    optimizer = trained(net, x, y)
    vd.shrink(net, optimizer, x)
    trained(net, x, y, optimizer=optimizer)
    elbo = vd.ELBO(num_data=1)
    elbo(net, net(x).sum())
    torch.testing.assert_close(elbo.kl, vd.kl(vd.fast(net, on=False)).detach(), rtol=1e-5, atol=0)


def test_the_order_of_dimensions_in_memory_stays():
    net = vd.convert(lenet(), vd.BetaBernoulli(init_a=2.0)).to(memory_format=torch.channels_last)
    optimizer = trained(net, X, Y)
    kill(net)
    vd.shrink(net, optimizer, X[:2])
    weight = net[3].weight
    for tensor in (weight, optimizer.state[weight]["exp_avg"]):
        assert tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous()


def test_nothing_is_cut_where_a_layer_would_be_left_without_a_living_weight():
    net = dense()
    with torch.no_grad():
        net[2].weight.fill_(1e-4)
        net[2].weight[0, 1] = 1.0
    optimizer, shape = torch.optim.Adam(net.parameters()), net[0].weight.shape
    done = vd.shrink(net, optimizer, torch.randn(1, 3))
    assert net[0].weight.shape == shape and "nothing is cut" in str(done) and "'0.weight'" in str(done)


def test_a_collapse_by_the_rule_is_not_made_final():
    net = vd.convert(lenet(), vd.BetaBernoulli(init_a=2.0))
    with torch.no_grad():
        net[7].gate.raw_a.fill_(-10.0)
    optimizer, size = torch.optim.Adam(net.parameters()), parameters(net)
    done = vd.shrink(net, optimizer, X[:2])
    assert parameters(net) == done.parameters_after == size
    assert "nothing is cut: layer '7.gate': all 40 units are dead" in str(done)


def test_what_cannot_shrink_is_refused_by_name_and_unharmed():
    x = torch.randn(2, 3)
    net = dense()
    state = {name: value.clone() for name, value in net.state_dict().items()}
    adam = torch.optim.Adam(net.parameters())
    with pytest.raises(ConversionError, match="no noisy layer"):
        vd.shrink(nn.Linear(3, 2), adam, x)
    with pytest.raises(ConversionError, match="DataParallel"):
        vd.shrink(nn.DataParallel(net), adam, x)
    with pytest.raises(InvalidValueError, match="optimizer Adam holds no parameter"):
        vd.shrink(net, torch.optim.Adam(nn.Linear(2, 2).parameters()), x)
    with pytest.raises(InvalidValueError, match="on_unknown='maybe'"):
        vd.shrink(net, adam, x, on_unknown="maybe")
    newton = torch.optim.LBFGS(net.parameters())
    for _ in range(2):
        newton.step(lambda: (newton.zero_grad(), net(x).square().sum().backward(), net(x).square().sum())[2])
    net.load_state_dict(state)
    with pytest.raises(InvalidValueError, match="LBFGS keeps 'd' for '0.weight'"):
        vd.shrink(net, newton, x)
    adafactor = torch.optim.Adafactor(net.parameters())
    net(x).sum().backward()
    adafactor.step()
    net.load_state_dict(state)
    with pytest.raises(InvalidValueError, match="Adafactor keeps 'row_var' for '0.weight'"):
        vd.shrink(net, adafactor, x)
    with pytest.raises(GraphError, match="no rule"):
        vd.shrink(nn.Sequential(net, Unknown()), adam, x)
    with torch.no_grad():
        net[0].weight[0, 0] = torch.nan
    with pytest.raises(InvalidValueError, match="layer '0': its weights or noise are not finite"):
        vd.shrink(net, adam, x)
    net.load_state_dict(state)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert [parameter for group in adam.param_groups for parameter in group["params"]] == list(net.parameters())


class Unknown(nn.Module):
    def forward(self, x):
        return torch.special.i0(x)


@pytest.mark.parametrize("method", [vd.MagnitudePruning(), vd.DynamicNetworkSurgery(), vd.VarianceNetwork()])
def test_methods_whose_units_are_never_dead_for_good_are_refused(method):
    net = dense(method=method)
    advice = "by its mean$" if method.by_ensemble else "call vardrop.compact after the training$"
    with pytest.raises(ConversionError, match=f"layer '0': {type(method).__name__} .*{advice}"):
        vd.shrink(net, torch.optim.Adam(net.parameters()), torch.randn(2, 3))


def test_a_layer_that_runs_in_training_alone_is_not_cut_from():
    net = vd.convert(TwoHeads(16), vd.ARD())
    with torch.no_grad():
        net.body.weight[:9] = 0.0
    optimizer = torch.optim.Adam(net.parameters())
    with pytest.raises(GraphError, match="layer 'aid' runs in training but not in eval mode"):
        vd.shrink(net, optimizer, torch.randn(2, 4))
    assert net.body.weight.shape == (16, 4) and [y.shape[1] for y in net(torch.randn(2, 4))] == [3, 5]


def test_what_describes_a_layer_as_a_whole_stays():
    model = vd.convert(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), vd.SoftWeightSharing()).eval()
    for site in vd.sites(model):
        site.noise.mask = torch.ones_like(site.weight, dtype=torch.bool)
    model[0].noise.mask[:5] = False
    x = torch.randn(4, 6)
    before = model(x)
    vd.shrink(model, torch.optim.Adam(model.parameters()), x)
    assert model[0].out_features == 3 and model[0].noise.means.shape == (16,)
    torch.testing.assert_close(model(x), before)


class NormedHeads(TwoHeads):
    """Batch-norm in training refuses a batch of one."""

    def __init__(self, width):
        super().__init__(width)
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x):
        y = self.norm(self.body(x))
        return (self.head(y), self.aid(y)) if self.training else self.head(y)


def test_a_layer_that_runs_in_training_alone_is_seen_on_a_batch_of_one_too():
    net = vd.convert(NormedHeads(16), vd.ARD())
    with torch.no_grad():
        net.body.weight[:9], net.head.weight[:, :9] = 0.0, 0.0
    with pytest.raises(GraphError, match="layer 'aid' runs in training but not in eval mode"):
        vd.shrink(net, torch.optim.Adam(net.parameters()), torch.randn(1, 4))


def test_several_optimisers_are_cut_together_and_one_alone_is_refused():
    net = vd.convert(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)), vd.ARD())
    x = torch.randn(3, 4)
    own = torch.optim.AdamW([parameter for name, parameter in net.named_parameters() if "noise" not in name])
    noise = torch.optim.SGD([parameter for name, parameter in net.named_parameters() if "noise" in name], lr=0.1)
    (net(x).square().sum() + vd.kl(net)).backward()
    own.step()
    with torch.no_grad():
        net[0].weight[:3] = 0.0
    with pytest.raises(
        InvalidValueError, match="'0.noise.log_std' loses units but is in no optimizer given.*as a list"
    ):
        vd.shrink(net, own, x)
    assert net[0].out_features == 6
    vd.shrink(net, [own, noise], x)
    held = {parameter for each in (own, noise) for group in each.param_groups for parameter in group["params"]}
    assert held == set(net.parameters()) and net[0].out_features == 3
    assert own.state[net[0].weight]["exp_avg"].shape == (3, 4)


class Functional(TwoLayers):
    """Reads the weight of its first layer by hand, its noise passed over, and adds a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("shift", torch.randn(2))

    def forward(self, x):
        return F.linear(F.linear(x, self.first.weight, self.first.bias).sigmoid(), self.second.weight, self.shift)


def test_a_noisy_weight_that_is_read_outside_its_layer_is_refused():
    net = vd.convert(Functional(), vd.ARD(), include="first")
    with torch.no_grad():
        net.first.weight[:3], net.first.weight[3:] = 0.005, 1.0
    vd.prune(net)
    with pytest.raises(GraphError, match="the weight of layer 'first' is also used outside its layer"):
        vd.shrink(net, torch.optim.Adam(net.parameters()), 100 * torch.randn(5, 4))


def test_constants_move_into_a_bias_that_is_a_buffer():
    net = nn.Sequential(vd.convert(nn.Linear(4, 4), vd.ARD()), Functional()).eval()
    with torch.no_grad():
        net[1].first.weight[:3] = 0.0
    x = torch.randn(5, 4)
    before = net(x)
    vd.shrink(net, torch.optim.Adam(net.parameters()), x)
    assert net[1].second.in_features == 3
    torch.testing.assert_close(net(x), before)
