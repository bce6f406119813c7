"""Heads of attention: whole ones go, with queries, keys and values, where the code leaves their number open."""

import pytest
import torch
from exactness import check, ignore, kill
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import vardrop as vd

HEAD = 3


class Attention(nn.Module):
    """Four heads; their number is open, or stated as a number."""

    def __init__(self, *, heads=-1, keys=4):
        super().__init__()
        self.heads, self.keys = heads, keys
        self.query, self.value, self.out = nn.Linear(6, 12), nn.Linear(6, keys * HEAD), nn.Linear(12, 6)
        self.key = nn.Linear(6, keys * HEAD)

    def forward(self, x, mask=None):
        def split(y, heads):
            return y.view(*y.shape[:-1], heads, HEAD).transpose(1, 2)

        q, k, v = split(self.query(x), self.heads), split(self.key(x), -1), split(self.value(x), -1)
        y = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=self.keys != 4)
        return self.out(y.transpose(1, 2).reshape(*x.shape[:-1], -1))


class Block(nn.Module):
    """A pre-norm transformer block, as in ViT."""

    def __init__(self, attention):
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(6), attention, nn.LayerNorm(6)
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm2(x))))


def test_heads_that_nothing_reads_are_cut_exactly_and_half_dead_ones_stay():
    model = Block(Attention())
    ignore(model.attention.out, [0, 1, 2, 4, 9, 10, 11])
    kill(model.up, [3])
    _, small = check(model, torch.randn(2, 5, 6))
    attention = small.attention
    assert {layer.out_features for layer in (attention.query, attention.key, attention.value)} == {2 * HEAD}
    assert attention.out.in_features == 2 * HEAD and small.down.in_features == 9


def test_a_head_whose_values_are_dead_but_whose_bias_is_read_stays():
    model = Attention()
    kill(model.value, [0, 1, 2])
    _, small = check(model, torch.randn(2, 5, 6))
    assert small.out.in_features == 12


@pytest.mark.parametrize("shape", [(5, 5), (1, 5, 5), (2, 1, 5, 5)])
def test_a_mask_for_all_heads_lets_them_go(shape):
    model = Attention()
    ignore(model.out, [3, 4, 5])
    small = vd.compact(model, (torch.randn(2, 5, 6), torch.rand(shape) > 0.3))
    assert small.out.in_features == 9


def test_heads_stay_where_their_number_is_stated_where_they_share_keys_and_where_each_has_its_mask():
    x = torch.randn(2, 5, 6)
    for model, inputs in (
        (Attention(heads=4), (x,)),
        (Attention(keys=2), (x,)),
        (Attention(), (x, torch.randn(2, 4, 5, 5))),
    ):
        ignore(model.out, [3, 4, 5])
        plan = vd.compact(model, inputs, dry_run=True)
        assert plan["out"].inputs == (12, 12) and plan["query"].units == (12, 12)


def test_a_noisy_attention_pruned_by_its_rule_loses_its_dead_heads():
    model = vd.convert(Attention(), vd.SparseVD())
    with torch.no_grad():
        model.out.weight[:, 6:] *= 1e-9
    vd.prune(model)
    x = torch.randn(2, 5, 6)
    small = vd.compact(model, x)
    assert small.query.out_features == 6
    torch.testing.assert_close(small(x), model.eval()(x))
