"""Plain chains: what goes, what folds, and what zero padding keeps."""

from copy import deepcopy

import pytest
import torch
from exactness import assert_same, check, ignore, kill, parameters, randomised
from torch import nn
from torch.nn import functional as F

from vardrop.surgery.cut import cut, plan


def mlp(activation=nn.ReLU):
    return nn.Sequential(nn.Linear(6, 9), activation(), nn.Linear(9, 8), activation(), nn.Linear(8, 3))


def sizes(model):
    return [tuple(parameter.shape) for parameter in model.parameters() if parameter.ndim > 1]


def test_dead_units_of_an_mlp_go_and_their_constants_fold():
    model = mlp(nn.Sigmoid)
    kill(model[0], [0, 3])
    ignore(model[4], [1, 2, 7])
    done, small = check(model, torch.randn(2, 6))
    assert sizes(small) == [(7, 6), (5, 7), (3, 5)]
    assert (small[0].in_features, small[0].out_features, small[2].in_features) == (6, 7, 7)
    assert done["2"].folded == 2
    assert done["4"].folded == 0


def test_the_folded_bias_is_the_constant_times_its_weights():
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    kill(model[0], [1])
    expected = model[2].bias + model[2].weight[:, 1] * torch.tanh(model[0].bias[1])
    cut(model, torch.randn(1, 2, dtype=torch.float64))
    torch.testing.assert_close(model[2].bias, expected, rtol=1e-14, atol=0)


def test_removing_a_unit_frees_the_units_that_only_it_read():
    model = mlp()
    ignore(model[4], [0, 1, 2, 3])
    with torch.no_grad():
        model[2].weight[4:, :5] = 0
    done, small = check(model, torch.randn(2, 6))
    assert sizes(small) == [(4, 6), (4, 4), (3, 4)]
    assert done.parameters_after == parameters(small) < parameters(model)


def test_constants_run_through_whole_layers():
    model = mlp(nn.GELU)
    kill(model[0], range(9))
    done, small = check(model, torch.randn(2, 6))
    assert sizes(small) == [(1, 6), (1, 1), (3, 1)]
    assert done["0"].kept == (("the last unit of 0", 1),)


def test_nothing_to_cut_leaves_the_parameters_as_they_are():
    model = mlp()
    before = list(model.parameters())
    done = cut(model, torch.randn(2, 6))
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    assert done.parameters_before == done.parameters_after


def test_layers_without_bias_get_one_only_where_a_constant_folds():
    model = nn.Sequential(
        nn.Linear(4, 5, bias=False),
        nn.ReLU(),
        nn.Linear(5, 5, bias=False),
        nn.Sigmoid(),
        nn.Linear(5, 2, bias=False),
    )
    kill(model[0], [0])
    kill(model[2], [1, 2])
    _, small = check(model, torch.randn(2, 4))
    assert sizes(small) == [(4, 4), (3, 4), (2, 3)]
    assert small[0].bias is None and small[2].bias is None
    assert small[4].bias.shape == (2,)


def test_training_flags_gradient_flags_and_the_mode_are_kept():
    model = mlp().train()
    model[0].weight.requires_grad_(False)
    kill(model[0], [0])
    cut(model, torch.randn(2, 6))
    assert model.training
    assert not model[0].weight.requires_grad
    assert model[0].bias.requires_grad
    model(torch.randn(3, 6)).sum().backward()


def test_linear_on_three_and_four_dimensions():
    model = mlp()
    kill(model[0], [1, 2])
    for shape in ((2, 5, 6), (2, 3, 4, 6)):
        _, small = check(model, torch.randn(*shape))
        assert sizes(small) == [(7, 6), (8, 7), (3, 8)]


class LeNet(nn.Module):
    def __init__(self, first=6, second=8, flat=8 * 16, hidden=10):
        super().__init__()
        self.conv1 = nn.Conv2d(1, first, 5)
        self.conv2 = nn.Conv2d(first, second, 5)
        self.fc1 = nn.Linear(flat, hidden)
        self.fc2 = nn.Linear(hidden, 3)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.fc2(F.relu(self.fc1(torch.flatten(x, 1))))


def test_lenet_and_its_state_in_a_plain_net_of_the_new_sizes():
    model = LeNet()
    kill(model.conv1, [0, 5])
    kill(model.conv2, [1, 2, 3])
    kill(model.fc1, [4])
    done, small = check(model, torch.randn(2, 1, 28, 28))
    assert done["conv1"].units == (6, 4)
    assert done["conv2"].inputs == (6, 4)
    assert done["fc1"].inputs == (128, 80)
    plain = LeNet(4, 5, 80, 9).double().eval()
    plain.load_state_dict(small.state_dict())
    assert_same(plain, small, torch.randn(4, 1, 28, 28, dtype=torch.float64), 0.0)


def test_single_entries_of_a_flattened_channel_do_not_free_it_but_all_of_them_do():
    model = LeNet()
    ignore(model.fc1, range(0, 15))
    assert plan(model, torch.randn(2, 1, 28, 28))["conv2"].units == (8, 8)
    ignore(model.fc1, [15])
    assert plan(model, torch.randn(2, 1, 28, 28))["conv2"].units == (8, 7)


FLATTENS = {
    "flatten": lambda x: torch.flatten(x, 1),
    "view": lambda x: x.view(x.size(0), -1),
    "reshape by shape": lambda x: x.reshape(x.shape[0], x.shape[1] * x.shape[2] * x.shape[3]),
    "mean": lambda x: x.mean((2, 3)),
    "squeezed pool": lambda x: F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1),
    "channels last": lambda x: x.permute(0, 2, 3, 1).flatten(1),
    "global max": lambda x: x.amax(dim=(-2, -1)),
    "slice": lambda x: x[:, :, 1, ::2].flatten(1),
}


class Flattened(nn.Module):
    def __init__(self, flatten):
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3)
        self.flatten = flatten
        self.fc = nn.Linear(flatten(torch.zeros(1, 6, 4, 4)).shape[1], 3)

    def forward(self, x):
        return self.fc(self.flatten(torch.sigmoid(self.conv(x))))


@pytest.mark.parametrize("flatten", FLATTENS.values(), ids=FLATTENS.keys())
def test_ways_from_maps_to_vectors(flatten):
    model = Flattened(flatten)
    kill(model.conv, [0, 2])
    done, small = check(model, torch.randn(2, 2, 6, 6))
    assert small.conv.out_channels == 4
    assert small.fc.in_features == model.fc.in_features * 4 // 6
    assert done["fc"].folded == model.fc.in_features * 2 // 6


def conv_bn(padding, mode="zeros", activation=nn.ReLU):
    return randomised(
        nn.Sequential(
            nn.Conv2d(2, 6, 3, bias=False),
            nn.BatchNorm2d(6),
            activation(),
            nn.Conv2d(6, 4, 3, padding=padding, padding_mode=mode),
            nn.ReLU(),
            nn.Conv2d(4, 2, 1),
        )
    )


@pytest.mark.parametrize(
    ("padding", "mode", "left"),
    [
        (0, "zeros", 3),
        (1, "reflect", 3),
        (1, "replicate", 3),
        (1, "circular", 3),
        ("valid", "zeros", 3),
        (1, "zeros", 6),
        ("same", "zeros", 6),
    ],
)
def test_a_dead_channel_behind_batch_norm_folds_unless_zeros_are_padded(padding, mode, left):
    model = conv_bn(padding, mode, nn.Sigmoid)
    kill(model[0], [0, 2, 5])
    done, small = check(model, torch.randn(2, 2, 7, 7))
    assert small[0].out_channels == small[1].num_features == small[3].in_channels == left
    assert small[1].running_mean.shape == small[1].weight.shape == (left,)
    if left == 6:
        assert done["0"].kept == (("3 cannot fold it: zero padding cuts it off at the border", 3),)
    else:
        assert done["3"].folded == 3


def test_zero_padding_keeps_only_the_constants_that_are_not_zero():
    model = conv_bn(1)
    with torch.no_grad():
        model[1].weight.fill_(1.0)
        model[1].bias.copy_(torch.tensor([-9.0, 9.0, -9.0, 9.0, 0.0, 0.0]))
    kill(model[0], [0, 1, 2])
    done, small = check(model, torch.randn(2, 2, 7, 7))
    assert small[0].out_channels == 4
    assert done["0"].kept == (("3 cannot fold it: zero padding cuts it off at the border", 1),)


def test_one_by_one_with_same_padding_pads_nothing():
    model = nn.Sequential(nn.Conv2d(2, 5, 3), nn.Sigmoid(), nn.Conv2d(5, 3, 1, padding="same"))
    kill(model[0], [1])
    assert check(model, torch.randn(2, 2, 6, 6))[1][0].out_channels == 4


def test_a_zero_scale_in_batch_norm_kills_its_channel():
    model = conv_bn(0)
    with torch.no_grad():
        model[1].weight[[1, 4]] = 0
    assert check(model, torch.randn(2, 2, 7, 7))[1][0].out_channels == 4


@pytest.mark.parametrize("norm", [nn.BatchNorm2d, nn.InstanceNorm2d])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("track", [True, False])
def test_norms_with_and_without_affine_and_running_statistics(norm, affine, track):
    model = randomised(
        nn.Sequential(
            nn.Conv2d(2, 6, 3, bias=False),
            norm(6, affine=affine, track_running_stats=track),
            nn.Sigmoid(),
            nn.Conv2d(6, 3, 3),
        )
    )
    kill(model[0], [0, 2])
    ignore(model[3], [5])
    _, small = check(model, torch.randn(2, 2, 7, 7))
    assert small[0].out_channels == small[1].num_features == 3


def test_batch_statistics_leave_no_constant_but_zero():
    model = randomised(
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU(), nn.Conv2d(4, 2, 1))
    )
    kill(model[0], [0, 1])
    with torch.no_grad():
        model[0].bias[0] = 0
    assert check(model, torch.randn(2, 2, 5, 5))[1][0].out_channels == 3


ACTIVATIONS = {
    **{kind.__name__: kind for kind in (nn.ReLU, nn.GELU, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.LeakyReLU, nn.ELU)},
    **{kind.__name__: kind for kind in (nn.SiLU, nn.Mish, nn.Hardtanh, nn.Hardswish, nn.SELU, nn.ReLU6, nn.Softsign)},
    "tanh gelu": lambda: nn.GELU("tanh"),
    "in place": lambda: nn.ReLU(inplace=True),
    "dropout": lambda: nn.Dropout(0.5),
    "dropout of channels": lambda: nn.Dropout2d(0.5),
    "alpha dropout": lambda: nn.AlphaDropout(0.5),
    "one slope": nn.PReLU,
    "slopes": lambda: nn.PReLU(6),
    "identity": nn.Identity,
    "batch norm": lambda: nn.BatchNorm2d(6),
    "max pool": lambda: nn.MaxPool2d(2, padding=1),
    "average pool": lambda: nn.AvgPool2d(2),
    "padded average pool of the inside": lambda: nn.AvgPool2d(3, padding=1, count_include_pad=False),
    "ceiled average pool": lambda: nn.AvgPool2d(2, stride=2, ceil_mode=True),
    "nearest": lambda: nn.Upsample(scale_factor=2),
    "bilinear": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
    "reflection": lambda: nn.ReflectionPad2d(1),
    "adaptive max": lambda: nn.AdaptiveMaxPool2d(3),
    "power average": lambda: nn.LPPool2d(2, 2),
}


@pytest.mark.parametrize("between", ACTIVATIONS.values(), ids=ACTIVATIONS.keys())
def test_constants_pass_through(between):
    model = randomised(nn.Sequential(nn.Conv2d(2, 6, 3), between(), nn.Conv2d(6, 3, 2)))
    kill(model[0], [1, 4])
    done, small = check(model, torch.randn(2, 2, 8, 8))
    assert small[0].out_channels == 4
    assert done["2"].folded in (1, 2)


@pytest.mark.parametrize(
    "between",
    [nn.AvgPool2d(3, padding=1), nn.ZeroPad2d(1), nn.ConstantPad2d(1, 0.3)],
    ids=["padded average pool", "zero pad", "constant pad"],
)
def test_constants_that_borders_break_keep_their_channel(between):
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Sigmoid(), between, nn.Conv2d(6, 3, 2))
    kill(model[0], [1, 4])
    ignore(model[3], [2])
    assert check(model, torch.randn(2, 2, 8, 8))[1][0].out_channels == 5


def test_a_pad_by_the_constant_itself_is_no_border():
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Sigmoid(), nn.ConstantPad2d(1, 0.5), nn.Conv2d(6, 3, 2))
    kill(model[0], [1])
    with torch.no_grad():
        model[0].bias[1] = 0
    assert check(model, torch.randn(2, 2, 8, 8))[1][0].out_channels == 5


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_convolutions_of_every_rank(rank):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
    norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[rank - 1]
    back = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[rank - 1]
    model = randomised(
        nn.Sequential(
            conv(2, 5, 3),
            norm(5),
            nn.ReLU(),
            conv(5, 6, 2, dilation=2),
            nn.ReLU(),
            back(6, 4, 2),
            nn.ReLU(),
            conv(4, 2, 1),
        )
    )
    kill(model[0], [0, 3])
    kill(model[3], [2])
    kill(model[5], [1])
    with torch.no_grad():
        model[3].bias[2] = -1.0
    _, small = check(model, torch.randn(2, 2, *[6] * rank))
    assert [small[place].out_channels for place in (0, 3, 5, 7)] == [3, 5, 3, 2]
    assert small[5].weight.shape[:2] == (5, 3)


def test_an_unbatched_image():
    model = LeNet()
    model.forward = lambda x: model.conv2(F.relu(model.conv1(x)))
    kill(model.conv1, [1])
    small = deepcopy(model)
    net = nn.Sequential(small.conv1, nn.ReLU(), small.conv2)
    large = deepcopy(net)
    cut(net, torch.randn(1, 14, 14))
    assert net[0].out_channels == 5
    assert_same(large, net, torch.randn(1, 14, 14), 1e-5)


def test_half_precision():
    model = mlp(nn.Sigmoid).bfloat16()
    kill(model[0], [0, 1])
    large = deepcopy(model)
    cut(model, torch.randn(2, 6).bfloat16())
    assert model[0].out_features == 7
    assert model[2].bias.dtype == torch.bfloat16
    assert_same(large, model, torch.randn(4, 6).bfloat16(), 0.02)


def test_the_plan_prints_what_goes_what_folds_and_what_stays():
    model = conv_bn(1, activation=nn.Sigmoid)
    kill(model[0], [0, 2])
    kill(model[3], [1])
    text = str(plan(model, torch.randn(2, 2, 7, 7)))
    assert text.splitlines()[0].split() == [
        "layer",
        "inputs",
        "units",
        "folded",
        "stays",
        "though",
        "constant",
    ]
    assert "2: 3 cannot fold it: zero padding cuts it off at the border" in text
    assert "4 -> 3" in text
    assert text.splitlines()[-1] == f"parameters: {parameters(model)} -> {parameters(model) - 6 * 9 - 1 - 2}"
