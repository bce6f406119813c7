"""Networks and data by name, one's own, and everything that is refused before any training."""

import re
import shutil
import textwrap
from unittest.mock import Mock

import numpy
import pytest
import torch
from torch import nn

from vardrop.errors import DataError, InvalidValueError
from vardrop.zoo import NETS, Batches, Split, build_net, check_fits, load_data, load_inputs, validation_split
from vardrop.zoo import data as zoo_data


def weights(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters() if p.dim() > 1)


@pytest.mark.parametrize(
    ("name", "shape", "count"),
    [
        ("lenet-300-100", (1, 28, 28), 266_200),
        ("lenet-500-300", (1, 28, 28), 545_000),
        ("lenet-5", (1, 28, 28), 430_500),
        ("mlp-340", (1, 28, 28), 784 * 340 + 2 * 340**2 + 3400),
        ("conv-small-1.5", (3, 32, 32), 3 * 9 * 48 + 48 * 9 * 96 + 96 * 64 * 192 + 192 * 192 + 1920),
        ("vgg-like", (3, 32, 32), 14_977_728),
    ],
)
def test_networks_have_the_weights_of_the_papers(name, shape, count):
    net = build_net(name, input_shape=shape, num_classes=10)
    assert weights(net) == count
    assert net.eval()(torch.zeros(2, *shape)).shape == (2, 10)


def test_every_net_has_a_line_of_help():
    assert all(builder.__doc__ for builder in NETS.values())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("lenet-300-10", "net 'lenet-300-10' is unknown; did you mean 'lenet-300-100'"),
        ("mlp", "mlp takes a width such as mlp-340"),
        ("mlp-wide", "'mlp-wide': mlp takes a width"),
        ("conv-small--1", "takes a scale"),
        ("vgg-like-0", "takes a factor on its widths"),
        ("mlp-0.5", "takes a width such as mlp-340, a whole number"),
        ("qqqq", r"net 'qqqq' is unknown\. Known are: lenet-300-100"),
        ("nowhere.py:net", "there is no file nowhere.py"),
    ],
)
def test_unknown_nets_are_refused(spec, message):
    with pytest.raises(InvalidValueError, match=message):
        build_net(spec, input_shape=(1, 28, 28), num_classes=10)


def test_no_layer_is_too_narrow_to_be_one():
    net = build_net("conv-small-0.01", input_shape=(1, 28, 28), num_classes=10)
    assert net[0].out_channels == net[2].out_channels == net[5].out_features == 1


def test_small_images_do_not_fit_lenet_5():
    with pytest.raises(DataError, match="at least 16 pixels, not 8"):
        build_net("lenet-5", input_shape=(1, 8, 8), num_classes=10)


def test_digits_are_stratified_and_scaled():
    data = load_data("digits")
    assert data.input_shape == (1, 8, 8) and data.num_classes == 10
    assert (len(data.train.y), len(data.test.y)) == (1437, 360)
    assert data.train.x.min() == 0 and data.train.x.max() == 1
    assert data.test.y.bincount().tolist() == [36, 36, 35, 37, 36, 37, 36, 36, 35, 36]


def test_random_labels_are_a_lot_that_falls_the_same_each_time():
    digits, by_lot, again = (load_data(name) for name in ("digits", *["digits:random-labels"] * 2))
    assert torch.equal(by_lot.train.x, digits.train.x)
    assert torch.equal(by_lot.train.y, again.train.y)
    assert by_lot.num_classes == 10
    agreeing = (by_lot.train.y == digits.train.y).float().mean()
    assert abs(agreeing - 0.1) < 4 * (0.09 / len(digits.train.y)) ** 0.5


def write_own(
    path, train_x="torch.rand(6, 4)", train_y="[0, 1, 2, 0, 1, 2]", test_x="torch.rand(3, 4)", test_y="[0, 1, 2]"
):
    path.write_text(
        textwrap.dedent(f"""
        from __future__ import annotations
        import dataclasses, torch
        @dataclasses.dataclass
        class Sizes:
            hidden: int = 5
        def data():
            return ({train_x}, torch.tensor({train_y})), ({test_x}, torch.tensor({test_y}))
        def net(input_shape, num_classes):
            return torch.nn.Linear(input_shape[0], num_classes)
        def narrow():
            return torch.nn.Linear(3, 3)
        def odd():
            return torch.nn.Linear(4, 7)
        class Named(torch.nn.Linear):
            def forward(self, x):
                return {{"logits": super().forward(x)}}
        def named():
            return Named(4, 3)
        def two():
            return torch.nn.Bilinear(4, 4, 3)
        def none():
            return None
        def broken():
            raise KeyError("x")
        """)
    )
    return str(path)


def test_ones_own_net_and_data(tmp_path):
    file = write_own(tmp_path / "mine.py")
    data = load_data(f"{file}:data")
    net = build_net(f"{file}:net", input_shape=data.input_shape, num_classes=data.num_classes)
    check_fits("mine", net, data)
    assert (net.in_features, net.out_features) == (4, 3)


def test_ones_own_data_are_the_same_whenever_they_are_read(tmp_path):
    file = write_own(tmp_path / "mine.py")
    first = load_data(f"{file}:data")
    torch.randn(3)
    assert torch.equal(load_data(f"{file}:data").test.x, first.test.x)


def test_ones_own_mistakes_are_named(tmp_path):
    file = write_own(tmp_path / "mine.py")
    data = load_data(f"{file}:data")

    def build(name):
        return build_net(f"{file}:{name}", input_shape=(4,), num_classes=3)

    with pytest.raises(DataError, match=r"shape \(4,\), which do not fit the net 'narrow'"):
        check_fits("narrow", build("narrow"), data)
    with pytest.raises(DataError, match=r"outputs of shape \(1, 7\).*must be \(1, 3\)"):
        check_fits("odd", build("odd"), data)
    with pytest.raises(DataError, match=r"'named' gives a dict: must give a tensor of logits, of shape \(1, 3\)"):
        check_fits("named", build("named"), data)
    with pytest.raises(DataError, match="do not fit the net 'two': .* missing 1 required positional argument"):
        check_fits("two", build("two"), data)
    with pytest.raises(InvalidValueError, match="gave a NoneType"):
        build("none")
    with pytest.raises(InvalidValueError, match="raised KeyError"):
        build("broken")
    with pytest.raises(InvalidValueError, match="no function 'absent'; it has: data, net"):
        build("absent")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"train_x": "torch.full((6, 4), float('nan'))"}, "training data.*example 0 holds NaN"),
        ({"test_y": "[0, 1, 5]"}, "test data.*label 5 of example 2 is out of range; labels must lie in 0 to 2"),
        ({"train_y": "[0, -1, 2, 0, 1, 2]"}, "label -1 of example 1"),
        ({"train_y": "[0, 1, 2, 0, 1.5, 2]"}, "returned a label 1.5: labels must be whole numbers"),
        ({"train_x": "torch.rand(5, 4)"}, "5 inputs, but 6 labels"),
        ({"train_x": "torch.rand(6)"}, r"inputs of shape \(6,\): must be an example a row"),
        ({"train_x": "[['a'] * 4] * 6"}, "returned inputs that are no array of numbers, but list"),
        ({"train_x": "{0: 1}"}, "returned inputs that are no array of numbers, but dict"),
        ({"test_x": "torch.rand(3, 9)"}, r"inputs of shape \(9,\)"),
        ({"train_x": "torch.rand(0, 4)", "train_y": "[]"}, "there are no examples"),
        ({"train_y": "[0] * 6", "test_y": "[0] * 3"}, "nothing to tell apart"),
    ],
)
def test_bad_data_is_refused(tmp_path, changed, message):
    with pytest.raises(DataError, match=message):
        load_data(f"{write_own(tmp_path / 'mine.py', **changed)}:data")


def write_hub_folder(root, columns=("image", "label"), splits=("train", "test")):
    datasets = pytest.importorskip("datasets")
    from PIL import Image

    images = [Image.fromarray(numpy.full((4, 5), 50 * index, dtype=numpy.uint8)) for index in range(4)]
    for split in splits:
        table = datasets.Dataset.from_dict({columns[0]: images, columns[1]: [0, 1, 0, 1]})
        table = table.cast_column(columns[0], datasets.Image())
        (root / "some" / "set").mkdir(parents=True, exist_ok=True)
        table.to_parquet(root / "some" / "set" / f"{split}-00000-of-00001.parquet")


@pytest.fixture
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.usefixtures("_own_cache")
def test_a_local_folder_of_the_hub_layout_also_from_the_cache(tmp_path, monkeypatch):
    write_hub_folder(tmp_path)
    for again in (False, True):
        if again:
            monkeypatch.setattr(zoo_data, "_pixels", Mock(side_effect=AssertionError("the images are decoded again")))
        data = load_data("some/set", data_root=tmp_path)
        assert data.input_shape == (1, 4, 5)
        assert torch.allclose(data.train.x[2], torch.full((1, 4, 5), 100 / 255))
        assert data.test.y.tolist() == [0, 1, 0, 1]
    assert len(list((tmp_path / "cache" / "vardrop").iterdir())) in (1, 2)


@pytest.mark.usefixtures("_own_cache")
def test_folders_that_are_missing_or_of_another_layout_are_refused(tmp_path):
    with pytest.raises(DataError, match="there is no folder .*nothing/here"):
        load_data("nothing/here", data_root=tmp_path)
    write_hub_folder(tmp_path / "a", columns=("picture", "kind"))
    with pytest.raises(DataError, match="has the columns picture, kind: must have an image column"):
        load_data("some/set", data_root=tmp_path / "a")
    write_hub_folder(tmp_path / "b", splits=("train",))
    with pytest.raises(DataError, match="has the splits train: must have train and test"):
        load_data("some/set", data_root=tmp_path / "b")
    (tmp_path / "c" / "x").mkdir(parents=True)
    with pytest.raises(DataError, match="'x' could not be read from"):
        load_data("x", data_root=tmp_path / "c")


@pytest.mark.usefixtures("_own_cache")
def test_strange_inputs_need_no_training_split_and_may_lie_in_any_folder(tmp_path):
    write_hub_folder(tmp_path, splits=("test",))
    by_name = load_inputs("some/set", input_shape=(1, 4, 5), data_root=tmp_path)
    assert torch.allclose(by_name[2], torch.full((1, 4, 5), 100 / 255)) and len(by_name) == 4
    folder = str(tmp_path / "some" / "set")
    for root in (None, tmp_path / "elsewhere"):
        assert torch.equal(load_inputs(folder, input_shape=(1, 4, 5), data_root=root), by_name)
    with pytest.raises(DataError, match=r"inputs of shape \(1, 4, 5\), but the net takes \(1, 8, 8\)"):
        load_inputs("some/set", input_shape=(1, 8, 8), data_root=tmp_path)
    shutil.copytree(tmp_path / "some" / "set", tmp_path / "c")
    table = pytest.importorskip("datasets").load_dataset(str(tmp_path / "c"))["test"].remove_columns("label")
    table.to_parquet(next((tmp_path / "c").glob("test*")))
    assert torch.equal(load_inputs(str(tmp_path / "c"), input_shape=(1, 4, 5)), by_name)
    write_hub_folder(tmp_path / "b", splits=("train",))
    with pytest.raises(DataError, match="has the splits train: must have test"):
        load_inputs("some/set", input_shape=(1, 4, 5), data_root=tmp_path / "b")


def test_the_order_of_batches_follows_from_seed_and_epoch_alone():
    split = Split(torch.arange(10.0), torch.arange(10))
    batches = Batches(split, 4, seed=3)
    batches.set_epoch(5)
    first = [y.tolist() for _, y in batches]
    assert [len(part) for part in first] == [4, 4, 2] and len(batches) == 3
    assert sorted(index for part in first for index in part) == list(range(10))
    torch.randn(3)
    again = Batches(split, 4, seed=3)
    again.set_epoch(5)
    assert [y.tolist() for _, y in again] == first
    again.set_epoch(6)
    assert [y.tolist() for _, y in again] != first


@pytest.mark.parametrize(("count", "size", "sizes"), [(9, 4, [4, 5]), (3, 1, [1, 1, 1]), (1, 4, [1]), (8, 4, [4, 4])])
def test_no_example_is_left_alone_at_the_end_of_an_epoch(count, size, sizes):
    batches = Batches(Split(torch.arange(float(count)), torch.arange(count)), size, seed=0)
    assert [len(y) for _, y in batches] == sizes and len(batches) == len(sizes)


def test_each_of_several_processes_has_two_examples_of_every_minibatch():
    batches = Batches(Split(torch.arange(50.0), torch.arange(50)), 15, seed=0)
    batches.share(3)
    assert [len(y) for _, y in batches] == [15, 15, 20]


def test_all_examples_stay_on_the_device_where_they_find_room():
    batches = Batches(Split(torch.arange(10.0), torch.arange(10)), 4, seed=3)
    batches.to(torch.device("meta"))
    assert {part.device.type for batch in batches for part in batch} == {"meta"}

    class TooLarge(torch.Tensor):
        def to(self, *args, **kwargs):
            raise torch.OutOfMemoryError("no room")

    large = Split(torch.arange(10.0).as_subclass(TooLarge), torch.arange(10))
    batches = Batches(large, 4, seed=3)
    batches.to(torch.device("meta"))
    assert batches.split is large


def test_a_validation_split_takes_examples_away_from_training():
    split = Split(torch.arange(10.0), torch.arange(10))
    rest, apart = validation_split(split, 3, seed=0)
    assert len(apart.y) == 3
    assert sorted(rest.y.tolist() + apart.y.tolist()) == list(range(10))
    assert validation_split(split, 3, seed=0)[1].y.tolist() == apart.y.tolist()
    with pytest.raises(InvalidValueError, match="validation=10: must lie in 1 to 9"):
        validation_split(split, 10, seed=0)


def text_folder(tmp_path, train, test, **others):
    folder = tmp_path / "texts"
    folder.mkdir(exist_ok=True)
    for part, lines in {"train": train, "test": test, **others}.items():
        (folder / f"{part}.txt").write_text("\n".join(lines))
    return load_data("texts", data_root=tmp_path)


def test_running_text_is_cut_into_stretches_with_the_next_character_as_label(tmp_path):
    data = text_folder(tmp_path, ["abc"] * 60, ["cab"] * 30)
    assert data.train.x.shape == data.train.y.shape == (2, 100) and data.num_classes == 4
    assert data.train.x[0, :5].tolist() == [1, 2, 3, 0, 1] and data.train.y[0, :5].tolist() == [2, 3, 0, 1, 2]
    assert data.train.x[1, 0] == data.train.y[0, -1], "the stretches follow on one another"


def test_examples_that_the_data_set_itself_sets_apart_are_read(tmp_path):
    data = text_folder(tmp_path, ["abc"] * 60, ["cab"] * 30, validation=["bca"] * 90)
    assert [len(split.y) for split in (data.train, data.test, data.validation)] == [2, 1, 3]
    assert data.validation.x[0, :4].tolist() == [2, 3, 1, 0]
    lot = load_data("texts:random-labels", data_root=tmp_path)
    assert lot.validation.y.shape == data.validation.y.shape and not torch.equal(lot.validation.y, data.validation.y)
    with pytest.raises(DataError, match="validation text of 'texts' holds 'x'"):
        text_folder(tmp_path, ["abc"] * 60, ["cab"] * 30, validation=["xyz"] * 90)


def test_characters_set_apart_by_blanks_are_read_without_the_blanks(tmp_path):
    data = text_folder(tmp_path, ["a b _ c"] * 60, ["c _ a"] * 60)
    assert data.num_classes == 5 and data.train.x[0, :6].tolist() == [2, 3, 1, 4, 0, 2]


@pytest.mark.parametrize(
    ("test", "words"),
    [(["xyz"] * 60, "test text of 'texts' holds 'x'"), (["ab"], "3 characters; must be at least 101")],
)
def test_text_that_cannot_be_predicted_is_refused(tmp_path, test, words):
    with pytest.raises(DataError, match=re.escape(words)):
        text_folder(tmp_path, ["abc"] * 60, test)


def test_sentences_become_ids_by_frequency_filled_up_on_the_left(tmp_path):
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "mine"
    folder.mkdir()
    for part in ("train", "test"):
        texts = ["good film", "Bad bad film"] if part == "train" else ["a film"]
        table = datasets.Dataset.from_dict({"text": texts, "label": list(range(len(texts)))})
        table.to_parquet(folder / f"{part}.parquet")
    data = load_data("mine", data_root=tmp_path)
    assert data.train.x.tolist() == [[0, 4, 3], [2, 2, 3]] and data.test.x.tolist() == [[0, 1, 3]]
    assert data.train.y.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("texts", "labels", "message"),
    [
        (["a", "b"], ["pos", "neg"], "example 0 has the label 'pos': must be a whole number"),
        (["a", "b"], [0.0, 0.7], "example 0 has the label 0.0: must be a whole number"),
        (["a", "b"], [0, None], "example 1 has the label None: must be a whole number"),
        (["a", None], [0, 1], "training data of 'mine': example 1 has no text"),
    ],
)
def test_sentences_without_text_or_class_are_refused(tmp_path, texts, labels, message):
    datasets = pytest.importorskip("datasets")
    (tmp_path / "mine").mkdir()
    for part in ("train", "test"):
        datasets.Dataset.from_dict({"text": texts, "label": labels}).to_parquet(tmp_path / "mine" / f"{part}.parquet")
    with pytest.raises(DataError, match=message):
        load_data("mine", data_root=tmp_path)


@pytest.mark.usefixtures("_own_cache")
def test_images_with_a_palette_are_read_in_colour(tmp_path):
    image = pytest.importorskip("PIL.Image")
    colours = numpy.random.default_rng(0).integers(0, 4, (8, 8, 3), dtype=numpy.uint8) * 80
    for part in ("train", "test"):
        for kind in ("cat", "dog"):
            folder = tmp_path / "mine" / part / kind
            folder.mkdir(parents=True)
            image.fromarray(colours).quantize(64).save(folder / "one.png")
    x = load_data("mine", data_root=tmp_path).train.x
    assert x.shape == (2, 3, 8, 8)
    torch.testing.assert_close(x[0], torch.as_tensor(colours).permute(2, 0, 1) / 255.0, rtol=0.0, atol=0.02)


def test_nets_for_text_give_a_logit_for_each_class(tmp_path):
    data = text_folder(tmp_path, ["abc"] * 60, ["cab"] * 30)
    net = build_net("char-lstm-8", input_shape=data.input_shape, num_classes=data.num_classes)
    check_fits("char-lstm-8", net, data)
    assert net(data.train.x).shape == (2, 4, 100)
    with pytest.raises(DataError, match=re.escape("must be (1, 4, 100)")):
        check_fits("word-lstm-8", build_net("word-lstm-8", input_shape=(100,), num_classes=4), data)
    with pytest.raises(InvalidValueError, match="char-lstm takes a number of units such as char-lstm-256"):
        build_net("char-lstm-x", input_shape=(100,), num_classes=4)


def test_lenet_5_has_a_form_with_batch_norm_behind_every_layer_but_the_last():
    net = build_net("lenet-5-bn", input_shape=(1, 28, 28), num_classes=10)
    kinds = [type(layer).__name__ for layer in net]
    assert [kinds[place + 1] for place, kind in enumerate(kinds[:-1]) if kind in ("Conv2d", "Linear")] == [
        "BatchNorm2d",
        "BatchNorm2d",
        "BatchNorm1d",
    ]
    assert kinds[-1] == "Linear" and weights(net) == 430_500


def test_a_net_of_ones_own_that_is_no_function_is_named(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from torch import nn\nnet = nn.Linear(64, 10)\n")
    with pytest.raises(InvalidValueError, match=r"mine.py:net' is a Linear: must be a function that gives one"):
        build_net(f"{file}:net", input_shape=(64,), num_classes=10)
