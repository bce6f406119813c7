"""Noise on embeddings, against rows drawn by hand."""

import pytest
import torch
from torch import nn

import vardrop as vd
from vardrop.errors import UnsupportedLayerError

WORDS = torch.tensor([[0, 2, 2], [4, 2, 1]])


def test_a_word_means_the_same_wherever_it_stands_in_a_minibatch():
    net = vd.convert(nn.Embedding(5, 8), vd.SparseVD(init_log_std=0.0))
    rows = net(WORDS)
    assert torch.equal(rows[0, 1], rows[0, 2]) and torch.equal(rows[0, 1], rows[1, 1])
    assert not torch.equal(rows, net(WORDS))


@pytest.mark.parametrize("layer", [nn.Embedding(5, 3), nn.EmbeddingBag(5, 3, mode="sum")], ids=["rows", "sums"])
def test_its_law_is_that_of_independent_gaussian_weights(layer):
    net = vd.convert(layer.double(), vd.ARD(init_log_std=-0.5))
    draws = torch.stack([net(WORDS) for _ in range(4000)]).detach()
    bags = not isinstance(layer, nn.Embedding)
    counts = nn.functional.one_hot(WORDS, 5).double()
    counts = counts.sum(dim=1) if bags else counts
    mean = counts @ layer.weight
    variance = counts.square() @ layer.noise.log_std.exp().square()
    assert ((draws.mean(dim=0) - mean).abs() <= 5 * (variance / 4000).sqrt()).all()
    torch.testing.assert_close(draws.var(dim=0), variance, rtol=5 * (2 / 4000) ** 0.5, atol=0)


def test_the_padding_row_stays_zero_and_gets_no_gradient():
    net = vd.convert(nn.Embedding(5, 3, padding_idx=2), vd.SparseVD(init_log_std=0.0))
    rows = net(WORDS)
    assert (rows[WORDS == 2] == 0).all() and (rows[WORDS != 2] != 0).all()
    (rows.square().sum() + vd.kl(net)).backward()
    assert (net.weight.grad[2] == 0).all() and (net.weight.grad[0] != 0).all()


def test_binary_dropout_drops_whole_words():
    net = vd.convert(nn.Embedding(400, 6), vd.BernoulliDropout(rate=0.25))
    rows = net(torch.arange(400))
    kept = (rows != 0).any(dim=1)
    torch.testing.assert_close(rows[kept], net.weight[kept] / 0.75)
    assert 60 < int((~kept).sum()) < 140


def test_a_rate_for_each_input_is_one_for_each_word():
    net = vd.convert(nn.Embedding(5, 3), vd.VariationalDropout(alpha="input"))
    assert net.noise.shared_log_alpha.shape == (5, 1)


def test_gradients_are_those_of_the_function():
    net = vd.convert(nn.Embedding(5, 3, padding_idx=2).double(), vd.SparseVD(init_log_std=0.0))

    def rows(weight, log_std):
        with vd.noise(net, on=True, generator=torch.Generator().manual_seed(3)):
            return torch.func.functional_call(net, {"weight": weight, "noise.log_std": log_std}, WORDS)

    assert torch.autograd.gradcheck(rows, (net.weight, net.noise.log_std))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_without_spread_bags_are_torchs_own(mode):
    plain = nn.EmbeddingBag(6, 3, mode=mode, padding_idx=1, include_last_offset=True)
    noisy = vd.convert(
        nn.EmbeddingBag(6, 3, mode=mode, padding_idx=1, include_last_offset=True), vd.ARD(init_log_std=-40.0)
    )
    noisy.weight.data.copy_(plain.weight)
    words, offsets = torch.tensor([0, 1, 2, 5, 5]), torch.tensor([0, 2, 5])
    torch.testing.assert_close(noisy(words, offsets), plain(words, offsets))
    if mode == "sum":
        shares = torch.rand(5)
        torch.testing.assert_close(noisy(words, offsets, shares), plain(words, offsets, shares))


def test_a_table_tied_to_the_output_layer_has_one_noise_and_one_price():
    net = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False))
    net[1].weight = net[0].weight
    net = vd.convert(net, vd.SparseVD())
    assert [site.name for site in vd.sites(net)] == ["0"]
    torch.testing.assert_close(vd.kl(net), vd.functional.log_uniform_kl(net[0].weight, net[0].noise.log_std).sum())
    assert net(WORDS).shape == (2, 3, 6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparse": True}, "sparse=True is not supported.*make it with sparse=False"),
        ({"max_norm": 1.0}, "max_norm=1.0 is not supported.*leave it out"),
    ],
)
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_options_that_do_not_go_with_noise_are_refused_by_name(kind, options, message):
    net = nn.Sequential(nn.Linear(2, 2), kind(5, 3, **options))
    with pytest.raises(UnsupportedLayerError, match=f"layer '1' is a {kind.__name__}: {message}.*exclude='1'"):
        vd.convert(net, vd.ARD())
    assert type(net[0]) is nn.Linear


def test_a_padding_row_other_than_zero_is_refused():
    layer = nn.Embedding.from_pretrained(torch.ones(3, 2), padding_idx=1)
    with pytest.raises(UnsupportedLayerError, match="padding row 1 is not zero.*set it to zero"):
        vd.convert(layer, vd.ARD())
