"""Noise on recurrent layers, against loops over time written from the definition."""

import copy
import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import vardrop as vd
from vardrop.errors import ConversionError, UnsupportedLayerError
from vardrop.layers.stepwise import stepwise

KINDS = {
    "rnn-tanh": lambda *args, **options: nn.RNN(*args, **options),
    "rnn-relu": lambda *args, **options: nn.RNN(*args, nonlinearity="relu", **options),
    "lstm": lambda *args, **options: nn.LSTM(*args, **options),
    "gru": lambda *args, **options: nn.GRU(*args, **options),
}
SHAPES = {
    "one": {},
    "no-bias": {"bias": False},
    "deep-both-ways": {"num_layers": 3, "bidirectional": True},
    "batch-first": {"batch_first": True, "num_layers": 2},
}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_shape = pytest.mark.parametrize("shape", SHAPES)


def leaves(outputs):
    output, state = outputs
    output = output.data if isinstance(output, nn.utils.rnn.PackedSequence) else output
    return [output, *(state if isinstance(state, tuple) else [state])]


def state_of(net, batch):
    directions = 2 if net.bidirectional else 1
    h = torch.randn(net.num_layers * directions, batch, net.hidden_size)
    return (h, torch.randn(h.shape)) if isinstance(net, nn.LSTM) else h


def seeded(net, *inputs, seed=1):
    with vd.noise(net, on=True, generator=torch.Generator().manual_seed(seed)):
        return net(*inputs)


def set_log_std(net, value):
    with torch.no_grad():
        for site in vd.sites(net):
            site.noise.log_std.fill_(value)


@every_kind
@every_shape
def test_without_spread_it_is_torchs_own_in_all_ways_of_calling_it(kind, shape):
    plain = KINDS[kind](3, 4, **SHAPES[shape])
    noisy = vd.convert(copy.deepcopy(plain), vd.SparseVD(init_log_std=-40.0))
    x, lengths = torch.randn(5, 5, 3), torch.tensor([2, 5, 1, 4, 5])
    packed = pack_padded_sequence(x, lengths, batch_first=plain.batch_first, enforce_sorted=False)
    for inputs in ((x,), (x, state_of(plain, 5)), (packed,), (packed, state_of(plain, 5)), (x[0],)):
        for noise in (False, True):
            with vd.noise(noisy, on=noise):
                torch.testing.assert_close(leaves(noisy(*inputs)), leaves(plain(*inputs)), rtol=0, atol=1e-6)


@every_kind
def test_packed_and_padded_sequences_see_the_same_draw(kind):
    net = vd.convert(KINDS[kind](3, 4, num_layers=2), vd.SparseVD(init_log_std=-1.0))
    x, lengths = torch.randn(6, 3, 3), [6, 4, 2]
    padded = seeded(net, x)[0]
    packed, _ = pad_packed_sequence(seeded(net, pack_padded_sequence(x, lengths))[0])
    for example, length in enumerate(lengths):
        torch.testing.assert_close(packed[:length, example], padded[:length, example])


def by_hand(kind, x, w_ih, w_hh, b_ih, b_hh):
    """Outputs ``(draws, time, units)`` for one sequence `x`, with one weight matrix for each draw."""
    h = torch.zeros(len(w_ih), w_hh.shape[2], dtype=x.dtype)
    c, outputs = h, []
    for now in x:
        a = torch.einsum("sgi,i->sg", w_ih, now) + b_ih
        b = torch.einsum("sgh,sh->sg", w_hh, h) + b_hh
        if kind == "lstm":
            i, f, g, o = (a + b).chunk(4, dim=1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        elif kind == "gru":
            (ar, az, an), (br, bz, bn) = a.chunk(3, dim=1), b.chunk(3, dim=1)
            r, z = (ar + br).sigmoid(), (az + bz).sigmoid()
            h = (1 - z) * (an + r * bn).tanh() + z * h
        else:
            h = (a + b).tanh() if kind == "rnn-tanh" else (a + b).relu()
        outputs.append(h)
    return torch.stack(outputs, dim=1)


@every_kind
def test_the_law_of_the_outputs_is_that_of_one_draw_of_the_weights_for_all_steps(kind):
    net = vd.convert(KINDS[kind](2, 3).double(), vd.ARD(init_log_std=math.log(0.4), init_spread=0.2))
    x = 2 * torch.randn(4, 2, dtype=torch.float64)
    own = torch.stack([net(x)[0] for _ in range(4000)]).detach()
    drawn = [
        site.weight + site.noise.log_std.exp() * torch.randn(40_000, *site.weight.shape, dtype=torch.float64)
        for site in vd.sites(net)
    ]
    expected = by_hand(kind, x, *drawn, net.bias_ih_l0, net.bias_hh_l0).detach()

    def statistics(outputs):
        flat = outputs.flatten(1)
        return torch.cat([flat, (flat.unsqueeze(1) * flat.unsqueeze(2)).flatten(1)], dim=1)

    ours, theirs = statistics(own), statistics(expected)
    error = (ours.var(dim=0) / len(ours) + theirs.var(dim=0) / len(theirs)).sqrt()
    assert ((ours.mean(dim=0) - theirs.mean(dim=0)).abs() <= 5 * error + 1e-12).all()


@pytest.mark.parametrize("method", [vd.SparseVD(init_log_std=0.0), vd.BernoulliDropout()], ids=["gaussian", "binary"])
def test_a_pass_shares_its_draw_over_time_and_the_next_pass_has_its_own(method):
    net = vd.convert(nn.RNN(30, 50, nonlinearity="relu", bias=False), method)
    with torch.no_grad():
        net.weight_hh_l0.zero_()
        if isinstance(method, vd.SparseVD):
            net.noise["weight_hh_l0"].log_std.fill_(-40.0)
    x = torch.randn(30).expand(6, 4, 30)
    first, second = net(x)[0], net(x)[0]
    torch.testing.assert_close(first, first[:1].expand_as(first))
    for one, other in pairwise(first[0]):  # the sequences share a draw of weights, but none of binary masks
        assert torch.allclose(one, other) == isinstance(method, vd.SparseVD)
    assert not torch.allclose(first, second)


@every_kind
def test_gradients_are_those_of_the_function(kind):
    net = vd.convert(KINDS[kind](2, 2, num_layers=2, bidirectional=True).double(), vd.SparseVD(init_log_std=-1.0))
    names, values = zip(*net.named_parameters(), strict=True)

    def pass_with(x, *parameters):
        with vd.noise(net, on=True, generator=torch.Generator().manual_seed(3)):
            return torch.func.functional_call(net, dict(zip(names, parameters, strict=True)), x)[0]

    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(pass_with, (x, *values))


def test_a_functional_call_draws_noise_around_the_weights_it_is_given():
    net = vd.convert(nn.LSTM(2, 3), vd.SparseVD(init_log_std=-1.0))
    x = torch.randn(4, 1, 2)
    other = {name: value + 1.0 for name, value in net.named_parameters()}
    called = torch.func.functional_call(net, other, x)[0]
    assert not torch.allclose(called, torch.func.functional_call(net, other, x)[0])
    assert not torch.allclose(called, net(x)[0])


def test_the_kl_counts_each_weight_once_and_no_bias():
    net = vd.convert(nn.LSTM(3, 4, num_layers=2, bidirectional=True), vd.VariationalDropout(init_log_alpha=-2.0))
    assert [site.name for site in vd.sites(net)] == [name for name in net._flat_weights_names if "weight" in name]
    weights = sum(site.weight.numel() for site in vd.sites(net))
    each = vd.functional.log_uniform_kl_from_log_alpha(torch.tensor(-2.0))
    torch.testing.assert_close(vd.kl(net), weights * each)


class Tagger(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 5)
        self.lstm = nn.LSTM(5, 6, batch_first=True, num_layers=2)
        self.head = nn.Linear(6, 4)

    def forward(self, words):
        return self.head(self.lstm(self.table(words))[0][:, -1])


def sparse_tagger():
    net = vd.convert(Tagger(), vd.SparseVD())
    with torch.no_grad():
        for site in vd.sites(net):
            site.weight.copy_(site.weight.sign() * 0.3)
            site.weight.view(-1)[::2] = 1e-6
    return net


WORDS = torch.randint(11, (3, 7), generator=torch.Generator().manual_seed(5))


def test_a_pruned_net_strips_to_plain_layers_with_the_same_outputs():
    net = sparse_tagger()
    counted = vd.prune(net)
    assert counted.layers["lstm.weight_hh_l1"].alive == 24 * 6 // 2
    expected = net.eval()(WORDS)
    plain = vd.strip(copy.deepcopy(net))
    assert [type(layer) for layer in plain.children()] == [nn.Embedding, nn.LSTM, nn.Linear]
    assert set(plain.state_dict()) == set(Tagger().state_dict())
    torch.testing.assert_close(plain(WORDS), expected)
    assert int(plain.lstm.weight_hh_l1.count_nonzero()) == 24 * 6 // 2
    assert not torch.equal(vd.unprune(net)(WORDS), expected)


def test_a_dead_weight_is_dead_in_noisy_passes_too():
    net = sparse_tagger()
    vd.prune(net)
    for site in vd.sites(net):
        if site.name.startswith("lstm"):
            assert (site.noise.sample_weight(site.weight)[~site.noise.mask] == 0).all()


def test_summary_lists_every_weight_and_a_stored_net_comes_back(tmp_path):
    net = sparse_tagger()
    vd.prune(net)
    rows = {row.name: row for row in vd.summary(net, example_inputs=WORDS).rows}
    assert set(rows) == {"table", "head", *(site.name for site in vd.sites(net))}
    assert rows["lstm.weight_ih_l0"].kind == "LSTM" and rows["lstm.weight_ih_l0"].alive == 24 * 5 // 2
    vd.save(net, tmp_path / "net", sparse=True)
    loaded = vd.load(tmp_path / "net", Tagger)
    torch.testing.assert_close(loaded.eval()(WORDS), net.eval()(WORDS), rtol=0, atol=0)
    torch.testing.assert_close(vd.kl(loaded), vd.kl(net))
    assert all(site.method == vd.SparseVD() for site in vd.sites(loaded))


def test_predict_averages_over_draws_and_a_generator_repeats_them():
    net = vd.convert(Tagger(), vd.SparseVD(init_log_std=-1.0))
    first, second = (vd.predict(net, WORDS, samples=3, generator=torch.Generator().manual_seed(2)) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    torch.testing.assert_close(first.sum(dim=1), torch.ones(3))


def test_binary_dropout_drops_an_input_or_hidden_unit_for_all_gates():
    net = vd.convert(nn.LSTM(200, 200), vd.BernoulliDropout(rate=0.25))
    for site in vd.sites(net):
        drawn = site.noise.sample_weight(site.weight)
        kept = (drawn != 0).any(dim=0)
        torch.testing.assert_close(drawn[:, kept], site.weight[:, kept] / 0.75)
        assert (drawn[:, ~kept] == 0).all() and 25 < int((~kept).sum()) < 75


@every_kind
@pytest.mark.parametrize("rates", [(0.4, None), (0.0, 0.5), (0.5, 0.0)], ids=["both", "hidden", "inputs"])
def test_binary_dropout_is_one_mask_on_inputs_and_one_on_hidden_units_at_every_step(kind, rates):
    rate, own = rates
    net = vd.convert(KINDS[kind](7, 9).double(), vd.BernoulliDropout(rate=rate, recurrent_rate=own))
    x, recurrent = torch.randn(6, 7, dtype=torch.float64), rate if own is None else own
    draws = torch.Generator().manual_seed(1)
    on_inputs, on_hidden = (  # nothing is drawn at a rate of 0
        (torch.rand(1, size, generator=draws) >= share) / (1 - share) if share else torch.ones(1, size)
        for size, share in ((7, rate), (9, recurrent))
    )
    expected = with_masks(kind, net, x, on_inputs[0].double(), on_hidden[0].double())
    torch.testing.assert_close(seeded(net, x)[0], expected)
    assert ((on_inputs == 0).any(), (on_hidden == 0).any()) == (rate > 0, recurrent > 0)


@every_kind
def test_every_sequence_has_binary_masks_of_its_own(kind):
    net = vd.convert(KINDS[kind](7, 9, batch_first=True).double(), vd.BernoulliDropout(rate=0.3, recurrent_rate=0.5))
    x, draws = torch.randn(4, 6, 7, dtype=torch.float64), torch.Generator().manual_seed(1)
    on_inputs, on_hidden = (
        ((torch.rand(4, size, generator=draws) >= rate) / (1 - rate)).double() for size, rate in ((7, 0.3), (9, 0.5))
    )
    expected = [with_masks(kind, net, *parts) for parts in zip(x, on_inputs, on_hidden, strict=True)]
    torch.testing.assert_close(seeded(net, x)[0], torch.stack(expected))


@every_kind
@pytest.mark.parametrize("form", ["plain", "batch_first", "unbatched", "packed", "packed in order"])
@pytest.mark.parametrize("given", [False, True], ids=["from zero", "from a state"])
@pytest.mark.parametrize("more", [{}, {"num_layers": 2, "bidirectional": True, "bias": False}], ids=["one", "several"])
def test_step_by_step_a_layer_gives_what_torch_gives(kind, form, given, more):
    net = KINDS[kind](5, 4, batch_first=form == "batch_first", **more).double()
    x, lengths = torch.randn(6, 3, 5, dtype=torch.float64), [2, 6, 3] if form == "packed" else [6, 3, 3]
    forms = {"batch_first": lambda: x.transpose(0, 1), "unbatched": lambda: x[:, 0], "plain": lambda: x}
    pack = partial(pack_padded_sequence, x, lengths, enforce_sorted=form != "packed")
    given_x = forms.get(form, pack)()
    shape = (net.num_layers * (1 + net.bidirectional), *(() if form == "unbatched" else (3,)), 4)
    states = [torch.randn(shape, dtype=torch.float64) for _ in range(2)]
    hx = None if not given else tuple(states) if kind == "lstm" else states[0]
    for found, expected in zip(leaves(stepwise(net, given_x, hx, {})), leaves(net(given_x, hx)), strict=True):
        torch.testing.assert_close(found, expected)


def test_step_by_step_torchs_own_dropout_stays_and_a_state_of_another_shape_is_refused():
    net, x = nn.LSTM(3, 4, num_layers=2, dropout=0.5), torch.randn(5, 2, 3)
    assert not torch.allclose(stepwise(net, x, None, {})[0], stepwise(net, x, None, {})[0])
    torch.testing.assert_close(stepwise(net.eval(), x, None, {})[0], net(x)[0])
    with pytest.raises(RuntimeError, match=r"hx has shape \(2, 1, 4\): must be \(2, 2, 4\)"):
        stepwise(net, x, (torch.zeros(2, 1, 4), torch.zeros(2, 1, 4)), {})


@every_kind
def test_binary_dropout_refuses_what_torch_refuses_and_keeps_its_types(kind):
    net = vd.convert(KINDS[kind](7, 9), vd.BernoulliDropout())
    for wrong in (torch.zeros(4, 3, 1), torch.zeros(0, 3, 7), torch.zeros(7), torch.zeros(1, 1, 1, 7)):
        with pytest.raises((RuntimeError, ValueError)):
            net(wrong)
    with pytest.raises(ValueError, match="dtype"):
        net(torch.zeros(4, 3, 7, dtype=torch.float64))
    with torch.autocast("cpu", torch.bfloat16):
        for dropped, plain in zip(
            leaves(net(torch.randn(4, 3, 7))), leaves(net.eval()(torch.randn(4, 3, 7))), strict=True
        ):
            assert dropped.dtype == plain.dtype


def with_masks(kind, net, x, on_inputs, on_hidden):
    """Outputs of a recurrence from zero whose inputs and fed-back hidden units are masked at each of its steps."""
    h, c, outputs = torch.zeros(9, dtype=x.dtype), torch.zeros(9, dtype=x.dtype), []
    for now in x:
        a = net.weight_ih_l0 @ (now * on_inputs) + net.bias_ih_l0
        b = net.weight_hh_l0 @ (h * on_hidden) + net.bias_hh_l0
        if kind == "lstm":
            i, f, g, o = (a + b).chunk(4)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        elif kind == "gru":
            (ar, az, an), (br, bz, bn) = a.chunk(3), b.chunk(3)
            h_new = (an + (ar + br).sigmoid() * bn).tanh()
            h = (1 - (az + bz).sigmoid()) * h_new + (az + bz).sigmoid() * h
        else:
            h = (a + b).tanh() if kind == "rnn-tanh" else (a + b).relu()
        outputs.append(h)
    return torch.stack(outputs)


def test_hidden_units_alone_are_dropped_in_every_layer_and_direction():
    net = nn.Sequential(nn.LSTM(20, 30, num_layers=2, bidirectional=True), nn.Linear(60, 5))
    vd.convert(net, vd.BernoulliDropout(rate=0.0, recurrent_rate=0.5))
    for site in vd.sites(net):
        dropped = (site.noise.sample_weight(site.weight) == 0).all(dim=0).any()
        assert dropped == ("weight_hh" in site.name)
    assert [line.split("{")[1] for line in vd.cite(net).splitlines() if line.startswith("@")] == [
        "hinton2012improving,",
        "gal2016theoretically,",
    ]
    assert "gal2016" not in vd.cite(vd.convert(nn.Linear(2, 2), vd.BernoulliDropout()))


def test_torchs_own_dropout_between_layers_stays():
    net = vd.convert(nn.LSTM(3, 4, num_layers=2, dropout=0.5), vd.SparseVD(init_log_std=-40.0))
    x = torch.randn(5, 2, 3)
    assert not torch.allclose(net(x)[0], net(x)[0])
    torch.testing.assert_close(net.eval()(x)[0], net(x)[0])


def test_a_projection_is_refused_by_name_before_anything_changes():
    net = nn.Sequential(nn.Linear(3, 3), nn.LSTM(3, 4, proj_size=2))
    with pytest.raises(UnsupportedLayerError, match="'1' is a LSTM: proj_size=2 is not supported"):
        vd.convert(net, vd.ARD())
    assert type(net[0]) is nn.Linear
    assert next(vd.sites(vd.convert(net, vd.ARD(), exclude="1"))).name == "0"


def test_a_subclass_is_refused():
    class Own(nn.GRU):
        pass

    with pytest.raises(UnsupportedLayerError, match="subclass of GRU"):
        vd.convert(Own(3, 4), vd.ARD())


@pytest.mark.parametrize("method", [vd.BetaBernoulli(), (vd.BetaBernoulli(), vd.ARD())], ids=["gate", "gate-and-noise"])
def test_gates_leave_recurrent_layers_alone_unless_named_and_then_are_refused(method):
    net = nn.ModuleDict({"lstm": nn.LSTM(3, 4), "head": nn.Linear(4, 2)})
    with pytest.raises(UnsupportedLayerError, match=r"layer 'lstm' is a LSTM, whose units have no gate"):
        vd.convert(net, {"lstm": method})
    assert all(site.name.startswith("head") for site in vd.sites(vd.convert(net, method)))
    with pytest.raises(ConversionError, match=r"there is no layer of the kinds [^R]*Embedding"):
        vd.convert(nn.Sequential(nn.LSTM(3, 4)), method)


def test_the_fast_path_leaves_recurrent_layers_and_embeddings_as_they_are():
    net = nn.Sequential(nn.Embedding(7, 3), nn.LSTM(3, 4, batch_first=True))
    vd.convert(net, vd.SparseVD())
    x = torch.randint(7, (2, 5))
    torch.manual_seed(1)
    expected, price = net(x)[0], vd.kl(net)
    vd.fast(net, variance="float32", compiled=False)
    torch.manual_seed(1)
    assert torch.equal(net(x)[0], expected) and torch.equal(vd.kl(net), price)
