"""Noise on attention and in the torch transformer layers, against attention written from its definition."""

import copy
import math

import pytest
import torch
from torch import nn

import vardrop as vd
from vardrop.errors import UnsupportedLayerError
from vardrop.noise import noises_of

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(1))
PADDING = torch.tensor([[False] * 5, [False] * 4 + [True], [False] * 2 + [True] * 3])
SHAPES = {
    "self": {},
    "no-bias": {"bias": False},
    "one-head": {"num_heads": 1, "batch_first": False},
    "other-sizes": {"kdim": 6, "vdim": 7},
    "bias-kv": {"add_bias_kv": True, "add_zero_attn": True},
}


def attention(*, num_heads=2, batch_first=True, **options):
    return nn.MultiheadAttention(8, num_heads, batch_first=batch_first, **options)


def inputs(layer):
    x = X if layer.batch_first else X.transpose(0, 1)
    return (x, x, x) if layer._qkv_same_embed_dim else (x, x[..., :6], x[..., :7])


def encoder(layers=2, **options):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0, **options)
    return nn.TransformerEncoder(layer, layers).eval()


@pytest.mark.parametrize("options", SHAPES.values(), ids=SHAPES.keys())
def test_quiet_it_is_the_plain_layer_and_noisy_it_draws_with_gradients_for_all(options):
    layer = attention(**options)
    plain = copy.deepcopy(layer)
    before = dict(layer.named_parameters())
    vd.convert(layer, vd.SparseVD(init_log_std=-2.0))
    expected = {"in_proj_weight"} if layer._qkv_same_embed_dim else {"q_proj_weight", "k_proj_weight", "v_proj_weight"}
    assert {site.name for site in vd.sites(layer)} == {*expected, "out_proj"}
    assert all(dict(layer.named_parameters())[name] is parameter for name, parameter in before.items())
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            for ours, theirs in zip(layer.eval()(*inputs(layer)), plain.eval()(*inputs(layer)), strict=True):
                torch.testing.assert_close(ours, theirs)
    layer.train()
    assert not torch.equal(layer(*inputs(layer))[0], layer(*inputs(layer))[0])
    (layer(*inputs(layer))[0].square().sum() + vd.kl(layer)).backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
        assert (parameter.grad != 0).any() or "bias" in name, name


def by_hand(layer, weights, x):
    """Self-attention of two heads from its definition, in the given weights."""
    query, key, value = (torch.nn.functional.linear(x, weights["in_proj_weight"], layer.in_proj_bias)).chunk(3, dim=-1)
    heads = []
    for head in (slice(0, 4), slice(4, 8)):
        scores = query[..., head] @ key[..., head].transpose(1, 2) / math.sqrt(4)
        heads.append(scores.softmax(dim=-1) @ value[..., head])
    return torch.cat(heads, dim=-1) @ weights["out_proj.weight"].T + layer.out_proj.bias


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_a_noisy_pass_is_attention_in_the_weights_drawn(mode, monkeypatch):
    layer = vd.convert(attention(), vd.ARD(init_log_std=-1.0)).eval()
    drawn = {}
    for name, noise in noises_of(layer).items():
        draw = noise.sample_weight

        def remember(weight, name=name, draw=draw):
            drawn[name] = draw(weight)
            return drawn[name]

        monkeypatch.setattr(noise, "sample_weight", remember)
    with mode(), vd.noise(layer, on=True):
        output = layer(X, X, X)[0]
    assert set(drawn) == {"in_proj_weight", "out_proj.weight"}
    assert not torch.allclose(drawn["in_proj_weight"], layer.in_proj_weight, atol=1e-2)
    torch.testing.assert_close(output, by_hand(layer, drawn, X))


def test_it_is_pruned_counted_stripped_and_stored(tmp_path):
    layer = vd.convert(attention(), vd.SparseVD())
    with torch.no_grad():
        layer.in_proj_weight[::2] *= 1e-6
        layer.out_proj.weight[1] *= 1e-6
    counted = vd.prune(layer)
    assert counted.layers["in_proj_weight"].alive <= 96 and counted.layers["out_proj"].alive <= 56
    assert counted.total == 192 + 64 and vd.summary(layer).rows[1].name == "out_proj"
    expected = layer.eval()(X, X, X)[0]
    vd.save(layer, tmp_path / "noisy")
    loaded = vd.load(tmp_path / "noisy", attention)
    assert torch.equal(loaded.eval()(X, X, X)[0], expected) and torch.equal(vd.kl(loaded), vd.kl(layer))
    plain = vd.strip(copy.deepcopy(layer))
    assert type(plain) is nn.MultiheadAttention and set(plain.state_dict()) == set(attention().state_dict())
    assert (plain.in_proj_weight[::2] == 0).all() and (plain.out_proj.weight[1] == 0).all()
    torch.testing.assert_close(plain(X, X, X)[0], expected)


def test_patterns_name_the_attention_not_its_projection_and_a_subclass_is_refused():
    class Own(nn.MultiheadAttention):
        pass

    net = vd.convert(encoder(), {"layers.0.self_attn": vd.ARD(), "*": vd.SparseVD()})
    names = {site.name for site in vd.sites(net) if type(site.method) is vd.ARD}
    assert names == {"layers.0.self_attn.in_proj_weight", "layers.0.self_attn.out_proj"}
    with pytest.raises(UnsupportedLayerError, match="'0' is a Own, a subclass of MultiheadAttention"):
        vd.convert(nn.Sequential(Own(8, 2)), vd.ARD())


@pytest.mark.parametrize("include", ["*.self_attn", "*.linear2"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@torch.no_grad()
def test_the_fused_pass_of_an_encoder_skips_neither_noise_nor_mask(include, padded):
    net = encoder()
    padding = PADDING if padded else None

    def run():  # what stands at padded places is left open by torch
        return net(X, src_key_padding_mask=padding).masked_fill(PADDING[..., None], 0.0)

    plain = run()
    vd.convert(net, vd.SparseVD(), include=include)
    torch.testing.assert_close(run(), plain)
    with vd.noise(net, on=True):
        assert not torch.allclose(run(), run(), atol=1e-4)
    for site in vd.sites(net):
        site.noise.mask = torch.zeros_like(site.weight, dtype=torch.bool)
    masked = run()
    assert not torch.allclose(masked, plain, atol=1e-2)
    vd.strip(net)
    assert net.use_nested_tensor and not any(module._forward_hooks for module in net.modules())
    torch.testing.assert_close(run(), masked)


def test_an_encoder_decoder_trains_prunes_compacts_and_is_stored(tmp_path):
    def build():
        torch.manual_seed(0)
        return nn.Transformer(8, 2, 1, 1, 16, dropout=0.0, batch_first=True)

    net = vd.convert(build(), vd.SparseVD())
    assert sum("attn" in site.name for site in vd.sites(net)) == 6
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    start = copy.deepcopy(net.state_dict())
    vd.ELBO(num_data=10)(net, net(X, X).square().mean()).backward()
    optimizer.step()
    assert all(not torch.equal(value, start[name]) for name, value in net.state_dict().items() if "log_std" in name)
    with torch.no_grad():
        net.encoder.layers[0].linear1.weight[:5] *= 1e-9
        net.decoder.layers[0].linear2.weight[:, 3] *= 1e-9
    vd.prune(net)
    net.eval()
    small = vd.compact(net, (X, X))
    assert small.encoder.layers[0].linear2.in_features == 11 and small.decoder.layers[0].linear1.out_features == 15
    vd.save(small, tmp_path / "small", sparse=True)
    loaded = vd.load(tmp_path / "small", build).eval()
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            torch.testing.assert_close(loaded(X, X[:, :3]), net(X, X[:, :3]))


@pytest.mark.parametrize("method", [vd.BetaBernoulli(), vd.StructuredBP(), (vd.BetaBernoulli(), vd.SparseVD())])
def test_gates_on_the_units_of_a_feed_forward_compact_exactly(method):
    net = vd.convert(encoder(), method, include="*.linear2")
    with torch.no_grad():
        for site in vd.sites(net):
            for parameter in site.noise.parameters() if site.counts == "units" else ():
                parameter.add_(0.1 * torch.randn_like(parameter))
            if site.counts == "units":
                site.noise.mask = torch.arange(16) % 3 == 0
    small = vd.compact(net, X)
    assert [layer.linear1.out_features for layer in small.layers] == [6, 6]
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            torch.testing.assert_close(small.eval()(X), net.eval()(X))


def test_dead_heads_stay_as_zeros_because_torch_attention_has_no_place_for_fewer():
    net = vd.convert(encoder(1), vd.SparseVD(), include="*.self_attn")
    with torch.no_grad():
        net.layers[0].self_attn.out_proj.weight[:, :4] *= 1e-9
    vd.prune(net)
    plan = vd.compact(net, X, dry_run=True)
    assert any("layers.0.self_attn" in note and "MultiheadAttention" in note for note in plan.notes)
    small = vd.compact(net, X)
    assert (small.layers[0].self_attn.out_proj.weight[:, :4] == 0).all()
    torch.testing.assert_close(small(X), net.eval()(X))


def test_noisy_attention_runs_on_tensors_that_are_handed_to_it():
    net = vd.convert(encoder(1), vd.ARD())
    handed = {name: 2.0 * parameter.detach() for name, parameter in net.named_parameters()}
    found = torch.func.functional_call(net.eval(), handed, (X,))
    net.load_state_dict(handed)
    torch.testing.assert_close(found, net(X))


@pytest.mark.parametrize("name", ["linear1", "linear2", "self_attn"])
def test_a_layer_of_an_encoder_converted_alone_is_not_skipped_by_the_fused_pass(name):
    torch.manual_seed(0)
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    vd.convert(getattr(encoder, name), vd.SparseVD(init_log_std=0.0))
    vd.noise(encoder, on=True)
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        assert not torch.equal(encoder(x), encoder(x))
    vd.strip(encoder)
    assert not any(module._forward_hooks for module in encoder.modules())
