"""The page on uncertainty is made of stored evaluations and of nothing else."""

import json

import pytest

import vardrop as vd
from vardrop.compress import Job, compress
from vardrop.train import Schedule

STRANGE = "import torch\ndef noise():\n    x = torch.rand(50, 1, 8, 8, generator=torch.Generator().manual_seed(0))\n"
STRANGE += "    return (x, torch.arange(50) % 2), (x, torch.arange(50) % 2)\n"


@pytest.fixture
def ood(load_script, tmp_path, monkeypatch):
    script = load_script("ood")
    monkeypatch.setattr(script, "STORED", tmp_path / "ood.json")
    monkeypatch.setattr(script, "DOCS", tmp_path / "docs")
    return script


def test_runs_become_a_page_and_a_picture(ood, tmp_path, capsys):
    (tmp_path / "strange.py").write_text(STRANGE)
    runs = {"a": vd.ARD(), "b": vd.VarianceNetwork()}
    for name, method in runs.items():
        schedule = Schedule(epochs=1, batch_size=100, decay_from=1, warmup_start=0, warmup_epochs=1)
        compress(Job(net="mlp-20", data="digits", method=method, schedule=schedule), tmp_path / name)
    folders = [str(tmp_path / name) for name in runs]
    ood.main([*folders, "--ood", f"{tmp_path / 'strange.py'}:noise", "--samples", "3"])
    page, picture = (tmp_path / "docs" / name for name in (ood.PAGE, ood.PICTURE))
    stored = json.loads(ood.STORED.read_text())
    assert page.read_text() == ood.page(stored) and ood.table(stored) in capsys.readouterr().out
    assert str(tmp_path) not in page.read_text() + ood.STORED.read_text() + picture.read_text()
    rows = [line.split(" | ") for line in page.read_text().splitlines() if line.startswith(("| a ", "| b "))]
    assert len(rows) == 6
    ways = [(name, way) for name in runs for way in ("pruned net", "one draw", "ensemble of 3 draws")]
    for cells, (name, way) in zip(rows, ways, strict=True):
        row = json.loads((tmp_path / name / "evaluation.json").read_text())["rows"][way]
        assert cells[2] == f"{100 * row['error']:.2f} %" and cells[3] == f"{row['nll']:.4f}"
        assert cells[6].strip(" |") == f"{row['auroc_entropy']:.4f}"
    before = picture.read_bytes()
    ood.main(["--write"])
    assert picture.read_bytes() == before and b"<svg" in before


@pytest.mark.parametrize("arguments", [[], ["runs/a"], ["--ood", "kmnist"], ["runs/a", "--ood", "kmnist", "--write"]])
def test_half_a_command_is_refused(ood, arguments, capsys):
    with pytest.raises(SystemExit):
        ood.main(arguments)
    assert ", or --write alone" in capsys.readouterr().err
