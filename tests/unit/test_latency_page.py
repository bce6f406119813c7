"""The page on latency is made of stored measurements and of nothing else."""

import json

import pytest

import vardrop as vd
from vardrop.compress import Job, compress
from vardrop.train import Schedule


@pytest.fixture
def latency(load_script, tmp_path, monkeypatch):
    script = load_script("latency")
    monkeypatch.setattr(script, "STORED", tmp_path / "latency.json")
    monkeypatch.setattr(script, "PAGE", tmp_path / "latency.md")
    return script


def test_measured_runs_become_a_page(latency, tmp_path, capsys):
    schedule = Schedule(epochs=1, batch_size=100, decay_from=1, warmup_start=0, warmup_epochs=0)
    for name, method, pretrain in (("a", vd.ARD(), 0), ("b", vd.StructuredBP(), 1)):
        compress(Job("mlp-20", "digits", method, schedule, pretrain=pretrain), tmp_path / name)
    latency.main([str(tmp_path / "a"), str(tmp_path / "b"), "--repeats", "2"])
    stored, text = json.loads(latency.STORED.read_text()), latency.PAGE.read_text()
    assert latency.page(stored) == text and latency.table(stored) in capsys.readouterr().out
    assert str(tmp_path) not in text + latency.STORED.read_text()
    first, second = (line.split(" | ") for line in text.splitlines() if line.startswith(("| a ", "| b ")))
    assert " to " not in first[1] and " to " in second[1], "only the second began as a trained plain net"
    assert second[2].count("-") == 3, "the units of four gates"
    for run, cells in zip(stored["runs"], (first, second), strict=True):
        assert cells[3] == f"{run['measured']['flops']['ratio']:.2f}x" and len(cells) == 12
        small = json.loads((tmp_path / run["run"] / "run.json").read_text())["compacted"]
        assert run["error"]["small"] == small["error"]
    latency.main(["--write"])
    assert latency.PAGE.read_text() == text


def test_runs_and_write_exclude_each_other(latency, capsys):
    for arguments in ([], ["runs/a", "--write"]):
        with pytest.raises(SystemExit):
            latency.main(arguments)
    assert "either runs, or --write alone" in capsys.readouterr().err
