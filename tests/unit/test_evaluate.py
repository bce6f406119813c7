"""What an evaluation says of a run, told again by loops, and what it leaves beside the run."""

import json
import math
import shutil
import sys

import pytest
import torch

import vardrop as vd
from vardrop.compress import NOISY, Job, compress
from vardrop.errors import DataError, InvalidValueError, MissingExtraError, StorageError
from vardrop.evaluate import BATCH, PICTURE, evaluate
from vardrop.files import EVALUATION
from vardrop.report import report
from vardrop.train import Schedule
from vardrop.zoo import build_net, load_data

SAMPLES = 4
ENSEMBLE = f"ensemble of {SAMPLES} draws"
WAYS = ["small net", "pruned net", "one draw", ENSEMBLE]
STRANGE = "import torch\ndef noise():\n    x = torch.rand(90, 1, 8, 8, generator=torch.Generator().manual_seed(0))\n"
STRANGE += "    return (x, torch.arange(90) % 2), (x, torch.arange(90) % 2)\n"


def compressed(folder, net="lenet-300-100", data="digits", method=None, data_root=None, epochs=2):
    schedule = Schedule(epochs=epochs, batch_size=50, decay_from=epochs, warmup_start=epochs - 1, warmup_epochs=epochs)
    compress(Job(net=net, data=data, method=method or vd.ARD(), schedule=schedule, data_root=data_root), folder)
    return folder


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    folder = compressed(tmp_path_factory.mktemp("runs") / "a", method=vd.SparseVD(init_log_std=-3.0), epochs=8)
    (folder.parent / "strange.py").write_text(STRANGE)
    strange = f"{folder.parent / 'strange.py'}:noise"
    return folder, strange, evaluate(folder, samples=SAMPLES, ood=strange)


def noisy_net(folder, net="lenet-300-100", data="digits", data_root=None):
    found = load_data(data, data_root=data_root)
    build = lambda: build_net(net, input_shape=found.input_shape, num_classes=found.num_classes)  # noqa: E731
    return vd.load(folder / NOISY, build).eval(), found


def probabilities(folder, strange):
    """Class probabilities of each way to predict, on known and on strange inputs, from the run's own seed."""
    net, data = noisy_net(folder)
    generator = torch.Generator().manual_seed(json.loads((folder / "run.json").read_text())["seed"])
    found = []
    for inputs in (data.test.x, load_data(strange).test.x):
        parts = [vd.draws(net, x, samples=SAMPLES, generator=generator) for x in inputs.split(BATCH)]
        drawn = torch.cat(parts, dim=1).double().softmax(dim=2)
        with torch.no_grad():
            quiet = net(inputs).double().softmax(dim=1)[None]
        found.append({"small net": quiet, "pruned net": quiet, "one draw": drawn[:1], ENSEMBLE: drawn})
    return found, data.test.y


def test_every_figure_is_that_of_a_loop_over_examples(evaluated):
    folder, strange, record = evaluated
    (known, unknown), y = probabilities(folder, strange)
    assert list(record["rows"]) == WAYS and record["samples"] == SAMPLES and record["ood"] == strange
    for way, row in record["rows"].items():
        mean = known[way].mean(0)
        labels = y.tolist()
        wrong = sum(p.index(max(p)) != label for p, label in zip(mean.tolist(), labels, strict=True))
        assert row["error"] == pytest.approx(wrong / len(labels), abs=1e-12)
        nll = -math.fsum(math.log(p[label]) for p, label in zip(mean.tolist(), labels, strict=True)) / len(labels)
        assert row["nll"] == pytest.approx(nll, rel=1e-5)
        one_hot = torch.nn.functional.one_hot(y, 10)
        assert row["brier"] == pytest.approx(float(((mean - one_hot) ** 2).sum() / len(labels)), rel=1e-5)
        scores = [-(p.mean(0) * p.mean(0).log()).sum(1) for p in (known[way], unknown[way])]
        pairs = [(float(a), float(b)) for a in scores[0] for b in scores[1]]
        auroc = sum((b > a) + 0.5 * (b == a) for a, b in pairs) / len(pairs)
        assert row["auroc_entropy"] == pytest.approx(auroc, abs=1e-6)
        assert (row["auroc_mutual_information"] is not None) is (way == ENSEMBLE)
    assert record["rows"][ENSEMBLE]["error"] < 0.2 and record["rows"][ENSEMBLE]["auroc_entropy"] > 0.5
    assert record["rows"]["one draw"]["nll"] != record["rows"][ENSEMBLE]["nll"]


def test_diagrams_and_histograms_hold_every_label_and_every_input_once(evaluated):
    _, _, record = evaluated
    for way in WAYS:
        diagram, row = record["reliability"][way], record["rows"][way]
        assert sum(diagram["counts"]) == 360
        gaps = [n * abs(p - hits) for n, p, hits in zip(*diagram.values(), strict=True)]
        assert row["ece"] == pytest.approx(sum(gaps) / 360, abs=1e-12)
        hits = sum(n * hits for n, _, hits in zip(*diagram.values(), strict=True))
        assert 1 - hits / 360 == pytest.approx(row["error"], abs=1e-12)
        for found in record["histograms"][way].values():
            assert sum(found["inside"]) == 360 and sum(found["outside"]) == 90
            assert len(found["edges"]) == len(found["inside"]) + 1


def test_it_is_kept_beside_the_run_and_the_same_again(evaluated):
    folder, strange, record = evaluated
    assert json.loads((folder / EVALUATION).read_text()) == record
    assert (folder / PICTURE).read_bytes().startswith(b"\x89PNG")
    torch.manual_seed(1)
    assert evaluate(folder, samples=SAMPLES, ood=strange) == record
    run = json.loads((folder / "run.json").read_text())
    for way, stage in (("small net", "compacted"), ("pruned net", "pruned")):
        assert record["rows"][way]["error"] == pytest.approx(run[stage]["error"], abs=1e-12)
        assert record["rows"][way]["nll"] == pytest.approx(run[stage]["nll"], rel=1e-5)
    page = report(folder, folder.parent / "page.html").read_text()
    (folder / EVALUATION).rename(folder.parent / EVALUATION)
    without = report(folder, folder.parent / "page.html").read_text()
    (folder.parent / EVALUATION).rename(folder / EVALUATION)
    assert page.count("<img") == without.count("<img") + 1


def test_without_strange_inputs_there_is_nothing_about_them(tmp_path):
    record = evaluate(compressed(tmp_path / "a", net="mlp-20"), samples=2)
    assert record["ood"] is None and record["histograms"] == {}
    assert all(list(row) == ["error", "nll", "brier", "ece"] for row in record["rows"].values())


def test_a_single_draw_has_no_mutual_information_to_draw(evaluated, tmp_path):
    folder, strange, _ = evaluated
    again = shutil.copytree(folder, tmp_path / "again")
    record = evaluate(str(again), samples=1, ood=strange)
    assert "mutual_information" not in record["histograms"]["ensemble of 1 draws"]
    assert report(again).exists() and (again / PICTURE).exists()


def test_a_net_that_changes_its_input_in_place_is_judged_on_the_data(tmp_path):
    text = "from torch import nn\n"
    for name, change in (("inplace", "x.sub_(0.3).div_(0.4)"), ("outside", "(x - 0.3) / 0.4")):
        text += f"class {name}(nn.Sequential):\n    def forward(self, x):\n        return super().forward({change})\n"
        text += f"def {name}_net():\n    return {name}(nn.Flatten(), nn.Linear(64, 10))\n"
    (tmp_path / "nets.py").write_text(text)
    folders = [compressed(tmp_path / name, net=f"{tmp_path / 'nets.py'}:{name}_net") for name in ("inplace", "outside")]
    records = [json.loads((folder / "run.json").read_text()) for folder in folders]
    for stage in ("trained", "pruned", "compacted"):
        assert records[0][stage]["nll"] == pytest.approx(records[1][stage]["nll"], rel=1e-4)
    assert records[0]["compacted"]["largest_difference"] < 1e-4
    found = [evaluate(folder, samples=3)["rows"] for folder in folders]
    for way in found[0]:
        assert found[0][way]["nll"] == pytest.approx(found[1][way]["nll"], rel=1e-4)


def test_a_record_without_its_parts_is_told_to_be_damaged(evaluated, tmp_path):
    folder, _, _ = evaluated
    again = shutil.copytree(folder, tmp_path / "again")
    whole = json.loads((again / "run.json").read_text())
    parts = ("history", "seed", "pruned", "config")
    without = [{key: value for key, value in whole.items() if key != part} for part in parts]
    for damaged in (*without, {**whole, "config": {}}, {**whole, "config": 5}, []):
        (again / "run.json").write_text(json.dumps(damaged))
        with pytest.raises(StorageError, match="is no record of a run"):
            report(again)


def test_labels_of_sequences_count_one_by_one(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for part in ("train", "test"):
        (folder / f"{part}.txt").write_text("to be or not to be\n" * 60)
    given = {"net": "char-lstm-8", "data": "texts", "data_root": tmp_path}
    run = compressed(tmp_path / "a", **given)
    record = evaluate(run, data_root=tmp_path, samples=2)
    net, data = noisy_net(run, **given)
    assert data.test.y.dim() == 2
    with torch.no_grad():
        logits = net(data.test.x).double()
    wrong = (logits.argmax(1) != data.test.y).sum().item()
    assert record["rows"]["pruned net"]["error"] == pytest.approx(wrong / data.test.y.numel(), abs=1e-12)
    assert sum(record["reliability"]["one draw"]["counts"]) == data.test.y.numel()


def test_what_cannot_be_evaluated_is_refused_before_any_work(evaluated, tmp_path, monkeypatch):
    folder, _, record = evaluated
    with pytest.raises(InvalidValueError, match="samples=0"):
        evaluate(folder, samples=0)
    (tmp_path / "wide.py").write_text(STRANGE.replace("8, 8", "9, 9"))
    with pytest.raises(DataError, match=r"inputs of shape \(1, 9, 9\), but the net takes \(1, 8, 8\)"):
        evaluate(folder, samples=2, ood=f"{tmp_path / 'wide.py'}:noise")
    (tmp_path / "whole.py").write_text(STRANGE.replace("    return", "    x = x.long()\n    return"))
    with pytest.raises(DataError, match=r"inputs of type torch.int64, but the net takes torch.float32"):
        evaluate(folder, samples=2, ood=f"{tmp_path / 'whole.py'}:noise")
    with pytest.raises(DataError, match="there is no folder"):
        evaluate(folder, samples=2, ood="nowhere", data_root=tmp_path)
    for package, extra in (("torchmetrics.functional.classification", "metrics"), ("matplotlib.figure", "report")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, package, None)
            with pytest.raises(MissingExtraError, match=rf"vardrop\[{extra}\]"):
                evaluate(folder, samples=2)
    assert json.loads((folder / EVALUATION).read_text()) == record
