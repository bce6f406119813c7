"""Original and small side by side: figures worked out by hand, the authors' rule against their printed table."""

import json
import sys
from itertools import pairwise

import pytest
import torch
from torch import nn

import vardrop as vd
from vardrop.compare import Figure, Measured, onnx_call
from vardrop.errors import InvalidValueError, MissingExtraError
from vardrop.files import size_on_disk
from vardrop.measure import authors_flops, flops


def mlp(*widths):
    layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def convolutional():
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3))


def test_parameters_nonzeros_bytes_and_flops_of_both(tmp_path):
    original, small = mlp(6, 5, 3), mlp(6, 2, 3)
    with torch.no_grad():
        small[0].weight[0, :3] = 0.0
    found = vd.measure(original, small, example_inputs=torch.randn(7, 6), repeats=1)
    assert found["parameters"] == Figure("parameters", 53, 23)
    assert found["nonzero"] == Figure("nonzero", 53, 20)
    assert found["flops"] == Figure("flops", 2 * 45, 2 * 18)
    assert found["authors_flops"] == Figure("authors_flops", 13 * 5 + 10 * 3, 13 * 2 + 4 * 3)
    vd.save(small, tmp_path / "small", sparse=True)
    assert found["bytes"].small == size_on_disk(tmp_path / "small")
    assert found["parameters"].ratio == 53 / 23


def test_the_latency_of_both_is_taken_at_each_batch_size_and_number_of_threads():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x):
            calls.append((len(x), torch.get_num_threads()))
            return self.layer(x)

    calls = []
    before = torch.get_num_threads()
    net = Net().train()
    found = vd.measure(net, Net(), example_inputs=torch.randn(2, 4), batch_sizes=(1, 5), threads=(1, 2), repeats=1)
    assert torch.get_num_threads() == before and net.training
    assert set(calls) >= {(1, 1), (1, 2), (5, 1), (5, 2)}
    names = [f"seconds, torch, batch {size}, threads {count}" for size in (1, 5) for count in (1, 2)]
    assert [figure.name for figure in found.figures if figure.name.startswith("seconds")] == names
    assert all(found[name].original > 0 and found[name].small > 0 for name in names)


def test_a_converted_model_is_measured_as_its_plain_form_and_left_as_it_is():
    original = mlp(6, 5, 3)
    net = vd.convert(mlp(6, 5, 3), vd.ARD())
    vd.prune(net, threshold=0.2)
    found = vd.measure(original, net, example_inputs=torch.randn(1, 6), repeats=1)
    assert found["parameters"].small == 53
    assert found["nonzero"].small < 53
    assert len(list(vd.sites(net))) == 2


def test_onnxruntime_is_timed_where_asked_for():
    found = vd.measure(
        mlp(6, 5, 3),
        mlp(6, 2, 3),
        example_inputs=torch.randn(1, 6),
        batch_sizes=(1, 3),
        threads=(1,),
        repeats=2,
        engines=("onnxruntime",),
    )
    names = [figure.name for figure in found.figures if figure.name.startswith("seconds")]
    assert names == [f"seconds, onnxruntime, batch {size}, threads 1" for size in (1, 3)]
    assert all(found[name].small > 0 for name in names)


def test_an_onnx_file_is_called_on_the_inputs_given(tmp_path):
    net, x = mlp(6, 5, 3), torch.randn(4, 6)
    vd.export_onnx(net, tmp_path / "net.onnx", x)
    (found,) = onnx_call(tmp_path / "net.onnx", x)()
    torch.testing.assert_close(torch.as_tensor(found), net(x).detach())


def test_the_table_and_the_record_say_the_same():
    found = Measured((Figure("parameters", 1200, 600), Figure("seconds, torch, batch 1, threads 1", 3e-5, 2e-5)))
    assert str(found).splitlines() == [
        "                                         original  small  ratio",
        "parameters                                  1,200    600   2.0x",
        "microseconds, torch, batch 1, threads 1      30.0   20.0   1.5x",
    ]
    record = json.loads(json.dumps(found.record, allow_nan=False))
    assert record["parameters"] == {"original": 1200, "small": 600, "ratio": 2.0}
    empty = Measured((Figure("nonzero", 3, 0),))
    assert json.loads(json.dumps(empty.record, allow_nan=False))["nonzero"]["ratio"] is None
    assert empty["nonzero"].ratio == float("inf")


PRINTED = {"SVD": ((532, 64, 34), 14.87), "SSL": ((409, 28, 23), 43.95), "SBP": ((257, 97, 43), 18.33)}


@pytest.mark.parametrize(("units", "speed_up"), PRINTED.values(), ids=PRINTED)
def test_the_authors_rule_gives_their_printed_speed_up(units, speed_up):
    """arXiv:1805.10896, table 1, rows of LeNet-500-300, whose inputs are cut too."""
    original = authors_flops(mlp(784, 500, 300, 10), torch.zeros(1, 784))
    small = authors_flops(mlp(*units, 10), torch.zeros(1, units[0]))
    assert original / small == pytest.approx(speed_up, rel=0.01)


def test_the_authors_rule_counts_a_convolution_at_each_position():
    counted = authors_flops(convolutional(), torch.randn(2, 2, 5, 5))
    assert counted == 2 * ((2 * 18 - 1 + 2) * 4 * 9 + (2 * 36 - 1 + 1) * 3)
    without_bias = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2))
    assert authors_flops(without_bias, torch.zeros(1, 4)) == (7 + 1) * 3 + (5 + 1) * 2


def test_the_authors_rule_counts_gates_that_depend_on_their_input():
    def gated(net):
        return vd.strip(vd.convert(vd.convert(net, vd.BetaBernoulli()), vd.DependentBetaBernoulli())).eval()

    assert authors_flops(gated(mlp(6, 5, 3)), torch.zeros(2, 6)) == 2 * (13 * 5 + 10 * 3 + 5 * 6 + 5 * 5)
    plain = authors_flops(convolutional(), torch.zeros(1, 2, 5, 5))
    assert authors_flops(gated(convolutional()), torch.zeros(1, 2, 5, 5)) == plain + (2 * 9 + 4) * 4 + 5 * 36


def test_a_net_that_the_authors_rule_does_not_cover_has_no_such_figure():
    net = nn.Sequential(nn.ConvTranspose2d(2, 3, 3))
    x = torch.randn(1, 2, 4, 4)
    with pytest.raises(InvalidValueError, match=r"0\.weight of shape \(2, 3, 3, 3\): the rule counts linear layers"):
        authors_flops(net, x)
    found = vd.measure(net, net, example_inputs=x, batch_sizes=(1,), threads=(1,), repeats=1)
    assert found["flops"].original == flops(net, x) > 0
    with pytest.raises(InvalidValueError, match="figure 'authors_flops' was not measured; there are: parameters;"):
        found["authors_flops"]


def test_what_cannot_be_measured_is_refused():
    net, x = mlp(6, 5, 3), torch.randn(1, 6)
    with pytest.raises(InvalidValueError, match=r"engines=\('tensorrt',\): must be among torch, onnxruntime"):
        vd.measure(net, net, example_inputs=x, engines=("tensorrt",))
    with pytest.raises(InvalidValueError, match=r"batch_sizes=\(0,\), threads=\(1, 2\), repeats=200: must all be"):
        vd.measure(net, net, example_inputs=x, batch_sizes=(0,))
    with pytest.raises(InvalidValueError, match="must be a tensor or a tuple of tensors"):
        vd.measure(net, net, example_inputs=torch.zeros(0, 6))


def test_onnxruntime_that_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"running ONNX files needs .*vardrop\[onnx\]"):
        onnx_call(tmp_path / "net.onnx", torch.zeros(1, 6))
