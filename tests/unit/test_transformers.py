"""Networks of the transformers library, tiny and with random weights, through the whole road."""

import pytest
import torch
from torch import nn

import vardrop as vd
from vardrop.layers import is_conv1d

transformers = pytest.importorskip("transformers")


class Logits(nn.Module):
    """The network with its logits as the only output."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x, return_dict=True).logits


def gpt2():
    config = transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2, n_inner=16)
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
NETS = {"gpt2": (gpt2, WORDS), "bert": (bert, WORDS), "vit": (vit, torch.randn(2, 3, 8, 8))}


def reader(net):
    """The name of the layer that reads the 16 hidden units."""
    return next(
        name
        for name, layer in net.named_modules()
        if getattr(layer, "in_features", 0) == 16 or (is_conv1d(type(layer)) and len(layer.weight) == 16)
    )


@pytest.mark.parametrize(("build", "x"), NETS.values(), ids=NETS.keys())
@pytest.mark.parametrize("on", ["weights", "units"])
def test_convert_train_prune_compact_save_load(build, x, on, tmp_path):
    net = build()
    vd.convert(net, vd.SparseVD() if on == "weights" else {reader(net): vd.BetaBernoulli(place="input")})
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    vd.ELBO(num_data=10)(net, net(x).square().mean()).backward()
    optimizer.step()
    with torch.no_grad():
        for site in vd.sites(net):
            if site.counts == "units":
                site.noise.mask = torch.arange(site.noise.units) % 2 == 0
    if on == "weights":
        vd.prune(net, threshold=0.0)
    net.eval()
    small = vd.compact(net, x, on_unknown="keep")
    vd.save(small, tmp_path / "small", sparse=True)
    loaded = vd.load(tmp_path / "small", build).eval()
    torch.testing.assert_close(loaded(x), net(x))
    if on == "units":
        before, after = (sum(parameter.numel() for parameter in model.parameters()) for model in (build(), small))
        assert after < before
