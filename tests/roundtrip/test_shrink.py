"""Shrinking while training: same quiet outputs, an optimiser cut to the right rows, and training that goes on."""

import pytest
import torch
from exactness import assert_same, parameters, randomised
from test_gated import METHODS, NETS, lenet
from test_recurrent_cuts import KINDS, WORDS, Tagger
from torch import nn

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
        if site.counts == "weights":
            mask[1::3] = False
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
