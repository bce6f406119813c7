"""From a converted, pruned model to a plain smaller one: the masked model and the compact one agree."""

from copy import deepcopy

import pytest
import torch
from exactness import assert_same, parameters, randomised
from torch import nn

import vardrop as vd
from vardrop.errors import GraphError, InvalidValueError
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
    model = vd.convert(model, method).eval()
    for site in vd.sites(model):
        site.noise.mask = torch.rand_like(site.weight) < 0.8
        site.noise.mask[: len(site.weight) // 3] = False
    return model


@pytest.mark.parametrize("method", vd.methods().values(), ids=vd.methods())
def test_the_masked_model_and_the_compact_one_agree(method):
    model = pruned(net(), method()).double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(2, 1, 6, 6, dtype=torch.float64)
    small = vd.compact(model, x)
    assert_same(model, small, torch.randn(9, 1, 6, 6, dtype=torch.float64), 1e-10)
    assert [small[place].out_channels for place in (0, 3)] == [4, 5]
    assert [small[place].out_features for place in (6, 8)] == [6, 3]
    assert all(type(module).__module__.startswith("torch.nn") for module in small.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_dry_run_gives_the_plan_alone():
    model = pruned(net(), vd.ARD())
    x = torch.randn(2, 1, 6, 6)
    plan = vd.compact(model, x, dry_run=True)
    assert isinstance(plan, Plan)
    assert plan.parameters_after == parameters(vd.compact(model, x))
    assert plan.parameters_before == parameters(vd.strip(deepcopy(model)))


def test_its_errors_are_those_of_the_cut():
    model = pruned(net(), vd.ARD())
    with pytest.raises(InvalidValueError, match="on_unknown='maybe'"):
        vd.compact(model, torch.randn(2, 1, 6, 6), on_unknown="maybe")
    model[7].register_forward_hook(lambda module, inputs, output: torch.special.i0(output))
    with pytest.raises(GraphError, match="special_i0"):
        vd.compact(model, torch.randn(2, 1, 6, 6))
    small = vd.compact(model, torch.randn(2, 1, 6, 6), on_unknown="keep")
    assert small[6].out_features == 8
