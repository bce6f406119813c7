"""Measuring: numbers worked out by hand, and a model that is left as it was found."""

import math
import time

import pytest
import torch
from torch import nn

import vardrop as vd
from vardrop.compress import error_and_nll
from vardrop.errors import InvalidValueError
from vardrop.measure import (
    Row,
    Summary,
    count_nonzero,
    count_parameters,
    flops,
    latencies,
    latency,
    living_units,
    open_units,
)
from vardrop.modes import in_eval_mode
from vardrop.noise import InputGate
from vardrop.zoo import Split, load_data


def net():
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


class WithNoiseOfItsOwn(nn.Module):
    """A plain model with a submodule that happens to be called noise."""

    def __init__(self):
        super().__init__()
        self.noise = nn.Linear(3, 3)


def test_parameters_are_counted_once_and_without_the_noise():
    assert count_parameters(net()) == 6 * 5 + 5 + 5 * 3 + 3
    assert count_parameters(vd.convert(net(), vd.SparseVD())) == 53
    assert count_parameters(tied()) == 16 + 4 + 4
    assert count_parameters(vd.convert(tied(), vd.SparseVD())) == 24
    assert count_parameters(WithNoiseOfItsOwn()) == 12
    assert count_parameters(nn.ReLU()) == 0


def test_nonzeros_of_a_pruned_model_are_those_of_its_plain_form():
    model = vd.convert(net(), vd.ARD())
    with torch.no_grad():
        model[0].weight[0] = 0
        model[2].bias[:2] = 0
    assert count_nonzero(model) == 53 - 6 - 2
    alive = vd.prune(model, threshold=0.2).alive
    assert alive < 45 - 6
    assert count_nonzero(model) == alive + 8 - 2
    assert count_nonzero(vd.strip(model)) == alive + 8 - 2


FLOPS = {
    "linear": (lambda: nn.Linear(6, 5), (2, 6), 2 * 2 * 6 * 5),
    "conv": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 8), 2 * 2 * (5 * 6) * 6 * (2 * 9)),
    "lstm": (lambda: nn.LSTM(4, 8), (3, 2, 4), 2 * 3 * 2 * 4 * 8 * (4 + 8)),
    "gru": (lambda: nn.GRU(4, 8), (3, 2, 4), 2 * 3 * 2 * 3 * 8 * (4 + 8)),
    "encoder": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        (2, 5, 8),
        2 * 10 * (4 * 8 * 8 + 2 * 8 * 16) + 2 * 2 * 2 * (5 * 5 * 8),
    ),
}


@pytest.mark.parametrize(("build", "shape", "expected"), FLOPS.values(), ids=FLOPS)
def test_flops_are_two_for_each_multiplication_also_on_fused_paths(build, shape, expected):
    backends = torch.backends.mkldnn, torch.backends.cudnn
    before = [backend.enabled for backend in backends] + [torch.backends.mha.get_fastpath_enabled()]
    assert flops(build(), torch.randn(shape)) == expected
    assert [backend.enabled for backend in backends] + [torch.backends.mha.get_fastpath_enabled()] == before


def test_flops_of_a_smaller_net_are_fewer_and_those_of_a_pruned_one_are_not():
    model = vd.convert(net(), vd.ARD())
    vd.prune(model, threshold=0.1)
    assert flops(model, torch.randn(1, 6)) == flops(net(), torch.randn(1, 6)) == 2 * 45


class Failing(nn.Module):
    def forward(self, x):
        raise RuntimeError("broken")


def test_measuring_gives_every_part_its_own_mode_back():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout()).train()
    model[1].eval()
    x = torch.randn(2, 4)
    flops(model, x)
    latencies({"a": model, "b": model[0]}, x, repeats=1)
    vd.summary(model, example_inputs=x)
    broken = nn.Sequential(model, Failing())
    for measure in (flops, latency):
        with pytest.raises((RuntimeError, InvalidValueError), match="broken"):
            measure(broken, x)
    assert [module.training for module in broken.modules()] == [True, True, True, False, True, True]
    assert model[1].num_batches_tracked == 0


def test_latencies_are_medians_of_calls_taken_in_turns():
    order = []

    def slow():
        order.append("slow")
        time.sleep(0.02 if len(order) != 5 else 0.2)

    found = latencies({"slow": slow, "fast": lambda: order.append("fast")}, repeats=5)
    assert order == ["slow", "fast"] * 6
    assert 0 < found["fast"] < 0.02 <= found["slow"] < 0.2


class Merging(nn.Module):
    """A net whose ``train`` merges a part into its weight for inference, and takes it apart for training."""

    def __init__(self):
        super().__init__()
        self.linear, self.merged, self.cache = nn.Linear(3, 2), False, None

    def train(self, mode=True):
        self.merged = not mode
        return super().train(mode)

    def forward(self, x):
        self.cache = torch.ones(3) if self.cache is None else self.cache
        return self.linear(x.sub_(1.0) * self.cache)


def test_measuring_leaves_a_net_and_its_inputs_as_they_were():
    net, x = Merging(), torch.zeros(2, 3)
    assert flops(net, x) == 24 and open_units(net, x) == []
    assert not net.merged and net.training and not x.any()
    latencies({"net": net}, x, repeats=1)
    assert not net.merged and not x.any()
    net(x.clone()).sum().backward()  # what it keeps can be trained on


def test_a_part_that_merges_its_weights_is_put_back_by_its_own_way():
    net = nn.Sequential(Merging(), Merging()).eval()
    net[1].train()
    with in_eval_mode(net):
        assert [part.merged for part in net] == [True, True]
    assert [part.merged for part in net] == [True, False]


def test_flops_are_those_without_noise_whatever_its_switch_says():
    net = vd.convert(nn.Linear(3, 2), vd.SparseVD())
    vd.noise(net, on=True)
    state = torch.get_rng_state()
    assert flops(net, torch.zeros(1, 3)) == 12
    assert torch.equal(state, torch.get_rng_state()) and net.noise.on


def test_the_first_call_is_not_timed():
    calls = []

    def cold():
        time.sleep(0.3 * (not calls))
        calls.append(1)

    assert latency(cold, repeats=1) < 0.1
    assert len(calls) == 2


def test_threads_are_set_for_the_time_of_measuring():
    before = torch.get_num_threads()
    seen = []
    latency(lambda: seen.append(torch.get_num_threads()), repeats=2, threads=before + 1)
    assert set(seen) == {before + 1}
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("wrong", [{"repeats": 0}, {"threads": 0}, {"repeats": 2.5}])
def test_bad_counts_are_refused(wrong):
    with pytest.raises(InvalidValueError, match="must both be whole numbers, at least 1"):
        latency(lambda: None, **wrong)


def test_a_module_needs_inputs_to_be_timed():
    with pytest.raises(InvalidValueError, match="a module needs example inputs"):
        latency(net())


def test_summary_of_a_converted_model_agrees_with_prune_and_kl():
    model = vd.convert(net(), {"0": vd.SparseVD()})
    counted = vd.prune(model, threshold=-6.0)
    shown = vd.summary(model, example_inputs=torch.randn(2, 6))
    noisy, plain = shown.rows
    assert (noisy.name, noisy.kind, noisy.shape, noisy.total) == ("0", "Linear", (5, 6), 30)
    assert 0 < noisy.alive == counted.alive < 30
    assert noisy.kl == pytest.approx(vd.kl(model).item())
    expected = (2 * model[0].noise.log_std - model[0].weight.square().log()).mean().item()
    assert noisy.log_alpha == pytest.approx(expected, rel=1e-5)
    assert plain == Row("2", "Linear", (3, 5), 15, 15, None, None)
    assert shown.compression == counted.compression == 30 / noisy.alive
    assert (shown.parameters, shown.tensor_bytes, shown.flops) == (53, 4 * 53, 2 * 2 * 45)


def test_summary_of_a_plain_model_counts_zeros():
    model = net().double()
    with torch.no_grad():
        model[0].weight[:4] = 0
    shown = vd.summary(model)
    assert [(row.alive, row.total, row.kl, row.log_alpha) for row in shown.rows] == [
        (6, 30, None, None),
        (15, 15, None, None),
    ]
    assert shown.compression == 45 / 21
    assert (shown.tensor_bytes, shown.flops) == (8 * 53, None)


def test_summary_lists_tied_weights_once_and_every_matrix_by_a_name():
    shown = vd.summary(vd.convert(tied(), vd.ARD()))
    assert [(row.name, row.total) for row in shown.rows] == [("0", 16)]
    assert (shown.parameters, shown.tensor_bytes) == (24, 96)
    mixed = nn.ModuleDict({"a": nn.GRU(4, 8), "b": nn.MultiheadAttention(8, 2), "noise": nn.Embedding(3, 4)})
    names = [row.name for row in vd.summary(mixed).rows]
    assert names == ["a.weight_ih_l0", "a.weight_hh_l0", "b.in_proj_weight", "b.out_proj", "noise"]


def test_summary_counts_buffers_but_not_the_noise():
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3))
    size = 4 * (54 + 3 + 4 * 3) + 8
    assert vd.summary(model).tensor_bytes == size
    vd.prune(vd.convert(model, vd.ARD()))
    assert vd.summary(model).tensor_bytes == size


def test_methods_without_log_alpha_leave_its_column_empty():
    row = vd.summary(vd.convert(nn.Linear(3, 2), vd.BernoulliDropout())).rows[0]
    assert (row.kl, row.log_alpha, row.alive) == (0.0, None, 6)


@pytest.mark.parametrize(("alive", "total", "expected"), [((), (), 1.0), ((0,), (4,), math.inf), ((1, 3), (4, 4), 2.0)])
def test_compression_at_the_ends(alive, total, expected):
    rows = [Row("a", "Linear", (2, 2), left, of, None, None) for left, of in zip(alive, total, strict=True)]
    assert Summary(rows, 0, 0, None).compression == expected


def test_the_printed_table_is_aligned():
    rows = [
        Row("", "Linear", (300, 784), 1234, 235200, 1234.56, 2.346),
        Row("head.last", "Conv2d", (10, 1, 3, 3), 90, 90, None, None),
    ]
    assert str(Summary(rows, 235290, 941160, 4705)) == (
        "layer      kind    shape     alive       of  KL, nats  mean log alpha\n"
        "(model)    Linear  300x784   1,234  235,200   1,234.6            2.35\n"
        "head.last  Conv2d  10x1x3x3     90       90\n"
        "compression 190.6x, 235,290 parameters, 941,160 dense bytes, 4,705 FLOPs for the example inputs"
    )


def test_living_units_are_inputs_that_are_read_and_channels_that_have_a_weight():
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(16, 5), torch.nn.Linear(5, 2)
    )
    assert living_units(net) == [4, 16, 5]
    with torch.no_grad():
        net[0].weight[1:3] = 0
        net[3].weight[:, [0, 5, 7]] = 0
        net[4].weight[0] = 0
    assert living_units(net) == [2, 13, 5]
    vd.convert(net, vd.ARD(threshold=1e6))
    with pytest.warns(vd.errors.EmptyLayerWarning):
        vd.prune(net)
    assert living_units(net) == [1, 1, 1]


def test_open_units_are_counted_for_an_average_input():
    net = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Flatten(), nn.Linear(12, 2)).eval()
    gate, inner = InputGate((3, 1, 1), "output"), InputGate((12,), "input")
    gate.hang_on(net[0])
    inner.hang_on(net[2])
    with torch.no_grad():
        net[0].weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]).view(3, 2, 1, 1))
        net[0].bias.zero_()
        gate.scale.fill_(1.0)
        gate.shift.zero_()
        gate.floor.fill_(0.5)
        inner.floor[:5] = 2.0
    x = torch.stack([torch.full((2, 2, 2), 0.9), torch.zeros(2, 2, 2)])
    assert open_units(net, x, batch_size=1) == [1.0, 7.0]
    assert open_units(nn.Linear(2, 2), torch.randn(3, 2)) == []


def test_a_frozen_part_keeps_its_mode_where_a_net_is_only_looked_at():
    model = nn.Sequential(nn.Linear(64, 3), nn.BatchNorm1d(3), nn.Linear(3, 10))
    model[1].eval()
    data = load_data("digits")
    flat = Split(data.test.x.flatten(1), data.test.y)
    error_and_nll(model, flat)
    flops(model, flat.x[:1])
    assert model.training and not model[1].training


def test_a_net_that_does_not_run_on_the_inputs_is_named():
    with pytest.raises(InvalidValueError, match=r"Linear does not run on inputs of shape \(1, 7\)"):
        flops(nn.Linear(3, 2), torch.ones(1, 7))

    class Wrong(nn.Module):
        def forward(self, x):
            return self.missing(x)

    with pytest.raises(InvalidValueError, match=r"Wrong does not run on inputs of shape \(1, 7\): .*missing"):
        flops(Wrong(), torch.ones(1, 7))


def test_flops_of_products_with_a_vector_are_counted():
    class Vectors(nn.Module):
        def forward(self, x, v):
            summed = torch.addbmm(x[:, :1], x.expand(2, 3, 5), x.T.expand(2, 5, 3))
            return x @ v + torch.addmv(v[:1], x, v) * (v @ v) * torch.vdot(v, v) + summed

    assert flops(Vectors(), (torch.ones(3, 5), torch.ones(5))) == 2 * (15 + 15 + 5 + 5 + 2 * 3 * 5 * 3)
