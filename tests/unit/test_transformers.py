"""Networks of the transformers library, tiny and with random weights, through the whole road."""

import pytest
import torch
from torch import nn

import vardrop as vd

transformers = pytest.importorskip("transformers")


class Logits(nn.Module):
    """The network with its logits as the only output."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).logits


def gpt2():
    config = transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2, use_cache=False)
    return Logits(transformers.GPT2LMHeadModel(config))


def bert():
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    return Logits(transformers.BertForSequenceClassification(config))


def vit():
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    return Logits(transformers.ViTForImageClassification(config))


WORDS = torch.randint(1, 11, (2, 5), generator=torch.Generator().manual_seed(0))
NETS = {
    "gpt2": (gpt2, WORDS, "*.mlp.c_proj"),
    "bert": (bert, WORDS, "*.layer.0.output.dense"),
    "vit": (vit, torch.randn(2, 3, 8, 8), "*.layer.0.output.dense"),
}


@pytest.mark.parametrize(("build", "x", "down"), NETS.values(), ids=NETS.keys())
@pytest.mark.parametrize("on", ["weights", "units"])
def test_convert_train_prune_compact_save_load(build, x, down, on, tmp_path):
    net = vd.convert(build(), vd.SparseVD()) if on == "weights" else vd.convert(build(), {down: vd.BetaBernoulli()})
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    vd.ELBO(num_data=10)(net, net(x).square().mean()).backward()
    optimizer.step()
    with torch.no_grad():
        for site in vd.sites(net):
            if site.counts == "units":
                site.noise.mask = torch.arange(site.noise.units) % 2 == 0
    if on == "weights":
        vd.prune(net, threshold=-5.0)
    net.eval()
    small = vd.compact(net, x, on_unknown="keep")
    vd.save(small, tmp_path / "small", sparse=True)
    loaded = vd.load(tmp_path / "small", build).eval()
    torch.testing.assert_close(loaded(x), net(x))
    if on == "units":
        before, after = (sum(parameter.numel() for parameter in model.parameters()) for model in (build(), small))
        assert after < before
