"""Several seeds in one batched run: the law of single runs, their figures where there is no noise, and exact resume."""

import json
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from torch import nn

import vardrop as vd
from vardrop.baselines import baselines
from vardrop.checkpoint import CHECKPOINT, HISTORY
from vardrop.compress import Job, compress, compress_together, error_and_nll
from vardrop.errors import ApartError, TrainingError
from vardrop.methods import methods
from vardrop.together import Member, _Stack, train_together
from vardrop.train import Schedule, train
from vardrop.zoo import Batches, load_data
from vardrop.zoo.data import Split

SHORT = Schedule(epochs=3, batch_size=32, decay_from=1, warmup_start=0, warmup_epochs=2)
METHODS = {name: cls for name, cls in (methods() | baselines()).items() if cls.follows is None}
APART = {"magnitude-pruning", "dynamic-network-surgery", "adversarial-dropout"}


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return self.factor * x


def plain():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3), Scale())


def quiet():
    return vd.convert(plain(), vd.BernoulliDropout(rate=0.0))


def members(folder, make=quiet, schedule=SHORT, seeds=(0, 1, 2)):
    torch.manual_seed(9)
    split = Split(torch.randn(100, 1, 6, 6), torch.randint(3, (100,)))
    found = []
    for seed in seeds:
        torch.manual_seed(seed)
        batches = Batches(split, schedule.batch_size, seed=seed)
        own = replace(schedule, seed=seed)
        evaluate = lambda net: (None, error_and_nll(net, split)[0])  # noqa: E731
        found.append(Member(make(), batches, own, folder / str(seed), f"run {seed}", evaluate))
    return found


def alone(member):
    return train(
        member.net,
        member.batches,
        member.schedule,
        member.folder,
        num_data=100,
        evaluate=member.evaluate,
        identity=member.identity,
    )


def figures(history):
    return [(epoch.train_nll, epoch.kl) for epoch in history]


@pytest.mark.parametrize(
    "schedule", [SHORT, replace(SHORT, clip_norm=0.2, weight_decay=0.1)], ids=["plain", "clipped and decayed"]
)
def test_without_noise_the_figures_are_those_of_single_runs(tmp_path, schedule):
    together = train_together(members(tmp_path / "a", schedule=schedule), num_data=100)
    singles = [alone(member) for member in members(tmp_path / "b", schedule=schedule)]
    for one, other in zip(together, singles, strict=True):
        torch.testing.assert_close(figures(one), figures(other), rtol=1e-4, atol=1e-5)
        assert [epoch.train_error for epoch in one] == pytest.approx([epoch.train_error for epoch in other], abs=0.011)
    assert len({history[-1].train_nll for history in together}) == 3


def test_running_statistics_belong_to_each_net(tmp_path):
    found, singles = members(tmp_path / "a"), members(tmp_path / "b")
    train_together(found, num_data=100)
    for member, single in zip(found, singles, strict=True):
        alone(single)
        torch.testing.assert_close(member.net[1].running_var, single.net[1].running_var, rtol=1e-3, atol=1e-4)
        assert member.net[1].num_batches_tracked == 12


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_together_or_says_why_not(tmp_path, name):
    found = members(tmp_path, lambda: vd.convert(plain(), METHODS[name]()), seeds=(0, 1))
    if name in APART:
        with pytest.raises(ApartError, match="cannot train together: .*; train them one by one"):
            train_together(found, num_data=100)
        assert not list(tmp_path.iterdir())
        return
    before = [{key: value.clone() for key, value in member.net.state_dict().items()} for member in found]
    one, other = train_together(found, num_data=100)
    assert len(one) == len(other) == 3 and one[-1].train_nll != other[-1].train_nll
    for member, old in zip(found, before, strict=True):
        for key, value in member.net.state_dict().items():
            assert torch.isfinite(value).all(), key
            assert value.untyped_storage().nbytes() == value.numel() * value.element_size(), f"{key} is still a view"
        assert any(not torch.equal(value, old[key]) for key, value in member.net.named_parameters())


def test_the_second_stage_of_a_gate_keeps_statistics_of_its_own(tmp_path):
    def make():
        return vd.convert(vd.convert(plain(), vd.BetaBernoulli()), vd.DependentBetaBernoulli())

    found = members(tmp_path, make, seeds=(0, 1))
    train_together(found, num_data=100)
    one, other = (member.net for member in found)
    assert not torch.equal(one[4].gate.running_mean, other[4].gate.running_mean)
    assert one[4].gate.running_mean.abs().sum() > 0


def test_noise_is_drawn_apart_and_kl_is_that_of_each_net():
    torch.manual_seed(0)
    first = vd.convert(nn.Linear(6, 3), vd.SparseVD(init_log_std=-0.5))
    second = vd.convert(nn.Linear(6, 3), vd.SparseVD(init_log_std=-0.5))
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        second.noise.log_std += 0.5
    x, y = torch.randn(1, 6).expand(2, 4000, 6), torch.zeros(2, 4000).long()
    with _Stack([first.train(), second.train()]) as stack:
        _, kls, logits = stack.losses(x, y, torch.no_grad)
        logits = logits.detach()
    expected = [vd.kl(net).item() for net in (first, second)]
    assert kls.tolist() == pytest.approx(expected, rel=1e-5)
    for net, drawn in zip((first, second), logits, strict=True):
        std = ((x[0, :1] ** 2) @ torch.exp(2 * net.noise.log_std).T).sqrt()[0]
        torch.testing.assert_close(drawn.std(dim=0), std, rtol=0.05, atol=0.0)
    centred = logits - logits.mean(dim=1, keepdim=True)
    correlation = (centred[0] * centred[1]).mean() / (centred[0].std() * centred[1].std())
    assert abs(float(correlation)) < 0.05


def test_a_broken_off_run_goes_on_bit_for_bit(tmp_path):
    make = lambda: vd.convert(plain(), vd.SparseVD())  # noqa: E731
    whole = train_together(members(tmp_path / "a", make), num_data=100)

    def stop(member, epoch):
        if epoch.epoch == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_together(members(tmp_path / "b", make), num_data=100, on_epoch=stop)
    kept = [len((tmp_path / "b" / str(seed) / HISTORY).read_text().splitlines()) for seed in range(3)]
    assert kept == [2, 2, 2]
    torch.manual_seed(77)
    resumed = train_together(members(tmp_path / "b", make), num_data=100)
    assert [figures(history) for history in resumed] == [figures(history) for history in whole]


def test_single_runs_take_up_checkpoints_and_stragglers_catch_up(tmp_path):
    make = lambda: vd.convert(plain(), vd.ARD())  # noqa: E731
    alone(members(tmp_path, make)[1])
    histories = train_together(members(tmp_path, make), num_data=100)
    assert [len(history) for history in histories] == [3, 3, 3]
    assert figures(alone(members(tmp_path, make)[0])) == figures(histories[0])


def test_a_straggler_keeps_what_it_learns_beside_one_that_is_done(tmp_path):
    make = lambda: vd.convert(plain(), vd.ARD())  # noqa: E731
    begun, done = members(tmp_path, make, seeds=(0, 1))
    alone(done)
    with pytest.raises(KeyboardInterrupt):
        alone(replace(begun, evaluate=Mock(side_effect=[(None, 0.5), KeyboardInterrupt])))
    found = members(tmp_path, make, seeds=(0, 1))
    assert [len(history) for history in train_together(found, num_data=100)] == [3, 3]
    for member in found:
        stored = torch.load(member.folder / CHECKPOINT, weights_only=True)
        assert len(stored["history"]) == 3
        torch.testing.assert_close(dict(member.net.state_dict()), dict(stored["model"]), rtol=0.0, atol=0.0)


def test_members_that_go_on_alone_draw_apart(tmp_path):
    train_together(members(tmp_path), num_data=100)
    states = [torch.load(tmp_path / str(seed) / CHECKPOINT, weights_only=True)["random"] for seed in range(3)]
    assert all(not torch.equal(states[one], states[other]) for one, other in ((0, 1), (0, 2), (1, 2)))


def test_a_loss_that_is_not_finite_names_the_seed(tmp_path):
    found = members(tmp_path)
    with torch.no_grad():
        found[1].net[4].weight[0, 0] = torch.inf
    with pytest.raises(TrainingError, match=r"the loss of seed 1 is \w+ at epoch 0, step 0"):
        train_together(found, num_data=100)


def test_runs_that_differ_in_more_than_the_seed_stay_apart(tmp_path):
    one, other = members(tmp_path, seeds=(0, 1))
    with pytest.raises(ApartError, match="their schedules differ in more than the seed"):
        train_together([one, replace(other, schedule=replace(other.schedule, lr=0.1))], num_data=100)
    for changed, obstacle in (
        (vd.convert(plain(), vd.BernoulliDropout(rate=0.5)), "their methods differ"),
        (vd.convert(plain(), vd.BernoulliDropout(rate=0.0)).requires_grad_(False), "not the same parameters learn"),
    ):
        with pytest.raises(ApartError, match=obstacle):
            train_together([one, replace(other, net=changed)], num_data=100)
    with pytest.raises(ApartError, match="their nets have different shapes"):
        train_together([one, replace(other, net=vd.convert(nn.Linear(2, 2), vd.ARD()))], num_data=100)


def test_recurrent_nets_train_one_by_one(tmp_path):
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(6, 3, batch_first=True)

        def forward(self, x):
            return self.lstm(x[:, 0])[0][:, -1]

    with pytest.raises(ApartError, match="torch cannot batch the net"):
        train_together(members(tmp_path, lambda: vd.convert(Last(), vd.SparseVD())), num_data=100)


def test_the_whole_road_together_equals_the_road_alone_without_noise(tmp_path, monkeypatch):
    schedule = Schedule(epochs=2, decay_from=1, warmup_start=0, warmup_epochs=0)
    method = vd.BernoulliDropout(rate=0.0)
    jobs = [
        Job("lenet-300-100", "digits", method, replace(schedule, seed=seed), pretrain=1, validation=200)
        for seed in (0, 1)
    ]
    reads = []
    monkeypatch.setattr(
        "vardrop.compress.load_data", lambda *told, **named: reads.append(told) or load_data(*told, **named)
    )
    found = compress_together({tmp_path / f"a{job.schedule.seed}": job for job in jobs})
    assert len(reads) == 1
    for job, one in zip(jobs, found, strict=True):
        other = compress(job, tmp_path / f"b{job.schedule.seed}")
        assert one["together"] == 2 and "together" not in other
        assert one["compacted"]["nll"] == pytest.approx(other["compacted"]["nll"], rel=1e-3)
        assert one["original"]["nll"] == pytest.approx(other["original"]["nll"], rel=1e-3)
        assert one["pruned"]["valid_error"] == pytest.approx(other["pruned"]["valid_error"], abs=0.011)
        stored = json.loads((tmp_path / f"a{job.schedule.seed}" / "run.json").read_text())
        assert stored["together"] == 2 and stored["compacted"] == one["compacted"]
