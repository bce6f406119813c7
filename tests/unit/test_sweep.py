"""The search: its ranges, what it refuses, the front it finds, and that it goes on where it stood."""

import json
import math
from dataclasses import replace

import pytest

import vardrop as vd
from vardrop.compress import Job
from vardrop.errors import InvalidValueError, StorageError, TrainingError, VardropWarning
from vardrop.sweep import FRONT, PICTURE, Range, parse_search, sweep
from vardrop.train import Schedule

SCHEDULE = Schedule(epochs=2, decay_from=1, warmup_start=0, warmup_epochs=1)
JOB = Job("mlp-20", "digits", vd.ARD(), SCHEDULE, validation=300)


def test_ranges_are_read():
    settings = ["threshold=1e-3:1e-1:log", "rule=snr,magnitude", "train_clip=true,false", "shrink_every=2,5"]
    found = parse_search([*settings, "batch_size=10:100:log"], JOB)
    assert found["threshold"] == Range(1e-3, 1e-1, log=True)
    assert found["rule"].choices == ("snr", "magnitude") and found["train_clip"].choices == (True, False)
    assert found["shrink_every"].choices == (2, 5) and isinstance(found["shrink_every"].choices[0], int)
    assert found["batch_size"] == Range(10, 100, log=True, whole=True)
    sharing = replace(JOB, method=vd.SoftWeightSharing())
    assert parse_search(["components=2:4"], sharing)["components"].whole


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("depth=1:2", "with a field of: rule"),
        ("threshold", "must be field=low:high"),
        ("threshold=2:1", "low below high"),
        ("threshold=0:1:log", "low above 0"),
        ("threshold=1:2:linear", "must be low:high"),
        ("threshold=a:b", "a must be a number"),
        ("lr=0:inf", "inf must be a finite number"),
        ("seed=true,false", "true must be a whole number"),
        ("rule=snr,foo", "foo must be one of log_alpha, magnitude, snr"),
        ("epochs=1.5:3", "1.5 must be a whole number"),
        ("shrink_every=2,2.5", "2.5 must be a whole number"),
    ],
)
def test_what_is_no_range_is_refused(setting, message):
    with pytest.raises(InvalidValueError, match=message):
        parse_search([setting], JOB)


def test_it_refuses_what_it_cannot_judge(tmp_path):
    with pytest.raises(InvalidValueError, match="nothing to search"):
        parse_search([], JOB)
    search = {"threshold": Range(0.001, 0.1)}
    with pytest.raises(InvalidValueError, match="validation=0"):
        sweep(Job("mlp-20", "digits", vd.ARD(), SCHEDULE), search, tmp_path, trials=1)
    with pytest.raises(InvalidValueError, match="trials=0"):
        sweep(JOB, search, tmp_path, trials=0)
    with pytest.raises(InvalidValueError, match="against='size'"):
        sweep(JOB, search, tmp_path, trials=1, against="size")


@pytest.mark.parametrize("against", ["compression", "flops"])
def test_the_front_is_what_no_trial_beats_and_a_study_goes_on(tmp_path, against):
    pytest.importorskip("optuna")
    search = parse_search(["threshold=0.001:0.3:log", "epochs=1:3"], JOB)
    seen = []
    sweep(JOB, search, tmp_path, trials=2, against=against, on_trial=seen.append)
    front = sweep(JOB, search, tmp_path, trials=4, against=against, on_trial=seen.append)
    stored = json.loads((tmp_path / FRONT).read_text())
    assert len(seen) == len(stored["all"]) == 4 and len({point.run for point in seen}) == 4
    better = min if against == "flops" else max
    for point in seen:
        rivals = [
            other for other in seen if other.error <= point.error and better(other.size, point.size) == other.size
        ]
        beaten = any((other.error, other.size) != (point.error, point.size) for other in rivals)
        assert (point in front) != beaten
    config = json.loads((tmp_path / seen[0].run / "config.json").read_text())
    assert config["method"]["threshold"] == seen[0].values["threshold"]
    assert config["schedule"]["epochs"] == seen[0].values["epochs"]
    assert (tmp_path / PICTURE).stat().st_size > 1000 and math.isfinite(front[0].error)


def test_a_finished_study_runs_nothing_and_another_one_is_refused(tmp_path):
    pytest.importorskip("optuna")
    tmp_path = tmp_path / "what? {50 %}"
    search, seen = parse_search(["threshold=0.001:0.3:log"], JOB), []
    front = sweep(JOB, search, tmp_path, trials=1, on_trial=seen.append)
    assert sweep(JOB, search, tmp_path, trials=1, on_trial=seen.append) == front and len(seen) == 1
    assert (tmp_path / "study.db").stat().st_size > 0
    longer = replace(JOB, schedule=replace(SCHEDULE, epochs=3))
    with pytest.raises(StorageError, match=r"differs in schedule"):
        sweep(longer, search, tmp_path, trials=2)
    with pytest.raises(StorageError, match=r"differs in search"):
        sweep(JOB, parse_search(["threshold=0.1:0.3"], JOB), tmp_path, trials=2)


@pytest.mark.parametrize(("values", "reason"), [("lr=1e36:1e37:log", "not finite"), ("decay_from=5:9", "decay_from=")])
def test_a_search_in_which_no_trial_gives_a_net_ends_and_says_why(tmp_path, values, reason):
    pytest.importorskip("optuna")
    search, seen = parse_search([values], JOB), []
    with pytest.raises(TrainingError, match=f"3 of 3 trials gave no net; the last because of .*{reason}"):
        sweep(JOB, search, tmp_path, trials=3, on_trial=seen.append)
    assert not seen
    assert json.loads((tmp_path / FRONT).read_text())["all"] == []


def test_trials_that_gave_no_net_are_told_beside_those_that_did(tmp_path):
    pytest.importorskip("optuna")
    search = parse_search(["decay_from=1,5"], JOB)
    with pytest.warns(VardropWarning, match=r"\d of 4 trials gave no net; the last because of decay_from=5"):
        assert sweep(JOB, search, tmp_path, trials=4)


def test_a_trial_that_was_broken_off_is_taken_up_again(tmp_path):
    pytest.importorskip("optuna")
    search = parse_search(["threshold=0.001:0.3:log"], JOB)

    class Cut(BaseException):
        pass

    def cut(point):
        raise Cut

    with pytest.raises(Cut):
        sweep(JOB, search, tmp_path, trials=1, on_trial=cut)
    (run,) = tmp_path.glob("run-*")
    seen = []
    sweep(JOB, search, tmp_path, trials=1, on_trial=seen.append)
    assert [point.run for point in seen] == [run.name]


def test_ctrl_c_in_a_trial_stops_the_search_and_the_trial_goes_on_later(tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    search, seen = parse_search(["threshold=0.001:0.3:log"], JOB), []

    def interrupted(job, folder, *, listeners):
        folder.mkdir(parents=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("vardrop.sweep.compress", interrupted)
        sweep(JOB, search, tmp_path, trials=1)
    (run,) = tmp_path.glob("run-*")
    sweep(JOB, search, tmp_path, trials=1, on_trial=seen.append)
    assert [point.run for point in seen] == [run.name]


def test_values_that_do_not_go_together_are_a_trial_on_no_front(tmp_path):
    pytest.importorskip("optuna")
    search = parse_search(["warmup_start=0:2", "warmup_epochs=1:2"], JOB)
    front = sweep(JOB, search, tmp_path, trials=6)
    stored = json.loads((tmp_path / FRONT).read_text())
    assert front and len(stored["all"]) < 6
    assert all(point["values"]["warmup_start"] < point["values"]["warmup_epochs"] for point in stored["all"])


def test_the_front_so_far_is_kept_after_every_trial(tmp_path):
    pytest.importorskip("optuna")
    kept = []

    def look(point):
        kept.append((tmp_path / FRONT).exists() and len(json.loads((tmp_path / FRONT).read_text())["all"]))

    sweep(JOB, parse_search(["threshold=0.001:0.3:log"], JOB), tmp_path, trials=3, on_trial=look)
    assert kept == [False, 1, 2]


def test_a_folder_or_a_storage_that_is_none_is_told_in_one_line(tmp_path):
    pytest.importorskip("optuna")
    search = parse_search(["threshold=0.001:0.3:log"], JOB)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file cannot be a folder"):
        sweep(JOB, search, tmp_path / "file", trials=1)
    with pytest.raises(StorageError, match="storage nonsense cannot keep the study"):
        sweep(JOB, search, tmp_path / "folder", trials=1, storage="nonsense")


def test_data_that_sets_examples_apart_itself_needs_no_others(tmp_path):
    pytest.importorskip("optuna")
    folder = tmp_path / "texts"
    folder.mkdir()
    for part in ("train", "test", "validation"):
        (folder / f"{part}.txt").write_text("to be or not to be\n" * 20)
    job = Job("char-lstm-8", "texts", vd.ARD(), SCHEDULE, data_root=tmp_path)
    search = parse_search(["threshold=0.001:0.3:log"], job)
    (point,) = sweep(job, search, tmp_path / "sweep", trials=1)
    run = json.loads((tmp_path / "sweep" / point.run / "run.json").read_text())
    assert run["config"]["validation"] == 0 and point.error == run["pruned"]["valid_error"]
