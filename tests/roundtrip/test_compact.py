"""From a converted, pruned model to a plain smaller one: the masked model and the compact one agree."""

import warnings
from copy import deepcopy

import pytest
import torch
from exactness import TwoHeads, assert_same, parameters, randomised
from torch import nn

import vardrop as vd
from vardrop.errors import CompactionWarning, GraphError, InvalidValueError
from vardrop.noise import InputGate
from vardrop.surgery.plan import Plan


def net():
    return randomised(
        nn.Sequential(
            nn.Conv2d(1, 6, 3, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.ConvTranspose2d(6, 5, 2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(5 * 25, 8),
            nn.Sigmoid(),
            nn.Linear(8, 3),
        )
    )


@torch.no_grad()
def pruned(model, method):
    model = vd.convert(model if method.follows is None else vd.convert(model, method.follows()), method).eval()
    for site in vd.sites(model):
        mask = torch.rand(site.noise.mask_shape(site.weight)) < 0.8
        mask[: len(mask) // 3] = False
        site.noise.mask = mask
    return model


@pytest.mark.parametrize("method", vd.methods().values(), ids=vd.methods())
def test_the_masked_model_and_the_compact_one_agree(method):
    model = pruned(net(), method()).double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(2, 1, 6, 6, dtype=torch.float64)
    small = vd.compact(model, x)
    assert_same(model, small, torch.randn(9, 1, 6, 6, dtype=torch.float64), 1e-10)
    gates = {site.name: site.noise.mask for site in vd.sites(model) if site.counts == "units"}
    if any(site.method == vd.ConcreteDropout() for site in vd.sites(model)):  # on the inputs of convolutions too
        expected = [gates["3.gate"].sum(), gates["6.gate"].view(5, 25).any(1).sum(), gates["8.gate"].sum(), 3]
    elif gates:
        norm = model[1]
        left = norm.bias - norm.running_mean * norm.weight / (norm.running_var + norm.eps).sqrt()
        first = gates["0.gate"] | (left > 0)  # what batch norm leaves of a dead channel, no transposed layer can take
        expected = [int(first.sum()), int(gates["3.gate"].sum()), int(gates["8.gate"].sum()), 3]
    elif method.by_ensemble:  # in its quiet pass all is constant
        expected = [1, 1, 1, 3]
    else:
        expected = [4, 5, 6, 3]
    assert [small[place].weight.shape[place == 3] for place in (0, 3, 6, 8)] == expected
    assert all(
        type(module).__module__.startswith("torch.nn") or isinstance(module, InputGate) for module in small.modules()
    )
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_dry_run_gives_the_plan_alone():
    model = pruned(net(), vd.ARD())
    x = torch.randn(2, 1, 6, 6)
    plan = vd.compact(model, x, dry_run=True)
    assert isinstance(plan, Plan)
    assert plan.parameters_after == parameters(vd.compact(model, x))
    assert plan.parameters_before == parameters(vd.strip(deepcopy(model)))


class Keeping(nn.Module):
    """Keeps what it computes, which torch does not copy."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)

    def forward(self, x):
        self.features = {"first": [self.first(x).relu()]}
        return self.last(self.features["first"][0])


@pytest.mark.filterwarnings("ignore:The tensor attribute self.features:UserWarning")
def test_a_net_that_keeps_what_it_computed_is_copied(tmp_path):
    model, x = vd.convert(Keeping(), vd.ARD()), torch.randn(3, 4)
    vd.ELBO(num_data=3)(model, model(x).sum()).backward()
    for site in vd.sites(model):
        site.noise.mask = torch.ones_like(site.weight, dtype=torch.bool)
    model.first.noise.mask[:5] = False
    small = vd.compact(model, x)
    assert small.first.out_features == 3 and model.features["first"][0].requires_grad
    torch.testing.assert_close(small.eval()(x), model.eval()(x))
    vd.export_onnx(model, tmp_path / "net.onnx", x)
    model.train()(x)
    vd.shrink(model, torch.optim.Adam(model.parameters()), x)
    assert model.first.out_features == 3


def test_its_errors_are_those_of_the_cut():
    model = pruned(net(), vd.ARD())
    with pytest.raises(InvalidValueError, match="on_unknown='maybe'"):
        vd.compact(model, torch.randn(2, 1, 6, 6), on_unknown="maybe")
    model[7].register_forward_hook(lambda module, inputs, output: torch.special.i0(output))
    with pytest.raises(GraphError, match="special_i0"):
        vd.compact(model, torch.randn(2, 1, 6, 6))
    small = vd.compact(model, torch.randn(2, 1, 6, 6), on_unknown="keep")
    assert small[6].out_features == 8


@pytest.mark.parametrize("pool", [nn.AvgPool2d(3, 1, padding=1), nn.MaxPool2d(3, 1, padding=1)])
def test_a_net_made_on_small_images_holds_for_large_ones(pool):
    model = nn.Sequential(nn.Conv2d(1, 6, 1), pool, nn.Conv2d(6, 2, 1)).eval()
    with torch.no_grad():
        model[0].weight[:3], model[0].bias[:3] = 0.0, 1.0
    small = vd.compact(model, torch.randn(2, 1, 1, 1))
    assert small[0].out_channels == (6 if isinstance(pool, nn.AvgPool2d) else 3)
    for size in (1, 2, 6):
        x = torch.randn(3, 1, size, size)
        torch.testing.assert_close(small(x), model(x))


def test_layers_without_units_are_left():
    model = vd.convert(nn.Sequential(nn.Linear(4, 0), nn.Linear(0, 3)), vd.ARD()).eval()
    x = torch.randn(2, 4)
    torch.testing.assert_close(vd.compact(model, x)(x), model(x))


def test_a_head_that_runs_in_training_alone_is_told():
    model = TwoHeads(6)
    vd.compact(model, torch.randn(2, 4))
    with torch.no_grad():
        model.head.weight[:, :3] = 0
    with pytest.warns(CompactionWarning, match="layer 'aid' runs in training but not in eval mode"):
        small = vd.compact(model, torch.randn(2, 4))
    assert small.body.out_features == 3 and small.aid.in_features == 6


def test_a_net_that_knows_by_its_variances_is_told():
    model = vd.convert(nn.Linear(4, 2), vd.VarianceNetwork())
    with pytest.warns(CompactionWarning, match="VarianceNetwork holds what a net knows in the variances"):
        vd.compact(model, torch.randn(2, 4))


def test_padding_that_torch_zeroes_is_told():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    class Summed(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.encoder = nn.Embedding(9, 8), nn.TransformerEncoder(layer, 1)

        def forward(self, x):
            return self.encoder(self.table(x), src_key_padding_mask=x == 0).sum(1)

    with pytest.raises(GraphError, match="TransformerEncoder zeroes padded positions"):
        vd.compact(vd.convert(Summed(), vd.ARD()), torch.tensor([[1, 2, 3, 0, 0]]))


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_model_of_which_nothing_is_marked_though_something_would_die_is_told(dry_run):
    model = vd.convert(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), vd.SparseVD(init_log_std=3.0))
    with pytest.warns(CompactionWarning, match=r"nothing is marked dead, though 16 of 18 would be: call vardrop.prune"):
        vd.compact(model, torch.randn(2, 4), dry_run=dry_run)
    vd.prune(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        vd.compact(model, torch.randn(2, 4), dry_run=dry_run)
