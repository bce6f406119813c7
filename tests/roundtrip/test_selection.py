"""Inputs that no weight reads: picked in front of the layer, with the same outputs, through storing and exporting."""

import numpy as np
import pytest
import torch
from torch import nn

import vardrop as vd
from vardrop.errors import InvalidValueError, StorageError
from vardrop.measure import flops, living_units
from vardrop.noise import InputGate
from vardrop.surgery.selection import InputSelection
from vardrop.surgery.skip import skip_closed_units


def plain():
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, 40), nn.ReLU(), nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, 5))


def pruned(dependent=False):
    net = vd.convert(plain(), vd.BetaBernoulli())
    for site in vd.sites(net):
        site.noise.mask = torch.arange(site.noise.units) % 3 == 0
    if dependent:
        vd.convert(net, vd.DependentBetaBernoulli())
    return net.eval()


@pytest.fixture
def x():
    return torch.randn(7, 3, 4, 4)


def selected(net, x):
    return vd.select_inputs(vd.compact(net, x), least=1)


def test_outputs_stay_and_the_first_layer_reads_its_living_inputs_alone(x):
    net = pruned()
    compacted = vd.compact(net, x)
    small = vd.select_inputs(compacted, least=1)
    assert (compacted[1].in_features, small[1].in_features) == (48, 16)
    assert small[1].selection.kept.tolist() == list(range(0, 48, 3))
    assert not any("selection" in layer._modules for layer in (*compacted, small[3], small[5]))
    torch.testing.assert_close(small(x), net(x), rtol=1e-5, atol=1e-7)
    assert living_units(small) == [16, 14, 10]
    assert flops(small, x[:1]) == 2 * (16 * 14 + 14 * 10 + 10 * 5)


def test_any_leading_shape_and_double_precision(x):
    layer = nn.Linear(12, 3).double().requires_grad_(False)
    layer.weight[:, 4:] = 0
    small = vd.select_inputs(layer, least=1)
    for shape in ((12,), (2, 12), (2, 5, 12)):
        value = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(small(value), layer(value), rtol=1e-12, atol=1e-14)


def test_a_layer_that_reads_nothing_keeps_one_input(x):
    layer = nn.Linear(12, 3).requires_grad_(False)
    layer.weight.zero_()
    small = vd.select_inputs(layer, least=1)
    assert small.in_features == 1 and torch.equal(small(x.flatten(1)[:, :12]), layer(x.flatten(1)[:, :12]))


def test_a_dependent_gate_is_cut_along(x):
    net = pruned(dependent=True)
    small = selected(net, x)
    assert isinstance(small[1].gate, InputGate) and len(small[1].gate.scale) == small[1].in_features == 16
    torch.testing.assert_close(small(x), net(x), rtol=1e-5, atol=1e-7)
    expected = small(x[:1])
    torch.testing.assert_close(skip_closed_units(small)(x[:1]), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dependent", [False, True])
def test_it_is_stored_loaded_and_exported(tmp_path, x, dependent):
    onnxruntime = pytest.importorskip("onnxruntime")
    small = selected(pruned(dependent), x)
    vd.save(small, tmp_path / "small", sparse=True)
    again = vd.load(tmp_path / "small", plain).eval()
    assert torch.equal(again(x), small(x)) and isinstance(again[1].selection, InputSelection)
    vd.export_onnx(again, tmp_path / "small.onnx", x)
    session = onnxruntime.InferenceSession(str(tmp_path / "small.onnx"))
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    np.testing.assert_allclose(found, small(x).detach().numpy(), rtol=1e-4, atol=1e-5)


def test_a_stored_selection_of_another_net_is_refused(tmp_path, x):
    vd.save(selected(pruned(), x), tmp_path / "small")
    other = lambda: nn.Sequential(nn.Flatten(), nn.Identity())  # noqa: E731
    with pytest.raises(StorageError, match="selects inputs of '1', which is no linear layer"):
        vd.load(tmp_path / "small", other)


def test_what_saves_too_little_or_is_shared_stays(x):
    net = vd.compact(pruned(), x)
    assert vd.select_inputs(net)[1].in_features == 48, "fewer than 20,000 weights"
    pair = nn.ModuleList([nn.Linear(6, 2), nn.Linear(6, 2)]).requires_grad_(False)
    pair[1].weight = pair[0].weight
    pair[0].weight[:, 3:] = 0
    assert [layer.in_features for layer in vd.select_inputs(pair, least=1)] == [6, 6]


@pytest.mark.parametrize("name", ["gate", "noise"])
def test_a_plain_child_that_is_called_like_noise_is_none(name):
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module(name, nn.Linear(50, 2))

        def forward(self, x):
            return getattr(self, name)(x)

    net = Gated().requires_grad_(False)
    getattr(net, name).weight[:, 10:] = 0
    assert getattr(vd.select_inputs(net, least=1), name).in_features == 10


def test_bad_input(x):
    with pytest.raises(InvalidValueError, match="least=0: must be a whole number, at least 1"):
        vd.select_inputs(plain(), least=0)
    with pytest.raises(InvalidValueError, match="layer '1' is noisy: call vardrop.compact"):
        vd.select_inputs(pruned())


def test_a_net_that_keeps_what_it_computed_is_copied_too():
    class Keeping(nn.Sequential):
        def forward(self, x):
            self.last = super().forward(x)
            return self.last

    net = Keeping(nn.Linear(50, 2))
    with torch.no_grad():
        net[0].weight[:, 10:] = 0
    x = torch.randn(3, 50)
    torch.testing.assert_close(vd.select_inputs(net, least=1)(x), net(x))
