"""The runner of tables on embedded data: each cell once, resumed where it was broken off, whatever else fails."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console
from test_cli import vardrop

from vardrop.errors import ApartError, DataError, InvalidValueError, StorageError, TrainingError, VardropError
from vardrop.tables import Cell, Found, load_tables, runner
from vardrop.tables.command import _storing, reproduce
from vardrop.tables.runner import Options, Watch, cells_of, run_cells, run_seeds
from vardrop.tables.store import CELL, left_to_run, record_of

RECIPE = """
title = "Digits"
source = "arXiv:1701.05369"
where = "nowhere"
columns = ["error", "compression", "units", "ensemble_accuracy", "elbo"]

[recipe]
net = "mlp-20"
data = "digits"
full = { epochs = 2, lr = 0.01, decay_from = 1, warmup_start = 0, warmup_epochs = 1 }

[[rows]]
name = "Plain"
paper = { error = 2.5, compression = 1 }
method = "bernoulli-dropout"
fields = { rate = 0.0 }
full = { epochs = 8, decay_from = 4 }

[[rows]]
name = "Pruning"
paper = { error = 99.0, compression = 2 }
method = "magnitude-pruning"
after = "Plain"
fields = { sparsity = 0.5, start = 1, every = 1, rounds = 1 }
parts = { "1" = { sparsity = 0.75 } }

[[rows]]
name = "BB"
method = "beta-bernoulli"
after = "Plain"

[[rows]]
name = "DBB"
method = "dependent-beta-bernoulli"
after = "BB"
from = "noisy"

[[orderings]]
better = "Pruning"
than = ["Plain"]
columns = ["compression"]
"""


def recipes(folder: Path, text: str = RECIPE) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "own.toml").write_text(text)
    return folder


def cell_of(folder: Path, row: str, seed: int = 0) -> Cell:
    return Cell(load_tables(folder)["own"].rows[row].runs[""], "full", seed)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A table made by the command line, with what it printed."""
    root = tmp_path_factory.mktemp("tables")
    own = recipes(root / "own")
    options = ["--recipes", own, "--out", root / "out", "--store", root / "results", "--jobs", 2, "--seeds", 1]
    done = vardrop("reproduce", "own", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    return root, options, done.stdout


def record(root: Path, row: str) -> dict:
    return json.loads((root / "out" / "own" / row / "full-seed-0" / CELL).read_text())


def test_the_table_is_printed_written_and_stored(made):
    root, _, printed = made
    shown = " ".join(printed.split())
    assert "Pruning is better than Plain in compression: holds (full, single seed)" in shown
    assert "better" in shown and "within" in shown
    text = (root / "out" / "own" / "table.md").read_text()
    assert f"{100 * record(root, 'pruning')['pruned']['error']:.2f}, better" in text
    assert "<table>" in (root / "out" / "own" / "table.html").read_text()
    stored = json.loads((root / "results" / "tables" / "own" / "dbb" / "full-seed-0.json").read_text())
    assert stored["config"]["pretrained"] == "own/bb/full-seed-0" and str(root) not in json.dumps(stored)
    assert {"ensemble", "history"} <= set(stored) and "times" not in stored


def test_what_is_stored_is_shown_and_not_run_again(made, tmp_path):
    root, _, _ = made
    own, store = root / "own", tmp_path / "results"
    shutil.copytree(root / "results", store)
    options = ["--recipes", own, "--out", tmp_path / "out", "--store", store, "--seeds", 1]
    done = vardrop("reproduce", "own", *options)
    assert done.returncode == 0 and "Pruning" in done.stdout
    assert not list((tmp_path / "out").rglob("run.json"))
    assert (tmp_path / "out" / "own" / "table.md").read_text() == (root / "out" / "own" / "table.md").read_text()
    listed = vardrop("reproduce", "--list", *options)
    assert f"{len(cells_of([load_tables(own)['own']], 'full', 1))} / " in listed.stdout


def test_only_what_is_not_stored_is_left_to_run_and_what_it_starts_from(made, tmp_path):
    root, _, _ = made
    store = tmp_path / "results"
    shutil.copytree(root / "results", store)
    cells = cells_of([load_tables(root / "own")["own"]], "full", 1)
    assert left_to_run(cells, tmp_path / "out", store) == ([], {})
    (store / "tables" / "own" / "dbb" / "full-seed-0.json").unlink()
    left, _ = left_to_run(cells, tmp_path / "out", store)
    assert [cell.run.row for cell in left] == ["Plain", "BB", "DBB"]
    finished, _ = left_to_run(cells, root / "out", store)
    assert [cell.run.row for cell in finished] == ["DBB"]


def test_a_stored_record_that_is_damaged_is_not_run_again_and_stops_nothing_else(made, tmp_path):
    root, _, _ = made
    store = tmp_path / "results"
    shutil.copytree(root / "results", store)
    plain, pruning, dbb = (store / "tables" / "own" / row / "full-seed-0.json" for row in ("plain", "pruning", "dbb"))
    stored = plain.read_text() + "\n"
    plain.write_text(stored)
    pruning.write_text("{")
    dbb.unlink()
    shutil.copytree(root / "out", tmp_path / "out")
    (tmp_path / "out" / "own" / "dbb" / "full-seed-0" / CELL).unlink()
    failed = reproduce(
        ["own"],
        Options(tmp_path / "out", recipes=root / "own", device="cpu"),
        Console(file=io.StringIO()),
        budget="full",
        seeds=1,
        store=store,
    )
    assert set(failed) == {"own/pruning/full-seed-0", "own"} and "not a readable record" in failed["own"]
    assert pruning.read_text() == "{" and dbb.exists() and plain.read_text() == stored


def test_a_store_that_cannot_be_written_is_told(made, tmp_path):
    root, _, _ = made
    (tmp_path / "results").write_text("no folder")
    failed, ended = {}, []
    watch = Watch(on_end=lambda cell, reason: ended.append(reason))
    cell = cell_of(root / "own", "Plain")
    _storing(watch, Options(root / "out"), tmp_path / "results", failed).on_end(cell, "")
    assert ended == [failed[cell.place]] and "could not be written" in ended[0]
    done = vardrop("reproduce", "own", "--recipes", root / "own", "--store", tmp_path / "results", "--seeds", 0)
    assert done.returncode == 1 and f"{tmp_path / 'results' / 'tables'} cannot be a folder" in done.stderr
    done = vardrop("reproduce", "own", "--recipes", root / "own", "--out", tmp_path / "results", "--seeds", 0)
    assert done.returncode == 1 and "results cannot be a folder" in done.stderr


def test_what_is_stored_is_shown_where_the_data_or_a_record_is_not_to_be_had(made, tmp_path):
    root, _, _ = made
    own = recipes(tmp_path / "own", RECIPE.replace('data = "digits"', 'data = "nowhere"'))
    options = ["--recipes", own, "--store", tmp_path / "results", "--data-root", tmp_path, "--seeds", 2]
    shutil.copytree(root / "results", tmp_path / "results")
    for path in (tmp_path / "results").rglob("*.json"):
        path.write_text(path.read_text().replace('"data": "digits"', '"data": "nowhere"'))
    (tmp_path / "results" / "tables" / "own" / "pruning" / "full-seed-0.json").write_text('{"config": {"net": "x"}}')
    done = vardrop("reproduce", "own", *options, "--out", tmp_path / "out")
    shown = " ".join(done.stdout.split())
    assert done.returncode == 1 and "nothing was run" in shown and "is not a readable record" in shown
    assert "within" in shown and "Pruning is better than Plain in compression: not run" in shown


def test_a_record_that_lacks_a_figure_does_not_hide_a_whole_one():
    whole, part = Found(), Found()
    whole.add("own/bb", "full", 0, {"pruned": {}, "sizes": {"bytes": 4}})
    part.add("own/bb", "full", 0, {"pruned": {}})
    part.add("own/bb", "full", 1, {"pruned": {}})
    whole.update(part)
    assert whole.records["own/bb", "full"] == {0: {"pruned": {}, "sizes": {"bytes": 4}}, 1: {"pruned": {}}}


def test_rows_start_from_those_they_name_and_parts_have_their_own_fields(made):
    root, _, _ = made
    plain, pruned = record(root, "plain"), record(root, "pruning")
    assert plain["compacted"]["units"] == [64, 20, 20, 20] and plain["pruned"]["compression"] == 1.0
    assert plain["num_data"] == 1437 and 0 < plain["pruned"]["train_error"] < 0.5
    assert pruned["original"]["error"] == plain["pruned"]["error"]
    alive = {name: pruned["pruned"]["alive"][name] / total for name, total in pruned["layers"].items()}
    assert alive == {"1": 0.25, "3": 0.5, "5": 0.5, "7": 0.5}
    assert pruned["config"]["parts"]["1"]["sparsity"] == 0.75


def test_finished_cells_are_not_run_again_and_the_pages_stay_as_they_are(made, monkeypatch):
    root, options, _ = made
    before = (root / "out" / "own" / "table.md").read_text(), (root / "out" / "own" / "table.html").read_text()

    def refuse(*_):
        raise AssertionError("a finished cell was started")

    monkeypatch.setattr(runner, "_process", refuse)
    unstored = [*options[:4], *options[6:]]
    assert "--store" in options and "--store" not in unstored
    for told in (options, unstored, [*options[:-1], 0]):
        assert vardrop("reproduce", "own", *told).returncode == 0
        after = (root / "out" / "own" / "table.md").read_text(), (root / "out" / "own" / "table.html").read_text()
        assert after == before
    listed = vardrop("reproduce", "--list", *options)
    assert listed.returncode == 0 and "4 / 4" in listed.stdout and "Digits" in listed.stdout


def test_the_list_and_what_is_refused(tmp_path):
    listed = vardrop("reproduce", "--list", "--out", tmp_path)
    assert listed.returncode == 0
    for name in load_tables():
        assert name in listed.stdout
    for arguments, message in (
        (["svd"], "table 'svd' is unknown; known are: ard-1-cifar10"),
        (["--list", "svd"], "table 'svd' is unknown"),
        (["svd-mnist-fc", "--row", "SVD"], "row 'SVD' is not in table svd-mnist-fc; it has: Original, Pruning, DNS"),
        (["svd-mnist-fc", "--jobs", 0], "jobs=0: must be at least 1"),
        (["svd-mnist-fc", "--seeds", -1], "seeds=-1: must be at least 0"),
        (["vbd-3-svhn", "--data-root", tmp_path], f"there is no folder {tmp_path}/ufldl-stanford/svhn"),
    ):
        done = vardrop("reproduce", *arguments, "--out", tmp_path / "out")
        assert done.returncode == 1 and message in done.stderr.replace("\n", ""), done.stderr
        assert not list(tmp_path.rglob("config.json"))


def test_a_killed_cell_goes_on_where_it_stood(tmp_path):
    text = RECIPE.replace("full = { epochs = 8, decay_from = 4 }", "full = { epochs = 300, decay_from = 4 }")
    own = recipes(tmp_path / "own", text)
    cell = cell_of(own, "Plain")
    told = {"table": "own", "row": "Plain", "column": "", "budget": "full", "seeds": [0], "data_root": None}
    told |= {"folder": str(tmp_path / "out"), "recipes": str(own)}
    command = [sys.executable, "-m", "vardrop.tables", json.dumps(told)]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    checkpoint = tmp_path / "out" / cell.place / "checkpoint.pt"
    deadline = time.monotonic() + 90
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    with pytest.raises(StorageError, match="is being worked on by another process"):
        run_seeds([cell], Options(tmp_path / "out", recipes=own))
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kept = runner.epochs_done(cell, tmp_path / "out")
    assert 0 < kept < 300 and not (checkpoint.parent / CELL).exists()
    before = torch.load(checkpoint, weights_only=True)["history"]  # the lines of the history are written first
    run_seeds([cell], Options(tmp_path / "out", recipes=own))
    after = json.loads((checkpoint.parent / CELL).read_text())["history"]
    assert kept - len(before) in (0, 1) and after[: len(before)] == before and len(after) == 300, (
        "no epoch of the checkpoint was run again"
    )


def test_a_cell_of_another_runner_is_left_to_it_and_taken_once_it_is_free(tmp_path):
    own = recipes(tmp_path / "own")
    options = Options(tmp_path / "out", recipes=own)
    held = runner._locked(tmp_path / "out" / cell_of(own, "Plain").place)
    assert held.__enter__()
    seen = []

    def on_tick():
        seen.append("tick")
        if seen.count("tick") == 3:
            held.__exit__()

    cells = cells_of([load_tables(own)["own"]], "full", 1, ["Plain"])
    outcome = run_cells(cells, options, Watch(on_start=lambda cell: seen.append("start"), on_tick=on_tick))
    assert seen.index("start") == 3 and outcome.finished == {"own/plain/full-seed-0"} and not outcome.failed


def test_a_cell_that_another_runner_took_at_the_same_moment_is_waited_for(tmp_path, monkeypatch):
    own = recipes(tmp_path / "own")
    statuses = [runner.BUSY, 0]

    def process(cell, options, slot):
        return subprocess.Popen([sys.executable, "-c", f"import sys; sys.exit({statuses.pop(0)})"])

    monkeypatch.setattr(runner, "_process", process)
    cells = cells_of([load_tables(own)["own"]], "full", 1, ["Plain"])
    outcome = run_cells(cells, Options(tmp_path / "out", recipes=own))
    assert outcome.finished == {cells[0].place} and not outcome.failed and not statuses
    with runner._locked(tmp_path / "out" / cells[0].place), pytest.raises(runner.BusyError):
        run_seeds([cells[0]], Options(tmp_path / "out", recipes=own))


def test_seeds_of_a_row_train_together_where_the_method_allows_and_else_one_by_one(tmp_path):
    own = recipes(tmp_path / "own")
    cells = cells_of([load_tables(own)["own"]], "full", 2, ["Plain", "Pruning", "BB"])
    options = Options(tmp_path / "out", recipes=own, together=True)
    outcome = run_cells(cells, options)
    assert len(outcome.finished) == 6 and not outcome.failed
    for row, together in (("plain", 2), ("pruning", None), ("bb", 2)):
        for seed in (0, 1):
            record = json.loads((tmp_path / f"out/own/{row}/full-seed-{seed}" / CELL).read_text())
            assert record.get("together") == together and record["seed"] == seed
    assert {path.name for path in (tmp_path / "out" / "own" / "bb").glob("*.log")} == {"full-seed-0.log"}


@pytest.mark.parametrize("reason", [ApartError, TrainingError])
def test_a_seed_that_fails_stops_no_other_one(tmp_path, monkeypatch, reason):
    own = recipes(tmp_path / "own")
    cells = cells_of([load_tables(own)["own"]], "full", 3, ["Plain"])
    options = Options(tmp_path / "out", recipes=own)
    usual = runner.compress

    def fails(job, folder):
        if job.schedule.seed == 1:
            raise TrainingError("the loss is nan")
        return usual(job, folder)

    def apart(jobs):
        raise reason("not these")

    monkeypatch.setattr(runner, "compress", fails)
    monkeypatch.setattr(runner, "compress_together", apart)
    with pytest.raises(VardropError, match="^seed 1: the loss is nan$"):
        run_seeds(cells, options)
    assert [record_of(cell, options.folder) is not None for cell in cells] == [True, False, True]


def test_a_run_that_another_recipe_made_is_no_cell(tmp_path):
    own = recipes(tmp_path / "own")
    cell, options = cell_of(own, "Plain"), Options(tmp_path / "out", recipes=own)
    run_seeds([cell], options)
    place = tmp_path / "out" / cell.place
    (place / CELL).unlink()  # broken off between the run and its record
    changed = recipes(tmp_path / "changed", RECIPE.replace("lr = 0.01", "lr = 0.02"))
    with pytest.raises(VardropError, match=r"made by another recipe \(it differs in schedule\)"):
        run_seeds([cell_of(changed, "Plain")], Options(tmp_path / "out", recipes=changed))
    assert not (place / CELL).exists()


def test_each_place_has_a_device_of_its_own(tmp_path, monkeypatch):
    own = recipes(tmp_path / "own")
    cell, given = cell_of(own, "Plain"), []
    monkeypatch.setattr(runner.subprocess, "Popen", lambda command, env, **_: given.append(env))
    monkeypatch.setattr(runner.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(runner.torch.cuda, "device_count", lambda: 2)
    (tmp_path / "out" / cell.place).parent.mkdir(parents=True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for slot in (0, 1, 2):
        runner._process([cell], Options(tmp_path / "out", recipes=own), slot)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,5")
    for slot in (0, 1, 2):
        runner._process([cell], Options(tmp_path / "out", recipes=own), slot)
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in given] == ["0", "1", "0", "7", "5", "7"]


def test_a_cell_whose_start_is_not_among_them_is_refused(tmp_path):
    own = recipes(tmp_path / "own")
    with pytest.raises(InvalidValueError, match="BB, full, seed 0 starts from own: Plain, full, seed 0, which must be"):
        run_cells([cell_of(own, "BB")], Options(tmp_path / "out", recipes=own, device="cpu"))


def test_what_fails_is_named_with_its_reason_and_the_rest_goes_on(tmp_path):
    text = RECIPE.replace('method = "beta-bernoulli"\n', 'method = "beta-bernoulli"\ninclude = ["99"]\n')
    text = text.replace('method = "magnitude-pruning"', 'data = "some/where"\nmethod = "magnitude-pruning"')
    own = recipes(tmp_path / "own", text)
    cells = cells_of([load_tables(own)["own"]], "full", 1)
    options = Options(tmp_path / "out", recipes=own, data_root=tmp_path, jobs=2)
    outcome = run_cells(cells, options)
    assert outcome.finished == {"own/plain/full-seed-0"}
    reasons = {place.split("/")[1]: reason for place, reason in outcome.failed.items()}
    assert "include='99' matches no layer" in reasons["bb"]
    assert reasons["dbb"] == "it starts from own: BB, full, seed 0, which failed"
    assert f"there is no folder {tmp_path}/some/where" in reasons["pruning"]
    with pytest.raises(DataError, match="there is no folder"):
        run_cells([cell for cell in cells if cell.run.row == "Pruning"], Options(tmp_path / "b", data_root=tmp_path))


def test_a_failure_is_told_by_the_signal_or_the_last_thing_said(tmp_path):
    log = tmp_path / "log"
    log.write_text("a warning\nerror: no such thing\n\n")
    assert runner._reason(1, log) == "no such thing"
    assert runner._reason(-signal.SIGKILL, log) == "its process was ended by SIGKILL"
    log.write_text("")
    assert runner._reason(3, log) == "its process ended with status 3"


@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_ctrl_c_and_sigterm_stop_the_cells_at_work_and_free_them(number, error, tmp_path, monkeypatch, request):
    if number != signal.SIGINT:  # as in what a script starts in the background
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    own = recipes(tmp_path / "own")
    started = []
    usual = runner._process

    def process(*told):
        started.append(usual(*told))
        return started[-1]

    monkeypatch.setattr(runner, "_process", process)
    cells = cells_of([load_tables(own)["own"]], "full", 1, ["Plain"])
    with pytest.raises(error):
        run_cells(
            cells,
            Options(tmp_path / "out", recipes=own),
            Watch(on_tick=lambda: signal.raise_signal(number)),
        )
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert len(started) == 1 and started[0].poll() not in (None, 0)
    with runner._locked(tmp_path / "out" / cells[0].place) as free:
        assert free
