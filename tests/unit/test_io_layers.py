"""Storage layer by layer: every kind that compaction cuts comes back cut, every number as it was."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import vardrop as vd
from vardrop import files, io

CUT = {
    "linear": (lambda: nn.Linear(3, 2), lambda: nn.Linear(6, 5), (4, 3)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 3), lambda: nn.Conv1d(4, 5, 3), (4, 2, 7)),
    "conv2d": (lambda: nn.Conv2d(2, 3, 3), lambda: nn.Conv2d(4, 5, 3), (4, 2, 7, 7)),
    "conv2d-groups": (lambda: nn.Conv2d(4, 2, 3, groups=2), lambda: nn.Conv2d(9, 6, 3, groups=3), (4, 4, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2), lambda: nn.Conv3d(4, 5, 2), (4, 2, 5, 5, 5)),
    "conv-transpose1d": (lambda: nn.ConvTranspose1d(2, 3, 3), lambda: nn.ConvTranspose1d(4, 5, 3), (4, 2, 7)),
    "conv-transpose2d": (lambda: nn.ConvTranspose2d(2, 3, 3), lambda: nn.ConvTranspose2d(4, 5, 3), (4, 2, 7, 7)),
    "conv-transpose3d": (lambda: nn.ConvTranspose3d(2, 3, 2), lambda: nn.ConvTranspose3d(4, 5, 2), (4, 2, 5, 5, 5)),
    "batch-norm1d": (lambda: nn.BatchNorm1d(3), lambda: nn.BatchNorm1d(5), (4, 3)),
    "batch-norm2d": (lambda: nn.BatchNorm2d(3), lambda: nn.BatchNorm2d(5), (4, 3, 6, 6)),
    "batch-norm3d": (lambda: nn.BatchNorm3d(3), lambda: nn.BatchNorm3d(5), (4, 3, 4, 4, 4)),
    "batch-norm-without-weights": (
        lambda: nn.BatchNorm2d(3, affine=False),
        lambda: nn.BatchNorm2d(5, affine=False),
        (4, 3, 6, 6),
    ),
    "prelu": (lambda: nn.PReLU(3), lambda: nn.PReLU(5), (4, 3)),
    "new-bias-linear": (lambda: nn.Linear(3, 2), lambda: nn.Linear(6, 5, bias=False), (4, 3)),
    "new-bias-conv2d": (lambda: nn.Conv2d(2, 3, 3), lambda: nn.Conv2d(4, 5, 3, bias=False), (4, 2, 7, 7)),
    "same-layer-norm": (lambda: nn.LayerNorm(3), lambda: nn.LayerNorm(3), (4, 3)),
}


def round_trip(model, build, folder, **options):
    vd.save(model, folder / "stored", **options)
    return vd.load(folder / "stored", build)


def bits(tensor):
    return tensor.detach().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize(("small", "build", "shape"), CUT.values(), ids=CUT)
def test_a_smaller_layer_comes_back_from_the_code_of_the_larger_one(tmp_path, small, build, shape):
    layer, x = small(), torch.randn(shape)
    with torch.no_grad():
        layer(x)
        for tensor in layer.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.5, 1.5)
    loaded = round_trip(layer, build, tmp_path)
    assert type(loaded) is type(build())
    assert list(loaded.state_dict()) == list(layer.state_dict())
    assert all(
        torch.equal(bits(a), bits(b))
        for a, b in zip(loaded.state_dict().values(), layer.state_dict().values(), strict=True)
    )
    assert loaded.__dict__.keys() == layer.__dict__.keys()
    for key in (
        "in_features",
        "out_features",
        "in_channels",
        "out_channels",
        "groups",
        "num_features",
        "num_parameters",
    ):
        assert getattr(loaded, key, None) == getattr(layer, key, None)
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(loaded.eval()(x), layer.eval()(x))


class Gained(nn.Module):
    """A gain of one's own between two layers."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow = nn.Linear(4, 8), nn.Linear(8, 2)
        self.gain = nn.Parameter(torch.rand(8))
        self.register_buffer("scale", torch.rand(8) + 1)

    def forward(self, x):
        return self.narrow(self.wide(x).relu() * self.gain * self.scale)


def test_parameters_and_buffers_of_a_module_of_ones_own_come_back_cut(tmp_path):
    net, x = Gained().eval(), torch.randn(3, 4)
    with torch.no_grad():
        net.wide.weight[:5] = 0
        net.wide.bias[:5] = 0
    small = vd.compact(net, x)
    assert small.gain.shape == small.scale.shape == (3,)
    loaded = round_trip(small, Gained, tmp_path)
    assert torch.equal(loaded(x), small(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64])
def test_numbers_keep_their_type_whatever_the_builder_makes(tmp_path, dtype):
    net = nn.Linear(5, 5, dtype=dtype)
    loaded = round_trip(net, lambda: nn.Linear(5, 5), tmp_path)
    assert torch.equal(bits(loaded.weight), bits(net.weight))
    assert loaded.weight.dtype == dtype


def test_noise_keeps_its_type_as_well(tmp_path):
    net = vd.convert(nn.Linear(5, 5), vd.ARD()).half()
    loaded = round_trip(net, lambda: nn.Linear(5, 5), tmp_path)
    assert loaded.weight.dtype == loaded.noise.log_std.dtype == torch.float16
    assert torch.equal(loaded.noise.log_std, net.noise.log_std)


def tied():
    net = nn.Sequential(nn.Linear(6, 6, bias=False), nn.Tanh(), nn.Linear(6, 6, bias=False))
    net[2].weight = net[0].weight
    return net


def test_tied_weights_stay_tied_also_when_cut(tmp_path):
    small = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Tanh(), nn.Linear(3, 3, bias=False))
    small[2].weight = small[0].weight
    loaded = round_trip(small, tied, tmp_path)
    assert loaded[2].weight is loaded[0].weight
    assert torch.equal(loaded[0].weight, small[0].weight) and loaded[2].in_features == 3


def test_layers_that_share_one_noise_share_it_again(tmp_path):
    net = vd.convert(tied(), vd.ARD())
    vd.prune(net, threshold=0.2)
    loaded = round_trip(net, tied, tmp_path)
    assert loaded[2].noise is loaded[0].noise
    assert torch.equal(loaded[0].noise.mask, net[0].noise.mask)
    torch.testing.assert_close(vd.kl(loaded), vd.kl(net))


def test_a_module_used_under_two_names_comes_back_as_one(tmp_path):
    def shared(width=6):
        layer = nn.Linear(width, width)
        return nn.Sequential(layer, nn.Tanh(), layer)

    small = shared(3)
    loaded = round_trip(small, shared, tmp_path)
    assert loaded[0] is loaded[2]
    assert torch.equal(loaded(torch.ones(1, 3)), small(torch.ones(1, 3)))


@pytest.mark.parametrize("method", [vd.ARD(), vd.BetaBernoulli()], ids=["weights", "units"])
def test_noise_of_a_module_under_two_names_comes_back(tmp_path, method):
    def shared():
        layer = nn.Linear(6, 6)
        return nn.ModuleDict({"body": layer, "layers": nn.ModuleList([layer]), "last": nn.Linear(6, 2)})

    net = vd.convert(shared(), method)
    vd.save(net, tmp_path / "net")
    loaded = vd.load(tmp_path / "net", shared)
    assert loaded["body"] is loaded["layers"][0]
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize("method", vd.methods().values(), ids=vd.methods())
def test_every_method_comes_back_on_a_cut_net(tmp_path, method):
    """A compacted net may be converted once more, to be trained on."""
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    net = vd.convert(net if method.follows is None else vd.convert(net, method.follows()), method())
    loaded = round_trip(net, lambda: nn.Sequential(nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 2)), tmp_path)
    assert [site.method for site in vd.sites(loaded)] == [site.method for site in vd.sites(net)]
    state = net.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    torch.testing.assert_close(vd.kl(loaded), vd.kl(net))


def test_layer_names_are_taken_literally(tmp_path):
    def build():
        return nn.ModuleDict({"a[0]": nn.Linear(2, 2), "a0": nn.Linear(2, 2)})

    net = vd.convert(build(), {"a0": vd.ARD(), "*": vd.SparseVD()})
    methods = {site.name: type(site.method) for site in vd.sites(round_trip(net, build, tmp_path))}
    assert methods == {"a[0]": vd.SparseVD, "a0": vd.ARD}


class MyARD(vd.ARD):
    """A method of one's own."""


def test_a_method_of_ones_own_comes_back_while_its_class_is_known(tmp_path):
    net = vd.convert(nn.Linear(3, 3), MyARD(threshold=0.5))
    assert round_trip(net, lambda: nn.Linear(3, 3), tmp_path).noise.method == MyARD(threshold=0.5)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_csr_parts_are_those_of_torch(tmp_path):
    layer = nn.Conv2d(40, 30, 3, bias=False)
    with torch.no_grad():
        layer.weight[torch.rand_like(layer.weight) < 0.9] = 0
        layer.weight[7] = 0
    vd.save(layer, tmp_path / "stored", sparse=True)
    parts = load_file(tmp_path / "stored" / io.TENSORS)
    expected = layer.weight.detach().flatten(1).to_sparse_csr()
    found = {name.partition(io.CSR)[2]: part for name, part in parts.items()}
    assert torch.equal(found["starts"].long(), expected.crow_indices())
    assert torch.equal(found["columns"].long(), expected.col_indices())
    assert torch.equal(found["values"], expected.values())
    assert [found[part].dtype for part in ("starts", "columns")] == [torch.int16, torch.int16]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_csr_keeps_every_number_to_the_last_bit(tmp_path, dtype):
    tiny = torch.finfo(dtype).smallest_normal / 2
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), tiny, -tiny], dtype=dtype)
    layer = nn.Linear(200, 50, bias=False).to(dtype)
    with torch.no_grad():
        layer.weight[torch.rand(50, 200) < 0.95] = 0
        layer.weight[3, 5:10] = odd
    loaded = round_trip(layer, lambda: nn.Linear(200, 50, bias=False), tmp_path, sparse=True)
    assert any(io.CSR in name for name in load_file(tmp_path / "stored" / io.TENSORS))
    assert torch.equal(bits(loaded.weight), bits(layer.weight))


def test_csr_takes_a_zero_of_either_sign_for_a_zero(tmp_path):
    layer = nn.Linear(200, 50, bias=False)
    with torch.no_grad():
        layer.weight.mul_(0.0)[3, 5] = 1.0
    assert layer.weight.signbit().any()
    loaded = round_trip(layer, lambda: nn.Linear(200, 50, bias=False), tmp_path, sparse=True)
    assert torch.equal(loaded.weight, layer.weight)
    assert files.size_on_disk(tmp_path / "stored") < 2000


@pytest.mark.parametrize(("alive", "sparse"), [(0, True), (1579, True), (1580, False), (2000, False)])
def test_csr_is_chosen_by_bytes(tmp_path, alive, sparse):
    """50 rows of 40: a float of 4 bytes, or as CSR 5 bytes a number and 2 for each of 51 starts."""
    layer = nn.Linear(40, 50, bias=False)
    with torch.no_grad():
        layer.weight.fill_(1.0).view(-1)[alive:] = 0
    vd.save(layer, tmp_path / "stored", sparse=True)
    names = set(load_file(tmp_path / "stored" / io.TENSORS))
    assert names == ({f"weight{io.CSR}{part}" for part in ("starts", "columns", "values")} if sparse else {"weight"})
    assert torch.equal(vd.load(tmp_path / "stored", lambda: nn.Linear(40, 50, bias=False)).weight, layer.weight)


@pytest.mark.parametrize("sparse", [False, True])
def test_models_and_tensors_without_any_number(tmp_path, sparse):
    assert isinstance(round_trip(nn.ReLU(), nn.ReLU, tmp_path, sparse=sparse), nn.ReLU)
    holder = nn.ParameterList([torch.zeros(0, 3), torch.zeros(3, 0)])
    loaded = round_trip(
        holder, lambda: nn.ParameterList([torch.ones(0, 3), torch.ones(3, 0)]), tmp_path / "b", sparse=sparse
    )
    assert [tuple(tensor.shape) for tensor in loaded] == [(0, 3), (3, 0)]


def test_the_record_says_what_was_stored_in_plain_json(tmp_path):
    vd.save(vd.convert(nn.Sequential(nn.Conv2d(2, 4, 3, groups=2, bias=False)), vd.ARD(threshold=0.5)), tmp_path / "a")
    record = json.loads((tmp_path / "a" / io.RECORD).read_text())
    assert record["format"] == 1 and record["torch"] == torch.__version__ and record["vardrop"] == vd.__version__
    assert record["layers"]["0"] == {"type": "Conv2d", "in_channels": 2, "out_channels": 4, "groups": 2, "bias": False}
    assert record["methods"]["0"]["name"] == "ard" and record["methods"]["0"]["fields"]["threshold"] == 0.5


def test_a_record_without_layer_types_is_read(tmp_path):
    """As the first runs were stored."""
    vd.save(nn.Linear(3, 2), tmp_path / "a")
    path = tmp_path / "a" / io.RECORD
    record = json.loads(path.read_text())
    del record["layers"][""]["type"], record["vardrop"]
    path.write_text(json.dumps(record))
    assert vd.load(tmp_path / "a", lambda: nn.Linear(9, 9)).out_features == 2
