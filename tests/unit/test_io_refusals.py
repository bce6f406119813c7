"""What storage refuses, in which words, and that nothing is lost by it."""

import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import vardrop as vd
from vardrop import files, io
from vardrop.errors import InvalidValueError, StorageError


@pytest.fixture
def stored(tmp_path):
    vd.save(nn.Linear(4, 3), tmp_path / "a")
    return tmp_path / "a"


def build():
    return nn.Linear(4, 3)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def edit(folder, change):
    record = json.loads((folder / io.RECORD).read_text())
    change(record)
    (folder / io.RECORD).write_text(json.dumps(record))


DAMAGES = {
    "no-table": (lambda record: record.pop("layers"), "vardrop.json is damaged: it has no table 'layers'"),
    "no-dict": (lambda record: record.update(methods=[]), "vardrop.json is damaged: it has no table 'methods'"),
    "tie-to-a-list": (lambda record: record["aliases"].update(x=[1]), r"damaged: aliases of 'x' is \[1\]"),
    "layer-in-words": (lambda record: record["layers"].update({"": "x"}), "damaged: layers of '' is 'x'"),
    "shape-a-number": (
        lambda record: record["dense_shapes"].update(weight=3),
        "damaged: dense_shapes of 'weight' is 3",
    ),
    "method-in-words": (lambda record: record["methods"].update({"": "ard"}), "damaged: methods of '' is 'ard'"),
    "no-fields": (lambda record: record["methods"].update({"": {"name": "ard"}}), "damaged: methods of '' is {'name'"),
    "gates-no-dict": (lambda record: record.update(gates=[1]), "damaged: it has no table 'gates'"),
    "gate-no-shape": (lambda record: record.update(gates={"": {}}), "damaged: gates of '' is {}"),
    "strange-layer": (
        lambda record: record["methods"].update({"9": {"name": "ard", "fields": {}}}),
        "holds noise for '9', which the built Linear lacks",
    ),
    "lost-tie": (lambda record: record["aliases"].update(x="y"), "nothing called 'y' is stored to be tied to"),
    "lost-tensor": (lambda record: record["dense_shapes"].update(other=[2]), "lacks the tensor 'other'"),
    "other-shape": (
        lambda record: record["dense_shapes"].update(weight=[4, 3]),
        r"'weight' has shape \[3, 4\], its record says \[4, 3\]",
    ),
    "unknown-method": (
        lambda record: record["methods"].update({"": {"name": "magic", "fields": {}}}),
        "uses the method 'magic'; known are: .*sparse-vd.* and those of one's own whose module is imported",
    ),
    "unknown-field": (
        lambda record: record["methods"].update({"": {"name": "ard", "fields": {"zeal": 1}}}),
        "a method that cannot be made .*zeal",
    ),
    "bad-field": (
        lambda record: record["methods"].update({"": {"name": "gamma-ard", "fields": {"a": 0.1}}}),
        r"a method that cannot be made \(GammaARD\(a=0.1\)",
    ),
    "newer": (lambda record: record.update(format=2), "has format 2, this version reads format 1: update vardrop"),
    "foreign": (lambda record: record.update(format="gguf"), "has format 'gguf', this version reads format 1$"),
}


@pytest.mark.parametrize(("change", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_record_is_named(stored, change, message):
    edit(stored, change)
    with pytest.raises(StorageError, match=message):
        vd.load(stored, build)


def test_damaged_csr_parts_are_named(tmp_path):
    layer = nn.Linear(90, 90, bias=False).requires_grad_(False)
    layer.weight[torch.rand_like(layer.weight) < 0.95] = 0
    vd.save(layer, tmp_path / "a", sparse=True)
    path = tmp_path / "a" / io.TENSORS
    parts = load_file(path)
    parts[f"weight{io.CSR}columns"][0] = 200
    save_file(parts, path)
    with pytest.raises(StorageError, match="'weight' is no CSR matrix"):
        vd.load(tmp_path / "a", lambda: nn.Linear(90, 90, bias=False))
    del parts[f"weight{io.CSR}values"]
    save_file(parts, path)
    with pytest.raises(StorageError, match="lacks the tensor 'weight'"):
        vd.load(tmp_path / "a", lambda: nn.Linear(90, 90, bias=False))


OTHERS = {
    "smaller": (lambda: nn.Linear(3, 3), r"weight: the stored weight has shape \(3, 4\), which is no cut .*\(3, 3\)"),
    "no-bias-stored": (lambda: Biased(), r"extra: stored not at all, built \(2,\)"),
    "more-stored": (lambda: nn.Linear(4, 3, bias=False).apply(_without_weight), r"weight: stored \(3, 4\), built not"),
    "rank": (lambda: nn.Conv1d(4, 3, 1), r"\(model\): stored a Linear, built a Conv1d\n  weight: .*no cut"),
}


class Biased(nn.Linear):
    def __init__(self):
        super().__init__(4, 3)
        self.extra = nn.Parameter(torch.zeros(2))


def _without_weight(layer):
    layer.weight = None


@pytest.mark.parametrize(("other", "message"), OTHERS.values(), ids=OTHERS)
def test_another_architecture_is_told_side_by_side_and_left_alone(stored, other, message):
    net = other()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(StorageError, match=r"another architecture:\n(.*\n)*.*" + message):
        vd.load(stored, lambda: net)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize("kinds", [(nn.ConvTranspose2d, nn.Conv2d), (nn.BatchNorm1d, nn.BatchNorm2d)])
def test_same_shapes_but_another_operation_are_refused(tmp_path, kinds):
    sizes = (4, 4, 3) if kinds[1] is nn.Conv2d else (4,)
    vd.save(kinds[0](*sizes), tmp_path / "a")
    with pytest.raises(StorageError, match=f"stored a {kinds[0].__name__}, built a {kinds[1].__name__}"):
        vd.load(tmp_path / "a", lambda: kinds[1](*sizes))


def test_a_layer_that_is_never_cut_must_have_the_stored_shape(tmp_path):
    vd.save(nn.LayerNorm(4), tmp_path / "a")
    with pytest.raises(StorageError, match=r"bias: the stored bias has shape \(4,\), which is no cut of .*\(8,\)"):
        vd.load(tmp_path / "a", lambda: nn.LayerNorm(8))


def test_a_long_list_of_differences_is_cut_short(tmp_path):
    vd.save(nn.Sequential(*(nn.LayerNorm(4) for _ in range(6))), tmp_path / "a")
    with pytest.raises(StorageError, match=r"(  .*\n){8}  and 4 more$"):
        vd.load(tmp_path / "a", lambda: nn.Sequential(*(nn.LayerNorm(8) for _ in range(6))))


def two(*, tied):
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    if tied:
        net[1].weight = net[0].weight
    return net


def test_ties_must_agree_for_one_value_would_overwrite_the_other(tmp_path):
    vd.save(two(tied=False), tmp_path / "apart")
    vd.save(two(tied=True), tmp_path / "tied")
    with pytest.raises(StorageError, match="1.weight: stored on its own, built tied to 0.weight"):
        vd.load(tmp_path / "apart", lambda: two(tied=True))
    with pytest.raises(StorageError, match="1.weight: stored tied to 0.weight, built on its own"):
        vd.load(tmp_path / "tied", lambda: two(tied=False))


def test_a_state_is_not_saved_in_place_of_a_model(tmp_path):
    with pytest.raises(InvalidValueError, match="model is a OrderedDict: must be a torch.nn.Module, not its state"):
        vd.save(nn.Linear(4, 3).state_dict(), tmp_path / "net")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "wrong", [None, nn.Linear(4, 3), lambda: "net", nn.Linear], ids=["none", "module", "string", "class"]
)
def test_the_builder_must_be_a_function_that_gives_a_module(stored, wrong):
    with pytest.raises(
        InvalidValueError, match="must be a function without arguments that gives the original torch.nn.Module"
    ):
        vd.load(stored, wrong)


def test_the_builder_must_give_the_plain_model(stored):
    with pytest.raises(InvalidValueError, match="gives a converted model; must give the plain one"):
        vd.load(stored, lambda: vd.convert(nn.Linear(4, 3), vd.ARD()))


class Stateful(nn.Linear):
    def get_extra_state(self):
        return {"steps": 3}


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: Stateful(2, 2), r"'_extra_state' .* no dense tensor with values: \{'steps': 3\}"),
        (lambda: nn.LazyLinear(2), "'weight' .* no dense tensor with values: <Uninit"),
        (lambda: nn.Linear(2, 2, device="meta"), "'weight' .* no dense tensor with values"),
    ],
    ids=["extra-state", "lazy", "meta"],
)
def test_what_is_no_dense_tensor_is_refused_before_anything_is_written(tmp_path, model, message):
    with pytest.raises(StorageError, match=message):
        vd.save(model(), tmp_path / "a")
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_is_taken_and_a_file_is_not(tmp_path):
    (tmp_path / "empty").mkdir()
    vd.save(build(), tmp_path / "empty")
    assert vd.load(tmp_path / "empty", build).out_features == 3
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="holds something else: choose an empty or a new folder"):
        vd.save(build(), tmp_path / "file", overwrite=True)
    (tmp_path / "empty" / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match="holds something else"):
        vd.save(build(), tmp_path / "empty", overwrite=True)


@pytest.mark.parametrize("failing", [1, 2], ids=["old-aside", "new-in-place"])
def test_a_rename_that_fails_leaves_the_old_model_in_its_place(stored, monkeypatch, failing):
    before, rename, calls = contents(stored), Path.rename, []

    def fails_once(self, target):
        calls.append(self)
        if len(calls) == failing:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_once)
    with pytest.raises(StorageError, match="Input/output error.*unharmed"):
        vd.save(nn.Linear(9, 9), stored, overwrite=True)
    assert contents(stored) == before
    assert [path.name for path in stored.parent.iterdir()] == ["a"]


def test_a_full_disk_at_the_record_leaves_the_old_model(stored, monkeypatch):
    before = contents(stored)

    def full(self, text):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(StorageError, match="No space left on device"):
        vd.save(nn.Linear(9, 9), stored, overwrite=True)
    assert contents(stored) == before
    assert [path.name for path in stored.parent.iterdir()] == ["a"]


def test_both_files_may_be_read_by_the_same_people(stored):
    modes = {path.stat().st_mode for path in stored.iterdir()}
    assert len(modes) == 1


def test_size_on_disk_counts_bytes_and_needs_a_folder(stored):
    assert files.size_on_disk(stored) == sum(len(content) for content in contents(stored).values())
    with pytest.raises(StorageError, match="is not a folder, so it has no size on disk"):
        files.size_on_disk(stored / "nowhere")


def test_quantised_tensors_are_refused_by_name(tmp_path):
    model = build()
    model.register_buffer("scale", torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8))
    with pytest.raises(StorageError, match="'scale' in the state of the model is no dense tensor"):
        vd.save(model, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_link_to_a_folder_stays_a_link(stored, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(stored, target_is_directory=True)
    model = build()
    vd.save(model, link, overwrite=True)
    assert link.is_symlink() and torch.equal(vd.load(stored, build).weight, model.weight)
