"""The loop: exact resume, also after kill -9, what stops it, and what it never destroys."""

import dataclasses
import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import vardrop as vd
from vardrop.checkpoint import CHECKPOINT, HISTORY
from vardrop.compress import Job, compress
from vardrop.errors import InvalidValueError, StorageError, TrainingError
from vardrop.files import replace_file
from vardrop.train import Schedule, train
from vardrop.zoo import Batches, Split

SCHEDULE = Schedule(epochs=4, batch_size=16, lr=1e-2, decay_from=2, warmup_start=0, warmup_epochs=2, seed=5)
UNEVEN = dataclasses.replace(SCHEDULE, batch_size=15)  # two processes share it as eight and seven


def split() -> Split:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(80, 6, generator=generator)
    return Split(x, (x[:, 0] > 0).long())


def fresh_plain() -> nn.Module:
    torch.manual_seed(SCHEDULE.seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))


def fresh() -> nn.Module:
    return vd.convert(fresh_plain(), vd.ARD())


def run(folder: Path, net: nn.Module, *, identity="a", stop_after=None, evaluate=None, schedule=SCHEDULE):
    data = split()

    def on_epoch(epoch):
        if stop_after is not None and epoch.epoch == stop_after:
            raise KeyboardInterrupt

    return train(
        net,
        Batches(data, schedule.batch_size, seed=schedule.seed),
        schedule,
        folder,
        num_data=len(data.y),
        evaluate=evaluate or (lambda model: (None, 0.5)),
        identity=identity,
        on_epoch=on_epoch,
    )


def kill_in_the_middle_of_an_epoch(module: str, folder: Path, epoch: int) -> int:
    """Runs what `module` calls run in a process, killed as it evaluates this epoch; the first layer's width then."""
    script = textwrap.dedent(f"""
        import sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import {module} as t
        from pathlib import Path
        seen = []
        def evaluate(model):
            seen.append(1)
            if len(seen) == {epoch}:
                print(model[0].out_features, flush=True)
                time.sleep(60)
            return None, 0.5
        t.run(Path({str(folder)!r}), t.fresh(), evaluate=evaluate)
    """)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    width = int(process.stdout.readline())
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return width


def without_time(history):
    return [{key: value for key, value in vars(epoch).items() if key != "seconds"} for epoch in history]


def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(tmp_path):
    whole = fresh()
    unbroken = run(tmp_path / "whole", whole)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "parts", fresh(), stop_after=1)
    torch.randn(17)
    parts = fresh()
    resumed = run(tmp_path / "parts", parts)
    assert without_time(resumed) == without_time(unbroken)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name
    lines = (tmp_path / "parts" / HISTORY).read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [0, 1, 2, 3]


def test_a_finished_run_trains_no_further(tmp_path):
    net = fresh()
    first = run(tmp_path, net)
    again = fresh()
    assert without_time(run(tmp_path, again)) == without_time(first)
    assert torch.equal(again[0].weight, net[0].weight)


def test_what_a_killed_process_left_half_written_stops_no_run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".config.json.123.part").write_text("{")
    job = Job("mlp-20", "digits", vd.ARD(), dataclasses.replace(SCHEDULE, epochs=1, decay_from=0))
    assert compress(job, folder)["seed"] == SCHEDULE.seed


def test_kill_minus_nine_in_the_middle_of_an_epoch_costs_only_that_epoch(tmp_path):
    unbroken = fresh()
    run(tmp_path / "whole", unbroken)
    assert kill_in_the_middle_of_an_epoch("test_train", tmp_path / "parts", 3) == 8
    parts = fresh()
    run(tmp_path / "parts", parts)
    for name, value in unbroken.state_dict().items():
        assert torch.equal(value, parts.state_dict()[name]), name
    assert not [path for path in (tmp_path / "parts").iterdir() if path.name.endswith(".part")]


def test_a_non_finite_loss_names_layer_and_step_and_keeps_the_last_epoch(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, fresh(), stop_after=0)
    kept = (tmp_path / CHECKPOINT).read_bytes()

    def poison(model):
        with torch.no_grad():
            model[2].noise.log_std[0, 0] = float("nan")
        return None, 0.5

    with pytest.raises(TrainingError, match=r"epoch 2, step 0: layer '2' has a log_std that is not finite"):
        run(tmp_path, fresh(), evaluate=poison)
    assert torch.load(tmp_path / CHECKPOINT, weights_only=True)["elbo"]["epoch"] == 1
    assert kept != (tmp_path / CHECKPOINT).read_bytes()


def test_an_infinite_activation_names_its_layer(tmp_path):
    net = fresh()
    with torch.no_grad():
        net[0].weight.fill_(1e38)
    with pytest.raises(TrainingError, match="layer '0' gives an output that is not finite"):
        run(tmp_path, net)
    assert not (tmp_path / CHECKPOINT).exists()


def test_foreign_truncated_and_other_checkpoints_are_refused(tmp_path):
    run(tmp_path, fresh())
    with pytest.raises(StorageError, match="belongs to another run"):
        run(tmp_path, fresh(), identity="b")
    path = tmp_path / CHECKPOINT
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(StorageError, match="not a readable checkpoint"):
        run(tmp_path, fresh())
    torch.save({"some": "thing"}, path)
    with pytest.raises(StorageError, match="not a readable checkpoint"):
        run(tmp_path, fresh())


def test_a_pickle_in_the_place_of_a_checkpoint_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"format": 1, "identity": "a", "model": Evil()}, tmp_path / CHECKPOINT)
    with pytest.raises(StorageError, match="not a readable checkpoint"):
        run(tmp_path, fresh())
    assert not (tmp_path / "ran").exists()


def test_a_full_disk_leaves_the_old_file_and_no_rubbish(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(aside: Path) -> None:
        aside.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StorageError, match="No space left on device"):
        replace_file(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_torch_save_to_a_full_disk_is_a_storage_error(tmp_path):
    def write(aside: Path) -> None:
        aside.symlink_to("/dev/full")
        torch.save({"x": torch.ones(100_000)}, aside)

    with pytest.raises(StorageError, match="could not be written"):
        replace_file(tmp_path / "file", write)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="could not be written"):
        replace_file(tmp_path / "file" / "run" / "run.json", lambda path: path.write_text("new"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": 0}, "epochs=0: must be at least 1"),
        ({"batch_size": -1}, "batch_size=-1"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1: must be a finite number, at least 0"),
        ({"clip_norm": 0.0}, "clip_norm=0.0: must be a finite number above 0"),
        ({"epochs": 5, "decay_from": 6}, "decay_from=6: must lie in 0 to 5"),
        ({"kl_factor": -1.0}, "kl_factor=-1.0: must be a finite number, at least 0"),
        ({"warmup_epochs": -2}, "warmup_epochs=-2: must be at least 0"),
        ({"warmup_start": 4, "warmup_epochs": 2}, "warmup_start=4: must be at least 0 and below warmup_epochs=2"),
        ({"warmup_start": -1}, "warmup_start=-1: must be at least 0"),
        ({"epochs": "8"}, r"Schedule\(epochs='8'\): must be a whole number"),
        ({"epochs": None}, r"Schedule\(epochs=None\): must be a whole number"),
        ({"lr": True}, r"Schedule\(lr=True\): must be a number"),
        ({"seed": 2**32}, "seed=4294967296: must lie in 0 to 4294967295"),
    ],
)
def test_a_schedule_is_checked(arguments, message):
    with pytest.raises(InvalidValueError, match=message):
        Schedule(**arguments)


def test_the_learning_rate_is_flat_then_falls_on_a_line():
    schedule = Schedule(epochs=10, lr=1.0, decay_from=5)
    assert [schedule.lr_at(epoch) for epoch in (0, 4, 5, 6, 9)] == [1.0, 1.0, 1.0, 0.8, 0.2]
    assert Schedule(epochs=10, lr=1.0, decay_from=0).lr_at(1) == 0.9


def test_every_group_keeps_its_share_of_the_learning_rate(tmp_path):
    torch.manual_seed(0)
    net = vd.convert(fresh_plain(), vd.BetaBernoulli())
    schedule = dataclasses.replace(SCHEDULE, gate_lr=SCHEDULE.lr / 4)
    run(tmp_path, net, schedule=schedule)
    state = torch.load(tmp_path / CHECKPOINT, weights_only=True)
    last = schedule.lr_at(schedule.epochs - 1)
    assert {group["lr"] for group in state["optimizer"]["param_groups"]} == {last, last / 4}


def test_weight_decay_leaves_out_the_noise_and_gradients_are_clipped(tmp_path):
    def trained(**options):
        net = fresh()
        run(tmp_path / str(options), net, schedule=dataclasses.replace(SCHEDULE, epochs=1, decay_from=1, **options))
        found = list(vd.sites(net))
        weights = torch.cat([site.weight.detach().flatten() for site in found])
        return weights, torch.cat([site.noise.log_std.detach().flatten() for site in found])

    plain, noise = trained()
    decayed, its_noise = trained(weight_decay=10.0)
    assert decayed.norm() < 0.9 * plain.norm()
    assert (its_noise - noise).mean().abs() < SCHEDULE.lr  # decay would draw all of it up in each of the five steps
    start = torch.cat([site.weight.detach().flatten() for site in vd.sites(fresh())])
    assert (trained(clip_norm=1e-12)[0] - start).norm() < 0.1 * (plain - start).norm()


def test_tensorboard_logs_are_written(tmp_path):
    run(tmp_path, fresh())
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline and not list(tmp_path.rglob("events.out.tfevents*")):
        time.sleep(0.1)
    assert list(tmp_path.rglob("events.out.tfevents*"))


def test_two_processes_share_every_minibatch_and_keep_the_same_weights(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(
        textwrap.dedent(f"""
        import os, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import test_train as t
        net = t.fresh()
        history = t.run(t.Path({str(tmp_path / "run")!r}), net)
        plain = t.fresh_plain()
        t.run(t.Path({str(tmp_path / "plain")!r}), plain, schedule=t.UNEVEN)
        totals = [sum(value.double().sum() for value in a.state_dict().values()).item() for a in (net, plain)]
        print(f"rank {{os.environ['RANK']}}: {{history[-1].train_nll!r}} {{totals[0]!r}} {{totals[1]!r}}", flush=True)
        if os.environ["RANK"] == "0":
            t.torch.save(plain.state_dict(), {str(tmp_path / "plain.pt")!r})
        """)
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    said = dict(line.split(": ") for line in done.stdout.splitlines() if line.startswith("rank"))
    assert len(said) == 2 and said["rank 0"] == said["rank 1"]
    alone = fresh()
    history = run(tmp_path / "alone", alone)
    assert abs(float(said["rank 0"].split()[0]) - history[-1].train_nll) < 0.1
    whole = fresh_plain()  # without noise, the shares of a minibatch weigh what the whole one does
    run(tmp_path / "whole", whole, schedule=UNEVEN)
    for name, value in torch.load(tmp_path / "plain.pt", weights_only=True).items():
        torch.testing.assert_close(value, whole.state_dict()[name], atol=1e-4, rtol=1e-4)


def test_a_checkpoint_of_a_net_whose_code_has_changed_is_refused(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, fresh(), stop_after=1)
    wider = vd.convert(nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 2)), vd.ARD())
    with pytest.raises(StorageError, match=r"is that of another net \(size mismatch for .*: has its code changed"):
        run(tmp_path, wider)
