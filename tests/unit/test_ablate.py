"""A layer that loses its means or the places of its spreads, and nothing else."""

import json

import pytest
import torch
from torch import nn

import vardrop as vd
from vardrop.compress import Job, compress
from vardrop.errors import InvalidValueError
from vardrop.train import Schedule
from vardrop.zoo import load_data

METHODS = {
    "additive": vd.SparseVD(init_log_std=-1.0),
    "clipped": vd.SparseVD(init_log_std=-1.0, train_clip=True),
    "weights themselves": vd.ARD(init_log_std=-1.0, sampling="weight"),
    "one alpha": vd.VarianceNetwork(parameterisation="layer", init_log_alpha=-0.5),
    "an alpha for each weight": vd.VariationalDropout(alpha="weight", init_log_alpha=-0.5),
    "zero mean": vd.VarianceNetwork(),
}
COUNT = 20_000


def net(method, mask=None):
    torch.manual_seed(0)
    made = vd.convert(nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)), method).eval()
    made[0].noise.mask = mask
    return made


def moments(made, x):
    """Mean and standard deviation of the first layer's noisy outputs."""
    layer = nn.Sequential(made[0])
    found = vd.draws(layer, x, samples=COUNT, generator=torch.Generator().manual_seed(1))[:, 0].double()
    return found.mean(0), found.std(0)


@pytest.mark.parametrize("name", METHODS)
def test_without_its_means_a_layer_keeps_its_variances(name):
    made = net(METHODS[name])
    before = {key: value.clone() for key, value in made.state_dict().items()}
    x = torch.randn(1, 5)
    without = vd.ablate(made, "0", "means")
    assert torch.equal(without[0](x)[0], made[0].bias)
    mean, std = moments(without, x)
    assert ((mean - made[0].bias.double()) / std * COUNT**0.5).abs().max() < 4.5
    expected = moments(made, x)[1]
    assert ((std - expected) / expected).abs().max() < 4.5 * COUNT**-0.5
    assert all(torch.equal(value, before[key]) for key, value in made.state_dict().items())
    assert all(torch.equal(without[2].state_dict()[key], value) for key, value in made[2].state_dict().items())
    assert vd.kl(without).isfinite()


@pytest.mark.parametrize("name", METHODS)
def test_permuted_spreads_are_the_same_spreads_elsewhere_and_the_means_stay(name):
    mask = torch.rand(4, 5, generator=torch.Generator().manual_seed(2)) < 0.7
    made = net(METHODS[name], mask)
    x = torch.randn(2, 5)
    moved = vd.ablate(made, "0", "spreads", generator=torch.Generator().manual_seed(3))
    assert torch.equal(moved(x), made(x))
    spreads = [each[0].noise.variance(each[0].weight).detach() for each in (made, moved)]
    assert torch.allclose(spreads[0][mask].sort().values, spreads[1][mask].sort().values, rtol=1e-5)
    assert torch.equal(moved[0].noise.mask, mask)
    if name in ("an alpha for each weight", "one alpha", "zero mean"):
        assert not torch.allclose(spreads[0][mask], spreads[1][mask])
    again = vd.ablate(made, "0", "spreads", generator=torch.Generator().manual_seed(3))
    assert torch.equal(again[0].noise.log_std, moved[0].noise.log_std)


def test_recurrent_weights_are_sites_of_their_own():
    made = vd.convert(nn.LSTM(3, 4), vd.VarianceNetwork(parameterisation="weight")).eval()
    without = vd.ablate(made, "weight_hh_l0", "means")
    assert not without.weight_hh_l0.any() and without.weight_ih_l0.any()
    x = torch.randn(5, 2, 3)
    assert not torch.equal(without(x)[0], made(x)[0])


def test_what_cannot_be_ablated_is_refused():
    with pytest.raises(InvalidValueError, match="part='noise': must be 'means' or 'spreads'"):
        vd.ablate(net(vd.ARD()), "0", "noise")
    with pytest.raises(InvalidValueError, match=r"site='1': .* the model has: '0', '2'"):
        vd.ablate(net(vd.ARD()), "1", "means")
    with pytest.raises(InvalidValueError, match="site='0.gate'"):
        vd.ablate(vd.convert(nn.Sequential(nn.Linear(5, 4)), vd.BetaBernoulli()), "0.gate", "means")


def test_a_variance_network_keeps_what_it_knows_in_its_spreads_alone(load_script):
    script = load_script("information_flow")
    data = load_data("digits")
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(64, 100), nn.BatchNorm1d(100), nn.ReLU(), nn.Linear(100, 10), nn.BatchNorm1d(10)]
    made = vd.convert(nn.Sequential(*layers), {"1": vd.VarianceNetwork(), "4": vd.SparseVD()}).train()
    elbo = vd.ELBO(num_data=len(data.train.y), warmup=vd.warmup.linear(start=20, epochs=40))
    optimiser = torch.optim.Adam(made.parameters(), lr=0.01)
    for _ in range(40):
        elbo.step_epoch()
        for index in torch.randperm(len(data.train.y)).split(100):
            loss = elbo(made, nn.functional.cross_entropy(made(data.train.x[index]), data.train.y[index]))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    rows = script.information_flow(script.ablated(made.eval(), seed=0), *data.test, samples=20, seed=0)
    found = {(row["layer"], row["change"]): row["ensemble"] for row in rows}
    assert len(found) == 5
    intact = found["", "intact"]
    assert intact > 0.8
    assert found["1", script.PARTS["means"]] == pytest.approx(intact, abs=0.03)
    assert found["1", script.PARTS["spreads"]] < 0.5
    assert found["4", script.PARTS["means"]] < 0.5
    assert next(row for row in rows if row["change"] == "intact")["deterministic"] < 0.3


def test_information_flow_becomes_a_page(load_script, tmp_path, monkeypatch, capsys):
    script = load_script("information_flow")
    monkeypatch.setattr(script, "STORED", tmp_path / "flow.json")
    monkeypatch.setattr(script, "PAGE", tmp_path / "flow.md")
    schedule = Schedule(epochs=1, batch_size=100, decay_from=1, warmup_start=0, warmup_epochs=0)
    compress(Job("mlp-20", "digits", vd.VarianceNetwork(), schedule, include=("1", "3")), tmp_path / "a")
    script.main([str(tmp_path / "a"), "--samples", "2"])
    text = script.PAGE.read_text()
    assert script.table(json.loads(script.STORED.read_text())) in capsys.readouterr().out
    assert text.count("| a | 1 |") == 2 and text.count("| a |  | intact |") == 1 and str(tmp_path) not in text
    script.PAGE.unlink()
    script.main(["--write"])
    assert script.PAGE.read_text() == text
