"""What every cut must hold: same outputs, fewer parameters, an unharmed model where only a plan is made."""

from copy import deepcopy

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from vardrop.surgery.cut import cut, plan
from vardrop.surgery.reading import NORMS


def randomised(model):
    """Fills in what is zero or one after construction, so that nothing is equal by accident."""
    for module in model.modules():
        if isinstance(module, (*NORMS, nn.LayerNorm, nn.GroupNorm)):
            for name in ("weight", "bias"):
                if getattr(module, name) is not None:
                    nn.init.normal_(getattr(module, name))
        if isinstance(module, NORMS) and module.track_running_stats:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
        if isinstance(module, nn.PReLU):
            nn.init.uniform_(module.weight, 0.1, 0.9)
    return model.eval()


class TwoLayers(nn.Module):
    """Two dense layers; what is done with them is up to the forward."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 2)


class TwoHeads(nn.Module):
    """A net with a head that runs in training alone."""

    def __init__(self, units):
        super().__init__()
        self.body, self.head, self.aid = nn.Linear(4, units), nn.Linear(units, 3), nn.Linear(units, 5)

    def forward(self, x):
        x = self.body(x).relu()
        return (self.head(x), self.aid(x)) if self.training else self.head(x)


@torch.no_grad()
def kill(layer, units):
    """Zeroes the weights that make these units; their biases stay, so the units become constants."""
    weight = layer.weight
    if "Transpose" in type(layer).__name__:
        weight = weight.unflatten(0, (layer.groups, -1)).transpose(1, 2).flatten(0, 1)
        for unit in units:
            group, place = divmod(unit, layer.out_channels // layer.groups)
            rows = layer.in_channels // layer.groups
            layer.weight[group * rows : (group + 1) * rows, place] = 0
    else:
        weight[units] = 0


@torch.no_grad()
def ignore(layer, units):
    """Zeroes the weights that read these units, in a layer of one group."""
    if "Transpose" in type(layer).__name__:
        layer.weight[units] = 0
    else:
        layer.weight[:, units] = 0


def as_tuple(inputs):
    return inputs if isinstance(inputs, tuple) else (inputs,)


@torch.no_grad()
def outputs(model, inputs):
    return tree_leaves(model(*tree_map(lambda leaf: leaf.clone(), as_tuple(inputs))))


def assert_same(large, small, inputs, tolerance):
    for expected, found in zip(outputs(large, inputs), outputs(small, inputs), strict=True):
        assert expected.shape == found.shape
        scale = max(1.0, expected.abs().max().item())
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * scale)


def batch(inputs, size, dtype):
    return tree_map(
        lambda leaf: torch.randn(size, *leaf.shape[1:], dtype=dtype) if leaf.is_floating_point() else leaf,
        as_tuple(inputs),
    )


def parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def check(model, inputs, *, on_unknown="refuse", batches=(1, 2, 7)):
    """Cuts copies of `model` in float32 and float64, compares, and returns the plan and the float64 copy."""
    model.eval()
    state = deepcopy(model.state_dict())
    planned = plan(model, inputs, on_unknown=on_unknown)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    results = []
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        large = deepcopy(model).to(dtype)
        small = deepcopy(large)
        example = tree_map(lambda leaf, t=dtype: leaf.to(t) if leaf.is_floating_point() else leaf, inputs)
        done = cut(small, example, on_unknown=on_unknown)
        assert done == planned
        assert done.parameters_before == parameters(large)
        assert done.parameters_after == parameters(small)
        assert type(small) is type(large)
        for size in batches:
            assert_same(large, small, batch(inputs, size, dtype), tolerance)
        results.append(small)
    return planned, results[-1]
