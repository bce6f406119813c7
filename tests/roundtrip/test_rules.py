"""One small network for each turn of a rule that no larger network needs."""

import pytest
import torch
from exactness import check, ignore, kill, parameters, randomised
from torch import nn
from torch.nn import functional as F

from vardrop.surgery.cut import cut


class Between(nn.Module):
    """A first layer with dead units 0 and 1, a function, and a last layer."""

    def __init__(self, first, function, last):
        super().__init__()
        self.first, self.last = first, last
        self.function = function
        kill(first, [0, 1])

    def forward(self, x):
        return self.last(self.function(torch.sigmoid(self.first(x))))


def left(model, x, **options):
    """Units of the first layer that are left."""
    return check(model, x, **options)[1].first.weight.shape[0]


IMAGE = torch.randn(2, 2, 6, 6)
TOKENS = torch.randn(2, 4, 3)


def images(function, channels=6, taps=1):
    return Between(nn.Conv2d(2, 6, 1), function, nn.Conv2d(channels, 2, taps))


def tokens(function, features=6):
    return Between(nn.Linear(3, 6), function, nn.Linear(features, 2))


IMAGE_FUNCTIONS = {
    "channels padded": (lambda x: F.pad(x, (0, 0, 0, 0, 1, 2)), 9, 6),
    "other dimensions padded in place of channels": (lambda x: F.pad(x, (1, 0, 0, 0, 0, 0), value=0.1), 6, 6),
    "constants one after another": (lambda x: torch.cat([x, x], 2), 6, 4),
    "other constants one after another": (lambda x: torch.cat([x, x + 1], 2), 6, 6),
    "zeros like": (lambda x: x + torch.zeros_like(x), 6, 4),
    "a comparison": (lambda x: torch.where(x > 0.4, x, -x), 6, 4),
    "a mask over space": (lambda x: x.masked_fill(torch.eye(6, dtype=torch.bool), 0.0), 6, 6),
    "swapped space": (lambda x: x.transpose(2, 3), 6, 4),
    "spatial gate": (lambda x: x * x.mean(1, keepdim=True), 6, 6),
    "largest of several": (lambda x: x.max(2).values.unsqueeze(2), 6, 6),
    "conversion": (lambda x: x.to(torch.float64).to(x.dtype), 6, 4),
    "whole numbers": (lambda x: (4 * x).to(torch.int64).to(x.dtype), 6, 4),
    "a step in space": (lambda x: x[:, :, ::2, 1], 6, None),
    "flipped": (lambda x: x.flip(1), 6, 6),
    "stacked": (lambda x: torch.stack([x, x], 2).flatten(2, 3), 6, 6),
    "split in space": (lambda x: x.chunk(2, 2)[1], 6, 4),
    "channels in blocks": (lambda x: x.view(2, 2, 3, 6, 6).transpose(1, 2).reshape(2, 6, 6, 6), 6, 6),
    "repeated in space": (lambda x: x.mean((2, 3), keepdim=True).expand(-1, -1, 6, 6), 6, 4),
    "tiled in space": (lambda x: x.repeat(1, 1, 2, 1), 6, 4),
    "tiled channels": (lambda x: x.repeat(1, 2, 1, 1), 12, 6),
    "one channel for all": (lambda x: x * x[:, :1], 6, 6),
    "repeated like another": (lambda x: x * x.mean((2, 3), keepdim=True).expand_as(x), 6, 4),
    "one channel repeated like all": (lambda x: x * x[:, :1].expand_as(x), 6, 6),
    "repeated like a fixed size": (lambda x: x.mean((2, 3), keepdim=True).expand_as(torch.ones(len(x), 6, 6, 6)), 6, 6),
    "shaped like another": (lambda x: x.view_as(x + 1), 6, 6),
    "the type of another": (lambda x: (x > 0.4).type_as(x) * x, 6, 4),
    "a whole type of another": (lambda x: (4 * x).type_as(torch.ones(1, dtype=torch.int64)).to(x.dtype), 6, 4),
    "stacked along channels": (lambda x: torch.hstack([x, 2 * x]), 12, 4),
    "operations by other names": (lambda x: torch.negative(torch.multiply(x, x).true_divide(3)), 6, 4),
    "transposed space": (lambda x: x.mT, 6, 4),
    "smoothed": (lambda x: F.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True), 6, 4),
}


@pytest.mark.parametrize(("function", "channels", "expected"), IMAGE_FUNCTIONS.values(), ids=IMAGE_FUNCTIONS.keys())
def test_functions_of_images(function, channels, expected):
    if expected is None:
        model = Between(nn.Conv2d(2, 6, 1), function, nn.Conv1d(channels, 2, 1))
        expected = 4
    else:
        model = images(function, channels)
    assert left(model, IMAGE, batches=(2,)) == expected


TOKEN_FUNCTIONS = {
    "mean over tokens": (lambda x: x.mean(1), 6, 4),
    "mean that keeps its dimension": (lambda x: x.mean(1, keepdim=True), 6, 4),
    "sum over tokens": (lambda x: x.sum(1), 6, 6),
    "sum of zeros over tokens": (lambda x: (x - 0.5).relu().sum(1), 6, None),
    "one token": (lambda x: x[:, 0], 6, 4),
    "some tokens": (lambda x: x[:, 1:], 6, 4),
    "one unit": (lambda x: x[:, :, 1], 4, 6),
    "pooling across units": (lambda x: F.avg_pool1d(x, 2), 3, 6),
    "padding across units": (lambda x: F.pad(x, (0, 1)), 7, 6),
    "pooling over tokens": (lambda x: F.avg_pool1d(x.transpose(1, 2), 2).transpose(1, 2), 6, 4),
    "tokens into the batch": (lambda x: x.flatten(0, 1), 6, 4),
    "heads": (lambda x: x.view(2, 4, 2, 3).transpose(1, 2).flatten(2), 12, 6),
    "tokens into units": (lambda x: x.flatten(1), 24, 4),
    "units before tokens": (lambda x: x.transpose(1, 2).flatten(1), 24, 4),
    "a split of tokens": (lambda x: x.unflatten(1, (2, 2)), 6, 4),
    "maps beside tokens": (lambda x: x @ x.transpose(1, 2), 4, 6),
    "softmax over tokens": (lambda x: x.softmax(1), 6, 6),
}


@pytest.mark.parametrize(("function", "features", "expected"), TOKEN_FUNCTIONS.values(), ids=TOKEN_FUNCTIONS.keys())
def test_functions_of_tokens(function, features, expected):
    model = tokens(function, features)
    if expected is None:
        with torch.no_grad():
            model.first.bias[:2] = -0.1
        expected = 4
    assert left(model, TOKENS, batches=(2,)) == expected


def test_reading_the_bits_of_units_keeps_them():
    model = tokens(lambda x: x.view(torch.int32).to(x.dtype) * 1e-9)
    cut(model, TOKENS)
    assert model.first.out_features == 6


def test_units_that_meet_other_dimensions():
    class Crossed(nn.Module):
        def __init__(self, meet):
            super().__init__()
            self.first, self.other, self.last = nn.Linear(3, 4), nn.Linear(3, 4), nn.Linear(4, 2)
            self.meet = meet
            kill(self.first, [0])
            kill(self.other, [0])

        def forward(self, x):
            a, b = torch.sigmoid(self.first(x)), torch.sigmoid(self.other(x))
            return self.last(self.meet(a, b.transpose(1, 2)))

    for meet in (torch.add, lambda a, b: torch.cat([a, b], 1), lambda a, b: torch.cat([a, b], 2)[:, :, 2:6]):
        model = Crossed(meet)
        assert parameters(check(model, TOKENS)[1]) == parameters(model)


def test_a_norm_over_tokens_reads_units_across():
    model = randomised(tokens(nn.BatchNorm1d(4)))
    assert left(model, TOKENS) == 6


def test_slopes_over_tokens_read_units_across():
    assert left(randomised(tokens(nn.PReLU(4))), TOKENS) == 6


def test_a_zero_scale_behind_batch_statistics():
    model = Between(nn.Conv2d(2, 6, 1), nn.BatchNorm2d(6, track_running_stats=False), nn.Conv2d(6, 2, 1))
    randomised(model)
    with torch.no_grad():
        model.function.weight[[3, 4]] = 0
    assert left(model, IMAGE, batches=(2, 5)) == 4


def test_the_places_of_maxima_are_no_constants():
    class Places(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(2, 6, 1), nn.Conv2d(6, 2, 1)
            kill(self.first, [0, 1])
            ignore(self.last, [2])

        def forward(self, x):
            found, places = F.max_pool2d(torch.sigmoid(self.first(x)), 2, return_indices=True)
            return self.last(found) + self.last.bias.sum() + self.last(places.to(x.dtype))

    class PlacesAlone(Places):
        def forward(self, x):
            _, places = F.max_pool2d(torch.sigmoid(self.first(x)), 2, return_indices=True)
            return self.last(places.to(x.dtype))

    assert parameters(check(Places(), IMAGE)[1]) == parameters(Places())
    assert check(PlacesAlone(), IMAGE)[1].first.out_channels == 5


def test_a_part_that_nobody_reads_stays_as_large_as_the_others():
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 8), nn.Linear(4, 2)
            ignore(self.last, [0])

        def forward(self, x):
            return self.last(self.first(x).chunk(2, dim=1)[1])

    model = Parts()
    _, small = check(model, torch.randn(2, 3))
    assert (small.first.out_features, small.last.in_features) == (6, 3)


def test_chunks_that_are_not_equal_keep_their_units():
    model = Between(nn.Linear(3, 7), lambda x: torch.cat(x.chunk(2, 1)[::-1], 1), nn.Linear(7, 2))
    assert left(model, torch.randn(2, 3)) == 7


def test_blocks_of_a_split_are_constant_only_as_a_whole():
    model = Between(nn.Linear(3, 24), lambda x: x.view(x.shape[0], -1, 2, 2), nn.Conv2d(6, 2, 1))
    kill(model.first, range(8))
    assert left(model, torch.randn(2, 3)) == 24
    with torch.no_grad():
        model.first.bias[:4] = 0.5
    assert left(model, torch.randn(2, 3)) == 20


def test_a_function_with_a_bias_takes_constants():
    class Called(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 6), nn.Linear(6, 2)
            kill(self.first, [0, 1])

        def forward(self, x):
            return F.linear(torch.sigmoid(self.first(x)), self.last.weight, self.last.bias)

    assert left(Called(), torch.randn(2, 3)) == 4


def test_a_number_of_groups_in_the_code_keeps_the_layer():
    class Called(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.middle, self.last = nn.Conv2d(2, 6, 1), nn.Conv2d(6, 4, 1, groups=2), nn.Conv2d(4, 2, 1)
            ignore(self.last, [0, 1])

        def forward(self, x):
            return self.last(F.conv2d(self.first(x), self.middle.weight, self.middle.bias, groups=2))

    done, small = check(Called(), IMAGE)
    assert parameters(small) == parameters(Called())
    assert done.notes == (
        "middle is kept as it is: middle.weight is called as a function with a fixed number of groups",
    )


def test_a_gain_used_twice_and_a_tensor_of_fixed_size_keep_units():
    class Gained(nn.Module):
        def __init__(self, twice):
            super().__init__()
            self.first, self.last = nn.Linear(3, 6), nn.Linear(6, 2)
            self.gain = nn.Parameter(torch.rand(6) + 0.5)
            self.twice = twice
            kill(self.first, [0])

        def forward(self, x):
            x = torch.sigmoid(self.first(x))
            return self.last(x * self.gain + self.gain if self.twice else x * torch.arange(6))

    assert left(Gained(True), torch.randn(2, 3)) == 6
    assert left(Gained(False), torch.randn(2, 3)) == 6


def test_a_gain_of_zero_kills_its_unit_and_a_single_gain_is_no_unit():
    class Gained(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 6), nn.Linear(6, 2)
            self.gain, self.scale = nn.Parameter(torch.rand(6) + 0.5), nn.Parameter(torch.tensor([0.7]))
            kill(self.first, [0])
            with torch.no_grad():
                self.gain[5] = 0

        def forward(self, x):
            return self.last(torch.sigmoid(self.first(x)) * self.gain * self.scale)

    _, small = check(Gained(), torch.randn(2, 3))
    assert small.gain.shape == (4,)
    assert small.scale.shape == (1,)


def test_one_channel_that_gates_all_stays():
    class Spatial(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.gate, self.last = nn.Conv2d(2, 6, 1), nn.Conv2d(2, 1, 1), nn.Conv2d(6, 2, 1)
            kill(self.first, [0])
            kill(self.gate, [0])

        def forward(self, x):
            return self.last(torch.sigmoid(self.first(x)) * torch.sigmoid(self.gate(x)))

    assert left(Spatial(), IMAGE) in (5, 6)


def test_buffers_that_change_during_the_pass_are_not_taken_for_constants():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(3, 6), nn.Linear(6, 2)
            self.register_buffer("calls", torch.zeros(()))
            kill(self.first, [0])

        def forward(self, x):
            self.calls += 1
            return self.last(torch.sigmoid(self.first(x)) * self.calls)

    model = Counting()
    cut(model, torch.randn(2, 3))
    assert model.first.out_features == 6
    assert model.calls == 0


def test_a_subclass_of_a_layer_gets_no_new_bias():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * F.linear(x, self.weight)

    model = Between(nn.Linear(3, 6), nn.Identity(), Scaled(6, 2, bias=False))
    ignore(model.last, [4])
    _, small = check(model, torch.randn(2, 3))
    assert (small.first.out_features, small.last.in_features) == (5, 5)
    assert small.last.bias is None


def test_a_module_of_ones_own_between_torch_classes_keeps_what_it_wants_kept():
    class Embedded(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(7, 6)
            self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 7, bias=False)
            self.last.weight = self.table.weight

        def forward(self, x):
            return self.last(torch.relu(self.first(self.table(x))))

    model = Embedded()
    kill(model.first, [0])
    done, small = check(model, torch.tensor([[1, 2], [3, 4]]))
    assert small.first.out_features == 6
    assert small.last.weight is small.table.weight
    assert done.notes == ("last is kept as it is: table.weight and last.weight are one parameter",)


def test_a_single_channel_is_followed_through_a_reshape():
    model = nn.Sequential(
        nn.Conv2d(2, 1, 1), nn.Flatten(2), nn.Conv1d(1, 5, 1), nn.Sigmoid(), nn.Flatten(), nn.Linear(5 * 36, 2)
    )
    kill(model[0], [0])
    _, small = check(model, IMAGE)
    assert small[2].out_channels == 1
    assert small[5].in_features == 36
