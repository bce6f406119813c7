"""Conversion: what is chosen, what is refused, and what stays as it was."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import vardrop as vd
from vardrop.errors import ConversionError, GraphError, InvalidValueError, UnsupportedLayerError


def net():
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))


def names(model):
    return [site.name for site in vd.sites(model)]


def test_include_and_exclude_patterns():
    assert names(vd.convert(net(), vd.ARD(), include=["0", "2"])) == ["0", "2"]
    assert names(vd.convert(net(), vd.ARD(), exclude="4")) == ["0", "2"]


def test_dict_gives_parts_different_methods_and_the_first_match_wins():
    model = vd.convert(net(), {"0": vd.ARD(), "[02]": vd.SparseVD()})
    assert [(site.name, type(site.method)) for site in vd.sites(model)] == [("0", vd.ARD), ("2", vd.SparseVD)]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "ard"}, InvalidValueError, "must be a method"),
        ({"method": {0: vd.ARD()}}, InvalidValueError, "method: 0 is no name pattern"),
        ({"method": vd.ARD(), "include": [0]}, InvalidValueError, "include: 0 is no name pattern"),
        ({"method": vd.ARD(), "include": "7"}, InvalidValueError, "include='7' matches no layer"),
        ({"method": vd.ARD(), "exclude": "x*"}, InvalidValueError, "exclude='x\\*' matches no layer"),
        ({"method": {"0": vd.ARD(), "9": vd.ARD()}}, InvalidValueError, "'9' matches no layer"),
        ({"method": vd.ARD(), "exclude": "*"}, ConversionError, "nothing to convert"),
    ],
)
def test_bad_requests_are_refused_and_leave_the_model_plain(arguments, error, message):
    model = net()
    with pytest.raises(error, match=message):
        vd.convert(model, **arguments)
    assert names(model) == []


def test_twice_is_refused():
    model = vd.convert(net(), vd.ARD())
    with pytest.raises(ConversionError, match="converted already"):
        vd.convert(model, vd.SparseVD())


def test_unsupported_layers_named_in_include_are_refused_by_name():
    model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
    with pytest.raises(UnsupportedLayerError, match="'1' is a LayerNorm"):
        vd.convert(model, vd.ARD(), include=["0", "1"])


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_a_subclass_of_ones_own_is_refused_by_name_but_can_be_excluded():
    model = nn.Sequential(nn.Linear(3, 3), Scaled(3, 3))
    with pytest.raises(UnsupportedLayerError, match="'1' is a Scaled, a subclass of Linear.*exclude='1'"):
        vd.convert(model, vd.ARD())
    assert names(vd.convert(model, vd.ARD(), exclude="1")) == ["0"]


def test_a_lazy_layer_needs_a_batch_first():
    with pytest.raises(ConversionError, match="run one batch"):
        vd.convert(nn.Sequential(nn.LazyLinear(3)), vd.ARD())


def test_tied_weights_share_one_noise_and_pay_once():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    single = vd.kl(vd.convert(nn.Sequential(model[0]), vd.ARD(init_spread=0.0)))
    vd.strip(model[0])
    model[1].weight = model[0].weight
    vd.convert(model, vd.ARD(init_spread=0.0))
    assert model[0].noise is model[1].noise
    torch.testing.assert_close(vd.kl(model), single)


class Tied(nn.Module):
    """A language model whose output layer has the embedding's weight, as a layer or as a call."""

    def __init__(self, *, call):
        super().__init__()
        self.table, self.middle, self.call = nn.Embedding(20, 8), nn.Linear(8, 8), call
        if not call:
            self.head = nn.Linear(8, 20, bias=False)
            self.head.weight = self.table.weight

    def forward(self, x):
        x = self.middle(self.table(x)).relu()
        return nn.functional.linear(x, self.table.weight) if self.call else self.head(x)


def test_a_weight_tied_to_a_layer_that_stays_plain_is_refused():
    for options in ({"exclude": "head"}, {"include": "head"}, {"exclude": "table"}):
        with pytest.raises(
            ConversionError, match=r"'(head|table)', which stays plain.*exclude=\['(head|table)', '(h|t)"
        ):
            vd.convert(Tied(call=False), vd.ARD(), **options)
    with pytest.raises(InvalidValueError, match="must be a torch.nn.Module"):
        vd.convert(Tied, vd.ARD())
    assert names(vd.convert(Tied(call=False), vd.ARD(), exclude=["head", "table"])) == ["middle"]
    assert names(vd.convert(Tied(call=False), vd.ARD())) == ["table", "middle"]


def test_layers_with_one_weight_take_one_method():
    with pytest.raises(InvalidValueError, match="'table' and 'head' share a weight but are given different methods"):
        vd.convert(Tied(call=False), {"table": vd.SparseVD(), "*": vd.ARD()})


@pytest.mark.parametrize("method", [vd.ARD(threshold=0.5), vd.BetaBernoulli(place="output")], ids=["weights", "units"])
def test_no_plain_net_is_given_out_for_one_that_reads_a_noisy_weight_elsewhere(method, tmp_path):
    model, x = vd.convert(Tied(call=True), {"table": method}).eval(), torch.randint(20, (4, 5))
    vd.prune(model)
    before = model(x)
    with pytest.raises(GraphError, match="the weight of layer 'table' is also used outside its layer.*exclude='table'"):
        vd.compact(model, x)
    with pytest.raises(GraphError, match="the weight of layer 'table' is also used outside its layer"):
        vd.export_onnx(model, tmp_path / "net.onnx", x)
    torch.testing.assert_close(model(x), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    "wrap",
    [
        nn.utils.weight_norm,
        nn.utils.spectral_norm,
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.orthogonal,
        lambda layer: prune.random_unstructured(layer, "weight", 0.5),
    ],
    ids=["weight_norm", "spectral_norm", "parametrized", "orthogonal", "prune"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_a_layer_whose_weight_is_computed_is_refused(wrap):
    model = nn.Sequential(wrap(nn.Linear(4, 3)), nn.Linear(3, 2))
    with pytest.raises(UnsupportedLayerError, match="'0' computes its weight anew for each pass"):
        vd.convert(model, vd.ARD())
    assert names(vd.convert(model, vd.ARD(), exclude="0*")) == ["1"]


def test_complex_weights_are_refused():
    with pytest.raises(UnsupportedLayerError, match=r"'0' has weights of type torch.complex64: must be real"):
        vd.convert(nn.Sequential(nn.Linear(4, 3, dtype=torch.cfloat)), vd.ARD())


def test_hooks_and_an_optimizer_made_earlier_stay_valid():
    model = net()
    calls = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    vd.convert(model, vd.ARD())
    before = model[0].weight.clone()
    model(torch.randn(2, 6)).sum().backward()
    optimizer.step()
    assert calls == [1]
    assert not torch.equal(model[0].weight, before)


def test_the_encoder_layers_fast_path_cannot_skip_the_mask():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        plain = layer(x)
        vd.convert(layer, vd.SparseVD())
        torch.testing.assert_close(layer(x), plain)
        for site in vd.sites(layer):
            site.noise.mask = torch.zeros_like(site.weight, dtype=torch.bool)
        masked = layer(x)
        assert not torch.allclose(masked, plain)
        with vd.noise(layer, on=True):
            assert not torch.equal(layer(x), layer(x))
        torch.testing.assert_close(vd.strip(layer)(x), masked)


def test_gamma_ard_is_projected_under_any_optimizer_and_seen_projected():
    model = vd.convert(net(), vd.GammaARD(max_log_std=-4.0, init_log_std=-4.001, init_spread=0.0))
    optimizer = torch.optim.SGD(model.parameters(), lr=10.0)
    x = torch.randn(8, 6)
    for _ in range(3):
        (model(x).sum() * 0 + model(x).square().mean() * 0 + vd.kl(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert max(site.noise.log_std.max().item() for site in vd.sites(model)) == -4.0


def test_compile_fullgraph_export_and_vmap_over_a_converted_net():
    x = torch.randn(3, 6)
    for method in (vd.SparseVD(), vd.GammaARD(), vd.VariationalDropout(), vd.BernoulliDropout()):
        model = vd.convert(net(), method)
        torch.compiler.reset()  # the compiler bounds its variants in a process, those of other tests included
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        loss = compiled(x).sum()
        loss.backward()
        assert model[0].weight.grad is not None
        model.eval()
        torch.testing.assert_close(compiled(x), model(x))
        exported = torch.export.export(model, (x,)).module()
        torch.testing.assert_close(exported(x), model(x))


def test_a_scripted_part_is_left_alone_and_a_scripted_net_is_refused():
    net = nn.Sequential(nn.Linear(4, 8), torch.jit.script(nn.Linear(8, 2)))
    assert names(vd.convert(net, vd.ARD())) == ["0"]
    assert vd.kl(net) > 0 and vd.prune(net).total == 32
    with pytest.raises(ConversionError, match="nothing to convert in RecursiveScriptModule"):
        vd.convert(torch.jit.script(nn.Sequential(nn.Linear(4, 2))), vd.ARD())
    with pytest.raises(InvalidValueError, match="threshold='3': must be a number"):
        vd.prune(net, threshold="3")
    with pytest.raises(InvalidValueError, match="lr='x': must be a finite number"):
        vd.parameter_groups(net, lr="x")


@pytest.mark.parametrize(
    ("include", "error", "message"),
    [
        (["0", "1"], UnsupportedLayerError, "layer '1' is a ReLU, not supported; supported are exactly Linear"),
        ([], InvalidValueError, r"include=\[\]: must name layers"),
        (3, InvalidValueError, "include: 3 is no name pattern"),
    ],
)
def test_an_included_layer_without_a_noisy_form_is_refused(include, error, message):
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    with pytest.raises(error, match=message):
        vd.convert(model, vd.ARD(), include=include)
    assert next(vd.sites(model), None) is None


def with_own_forward(layer):
    layer.forward = lambda x: x


def with_child(layer):
    layer.probe = nn.Identity()


@pytest.mark.parametrize(("hang", "what"), [(with_own_forward, "a forward of its own"), (with_child, "child 'probe'")])
def test_a_layer_on_which_something_hangs_that_noise_would_pass_over_is_refused(hang, what):
    model = net()
    hang(model[2])
    with pytest.raises(UnsupportedLayerError, match=f"layer '2' is a Linear: it has .*{what}.*exclude='2'"):
        vd.convert(model, vd.ARD())
    assert names(vd.convert(model, vd.ARD(), exclude="2")) == ["0", "4"]


def test_a_layer_that_was_parametrized_after_its_conversion_does_not_pass_for_plain():
    model = vd.convert(net(), vd.ARD())
    nn.utils.parametrizations.weight_norm(model[2])
    for plain in (vd.strip, lambda model: vd.compact(model, torch.randn(2, 6))):
        with pytest.raises(ConversionError, match="layer '2' has become a ParametrizedNoisyLinear"):
            plain(model)
    assert names(model)[0] == "0"


def test_a_state_that_says_nothing_of_the_noise_leaves_the_marks_alone():
    dense = net()
    model = vd.convert(net(), vd.ARD())
    unpruned = model.state_dict()
    vd.prune(model)
    model.load_state_dict(dense.state_dict(), strict=False)
    assert all(site.noise.mask is not None for site in vd.sites(model))
    model.load_state_dict(unpruned)
    assert all(site.noise.mask is None for site in vd.sites(model))


def test_a_pattern_whose_layers_an_earlier_one_takes_is_told_so():
    with pytest.raises(
        InvalidValueError, match=r"pattern '0': pattern '\*', which comes before it, takes all its layers"
    ):
        vd.convert(nn.Sequential(nn.Linear(4, 3)), {"*": vd.ARD(), "0": vd.VBD()})


@pytest.mark.parametrize("method", [vd.GammaARD(), vd.StructuredBP()])
def test_a_net_whose_noise_is_put_back_into_its_domain_can_be_exported_while_training(method):
    net = vd.convert(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), method).train()
    assert isinstance(torch.export.export(net, (torch.randn(2, 4),)), torch.export.ExportedProgram)
