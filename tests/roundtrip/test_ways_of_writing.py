"""Networks written in many ways: shared layers, functions, several inputs, parts, readers of everything."""

from copy import deepcopy

import pytest
import torch
from exactness import TwoLayers, check, ignore, kill, parameters, randomised
from torch import nn
from torch.nn import functional as F

import vardrop as vd
from vardrop.errors import CompactionWarning, GraphError, InvalidValueError


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.twice, self.out = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x):
        return self.out(F.relu(self.twice(F.relu(self.twice(F.relu(self.inner(x)))))))


def test_a_layer_called_twice_is_kept_and_the_plan_says_so():
    model = Shared()
    kill(model.inner, [0])
    kill(model.twice, [1])
    done, small = check(model, torch.randn(2, 4))
    assert parameters(small) == parameters(model)
    assert done.notes == ("twice is kept as it is: twice.weight is used 2 times",)
    assert "twice is kept as it is" in str(done)
    with pytest.warns(CompactionWarning, match="no unit could be taken out: twice is kept as it is: .*dry_run=True"):
        vd.compact(model, torch.randn(2, 4))


def test_a_model_is_taken_out_of_its_wrappers():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
    kill(model[0], [0, 1])
    averaged = torch.optim.swa_utils.AveragedModel(model)
    for wrapped in (nn.DataParallel(model), torch.compile(model, backend="eager"), nn.DataParallel(averaged)):
        small = vd.compact(wrapped, torch.randn(2, 4))
        assert type(small) is nn.Sequential and small[0].out_features == 3


def test_what_a_forward_refuses_is_told_in_one_line():
    class Strict(nn.Module):
        def forward(self, x):
            raise AssertionError

    with pytest.raises(GraphError, match=r"Strict does not run on inputs of shape \(2, 4\): AssertionError"):
        vd.compact(Strict(), torch.randn(2, 4))
    with pytest.raises(GraphError, match=r"Linear does not run on inputs of shape dict"):
        vd.compact(nn.Linear(4, 2), {"x": torch.randn(2, 4)})


def test_a_list_is_one_argument():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, parts):
            return self.layer(parts[0] + parts[1])

    inputs = [torch.randn(2, 4), torch.randn(2, 4)]
    assert vd.compact(Sum(), inputs)(inputs).shape == (2, 2)
    assert vd.summary(Sum(), example_inputs=inputs).flops == 32


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.middle, self.decoder = nn.Linear(6, 6), nn.Linear(6, 5), nn.Linear(5, 6)
        self.out = nn.Linear(6, 6)
        self.out.weight = self.encoder.weight

    def forward(self, x):
        return self.out(F.relu(self.decoder(F.relu(self.middle(F.relu(self.encoder(x)))))))


def test_tied_weights_stay_tied_and_what_lies_between_is_cut():
    model = Tied()
    kill(model.encoder, [0])
    kill(model.middle, [1, 2])
    done, small = check(model, torch.randn(2, 6))
    assert small.out.weight is small.encoder.weight
    assert small.middle.out_features == 3
    assert small.decoder.out_features == 6
    assert done.notes == ("out is kept as it is: encoder.weight and out.weight are one parameter",)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(4, 6), nn.Linear(6, 6, bias=False), nn.Linear(6, 5)
        self.raw = nn.Parameter(torch.randn(3, 5))
        self.gain = nn.Parameter(torch.rand(6) + 0.5)
        self.register_buffer("shift", torch.randn(6))

    def forward(self, x):
        x = torch.sigmoid(F.linear(x, self.fc1.weight, self.fc1.bias)) * self.gain + self.shift
        x = torch.sigmoid(F.linear(x, self.fc2.weight))
        return F.linear(torch.sigmoid(self.fc3(x)), self.raw)


def test_layers_used_as_functions_and_parameters_of_ones_own():
    model = Functional()
    ignore(model.fc2, [0, 1])
    ignore(model.fc3, [3])
    kill(model.fc2, [4])
    with torch.no_grad():
        model.raw[:, 2] = 0
    _, small = check(model, torch.randn(2, 4))
    assert (small.fc1.out_features, small.fc2.in_features) == (4, 4)
    assert small.gain.shape == small.shift.shape == (4,)
    assert isinstance(small.gain, nn.Parameter) and not isinstance(small.shift, nn.Parameter)
    assert (small.fc2.out_features, small.fc3.in_features) == (4, 4)
    assert small.raw.shape == (3, 4)


def test_a_function_without_bias_cannot_take_a_constant():
    model = Functional()
    kill(model.fc1, [0])
    done, small = check(model, torch.randn(2, 4))
    assert small.fc1.out_features == 6
    assert done["fc1"].kept == (("fc2 cannot fold it: there is no bias to take it", 1),)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Conv2d(1, 5, 3), nn.Linear(4, 6)
        self.table = nn.Embedding(10, 3)
        self.join, self.out = nn.Linear(5 + 6 + 3, 7), nn.Linear(7, 2)

    def forward(self, image, text, token):
        image = F.relu(self.image(image)).amax((2, 3))
        joined = torch.cat([image, F.relu(self.text(text)), self.table(token)], 1)
        hidden = F.relu(self.join(joined))
        return {"scores": (self.out(hidden), hidden[:, :1]), "joined": joined.sum(1)}


class ThreeOut(TwoInputs):
    def forward(self, image, text, token):
        image = F.relu(self.image(image)).amax((2, 3))
        hidden = F.relu(self.join(torch.cat([image, F.relu(self.text(text)), self.table(token)], 1)))
        return {"scores": self.out(hidden), "first": (image.mean(), hidden * 2)}


def test_several_inputs_and_nested_outputs():
    inputs = (torch.randn(3, 1, 5, 5), torch.randn(3, 4), torch.tensor([1, 2, 9]))
    model = ThreeOut()
    kill(model.image, [0])
    ignore(model.join, [6, 7])
    kill(model.join, [1])
    _, small = check(model, inputs, batches=(3,))
    assert (small.image.out_channels, small.text.out_features, small.join.out_features) == (5, 4, 7)
    assert small.join.in_features == 12
    whole = TwoInputs()
    whole.load_state_dict(model.state_dict())
    _, small = check(whole, inputs, batches=(3,))
    assert parameters(small) == parameters(whole)


class Chunked(nn.Module):
    def __init__(self, split):
        super().__init__()
        self.inner, self.left, self.right = nn.Linear(3, 8), nn.Linear(4, 2), nn.Linear(4, 2)
        self.split = split

    def forward(self, x):
        left, right = self.split(torch.sigmoid(self.inner(x)))
        return self.left(left) + self.right(right)


def test_chunks_stay_equal_and_other_splits_stay_whole():
    model = Chunked(lambda x: x.chunk(2, dim=1))
    ignore(model.left, [0, 1])
    ignore(model.right, [3])
    _, small = check(model, torch.randn(2, 3))
    assert (small.inner.out_features, small.left.in_features, small.right.in_features) == (6, 3, 3)
    for split in (lambda x: x.split(4, 1), lambda x: (x[:, :4], x[:, 4:])):
        model.split = split
        assert check(model, torch.randn(2, 3))[1].inner.out_features == 8


def test_a_gated_linear_unit():
    model = nn.Sequential(nn.Linear(3, 8), nn.GLU(), nn.Linear(4, 2))
    ignore(model[2], [1])
    kill(model[0], [3, 7])
    done, small = check(model, torch.randn(2, 3))
    assert (small[0].out_features, small[2].in_features) == (4, 2)
    assert done["2"].folded == 1


BARRIERS = {
    "layer norm": nn.LayerNorm(6),
    "group norm": nn.GroupNorm(2, 6),
    "softmax": nn.Softmax(1),
    "attention": nn.TransformerEncoderLayer(6, 2, 8, batch_first=True),
    "pixel shuffle": nn.Sequential(nn.Unflatten(1, (6, 1, 1)), nn.ChannelShuffle(2), nn.Flatten()),
}


class Barred(nn.Module):
    def __init__(self, bar):
        super().__init__()
        self.before, self.inner, self.bar, self.out = nn.Linear(3, 5), nn.Linear(5, 6), bar, nn.Linear(6, 2)

    def forward(self, x):
        x = self.bar(self.inner(F.relu(self.before(x))))
        return self.out(x[0] if isinstance(x, tuple) else x)


@pytest.mark.parametrize("bar", BARRIERS.values(), ids=BARRIERS.keys())
def test_layers_that_read_all_units_at_once_keep_them(bar):
    model = randomised(Barred(deepcopy(bar)))
    kill(model.before, [0, 1])
    kill(model.inner, [2])
    done, small = check(model, torch.randn(4, 3), batches=(4,))
    assert (small.before.out_features, small.inner.out_features, small.out.in_features) == (3, 6, 6)
    assert any(count == 1 for _, count in done["inner"].kept)


def test_the_feed_forward_of_an_encoder_layer_is_cut_and_the_fast_path_agrees():
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    kill(model.linear1, [0, 3, 5])
    _, small = check(model, torch.randn(2, 5, 8))
    assert (small.linear1.out_features, small.linear2.in_features) == (13, 13)
    assert small.self_attn.in_proj_weight.shape == (24, 8)


def test_positions_and_units_do_not_mix():
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.along, self.out = nn.Conv1d(2, 4, 1), nn.Linear(5, 6), nn.Conv1d(4, 3, 1)

        def forward(self, x):
            return self.out(F.relu(self.along(F.relu(self.conv(x)))))

    model = Mixer()
    kill(model.conv, [0])
    done, small = check(model, torch.randn(2, 2, 5))
    assert parameters(small) == parameters(model)
    assert done["conv"].kept[0][1] <= 1


def test_a_gain_over_positions_is_not_a_gain_over_units():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.out = nn.Linear(3, 4), nn.Linear(4, 2)
            self.position = nn.Parameter(torch.randn(1, 5, 4))
            self.scale = nn.Parameter(torch.randn(5, 1))

        def forward(self, x):
            return self.out(torch.tanh(self.inner(x) + self.position) * self.scale)

    model = Positions()
    kill(model.inner, [0])
    ignore(model.out, [1])
    _, small = check(model, torch.randn(2, 5, 3))
    assert small.inner.out_features == 3
    assert small.position.shape == (1, 5, 3)
    assert small.scale.shape == (5, 1)


def test_a_layer_known_under_two_names_is_cut_once():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.out = nn.Linear(3, 6), nn.Linear(6, 2, bias=False)
            self.all = nn.Sequential(self.inner, nn.Sigmoid(), self.out)

        def forward(self, x):
            return self.all(x)

    model = Listed()
    kill(model.inner, [0])
    _, small = check(model, torch.randn(2, 3))
    assert small.inner is small.all[0]
    assert (small.inner.out_features, small.out.in_features) == (5, 5)
    assert small.out.bias is not None


class Counting(TwoLayers):
    """Its passes leave traces: a running mean of what it saw, in eval mode too, and the last output."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        self.mean += (x.mean(0) - self.mean) / self.seen
        self.last = self.second(self.first(x - self.mean).sigmoid())
        return self.last


def test_what_a_pass_leaves_behind_is_not_in_the_small_net():
    model = vd.convert(Counting(), vd.ARD()).eval()
    with torch.no_grad():
        model.first.weight[:3] = 0.0
    vd.prune(model)
    small = vd.compact(model, torch.randn(5, 4))
    assert small.first.out_features == 3 and small.seen == model.seen == 0 and not hasattr(small, "last")
    x = torch.randn(2, 4)
    torch.testing.assert_close(small(x), model(x))


class Scaled(TwoLayers):
    """Multiplies by a number that it reads from a tensor."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x):
        return self.second(self.first(x).sigmoid() * self.scale.item())


def test_a_number_read_from_a_tensor_may_multiply_units():
    model = Scaled()
    ignore(model.second, [0, 1])
    _, small = check(model, torch.randn(3, 4))
    assert small.first.out_features == 4


class Collecting(TwoLayers):
    """Begins with an empty tensor, which torch passes over."""

    def forward(self, x):
        return self.second(torch.cat([torch.tensor([]).to(x), self.first(x).relu()], 1))


def test_an_empty_tensor_joins_without_a_trace():
    model = Collecting()
    kill(model.first, [0, 1])
    _, small = check(model, torch.randn(3, 4))
    assert small.first.out_features == 4


class Narrow(nn.Module):
    """Computes in bfloat16 inside and gives float32."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(16, 64).bfloat16(), nn.Linear(64, 64).bfloat16()
        self.third = nn.Linear(64, 3)

    def forward(self, x):
        return self.third(self.second(self.first(x.bfloat16()).sigmoid()).sigmoid().float())


def test_a_net_of_several_types_is_held_to_the_rounding_of_its_coarsest():
    torch.manual_seed(0)
    model = Narrow().requires_grad_(False)
    model.first.weight[:30] = 0
    x = torch.randn(4, 16)
    small = vd.compact(model, x)
    assert small.first.out_features == 34
    torch.testing.assert_close(small(x), model(x), rtol=0.0, atol=1e-2)


class Autocast(TwoLayers):
    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.second(self.first(x).sigmoid())


def test_a_part_that_cannot_be_looked_into_is_refused_also_around_the_first_layer():
    model = Autocast()
    kill(model.first, [0, 1])
    with pytest.raises(GraphError, match="no rule for the operation 'wrap_with_autocast'"):
        vd.compact(model, torch.randn(3, 4))
    plan = vd.compact(model, torch.randn(3, 4), dry_run=True, on_unknown="keep")
    assert "wrap_with_autocast" in plan.notes[0]


def test_the_order_of_dimensions_in_memory_stays():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).to(memory_format=torch.channels_last)
    kill(model[0], [0, 1, 2])
    _, small = check(model, torch.randn(2, 3, 8, 8))
    for layer in (small[0], small[2]):
        assert layer.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_plan_without_a_layer_of_that_name_and_an_empty_example_are_refused():
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    with pytest.raises(KeyError, match="'1' is no layer of the plan; there are: 0, 2"):
        vd.compact(model, torch.randn(2, 4), dry_run=True)["1"]
    with pytest.raises(InvalidValueError, match=r"example_inputs of shape \(0, 4\): must hold an example"):
        vd.compact(model, torch.randn(0, 4))
