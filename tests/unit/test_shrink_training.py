"""The loop of a net that shrinks: exact resume, also after kill -9, and figures against the net as it was."""

import dataclasses

import pytest
import torch
from test_train import kill_in_the_middle_of_an_epoch, without_time
from test_train import run as run_schedule
from torch import nn

import vardrop as vd
from vardrop.checkpoint import CHECKPOINT
from vardrop.compress import Job, compress
from vardrop.errors import InvalidValueError
from vardrop.train import Schedule

SCHEDULE = Schedule(
    epochs=6, batch_size=16, lr=1e-2, gate_lr=0.1, decay_from=3, warmup_epochs=1, warmup_start=0, seed=5, shrink_every=2
)


def fresh(*, compiled=None):
    """Of its hidden units some are dead from the start, and others die on the way."""
    torch.manual_seed(SCHEDULE.seed)
    net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 2))
    net = vd.convert(net, (vd.BetaBernoulli(threshold=0.05), vd.ARD()))
    with torch.no_grad():
        net[0].weight[:3] = 0
        net[3].gate.raw_a[:5] = -9.0
    return net if compiled is None else vd.fast(net, variance="float32", compiled=compiled)


def run(folder, net, schedule=SCHEDULE, **options):
    return run_schedule(folder, net, schedule=schedule, **options)


def assert_same_state(left, right):
    ours, theirs = left.state_dict(), right.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


@pytest.mark.parametrize("compiled", [None, False, True])
@pytest.mark.parametrize("stop_after", [0, 1, 2, 4])
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(tmp_path, stop_after, compiled):
    whole = fresh(compiled=compiled)
    size = sum(parameter.numel() for parameter in whole.parameters())
    unbroken = run(tmp_path / "whole", whole)
    assert sum(parameter.numel() for parameter in whole.parameters()) < size and whole[0].out_features < 16
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", fresh(compiled=compiled), stop_after=stop_after)
    torch.randn(17)
    parts = fresh(compiled=compiled)
    assert without_time(run(tmp_path / "parts", parts)) == without_time(unbroken)
    assert_same_state(whole, parts)
    stored = [torch.load(tmp_path / name / CHECKPOINT, weights_only=True) for name in ("whole", "parts")]
    states = [checkpoint["optimizer"]["state"] for checkpoint in stored]
    assert states[0].keys() == states[1].keys()
    for place, state in states[0].items():
        assert all(torch.equal(value, states[1][place][key]) for key, value in state.items())


def test_kill_minus_nine_after_a_cut_costs_only_that_epoch(tmp_path):
    unbroken = fresh()
    run(tmp_path / "whole", unbroken)
    assert kill_in_the_middle_of_an_epoch("test_shrink_training", tmp_path / "parts", 4) < 16
    parts = fresh()
    run(tmp_path / "parts", parts)
    assert_same_state(unbroken, parts)


def test_the_history_counts_against_the_net_as_it_was(tmp_path):
    net = fresh()
    total = sum(count.numel() for count in (net[0].weight, net[3].weight, net[5].weight))
    for epoch in run(tmp_path, net):
        assert epoch.compression == total / epoch.nonzero
    assert sum(count.numel() for count in (net[0].weight, net[3].weight, net[5].weight)) < total


def test_without_cuts_the_run_is_the_one_it_was(tmp_path):
    plain = fresh()
    run(tmp_path / "plain", plain, dataclasses.replace(SCHEDULE, shrink_every=None))
    late = fresh()
    run(tmp_path / "late", late, dataclasses.replace(SCHEDULE, shrink_every=6))
    assert_same_state(plain, late)


@pytest.mark.slow
def test_the_small_net_is_about_the_one_that_training_in_full_gives(tmp_path):
    schedule = Schedule(epochs=24, lr=5e-3, decay_from=16, warmup_start=2, warmup_epochs=6)
    found = {}
    for every in (None, 4):
        for seed in (0, 1):
            own = dataclasses.replace(schedule, seed=seed, shrink_every=every)
            job = Job("lenet-300-100", "digits", vd.SparseVD(train_clip=True), own, pretrain=6, fast=False)
            found[every, seed] = compress(job, tmp_path / f"{every}-{seed}")
    mean = {
        key: [sum(found[every, seed][part][key] for seed in (0, 1)) / 2 for every in (None, 4)]
        for part, key in (("pruned", "error"), ("pruned", "nonzero"), ("compacted", "parameters"))
    }
    assert abs(mean["error"][0] - mean["error"][1]) < 0.02, mean
    assert mean["nonzero"][1] == pytest.approx(mean["nonzero"][0], rel=0.1), mean
    assert mean["parameters"][1] == pytest.approx(mean["parameters"][0], rel=0.1), mean


def test_what_cannot_shrink_is_refused_before_any_work():
    with pytest.raises(InvalidValueError, match="shrink_every=0: must be at least 1"):
        dataclasses.replace(SCHEDULE, shrink_every=0)
    with pytest.raises(InvalidValueError, match="shrink_every=2: MagnitudePruning moves its marks itself"):
        Job("lenet-300-100", "digits", vd.MagnitudePruning(), SCHEDULE)
