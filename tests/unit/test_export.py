"""Export to ONNX: the same outputs at every batch size, the model untouched, and nothing kept that is wrong."""

import contextlib
import logging
import sys

import pytest
import torch
from torch import nn

import vardrop as vd
from vardrop import export
from vardrop.errors import ConversionError, InvalidValueError, MissingExtraError, StorageError

onnxruntime = pytest.importorskip("onnxruntime")


def run(path, *inputs):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feed = {slot.name: x.numpy() for slot, x in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.as_tensor(output) for output in session.run(None, feed)]


def mlp():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 3))


def lenet():
    return nn.Sequential(
        nn.Conv2d(1, 4, 5), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)
    )


def conv_with_batch_norm():
    net = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    net(3 * torch.randn(20, 1, 8, 8) + 1)
    return net


@pytest.mark.parametrize("build", [mlp, lenet, conv_with_batch_norm])
def test_outputs_are_those_of_torch_for_one_and_for_seven(tmp_path, build, capfd):
    net, path = build(), tmp_path / "net.onnx"
    vd.export_onnx(net, path, torch.randn(1, 1, 8, 8))
    assert capfd.readouterr().out == ""
    assert [found.name for found in tmp_path.iterdir()] == ["net.onnx"]
    net.eval()
    for batch in (1, 7):
        x = torch.randn(batch, 1, 8, 8)
        torch.testing.assert_close(run(path, x)[0], net(x), rtol=1e-4, atol=1e-5)


class TwoInTwoOut(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x, y):
        return self.layer(x), {"sum": (self.layer(x) + y).sum(dim=1)}


def test_several_inputs_and_outputs(tmp_path):
    net, path = TwoInTwoOut(), tmp_path / "net.onnx"
    vd.export_onnx(net, path, (torch.randn(2, 4), torch.randn(2, 2)))
    x, y = torch.randn(7, 4), torch.randn(7, 2)
    first, second = net(x, y)
    found = run(path, x, y)
    torch.testing.assert_close(found[0], first, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], second["sum"], rtol=1e-4, atol=1e-5)


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, first, *others):
        return self.layer(sum(others, first))


def test_a_forward_that_takes_any_number_of_inputs(tmp_path):
    net, path = Sum(), tmp_path / "net.onnx"
    vd.export_onnx(net, path, tuple(torch.randn(2, 4) for _ in range(3)))
    inputs = [torch.randn(7, 4) for _ in range(3)]
    torch.testing.assert_close(run(path, *inputs)[0], net(*inputs), rtol=1e-4, atol=1e-5)


def test_what_onnxruntime_does_not_take_is_told(tmp_path):
    with pytest.raises(StorageError, match=r"does not take the exported Linear: .* exported after model.float\(\)"):
        vd.export_onnx(nn.Linear(4, 3).bfloat16(), tmp_path / "net.onnx", torch.randn(2, 4).bfloat16())
    assert not list(tmp_path.iterdir())


def test_a_converted_model_is_left_as_it_is_and_costs_no_more_bytes_than_a_plain_one(tmp_path):
    net = nn.Sequential(nn.Linear(60, 50), nn.ReLU(inplace=True))
    vd.export_onnx(net, tmp_path / "plain.onnx", torch.randn(2, 60))
    vd.prune(vd.convert(net, vd.SparseVD()), threshold=-4.4)
    net.eval()
    net[0].train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    logging.disable(logging.INFO)
    try:
        vd.export_onnx(net, tmp_path / "noisy.onnx", torch.randn(2, 60))
        assert logging.root.manager.disable == logging.INFO
    finally:
        logging.disable(logging.NOTSET)
    assert [module.training for module in net] == [True, False]
    assert len(list(vd.sites(net))) == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert (tmp_path / "noisy.onnx").stat().st_size <= (tmp_path / "plain.onnx").stat().st_size


def test_a_file_that_differs_is_not_kept_and_the_old_one_is(tmp_path, monkeypatch):
    path = tmp_path / "net.onnx"
    path.write_text("old")
    monkeypatch.setattr(export, "LARGEST_RELATIVE_DIFFERENCE", -1.0)
    with pytest.raises(StorageError, match="onnxruntime differs from torch by .* of the largest output.*unharmed"):
        vd.export_onnx(nn.Linear(3, 2), path, torch.randn(2, 3))
    assert path.read_text() == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["net.onnx"]


@pytest.mark.parametrize(("bias", "kept"), [(2e-6, True), (5e-4, False)])
def test_a_difference_that_rounding_does_not_explain_is_refused(tmp_path, monkeypatch, bias, kept):
    net = nn.Linear(3, 2)
    exported = export._export

    def shifted(model, inputs):
        with torch.no_grad():
            model.bias += bias
        return exported(model, inputs)

    monkeypatch.setattr(export, "_export", shifted)
    with contextlib.nullcontext() if kept else pytest.raises(StorageError, match="differs from torch"):
        vd.export_onnx(net, tmp_path / "net.onnx", torch.rand(2, 3))
    assert (tmp_path / "net.onnx").exists() == kept


class Session:
    """An onnxruntime session that gives these outputs."""

    def __init__(self, *outputs):
        self.outputs = outputs

    def get_inputs(self):
        return []

    def run(self, names, feed):
        return [output.numpy() for output in self.outputs]


def test_differences_are_relative_and_see_shapes_and_numbers_that_are_none():
    expected = [torch.tensor([200.0, 1.0]).double(), torch.tensor([0.5]).double()]
    found = Session(torch.tensor([200.0, 2.0]), torch.tensor([0.25]))
    assert export._differences(found, (), expected) == [1 / 200, 0.25]
    broken = export._differences(Session(torch.tensor([200.0, float("nan")]), torch.tensor([0.5])), (), expected)
    assert not broken[0] <= 1 and broken[1] == 0
    assert export._differences(Session(torch.tensor([[200.0, 1.0]]), torch.tensor([0.5])), (), expected) == [
        float("inf")
    ]
    assert export._differences(Session(torch.tensor([200.0, 1.0])), (), expected) == [float("inf")]


def test_equal_infinities_are_no_difference():
    expected = [torch.tensor([-torch.inf, 2.0]).double(), torch.zeros(0).double()]
    assert export._differences(Session(torch.tensor([-torch.inf, 2.0]), torch.zeros(0)), (), expected) == [0, 0]
    found = export._differences(Session(torch.tensor([-torch.inf, 3.0]), torch.zeros(0)), (), expected)
    assert found == [0.5, 0]


def test_examples_may_require_gradients(tmp_path):
    vd.export_onnx(nn.Linear(4, 2), tmp_path / "net.onnx", torch.randn(3, 4, requires_grad=True))
    assert (tmp_path / "net.onnx").exists()


class Broken(nn.Module):
    def forward(self, x):
        return self.missing(x)


class Fixed(nn.Module):
    def __init__(self, batch):
        super().__init__()
        self.batch = batch

    def forward(self, x):
        return x.reshape(self.batch, -1)


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Fixed(3), r"Fixed does not run on inputs of shape \(4, 4\).*|torch cannot export Fixed to ONNX"),
        (Branching(), "torch cannot export Branching to ONNX: .*data-dependent"),
        (Broken(), r"Broken does not run on inputs of shape \(3, 4\): .*missing"),
        (nn.Sequential(nn.ReLU(), nn.Threshold(1e9, torch.nan)), "Sequential gives NaN on the example inputs"),
        (nn.Linear(5, 2), r"Linear does not run on inputs of shape \(3, 4\): mat1 and mat2"),
    ],
    ids=["fixed-batch", "data-dependent", "broken", "nan", "wrong-example"],
)
def test_models_that_cannot_be_exported_are_told_why(tmp_path, model, message):
    with pytest.raises(ConversionError, match=message):
        vd.export_onnx(model, tmp_path / "net.onnx", torch.randn(3, 4))
    assert not list(tmp_path.iterdir())


def test_a_net_of_other_inputs_is_named(tmp_path):
    x = torch.ones(2, 4)
    with pytest.raises(ConversionError, match=r"Linear does not run on inputs of shape \(2, 4\), \(2, 4\)"):
        vd.export_onnx(nn.Linear(4, 2), tmp_path / "net.onnx", (x, x))
    with pytest.raises(StorageError, match="is a folder: name a file"):
        vd.export_onnx(nn.Linear(4, 2), tmp_path, x)


@pytest.mark.parametrize(
    "wrong", ["x", torch.ones(2, 4).numpy(), (), torch.tensor(1.0), torch.ones(0, 4), (torch.ones(2, 4), 3)]
)
def test_examples_must_be_tensors_with_a_batch(tmp_path, wrong):
    with pytest.raises(InvalidValueError, match="must be a tensor or a tuple of tensors, each with a batch"):
        vd.export_onnx(nn.Linear(4, 2), tmp_path / "net.onnx", wrong)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_the_extra_is_named_where_it_is_missing(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=r'export to ONNX needs .* pip install "vardrop\[onnx\]"'):
        vd.export_onnx(nn.Linear(4, 2), tmp_path / "net.onnx", torch.randn(2, 4))


def test_outputs_in_a_dict_keep_their_names(tmp_path):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 3), nn.Linear(3, 2)

        def forward(self, x):
            hidden = self.body(x).relu()
            return {"logits": self.head(hidden), "hidden": hidden}

    model, x = Named(), torch.randn(5, 4)
    vd.export_onnx(model, tmp_path / "net.onnx", x)
    runner = onnxruntime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    found = dict(zip((output.name for output in runner.get_outputs()), runner.run(None, {"x": x.numpy()}), strict=True))
    assert set(found) == {"logits", "hidden"}
    torch.testing.assert_close(torch.from_numpy(found["logits"]), model(x)["logits"])
