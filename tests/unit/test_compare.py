"""Original and small side by side: figures worked out by hand."""

import json
import sys
from itertools import pairwise

import pytest
import torch
from torch import nn

import vardrop as vd
from vardrop import compare
from vardrop.compare import Figure, Measured, onnx_call
from vardrop.errors import InvalidValueError, MissingExtraError
from vardrop.files import size_on_disk


def mlp(*widths):
    layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def test_parameters_nonzeros_bytes_and_flops_of_both(tmp_path):
    original, small = mlp(6, 5, 3), mlp(6, 2, 3)
    with torch.no_grad():
        small[0].weight[0, :3] = 0.0
    found = vd.measure(original, small, example_inputs=torch.randn(7, 6), repeats=1)
    assert found["parameters"] == Figure("parameters", 53, 23)
    assert found["nonzero"] == Figure("nonzero", 53, 20)
    assert found["flops"] == Figure("flops", 2 * 45, 2 * 18)
    with pytest.raises(InvalidValueError, match="figure 'seconds' was not measured; there are: parameters;"):
        found["seconds"]
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


def test_each_latency_is_told_of_its_own_net(monkeypatch):
    seconds = {"original": 2.0, "small": 1.0}
    monkeypatch.setattr(compare, "latencies", lambda calls, *_, **__: {name: seconds[name] for name in calls})
    found = vd.measure(mlp(6, 5, 3), mlp(6, 2, 3), example_inputs=torch.randn(1, 6), batch_sizes=(1,), threads=(1,))
    assert found["seconds, torch, batch 1, threads 1"] == Figure("seconds, torch, batch 1, threads 1", 2.0, 1.0)


def test_a_converted_model_is_measured_as_its_plain_form_and_left_as_it_is():
    original = mlp(6, 5, 3)
    net = vd.convert(mlp(6, 5, 3), vd.ARD())
    vd.prune(net, threshold=0.2)
    found = vd.measure(original, net, example_inputs=torch.randn(1, 6), repeats=1)
    assert found["parameters"].small == 53
    assert found["nonzero"].small < 53
    assert len(list(vd.sites(net))) == 2


def test_onnxruntime_is_timed_where_asked_for(monkeypatch):
    called = []
    monkeypatch.setattr(
        compare, "onnx_call", lambda path, *told, **named: called.append((path.stem, named)) or (lambda: None)
    )
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
    assert called == [(name, {"threads": 1}) for _ in range(2) for name in ("original", "small")]


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


def test_what_cannot_be_measured_is_refused():
    net, x = mlp(6, 5, 3), torch.randn(1, 6)
    with pytest.raises(InvalidValueError, match=r"engines=\('tensorrt',\): must be a list out of torch, onnxruntime"):
        vd.measure(net, net, example_inputs=x, engines=("tensorrt",))
    with pytest.raises(InvalidValueError, match=r"batch_sizes=\(0,\), threads=\(1, 2\), repeats=200: must all be"):
        vd.measure(net, net, example_inputs=x, batch_sizes=(0,))
    with pytest.raises(InvalidValueError, match=r"batch_sizes=\(1\.5,\)"):
        vd.measure(net, net, example_inputs=x, batch_sizes=(1.5,))
    with pytest.raises(InvalidValueError, match="engines='torch': must be a list"):
        vd.measure(net, net, example_inputs=x, engines="torch")
    with pytest.raises(InvalidValueError, match="must be a tensor or a tuple of tensors"):
        vd.measure(net, net, example_inputs=torch.zeros(0, 6))
    with pytest.raises(InvalidValueError, match="example_inputs=int: must be a tensor or a tuple of tensors"):
        vd.measure(net, net, example_inputs=3)


def test_onnxruntime_that_is_missing_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtraError, match=r"running ONNX files needs .*vardrop\[onnx\]"):
        onnx_call(tmp_path / "net.onnx", torch.zeros(1, 6))
