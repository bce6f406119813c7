"""Gates on a model: where they go, what is refused, what is shared, and the way to the second stage."""

import copy

import pytest
import torch
from torch import nn

import vardrop as vd
from vardrop.errors import ConversionError, EmptyLayerWarning, InvalidValueError, StorageError
from vardrop.io import load_weights
from vardrop.noise import InputGate
from vardrop.surgery.prune import would_live


def net():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 12), nn.ReLU(), nn.Linear(12, 3)
    )


X = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def places(model):
    return {site.name: (site.noise.place, site.noise.units) for site in vd.sites(model)}


def test_auto_gates_the_outputs_of_convolutions_and_the_inputs_of_linear_layers():
    model = vd.convert(net(), vd.BetaBernoulli())
    assert places(model) == {"0.gate": ("output", 4), "3.gate": ("input", 144), "5.gate": ("input", 12)}


def test_the_last_layer_of_a_sequential_is_gated_at_its_inputs_or_refused():
    fully = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Sequential(nn.ReLU(), nn.Conv2d(4, 2, 1)), nn.Softmax(1))
    assert places(vd.convert(fully, vd.StructuredBP())) == {"0.gate": ("output", 4), "1.1.gate": ("input", 4)}
    model = net()
    with pytest.raises(ConversionError, match="'5' is the last one.*exclude='5'.*place='input'"):
        vd.convert(model, vd.StructuredBP(place="output"))
    assert not list(vd.sites(model))
    vd.convert(model, vd.StructuredBP(place="output"), exclude="5")


def test_a_gate_on_tied_weights_is_refused_by_name():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    with pytest.raises(ConversionError, match="'0' shares its weight with '1'"):
        vd.convert(model, vd.BetaBernoulli())
    head = nn.ModuleDict({"table": nn.Embedding(6, 4), "head": nn.Linear(4, 6)})
    head["head"].weight = head["table"].weight
    with pytest.raises(ConversionError, match="'table' shares its weight with 'head'"):
        vd.convert(head, vd.BetaBernoulli())


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ((vd.ARD(), vd.SparseVD()), "given ARD, SparseVD: a layer takes one method on weights, one on units"),
        ((vd.BetaBernoulli(), vd.StructuredBP()), "given BetaBernoulli, StructuredBP"),
        ((), "given nothing"),
        ((vd.ARD(), "sbp"), "method='sbp'"),
    ],
)
def test_a_tuple_is_one_of_each_kind(method, message):
    with pytest.raises(InvalidValueError, match=message):
        vd.convert(net(), method)


def test_noise_and_gate_on_one_layer_both_act_pay_and_fold():
    model = vd.convert(net(), (vd.StructuredBP(), vd.SparseVD()))
    assert [site.name for site in vd.sites(model)] == ["0", "0.gate", "3", "3.gate", "5", "5.gate"]
    parts = [site.method.kl(site.noise, site.weight) for site in vd.sites(model)]
    torch.testing.assert_close(vd.kl(model), sum(parts))
    for site in vd.sites(model):
        site.noise.mask = torch.rand(site.noise.mask_shape(site.weight)) < 0.7
    model.eval()
    weight = model[3].weight * model[3].noise.mask * (model[3].gate.mean() * model[3].gate.mask)
    small = vd.compact(model, X)
    torch.testing.assert_close(small(X), model(X))
    torch.testing.assert_close(vd.strip(copy.deepcopy(model))[3].weight, weight)
    counted = vd.summary(model)
    living = model[3].noise.mask & model[3].gate.mask
    assert counted.rows[2].alive == living.sum() and counted.rows[3].alive == model[3].gate.mask.sum()


def test_parts_of_a_net_may_have_gates_and_others_noise_on_weights():
    model = vd.convert(net(), {"0": vd.BetaBernoulli(), "*": vd.ARD()})
    assert [type(site.method) for site in vd.sites(model)] == [vd.BetaBernoulli, vd.ARD, vd.ARD]
    assert "gate" in dict(model[0].named_children()) and "noise" not in dict(model[0].named_children())


def test_a_factor_on_the_kl_of_one_layer_weighs_in_the_objective_and_changes_nothing_else():
    model = vd.convert(net(), {"0": vd.StructuredBP(kl_factor=40.0), "*": vd.StructuredBP()})
    first, *others = (site.method.kl(site.noise, site.weight).item() for site in vd.sites(model))
    assert first > 0 and vd.kl(model).item() == pytest.approx(40 * first + sum(others))
    plain = vd.convert(net(), vd.StructuredBP())
    assert [first, *others] == [site.method.kl(site.noise, site.weight).item() for site in vd.sites(plain)]


def test_draws_are_one_for_each_example_and_unit_never_for_positions():
    model = vd.convert(nn.Sequential(nn.Conv2d(2, 4, 1, bias=False), nn.ReLU()), vd.StructuredVBD(place="input"))
    with torch.no_grad():
        model[0].weight.zero_()
        for unit in range(2):
            model[0].weight[unit, unit] = 1.0
    out = model.train()(torch.ones(6, 2, 5, 5))[:, :2]
    assert (out == out[:, :, :1, :1]).all()
    assert len(out[:, :, 0, 0].flatten().unique()) == 12
    assert model[0](torch.ones(2, 5, 5)).shape == (4, 5, 5)
    linear = vd.convert(nn.Linear(3, 3, bias=False), vd.StructuredVBD())
    with torch.no_grad():
        linear.weight.copy_(torch.eye(3))
    out = linear.train()(torch.ones(4, 7, 3))
    assert (out == out[:, :1]).all() and len(out[:, 0].unique()) == 12
    assert linear(torch.ones(3)).shape == (3,)


def test_the_generator_and_the_switch_reach_gates():
    model = vd.convert(net(), vd.BetaBernoulli()).eval()
    draws = []
    for _ in range(2):
        with vd.noise(model, on=True, generator=torch.Generator().manual_seed(3)):
            draws.append(model(X))
    assert torch.equal(*draws) and not torch.equal(draws[0], model(X))


def test_prune_counts_units_and_never_empties_a_gate():
    model = vd.convert(net(), vd.BetaBernoulli())
    with torch.no_grad():
        model[0].gate.raw_a[:3] = -9.0
        model[3].gate.raw_a.fill_(-9.0)
        model[3].gate.raw_a[7] = -8.5
    with pytest.raises(InvalidValueError, match="'3.gate': all 144 units are dead by the rule of BetaBernoulli"):
        vd.prune(model, on_empty="refuse")
    with pytest.warns(EmptyLayerWarning, match="'3.gate'"):
        counted = vd.prune(model)
    assert counted.units == vd.summary(model).units == "1-1-12"
    assert "3.gate: 1 of 144 units\n" in str(counted) and "units 1-1-12" in str(counted)
    assert model[3].gate.mask.nonzero().item() == 7
    assert counted.alive == 1 * 9 + 12 + 36 and counted.total == 36 + 144 * 12 + 36
    assert vd.summary(vd.unprune(model)).units == "4-144-12"


def test_noise_and_gate_never_empty_a_layer_together():
    model = vd.convert(nn.Linear(4, 2), (vd.BetaBernoulli(), vd.SparseVD()))
    with torch.no_grad():
        model.gate.raw_a[:2] = -9.0
        model.noise.log_std[:, 2:] = 5.0
    with pytest.raises(InvalidValueError, match="noise and gate leave no weight together"):
        vd.prune(model, on_empty="refuse")
    assert would_live(model).alive == 1
    with pytest.warns(EmptyLayerWarning, match="together"):
        assert vd.prune(model).alive == 1
    living = model.noise.mask & model.gate.mask
    assert living.sum() == 1 and living[:, 2:].any()


def test_dead_units_stay_dead_in_training_and_pay_nothing():
    model = vd.convert(net(), vd.StructuredBP())
    model[3].gate.mask = torch.arange(144) < 100
    x = torch.zeros(2, 144)
    x[1, 100:] = 1e3
    out = model[3].train()(x)
    torch.testing.assert_close(out[0], out[1])
    pays = model[3].gate.method.kl(model[3].gate, model[3].weight)
    full = vd.functional.truncated_lognormal_kl(model[3].gate.mu, model[3].gate.log_sigma)
    torch.testing.assert_close(pays, full[:100].sum())


def test_parameters_are_projected_into_their_domain():
    model = vd.convert(nn.Linear(3, 2), vd.StructuredBP()).train()
    with torch.no_grad():
        model.gate.mu.copy_(torch.tensor([-30.0, 0.0, 9.0]))
        model.gate.log_sigma.copy_(torch.tensor([-30.0, 0.0, 9.0]))
    model(torch.randn(2, 3))
    assert model.gate.mu.tolist() == model.gate.log_sigma.tolist() == [-20.0, 0.0, 5.0]
    model = vd.convert(nn.Linear(3, 2), vd.BetaBernoulli()).train()
    with torch.no_grad():
        model.gate.raw_a.fill_(-99.0)
        model.gate.raw_b.fill_(99.0)
    model(torch.randn(2, 3))
    assert model.gate.raw_a.max() == -10.0 and model.gate.raw_b.min() == 50.0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: vd.StructuredBP(init_mu=5.5), r"StructuredBP\(init_mu=5.5\): must satisfy -20 <= init_mu <= 5"),
        (lambda: vd.StructuredBP(init_log_sigma=-21.0), "init_log_sigma=-21.0"),
        (lambda: vd.StructuredBP(low=0.0), r"StructuredBP\(low=0.0, high=0.0\): must satisfy low < high"),
        (lambda: vd.StructuredBP(place="left"), "place='left'"),
        (lambda: vd.StructuredBP(kl_factor=-1.0), r"StructuredBP\(kl_factor=-1.0\)"),
        (lambda: vd.StructuredBP(draws="unit"), "draws='unit'"),
        (lambda: vd.BetaBernoulli(threshold=float("nan")), "threshold=nan"),
        (lambda: vd.BetaBernoulli().cutoff(float("nan")), "threshold=nan"),
        (lambda: vd.BetaBernoulli(init_a=0.0), "init_a=0.0"),
        (lambda: vd.BetaBernoulli(temperature=0.0), "temperature=0.0"),
        (lambda: vd.StructuredVBD(init_spread=-1.0), "init_spread=-1.0"),
        (lambda: vd.ConcreteDropout(init_rate=1.0), "init_rate=1.0"),
        (lambda: vd.ConcreteDropout(temperature=0.0), "temperature=0.0"),
        (lambda: vd.DependentBetaBernoulli(momentum=0.0), "momentum=0.0"),
        (lambda: vd.GaussianDropout(on="outputs"), "on='outputs'"),
        (lambda: vd.GaussianDropout(on="inputs", rule="snr"), "noise on inputs takes rule=None"),
        (lambda: vd.VariationalDropout(on="inputs", alpha="weight"), "must be 'layer' or 'input'"),
        (lambda: vd.parameter_groups(net(), gate_lr=-1.0), "gate_lr=-1.0"),
        (lambda: vd.parameter_groups(net(), lr=float("inf")), "lr=inf"),
    ],
)
def test_bad_values_are_refused_by_name(build, message):
    with pytest.raises(InvalidValueError, match=message):
        build()


def test_parameter_groups_hold_every_trainable_parameter_once():
    model = vd.convert(net(), {"0": (vd.BetaBernoulli(), vd.ARD()), "*": vd.StructuredBP()})
    model[5].bias.requires_grad_(False)
    _, weights, gates = groups = vd.parameter_groups(model, lr=0.1, gate_lr=0.5)
    assert [group["lr"] for group in groups] == [0.1, 0.1, 0.5]
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert all(".gate." in names[parameter] for parameter in gates["params"])
    assert [names[parameter] for parameter in weights["params"]] == ["0.noise.log_std"]
    listed = [names[parameter] for group in groups for parameter in group["params"]]
    assert sorted(listed) == sorted(name for name in names.values() if name != "5.bias")
    optimizer = torch.optim.AdamW(groups, weight_decay=0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0, 0.0]
    model(X).sum().backward()
    optimizer.step()
    assert [group["lr"] for group in vd.parameter_groups(net())] == [1e-3]


def two_stages(**options):
    model = vd.convert(net(), vd.BetaBernoulli(init_a=2.0))
    with torch.no_grad():
        model[3].gate.raw_a[::3] = -9.0
    vd.prune(model)
    return vd.convert(model, vd.DependentBetaBernoulli(**options))


def test_the_second_stage_carries_the_posterior_over_frozen():
    model = vd.convert(net(), vd.BetaBernoulli(init_a=2.0))
    with torch.no_grad():
        model[3].gate.raw_a[::3] = -9.0
    vd.prune(model)
    first, weight = model[3].gate, model[3].weight
    vd.convert(model, vd.DependentBetaBernoulli())
    gate = model[3].gate
    assert model[3].weight is weight and torch.equal(gate.mask, first.mask)
    torch.testing.assert_close(gate.a[first.mask], first.a[first.mask])
    torch.testing.assert_close(gate.b, first.b)
    assert {name for name, _ in gate.named_parameters()} == {"scale", "shift", "log_std"}
    assert vd.prune(vd.unprune(model)).units == "4-96-12"
    assert vd.convert(net(), vd.BetaBernoulli(place="input"))[0].gate.place == "input"


def test_only_the_second_stage_converts_a_converted_model():
    second = vd.DependentBetaBernoulli()
    with pytest.raises(ConversionError, match="second stage of BetaBernoulli.*train it first"):
        vd.convert(net(), second)
    with pytest.raises(ConversionError, match="second stage of BetaBernoulli"):
        vd.convert(vd.convert(net(), vd.StructuredBP()), second)
    with pytest.raises(ConversionError, match="converted already"):
        vd.convert(vd.convert(net(), vd.BetaBernoulli()), vd.BetaBernoulli())
    with pytest.raises(InvalidValueError, match="is given alone"):
        vd.convert(vd.convert(net(), vd.BetaBernoulli()), (second, vd.ARD()))
    with pytest.raises(ConversionError, match="second stage"):
        vd.convert(two_stages(), second)
    some = vd.convert(vd.convert(net(), vd.BetaBernoulli()), second, include=["3", "5"])
    assert [type(site.method) for site in vd.sites(some)] == [vd.BetaBernoulli, *[vd.DependentBetaBernoulli] * 2]
    with pytest.raises(InvalidValueError, match="'1' matches no layer"):
        vd.convert(vd.convert(net(), vd.BetaBernoulli()), {"1": second})


def test_units_that_no_recent_input_switched_on_die():
    model = two_stages(momentum=0.5)
    with torch.no_grad():
        model[5].gate.shift[:4] = -50.0
    for _ in range(12):
        model.train()(X)
    assert vd.prune(model).units == "4-96-8"


@pytest.mark.parametrize("sparse", [False, True])
def test_a_compacted_net_keeps_its_dependent_gates_cut_to_the_living_units(tmp_path, sparse):
    model = two_stages(init_shift=0.4)
    for _ in range(3):
        model.train()(X)
    model.eval()
    model[5].gate.mask = torch.arange(12) < 7
    small = vd.compact(model, X)
    torch.testing.assert_close(small(X), model(X))
    assert small[5].in_features == 7 and len(small[5].gate.scale) == 7
    assert all(type(m).__module__.startswith("torch.nn") or type(m) is InputGate for m in small.modules())
    vd.save(small, tmp_path / "small", sparse=sparse)
    loaded = vd.load(tmp_path / "small", net).eval()
    assert torch.equal(loaded(X), small(X))
    assert torch.equal(copy.deepcopy(loaded)(X), small(X))
    torch.testing.assert_close(torch.export.export(small, (X,)).module()(X), small(X))
    torch.testing.assert_close(torch.compile(small, fullgraph=True, backend="aot_eager")(X), small(X))
    with pytest.raises(StorageError, match="a gate for '3', which is no layer"):
        vd.load(tmp_path / "small", lambda: nn.Sequential(nn.Conv2d(1, 4, 3)))
    pytest.importorskip("onnxruntime")
    vd.export_onnx(small, tmp_path / "small.onnx", X)


def test_skipping_closed_units_gives_the_same_outputs_for_one_example():
    from vardrop.surgery.skip import SkippingLinear, skip_closed_units

    model = two_stages(init_shift=0.0).eval()
    model[5].gate.shift.data.fill_(1.0)  # most units are open here, which takes the other way
    small = vd.compact(model, X)
    skipping = skip_closed_units(copy.deepcopy(small))
    assert sum(isinstance(module, SkippingLinear) for module in skipping.modules()) == 2
    for x in X.split(1):
        torch.testing.assert_close(skipping(x), small(x))
    with pytest.raises(InvalidValueError, match="must be one example with"):
        skipping(X)
    with pytest.raises(ConversionError, match="no linear layer with an input-dependent gate"):
        skip_closed_units(net())


@pytest.mark.parametrize("method", [vd.BetaBernoulli(), vd.StructuredBP(), vd.StructuredVBD(), vd.ConcreteDropout()])
def test_gated_nets_compile_in_one_graph_and_their_compact_form_exports(tmp_path, method):
    torch.compiler.reset()
    model = vd.convert(net(), method)
    model(X).sum().backward()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.isfinite(compiled(X)).all()
    model.eval()
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(X), model(X))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(model.train()(X)).all()
    pytest.importorskip("onnxruntime")
    vd.export_onnx(vd.compact(model.eval(), X), tmp_path / "small.onnx", X)


def test_load_weights_takes_a_file_or_a_folder_and_names_what_differs(tmp_path):
    from safetensors.torch import save_file

    source = net()
    save_file(source.state_dict(), tmp_path / "net.safetensors")
    vd.save(source, tmp_path / "net")
    vd.save(vd.convert(copy.deepcopy(source), vd.BetaBernoulli()), tmp_path / "noisy")
    for path in ("net.safetensors", "net"):
        assert torch.equal(load_weights(net(), tmp_path / path)(X), source(X))
    assert [site.method for site in vd.sites(load_weights(net(), tmp_path / "noisy"))] == [vd.BetaBernoulli()] * 3
    other = nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(180, 12))
    with pytest.raises(
        StorageError, match=r"(?s)0.bias: stored \(4,\), built \(5,\).*5.bias: stored \(3,\), built not"
    ):
        load_weights(other, tmp_path / "net.safetensors")
    with pytest.raises(StorageError, match="does not exist"):
        load_weights(net(), tmp_path / "nowhere")
    (tmp_path / "torn").write_bytes(b"123")
    with pytest.raises(StorageError, match="truncated or not a safetensors file"):
        load_weights(net(), tmp_path / "torn")


class ByName(nn.Module):
    """Two layers that are given their inputs by name."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.second(input=self.first(input=x).relu())


def in_second_stage(model):
    return vd.convert(vd.convert(model, vd.BetaBernoulli()), vd.DependentBetaBernoulli())


def test_what_is_left_of_a_dependent_gate_takes_inputs_given_by_name():
    model, x = in_second_stage(ByName()).eval(), torch.randn(5, 6)
    expected = model(x).detach()
    torch.testing.assert_close(vd.strip(model)(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dependent_gates_train_in_the_type_that_the_model_was_cast_to(dtype):
    model = in_second_stage(nn.Sequential(nn.Linear(6, 8))).to(dtype)
    model(torch.randn(5, 6, dtype=dtype)).sum().backward()
    assert model[0].gate.running_mean.dtype == dtype and model[0].weight.grad.isfinite().all()


def test_dependent_gates_take_an_empty_batch():
    model = in_second_stage(nn.Sequential(nn.Linear(6, 8)))
    before = {name: tensor.clone() for name, tensor in model.named_buffers()}
    assert model(torch.randn(0, 6)).shape == (0, 8)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_buffers())
