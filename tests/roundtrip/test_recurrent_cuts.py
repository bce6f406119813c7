"""Recurrent layers and embeddings: hidden units and columns that nothing reads go, and the outputs stay."""

import pytest
import torch
from exactness import check, ignore, kill
from torch import nn

import vardrop as vd
from vardrop.surgery.cut import plan

KINDS = {"rnn": nn.RNN, "lstm": nn.LSTM, "gru": nn.GRU}
GATES = {"rnn": 1, "lstm": 4, "gru": 3}
every_kind = pytest.mark.parametrize("kind", KINDS)
WORDS = torch.randint(11, (3, 5), generator=torch.Generator().manual_seed(4))


class Tagger(nn.Module):
    """Words to a vector each; one linear layer before the recurrent one and one after it."""

    def __init__(self, kind, *, last_state=False, start=None, **options):
        super().__init__()
        self.table = nn.Embedding(11, 7)
        self.inner = nn.Linear(7, 8)
        self.rnn = KINDS[kind](8, 6, batch_first=True, **options)
        self.head = nn.Linear(12 if options.get("bidirectional") else 6, 4)
        self.last_state, self.start = last_state, start

    def forward(self, words):
        x = self.inner(self.table(words)).relu()
        output, state = self.rnn(x) if self.start is None else self.rnn(x, self.start(len(x)))
        if not self.last_state:
            return self.head(output)
        return self.head((state[0] if isinstance(state, tuple) else state)[-1])


@torch.no_grad()
def forget(rnn, units, *, suffix="l0"):
    """Zeroes the weights by which the other hidden units of one layer and direction read each of these units."""
    gates = rnn.get_parameter(f"weight_hh_{suffix}").view(-1, rnn.hidden_size, rnn.hidden_size)
    for unit in units:
        gates[:, torch.arange(rnn.hidden_size) != unit, unit] = 0


@every_kind
def test_a_hidden_unit_that_nothing_alive_reads_goes_with_its_rows_in_every_gate(kind):
    model = Tagger(kind)
    forget(model.rnn, [1, 4])
    ignore(model.head, [1, 4])
    done, small = check(model, WORDS)
    assert small.rnn.hidden_size == 4 and small.head.in_features == 4
    assert small.rnn.weight_hh_l0.shape == (4 * GATES[kind], 4) and small.rnn.bias_hh_l0.shape == (4 * GATES[kind],)
    assert done["rnn.weight_ih_l0"].units == (6 * GATES[kind], 4 * GATES[kind])


@every_kind
def test_a_hidden_unit_that_one_gate_reads_stays(kind):
    model = Tagger(kind)
    forget(model.rnn, [1])
    ignore(model.head, [1])
    with torch.no_grad():
        model.rnn.weight_hh_l0[-1, 1] = 0.3
    _, small = check(model, WORDS)
    assert small.rnn.hidden_size == 6


@every_kind
def test_inputs_that_no_gate_reads_go_and_constants_fold_into_the_bias(kind):
    model = Tagger(kind)
    with torch.no_grad():
        model.rnn.weight_ih_l0[:, [0, 5]] = 0
        model.inner.weight[2] = 0
        model.inner.bias[2] = 0.7
        model.table.weight[:, 3] = 0.5
        model.inner.weight[:, 6] = 0
    done, small = check(model, WORDS)
    assert small.rnn.input_size == 5 and small.inner.out_features == 5
    assert small.table.embedding_dim == 5 and small.table.weight.shape == (11, 5)
    assert done["rnn.weight_ih_l0"].folded == 1 and done["inner"].folded == 1


def test_without_a_bias_a_constant_input_stays():
    model = Tagger("lstm", bias=False)
    kill(model.inner, [2])
    with torch.no_grad():
        model.inner.bias[2] = 0.7
    done, small = check(model, WORDS)
    assert small.rnn.input_size == 8 and any("no bias" in why for why, _ in done["inner"].kept)


@every_kind
def test_layers_and_directions_keep_equally_many_units(kind):
    model = Tagger(kind, num_layers=2, bidirectional=True)
    for suffix, units in {"l0": [0, 1, 2], "l0_reverse": [3, 4], "l1": [1, 2], "l1_reverse": [0, 5]}.items():
        forget(model.rnn, units, suffix=suffix)
    with torch.no_grad():
        for reader in (model.rnn.weight_ih_l1, model.rnn.weight_ih_l1_reverse):
            reader[:, [0, 1, 2, 6 + 3, 6 + 4]] = 0
    ignore(model.head, [1, 2, 6 + 0, 6 + 5])
    _, small = check(model, WORDS)
    assert small.rnn.hidden_size == 4 and small.head.in_features == 8
    assert small.rnn.weight_ih_l1_reverse.shape == (4 * GATES[kind], 8)


@every_kind
def test_where_the_last_state_is_read_its_layers_are_cut_at_the_same_places(kind):
    model = Tagger(kind, num_layers=2, last_state=True)
    for suffix in ("l0", "l1"):
        forget(model.rnn, [1, 2, 3], suffix=suffix)
    with torch.no_grad():
        model.rnn.weight_ih_l1[:, [1, 2]] = 0
    ignore(model.head, [1, 2, 3])
    _, small = check(model, WORDS)
    assert small.rnn.hidden_size == 4


def test_the_last_unit_stays():
    model = Tagger("gru")
    forget(model.rnn, range(6))
    ignore(model.head, range(6))
    _, small = check(model, WORDS)
    assert small.rnn.hidden_size == 1


def test_a_given_first_state_keeps_the_layer_whole():
    model = Tagger("gru", start=lambda batch: torch.ones(1, batch, 6))
    forget(model.rnn, [1])
    ignore(model.head, [1])
    kill(model.inner, [2])
    done = plan(model, WORDS)
    assert done.parameters_after == done.parameters_before
    assert done.notes == ("rnn is kept as it is: its first state is given",)


def test_a_projection_and_a_layer_called_twice_are_kept_whole():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.projected, self.rnn, self.head = nn.LSTM(3, 6, proj_size=4), nn.RNN(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            x = self.projected(x)[0]
            return self.head(self.rnn(self.rnn(x)[0])[0])

    model = Twice()
    ignore(model.head, [1])
    done = plan(model, torch.randn(5, 2, 3))
    assert done.notes == (
        "projected is kept as it is: it has a projection",
        "rnn is kept as it is: rnn.weight_ih_l0 is used 2 times",
    )


def test_a_converted_net_becomes_smaller_plain_and_can_be_stored(tmp_path):
    net = vd.convert(Tagger("lstm", num_layers=2), vd.SparseVD())
    with torch.no_grad():
        for site in vd.sites(net):
            site.weight.copy_(site.weight.sign() * 0.3)
        for suffix in ("l0", "l1"):
            forget(net.rnn, [0, 3], suffix=suffix)
        net.rnn.weight_ih_l1[:, [0, 3]] = 0
        ignore(net.head, [0, 3])
        net.rnn.weight_ih_l0[:, 2] = 0
    vd.prune(net)
    small = vd.compact(net, WORDS)
    assert (small.rnn.input_size, small.rnn.hidden_size) == (7, 4) and type(small.rnn) is nn.LSTM
    torch.testing.assert_close(small.eval()(WORDS), net.eval()(WORDS))
    vd.save(small, tmp_path / "small")
    loaded = vd.load(tmp_path / "small", lambda: Tagger("lstm", num_layers=2))
    assert loaded.rnn.hidden_size == 4
    torch.testing.assert_close(loaded.eval()(WORDS), small(WORDS), rtol=0, atol=0)
    small.double()(WORDS)
