"""The command line on real, embedded data: the whole road, what it refuses, and what it leaves behind."""

import io
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file

import vardrop as vd
from vardrop import cli
from vardrop.cli import make_method
from vardrop.compress import Job, compress, error_and_nll
from vardrop.errors import InvalidValueError, StorageError
from vardrop.evaluate import load_small
from vardrop.files import read_run
from vardrop.report import report
from vardrop.train import Schedule
from vardrop.zoo import build_net, load_data

FAST = ["--epochs", "3", "--batch-size", "100", "--pretrain", "4", "--warmup-epochs", "2", "--set", "train_clip=true"]


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def vardrop(*arguments: object) -> Done:
    """Runs the command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["vardrop", *map(str, arguments)])
        patch.setattr(cli.console, "width", 140)
        with pytest.raises(SystemExit) as ended:
            cli.main()
    return Done(ended.value.code or 0, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("runs") / "a"
    done = vardrop("compress", "lenet-300-100", "--validation", 100, "--out", folder, *FAST)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_compress_prints_its_figures_and_the_small_net_has_those_of_the_pruned_one(finished):
    folder, printed = finished
    run = read_run(folder)
    assert run["pruned"]["error"] == run["compacted"]["error"]
    assert run["compacted"]["largest_difference"] < 1e-4
    assert run["compacted"]["parameters"] < run["original"]["parameters"]
    assert len(run["history"]) == 3 and run["history"][0]["valid_error"] is not None
    assert run["config"]["method"]["name"] == "sparse-vd" and run["seed"] == 0 and run["versions"]["torch"]
    assert f"{100 * run['compacted']['error']:.2f}" in printed
    data = load_data("digits")
    wrong = (load_small(folder, data)(data.test.x).argmax(dim=1) != data.test.y).double().mean().item()
    assert wrong == pytest.approx(run["compacted"]["error"])


def test_evaluate_export_and_report_work_on_the_finished_run(finished, tmp_path):
    folder, _ = finished
    done = vardrop("evaluate", folder, "--samples", 3)
    assert done.returncode == 0, done.stderr
    assert "ensemble of 3 draws" in done.stdout and "small net" in done.stdout
    done = vardrop("export", folder, "--out", tmp_path / "small.onnx")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "small.onnx").stat().st_size > 0
    done = vardrop("report", folder, "--out", tmp_path / "page.html")
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/") == 5
    assert "http" not in page.replace("http://www.w3.org", "")
    assert "not recorded" not in page


def test_measure_prints_sizes_and_times_and_keeps_them_beside_the_run(finished):
    folder, _ = finished
    done = vardrop("measure", folder, "--repeats", 3)
    assert done.returncode == 0, done.stderr
    run, record = read_run(folder), json.loads((folder / "measure.json").read_text())
    assert [record["parameters"][name] for name in ("original", "small")] == [
        run[part]["parameters"] for part in ("original", "compacted")
    ]
    assert f"{record['flops']['original']:,}" in done.stdout and "microseconds, onnxruntime, batch 128" in done.stdout
    assert len(record) == 4 + 2 * 2 * 2


def test_measure_builds_the_net_anew_where_a_run_keeps_no_original(finished, tmp_path):
    folder, _ = finished
    for name in ("small", "run.json"):
        (tmp_path / name).symlink_to(folder / name)
    done = vardrop("measure", tmp_path, "--repeats", 1, "--no-onnx")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "measure.json").read_text())
    assert record["parameters"]["original"] == 64 * 300 + 300 + 300 * 100 + 100 + 100 * 10 + 10
    assert len(record) == 4 + 2 * 2
    gone = vardrop("measure", tmp_path / "nowhere")
    assert gone.returncode == 1 and "must be the folder of a finished" in gone.stderr


def test_two_processes_do_the_whole_road_and_the_first_alone_speaks(finished, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "vardrop"]
    command += ["compress", "lenet-300-100", "--validation", "100", "--out", str(tmp_path / "a"), *FAST]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("everything is in") == 1
    run, alone = read_run(tmp_path / "a"), read_run(finished[0])
    assert [epoch["train_nll"] for epoch in run["history"]] != [epoch["train_nll"] for epoch in alone["history"]]
    assert run["config"] == alone["config"] and run["pruned"]["error"] == run["compacted"]["error"]
    assert abs(run["pruned"]["error"] - alone["pruned"]["error"]) < 0.1


def test_a_report_says_what_is_missing_and_escapes_names(finished, tmp_path):
    folder, _ = finished
    run = read_run(folder)
    run["config"]["net"] = "<script>alert(1)</script>"
    (tmp_path / "run.json").write_text(json.dumps(run))
    page = report(tmp_path).read_text()
    assert page.count("not recorded") == 3
    for line in run["history"]:
        line["kl"] = 0.0
    (tmp_path / "run.json").write_text(json.dumps(run))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report(tmp_path)
    assert "<script>" not in page and "&lt;script&gt;" in page
    with pytest.raises(StorageError, match=r"run.json does not exist"):
        report(tmp_path / "nowhere")
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(StorageError, match="not readable JSON"):
        report(tmp_path)


def test_the_same_command_again_trains_nothing_and_another_one_is_refused(finished):
    folder, _ = finished
    before = read_run(folder)
    again = vardrop("compress", "lenet-300-100", "--validation", 100, "--out", folder, *FAST)
    assert again.returncode == 0, again.stderr
    assert read_run(folder)["compacted"] == before["compacted"]
    other = vardrop("compress", "lenet-300-100", "--validation", 90, "--out", folder, *FAST)
    assert other.returncode == 1 and "holds another run (it differs in validation)" in other.stderr
    assert read_run(folder)["config"]["validation"] == 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["methods", "all"], "unexpected extra argument"),
        (["compress"], "Missing argument"),
        (["compress", "lenet-5", "--epoch", "3"], "No such option: --epoch"),
        (["evaluate", "run", "--samples", "few"], "Invalid value for '--samples'"),
        (["prune"], "No such command 'prune'"),
    ],
)
def test_a_command_that_does_not_exist_so_says_how_to_get_help(arguments, message):
    done = vardrop(*arguments)
    assert done.returncode == 2
    assert message in done.stderr and "--help' for help" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["lenet-9"], "net 'lenet-9' is unknown"),
        (["lenet-300-100", "--method", "magic"], "method 'magic' is unknown; known are: ard, beta-bernoulli"),
        (["lenet-300-100", "--set", "threshold=high"], "--set threshold=high: must be a number"),
        (["lenet-300-100", "--set", "size=3"], "must be field=value with a field of sparse-vd"),
        (["lenet-300-100", "--method", "gamma-ard", "--set", "a=0.5"], "GammaARD(a=0.5): must satisfy 0.5 < a"),
        (["lenet-300-100", "--epochs", "0"], "epochs=0: must be at least 1"),
        (["lenet-300-100", "--shrink-every", "0"], "shrink_every=0: must be at least 1"),
        (["lenet-300-100", "--shrink-every", "1", "--method", "dynamic-network-surgery"], "no unit is dead for good"),
        (["lenet-300-100", "--pretrain", "1", "--include", "conv*"], "matches no layer; layers are: 1, 3, 5"),
        (["lenet-5"], "at least 16 pixels, not 8"),
        (["lenet-300-100", "--data", "ylecun/mnist", "--data-root", "/nowhere"], "there is no folder"),
        (["lenet-300-100", "--validation", "5000"], "validation=5000: must lie in 1 to 1436"),
    ],
)
def test_bad_requests_are_one_line_and_leave_no_folder(tmp_path, arguments, message):
    done = vardrop("compress", *arguments, "--out", tmp_path / "run")
    assert done.returncode == 1
    assert message in done.stderr.replace("\n", "")
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_package_itself_runs_as_the_command_line():
    done = subprocess.run(
        [sys.executable, "-m", "vardrop", "reproduce", "--seeds", "-1"], capture_output=True, text=True
    )
    assert done.returncode == 1 and "seeds=-1" in done.stderr


def test_what_only_the_stored_run_has_is_named_too(finished, tmp_path):
    folder, _ = finished
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"parts": {}}))
    again = vardrop("compress", "lenet-300-100", "--validation", 100, "--out", tmp_path, *FAST)
    assert again.returncode == 1 and "holds another run (it differs in parts)" in again.stderr


def test_a_folder_that_holds_something_else_is_refused(tmp_path):
    (tmp_path / "letters").write_text("dear")
    done = vardrop("compress", "lenet-300-100", "--out", tmp_path)
    assert done.returncode == 1 and "is not empty and holds no run" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["letters"]


def test_ctrl_c_says_what_is_kept_and_the_same_command_goes_on(tmp_path):
    arguments = [
        "compress",
        "lenet-300-100",
        "--epochs",
        "400",
        "--warmup-epochs",
        "200",
        "--out",
        str(tmp_path / "run"),
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "vardrop.cli", *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 90
    while not (tmp_path / "run" / "checkpoint.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on from there" in " ".join(said.split())
    stored = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert 0 < len(stored["history"]) < 400


def test_a_rule_that_kills_a_whole_layer_keeps_its_best_weight_or_refuses_as_asked(tmp_path):
    command = ["compress", "lenet-300-100", "--epochs", 1, "--set", "threshold=-50", "--out", tmp_path / "run"]
    refused = vardrop(*command, "--on-empty", "refuse")
    assert refused.returncode == 1
    assert "layer '1': all 19200 weights are dead" in " ".join(refused.stderr.split())
    assert not (tmp_path / "run" / "run.json").exists()
    kept = vardrop(*command)
    assert kept.returncode == 0, kept.stderr
    shown = " ".join(kept.stderr.split())
    assert "warning: layer '5': all 1000 weights are dead" in shown and "the best one is kept" in shown
    assert ".py" not in shown
    run = read_run(tmp_path / "run")
    assert run["pruned"]["alive"] == {"1": 1, "3": 1, "5": 1}
    assert run["pruned"]["error"] == run["compacted"]["error"]


def test_methods_and_help_explain_themselves():
    listed = vardrop("methods")
    assert listed.returncode == 0, listed.stderr
    for name in (*vd.methods(), "lenet-5", "digits"):
        assert name in listed.stdout
    for command in ("compress", "evaluate", "export", "report", "methods", "demo"):
        shown = vardrop(command, "--help")
        assert shown.returncode == 0 and command in shown.stdout
        assert ("--data-root" in shown.stdout) == (command in ("compress", "evaluate", "export"))


def test_make_method_reads_numbers_words_truth_and_none():
    method = make_method("sparse-vd", ["threshold=2.5", "rule=snr", "form=sigmoid", "init_log_std=-4"])
    assert method == vd.SparseVD(threshold=2.5, rule="snr", form="sigmoid", init_log_std=-4.0)
    assert make_method("sparse-vd", ["rule=none"]) == vd.SparseVD(rule=None)
    assert make_method("vbd", ["train_clip=true", "alpha=weight"]) == vd.VBD(train_clip=True)
    for bad in ("train_clip=yes", "threshold=x", "novalue"):
        with pytest.raises(InvalidValueError, match="--set"):
            make_method("vbd", [bad])


UNFOLLOWED = """
from torch import nn


class Renormed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(64, 8), nn.Linear(8, 10)

    def forward(self, x):
        return self.last(self.first(x.flatten(1)).relu().renorm(2, 0, 1e6))


def build():
    return Renormed()
"""


def test_a_net_that_compaction_cannot_follow_is_refused_before_it_is_trained(tmp_path):
    (tmp_path / "mine.py").write_text(UNFOLLOWED)
    told = ["compress", f"{tmp_path / 'mine.py'}:build", "--out", tmp_path / "run", *FAST]
    done = vardrop(*told)
    assert done.returncode == 1 and "no rule for the operation 'renorm'" in done.stderr + done.stdout
    assert not (tmp_path / "run").exists()
    kept = vardrop(*told, "--on-unknown", "keep")
    assert kept.returncode == 0, kept.stderr
    assert read_run(tmp_path / "run")["config"]["on_unknown"] == "keep"


@pytest.mark.parametrize("text", ["{}", "[]", '{"other": 1}'])
def test_a_foreign_record_is_refused(tmp_path, text):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(StorageError, match="is no record of a run: .* must be the folder of a finished"):
        read_run(tmp_path)


def test_a_damaged_config_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(StorageError, match="not readable JSON"):
        compress(Job("lenet-300-100", "digits", vd.ARD(), Schedule(epochs=1, decay_from=0)), tmp_path)


def test_gates_by_name_with_their_own_learning_rate_from_a_stored_net_and_on_to_the_second_stage(tmp_path):
    plain = tmp_path / "plain.safetensors"
    save_file(build_net("mlp-20", input_shape=(1, 8, 8), num_classes=10).state_dict(), plain)
    options = ["--epochs", "2", "--gate-lr", "0.05", "--warmup-epochs", "0", "--decay-from", "2"]
    done = vardrop(
        "compress", "mlp-20", "--method", "beta-bernoulli", "--pretrained", plain, "--out", tmp_path / "a", *options
    )
    assert done.returncode == 0, done.stderr
    run = read_run(tmp_path / "a")
    assert run["original"] is not None and run["config"]["pretrained"] == str(plain)
    assert run["config"]["schedule"]["gate_lr"] == 0.05
    assert run["layers"] == {"1.gate": 64, "3.gate": 20, "5.gate": 20, "7.gate": 20}
    units = run["pruned"]["units"]
    assert len(units.split("-")) == 4 and run["history"][-1]["units"] == units and f"units {units}" in done.stdout
    assert run["compacted"]["largest_difference"] < 1e-5
    done = vardrop(
        *("compress", "mlp-20", "--method", "dependent-beta-bernoulli", "--pretrained", tmp_path / "a" / "noisy"),
        *("--out", tmp_path / "b", *options),
    )
    assert done.returncode == 0, done.stderr
    second = read_run(tmp_path / "b")
    assert second["original"] is None and second["compacted"]["largest_difference"] < 1e-4
    assert vardrop("evaluate", tmp_path / "b", "--samples", 2).returncode == 0
    assert vardrop("export", tmp_path / "b", "--out", tmp_path / "b.onnx").returncode == 0
    assert vardrop("report", tmp_path / "b").returncode == 0


def test_a_run_that_shrinks_counts_against_the_original_and_ends_like_any_other(tmp_path):
    options = ["--epochs", "6", "--warmup-start", "0", "--warmup-epochs", "2", "--pretrain", "4"]
    options += ["--set", "train_clip=true", "--lr", "5e-3"]
    done = vardrop("compress", "lenet-300-100", "--out", tmp_path / "a", "--shrink-every", 2, *options)
    assert done.returncode == 0, done.stderr
    run = read_run(tmp_path / "a")
    totals = {"1": 64 * 300, "3": 300 * 100, "5": 100 * 10}
    assert run["layers"] == totals and run["pruned"]["total"] == sum(totals.values())
    assert run["pruned"]["compression"] == sum(totals.values()) / run["pruned"]["nonzero"]
    assert run["pruned"]["error"] == run["compacted"]["error"] and run["compacted"]["largest_difference"] < 1e-4
    noisy = json.loads((tmp_path / "a" / "noisy" / "vardrop.json").read_text())
    assert noisy["layers"]["3"]["in_features"] < 300
    for command in (["evaluate"], ["report"], ["export", "--out", tmp_path / "a.onnx"]):
        done = vardrop(command[0], tmp_path / "a", *command[1:])
        assert done.returncode == 0, done.stderr
    done = vardrop("compress", "lenet-300-100", "--out", tmp_path / "a", *options)
    assert done.returncode == 1 and "differs in schedule." in done.stderr


def test_the_second_stage_takes_a_net_that_shrank_and_counts_against_the_whole_one(tmp_path):
    first = vd.convert(build_net("mlp-20", input_shape=(1, 8, 8), num_classes=10), vd.BetaBernoulli())
    with torch.no_grad():
        first[3].gate.raw_a[:12] = -10.0
    vd.shrink(first, torch.optim.Adam(first.parameters()), torch.rand(1, 1, 8, 8))
    assert first[3].in_features == 8
    vd.save(first, tmp_path / "noisy")
    schedule = Schedule(epochs=1, batch_size=100, decay_from=1, warmup_start=0, warmup_epochs=0)
    job = Job("mlp-20", "digits", vd.DependentBetaBernoulli(), schedule, pretrained=tmp_path / "noisy")
    run = compress(job, tmp_path / "b")
    assert run["layers"] == {"1.gate": 64, "3.gate": 20, "5.gate": 20, "7.gate": 20}
    assert run["pruned"]["alive"]["3.gate"] <= 8 and run["pruned"]["compression"] > 1.0
    assert run["compacted"]["largest_difference"] < 1e-4


def test_stored_weights_of_another_net_are_refused_side_by_side(tmp_path):
    path = tmp_path / "other.safetensors"
    save_file(build_net("mlp-30", input_shape=(1, 8, 8), num_classes=10).state_dict(), path)
    done = vardrop("compress", "mlp-20", "--pretrained", path, "--out", tmp_path / "a")
    assert done.returncode == 1 and "1.weight: stored (30, 64), built (20, 64)" in done.stderr
    done = vardrop("compress", "mlp-20", "--method", "dependent-beta-bernoulli", "--out", tmp_path / "b")
    assert done.returncode == 1 and "is the second stage of BetaBernoulli" in done.stderr
    done = vardrop("compress", "mlp-20", "--gate-lr", "-1", "--out", tmp_path / "c")
    assert done.returncode == 1 and "gate_lr=-1.0: must be a finite number above 0" in done.stderr


def test_layers_are_chosen_by_name(tmp_path):
    options = ["--epochs", "1", "--warmup-epochs", "1", "--exclude", "5", "--include", "1", "--include", "5"]
    assert vardrop("compress", "mlp-20", "--method", "ard", "--out", tmp_path / "a", *options).returncode == 0
    run = read_run(tmp_path / "a")
    assert list(run["layers"]) == ["1"] and run["config"]["exclude"] == ["5"]
    assert vardrop("evaluate", tmp_path / "a", "--samples", 2).returncode == 0
    done = vardrop("compress", "mlp-20", "--exclude", "conv*", "--out", tmp_path / "b")
    assert done.returncode == 1 and "conv*" in done.stderr


def test_the_whole_road_of_a_recurrent_net_on_text(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for part, line in (("train", "to be or not to be"), ("test", "to be or not to be"), ("validation", "be or not")):
        (folder / f"{part}.txt").write_text(f"{line}\n" * 60)
    options = ["--data", "texts", "--data-root", tmp_path, "--batch-size", "4", "--lr", "0.02", "--clip-norm", "1"]
    options += ["--pretrain", "2", "--epochs", "2", "--warmup-epochs", "2"]
    done = vardrop("compress", "char-lstm-8", "--out", tmp_path / "a", *options)
    assert done.returncode == 0, done.stderr
    run = read_run(tmp_path / "a")
    assert list(run["layers"]) == ["lstm.weight_ih_l0", "lstm.weight_hh_l0", "output"]
    assert run["original"]["error"] < 0.8 and run["compacted"]["largest_difference"] < 1e-4
    data = load_data("texts", data_root=tmp_path)
    apart = error_and_nll(load_small(tmp_path / "a", data), data.validation)[1]
    assert run["pruned"]["valid_nll"] == pytest.approx(apart, abs=1e-4) != run["pruned"]["nll"]
    assert vardrop("evaluate", tmp_path / "a", "--samples", 2, "--data-root", tmp_path).returncode == 0
    assert vardrop("report", tmp_path / "a").returncode == 0
