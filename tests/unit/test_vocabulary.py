"""Dead words go, and the model says the same of the new ids."""

import copy

import pytest
import torch
from torch import nn

import vardrop as vd
from vardrop.errors import ConversionError, GraphError, InvalidValueError

WORDS = torch.randint(9, (4, 6), generator=torch.Generator().manual_seed(1))


def net(padding=None, dead=(1, 4, 5)):
    model = nn.Sequential(nn.Embedding(9, 3, padding_idx=padding), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight[list(dead)] = 0
    return model


@pytest.mark.parametrize("padding", [None, 0, 4])
def test_outputs_stay_and_dead_words_share_one_row(padding):
    model = net(padding)
    small = copy.deepcopy(model)
    ids = vd.shrink_vocabulary(small, "0")
    kept = 9 - len({1, 4, 5} - {padding}) + 1
    assert small[0].num_embeddings == len(small[0].weight) == kept == int(ids.max()) + 1
    assert torch.equal(small(ids[WORDS]), model(WORDS))
    assert small[0].padding_idx == (None if padding is None else ids[padding])


def test_with_no_dead_word_nothing_changes():
    model = net(dead=())
    assert torch.equal(vd.shrink_vocabulary(model, "0"), torch.arange(9))
    assert model[0].num_embeddings == 9


def test_a_pruned_net_shrinks_and_can_be_stored(tmp_path):
    noisy = vd.convert(net(padding=2, dead=()), vd.SparseVD())
    with torch.no_grad():
        noisy[0].weight[[0, 7]] *= 1e-6
    vd.prune(noisy)
    small = vd.compact(noisy, WORDS)
    ids = vd.shrink_vocabulary(small, "0")
    assert small[0].num_embeddings == 8
    torch.testing.assert_close(small(ids[WORDS]), noisy.eval()(WORDS))
    vd.save(small, tmp_path / "small")
    loaded = vd.load(tmp_path / "small", lambda: net(padding=2))
    assert torch.equal(loaded(ids[WORDS]), small(ids[WORDS]))
    assert (loaded[0].num_embeddings, loaded[0].padding_idx) == (8, small[0].padding_idx)


def test_what_cannot_be_shrunk_is_refused():
    with pytest.raises(InvalidValueError, match="name='1' is no nn.Embedding of the model; there are: 0"):
        vd.shrink_vocabulary(net(), "1")
    with pytest.raises(ConversionError, match="embedding '0' is a NoisyEmbedding.*vardrop.strip first"):
        vd.shrink_vocabulary(vd.convert(net(), vd.ARD()), "0")
    tied = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4))
    tied[1].weight = tied[0].weight
    with pytest.raises(GraphError, match="0.weight and 1.weight are one parameter"):
        vd.shrink_vocabulary(tied, "0")


def text_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(9, 4, padding_idx=0), nn.Flatten(), nn.Linear(24, 2))


def test_a_gated_word_has_one_draw_wherever_it_stands():
    net = vd.convert(text_net(), vd.StructuredBP(init_log_sigma=-1.0), include="0")
    rows = net[0](torch.tensor([[1, 1, 2], [2, 1, 0]]))
    assert torch.equal(rows[0, 0], rows[1, 1]) and torch.equal(rows[0, 2], rows[1, 0])
    factor = rows[0, 0] / net[0].weight[1]
    torch.testing.assert_close(factor, factor[:1].expand(4))
    assert not torch.equal(net[0](torch.tensor([1])), net[0](torch.tensor([1])))
    assert (rows[1, 2] == 0).all()


@pytest.mark.parametrize("method", [vd.BetaBernoulli(), (vd.StructuredBP(), vd.SparseVD())], ids=["gate", "both"])
def test_words_whose_gate_is_closed_fall_out_of_the_vocabulary(method, tmp_path):
    net = vd.convert(text_net(), method, include="0")
    gate = next(site.noise for site in vd.sites(net) if site.counts == "units")
    gate.mask = torch.tensor([True, True, False, True, False, False, True, True, False])
    assert vd.summary(net).rows[0].alive == 5 * 4
    vd.save(net, tmp_path / "net")
    net.eval()
    torch.testing.assert_close(vd.load(tmp_path / "net", text_net).eval()(WORDS), net(WORDS))
    small = vd.compact(net, WORDS)
    ids = vd.shrink_vocabulary(small, "0")
    assert small[0].num_embeddings == 6
    torch.testing.assert_close(small(ids[WORDS]), net(WORDS))


def test_the_data_opens_the_gates_of_its_words_and_the_price_closes_the_others():
    torch.manual_seed(2)
    net = vd.convert(text_net(), vd.StructuredBP(init_log_sigma=-3.0), include="0")
    optimizer = torch.optim.Adam(vd.parameter_groups(net, lr=1e-2, gate_lr=5e-2))
    elbo = vd.ELBO(num_data=200)
    words = torch.randint(1, 4, (200, 6))
    labels = (words[:, 0] == 1).long()
    for _ in range(300):
        elbo(net, nn.functional.cross_entropy(net(words), labels)).backward()
        optimizer.step()
        optimizer.zero_grad()
    score = net[0].gate.method.score(net[0].gate, net[0].weight)
    assert score[1] > score[4:].max()


def test_a_second_stage_leaves_the_gates_of_words_as_they_are():
    net = vd.convert(text_net(), vd.BetaBernoulli(place="input"))
    vd.convert(net, vd.DependentBetaBernoulli())
    assert [type(site.method) for site in vd.sites(net)] == [vd.BetaBernoulli, vd.DependentBetaBernoulli]


class MaskedMean(nn.Module):
    """The mean over the words that are no padding, told by their id."""

    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(9, 3, padding_idx=0), nn.Linear(3, 2)

    def forward(self, words):
        told = (words != self.table.padding_idx).unsqueeze(-1)
        return self.out((self.table(words) * told).sum(1) / told.sum(1).clamp(min=1))


def test_dead_words_do_not_become_padding():
    model, words = MaskedMean().requires_grad_(False), torch.tensor([[1, 2, 5, 0], [3, 4, 0, 0]])
    model.table.weight[[2, 5]] = 0
    expected = model(words)
    ids = vd.shrink_vocabulary(model, "table")
    assert ids.tolist() == [0, 1, 2, 3, 4, 2, 5, 6, 7] and torch.equal(model(ids[words]), expected)
