"""Storing and loading: nothing lost, nothing half-written, nothing foreign taken for ours."""

import errno
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import vardrop as vd
from vardrop import files, io
from vardrop.errors import ConversionError, InvalidValueError, StorageError
from vardrop.measure import count_nonzero, count_parameters, flops, latencies


def build():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(6 * 36, 20),
        nn.ReLU(),
        nn.Linear(20, 3),
    )


def compacted():
    net = vd.convert(build(), vd.ARD())
    for site in vd.sites(net):
        site.noise.mask = torch.ones_like(site.weight, dtype=torch.bool)
    net[0].noise.mask[1:4] = False
    net[4].noise.mask[:12] = False
    net[4].noise.mask[:, ::3] = False
    return vd.compact(net, X)


X = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("sparse", [False, True])
def test_a_compacted_model_comes_back_bit_for_bit_without_any_class_of_ours(tmp_path, sparse):
    small = compacted().eval()
    vd.save(small, tmp_path / "small", sparse=sparse)
    loaded = vd.load(tmp_path / "small", build).eval()
    assert loaded[4].out_features == 8
    assert torch.equal(loaded(X), small(X))
    assert all(type(module).__module__.startswith("torch.nn") for module in loaded.modules())
    assert {path.suffix for path in (tmp_path / "small").iterdir()} == {".safetensors", ".json"}


def test_csr_is_taken_only_where_it_is_smaller(tmp_path):
    net = nn.Sequential(nn.Linear(300, 200), nn.Linear(200, 3))
    with torch.no_grad():
        net[0].weight[torch.rand(200, 300) < 0.97] = 0
    vd.save(net, tmp_path / "dense")
    vd.save(net, tmp_path / "sparse", sparse=True)
    assert files.size_on_disk(tmp_path / "sparse") < 0.2 * files.size_on_disk(tmp_path / "dense")
    loaded = vd.load(tmp_path / "sparse", lambda: nn.Sequential(nn.Linear(300, 200), nn.Linear(200, 3)))
    assert all(torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), net.state_dict().values(), strict=True))


def test_a_converted_and_pruned_model_comes_back_with_its_methods(tmp_path):
    net = vd.convert(build(), {"0": vd.SparseVD(threshold=2.0), "*": vd.VBD(train_clip=True)})
    with torch.no_grad():
        net[4].weight[:3] = 1e-6
    vd.prune(net)
    vd.save(net, tmp_path / "noisy")
    loaded = vd.load(tmp_path / "noisy", build)
    assert [site.method for site in vd.sites(loaded)] == [site.method for site in vd.sites(net)]
    assert torch.equal(loaded.eval()(X), net.eval()(X))
    torch.testing.assert_close(vd.kl(loaded), vd.kl(net))


def test_tied_tensors_are_stored_once(tmp_path):
    def tied():
        net = nn.Sequential(nn.Linear(50, 50, bias=False), nn.Linear(50, 50, bias=False))
        net[1].weight = net[0].weight
        return net

    net = tied()
    vd.save(net, tmp_path / "tied")
    assert files.size_on_disk(tmp_path / "tied") < 2 * 4 * 2500
    assert torch.equal(vd.load(tmp_path / "tied", tied)[1].weight, net[0].weight)


def test_an_existing_folder_is_not_overwritten_unasked(tmp_path):
    vd.save(nn.Linear(2, 2), tmp_path / "a")
    with pytest.raises(StorageError, match="a stored model: pass overwrite=True"):
        vd.save(nn.Linear(3, 3), tmp_path / "a")
    vd.save(nn.Linear(3, 3), tmp_path / "a", overwrite=True)
    assert vd.load(tmp_path / "a", lambda: nn.Linear(3, 3)).in_features == 3
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(StorageError, match="holds something else"):
        vd.save(nn.Linear(2, 2), tmp_path / "mine", overwrite=True)


def test_a_full_disk_leaves_the_old_model_and_no_rubbish(tmp_path, monkeypatch):
    vd.save(nn.Linear(2, 2), tmp_path / "a")
    before = (tmp_path / "a" / io.TENSORS).read_bytes()

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(io, "save_file", full)
    with pytest.raises(StorageError, match="No space left on device"):
        vd.save(nn.Linear(3, 3), tmp_path / "a", overwrite=True)
    assert (tmp_path / "a" / io.TENSORS).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_key_pressed_while_folders_change_places_leaves_the_old_model(tmp_path, monkeypatch):
    vd.save(nn.Linear(2, 2), tmp_path / "a")
    rename, calls = Path.rename, []

    def interrupted(path, target):
        calls.append(path)
        done = rename(path, target)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return done

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        vd.save(nn.Linear(3, 3), tmp_path / "a", overwrite=True)
    assert vd.load(tmp_path / "a", lambda: nn.Linear(2, 2)).in_features == 2
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("name", ["a" * 300, "a\0b"])
def test_a_name_that_nothing_can_have_is_refused(tmp_path, name):
    with pytest.raises(StorageError, match="cannot be a path"):
        vd.save(nn.Linear(2, 2), tmp_path / name)
    with pytest.raises(StorageError, match="cannot be a path"):
        files.replace_file(tmp_path / name, Path.touch)


def test_a_link_to_itself_is_refused(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(StorageError, match="cannot be a path"):
        vd.save(nn.Linear(2, 2), tmp_path / "loop")


def test_missing_truncated_and_foreign_folders_are_refused(tmp_path):
    with pytest.raises(StorageError, match=r"vardrop.json does not exist"):
        vd.load(tmp_path, build)
    vd.save(build(), tmp_path / "a")
    with pytest.raises(InvalidValueError, match="must be a function"):
        vd.load(tmp_path / "a", None)
    with pytest.raises(StorageError, match="layer '0'.*the built Linear lacks"):
        vd.load(tmp_path / "a", lambda: nn.Linear(2, 2))
    with pytest.raises(
        StorageError, match=r"stored weight has shape \(6, 1, 3, 3\), which is no cut of the built one, \(6, 1, 5, 5\)"
    ):
        vd.load(tmp_path / "a", lambda: nn.Sequential(nn.Conv2d(1, 6, 5, bias=False), *build()[1:]))
    with pytest.raises(StorageError, match=r"another architecture:\n  7.bias: stored not at all, built \(3,\)"):
        vd.load(tmp_path / "a", lambda: nn.Sequential(*build(), nn.Linear(3, 3)))
    tensors = tmp_path / "a" / io.TENSORS
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:-10])
    with pytest.raises(StorageError, match="truncated or not a safetensors file"):
        vd.load(tmp_path / "a", build)
    tensors.write_bytes(whole)
    record = tmp_path / "a" / io.RECORD
    record.write_text(json.dumps({**json.loads(record.read_text()), "format": 99}))
    with pytest.raises(StorageError, match="has format 99, this version reads format 1"):
        vd.load(tmp_path / "a", build)
    record.write_text("[]")
    with pytest.raises(StorageError, match=r"is not a record of vardrop.save"):
        vd.load(tmp_path / "a", build)


def test_onnx_gives_the_same_outputs_at_every_batch_size(tmp_path, capfd):
    onnxruntime = pytest.importorskip("onnxruntime")
    small = compacted().eval()
    vd.export_onnx(small, tmp_path / "small.onnx", example_inputs=X)
    runner = onnxruntime.InferenceSession(str(tmp_path / "small.onnx"))
    for batch in (1, 5):
        found = runner.run(None, {runner.get_inputs()[0].name: X[:batch].numpy()})[0]
        torch.testing.assert_close(torch.as_tensor(found), small(X[:batch]), rtol=1e-4, atol=1e-5)
    assert not capfd.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["small.onnx"]


def test_onnx_of_a_converted_model_is_its_pruned_network_and_noise_is_refused(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    net = vd.convert(build(), vd.ARD()).train()
    vd.prune(net, threshold=0.05)
    vd.export_onnx(net, tmp_path / "net.onnx", example_inputs=X[:1])
    assert net.training
    runner = onnxruntime.InferenceSession(str(tmp_path / "net.onnx"))
    found = torch.as_tensor(runner.run(None, {runner.get_inputs()[0].name: X.numpy()})[0])
    torch.testing.assert_close(found, net.eval()(X), rtol=1e-4, atol=1e-5)
    vd.noise(net, on=True)
    with pytest.raises(ConversionError, match="noise of the model is switched on"):
        vd.export_onnx(net, tmp_path / "other.onnx", example_inputs=X)


def test_summary_shows_what_is_alive_and_what_all_weighs():
    net = vd.convert(nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), vd.ARD())
    vd.prune(net, threshold=0.3)
    shown = vd.summary(net, example_inputs=torch.randn(2, 6))
    assert [row.total for row in shown.rows] == [30, 15]
    assert shown.rows[0].alive == int((net[0].weight.abs() >= 0.3).sum())
    assert shown.compression == 45 / sum(row.alive for row in shown.rows)
    assert shown.flops == 2 * 2 * 45 and shown.parameters == 53 and shown.tensor_bytes == 4 * 53 + 0
    assert sum(row.kl for row in shown.rows) == pytest.approx(vd.kl(net).item(), rel=1e-5)
    text = str(shown)
    assert "KL, nats" in text and "compression" in text and "Linear" in text
    plain = vd.summary(vd.strip(net))
    assert plain.rows[0].alive == shown.rows[0].alive and plain.rows[0].kl is None
    assert count_nonzero(net) == sum(row.alive for row in shown.rows) + 8 and count_parameters(net) == 53


def test_measuring_leaves_the_model_as_it_was():
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout()).train()
    threads = torch.get_num_threads()
    assert flops(net, torch.randn(3, 4)) == 2 * 3 * 16
    assert net.training
    found = latencies({"net": net, "function": lambda: None}, torch.randn(1, 4), repeats=5)
    assert found["net"] > found["function"] >= 0
    assert torch.get_num_threads() == threads
    with pytest.raises(InvalidValueError, match="repeats=0"):
        latencies({}, repeats=0)
    with pytest.raises(InvalidValueError, match="needs example inputs"):
        latencies({"net": net})
