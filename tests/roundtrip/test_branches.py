"""Graphs with branches: sums, concatenation, groups, gates, several inputs, shared layers."""

from copy import deepcopy

import torch
from exactness import check, ignore, kill, parameters, randomised
from torch import nn
from torch.nn import functional as F

from vardrop.surgery.cut import cut, plan
from vardrop.surgery.graph import graph


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.down = None
        if stride > 1 or inputs != outputs:
            self.down = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += x if self.down is None else self.down(x)
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.block1 = Block(6, 6)
        self.block2 = Block(6, 8, stride=2)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        x = self.block2(self.block1(self.stem(x)))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def zero_behind(conv, norm, units):
    """Dead channels that are below zero behind their norm, so that a ReLU makes them zero."""
    kill(conv, units)
    with torch.no_grad():
        norm.weight[units] = 1.0
        norm.bias[units] = norm.running_mean[units] / (norm.running_var[units] + norm.eps).sqrt() - 0.01


def resnet():
    return randomised(ResNet())


def test_a_residual_stream_loses_only_what_is_dead_in_all_its_branches():
    model = resnet()
    zero_behind(model.stem[0], model.stem[1], [1, 2, 4])
    zero_behind(model.block1.conv2, model.block1.bn2, [2, 4, 5])
    zero_behind(model.block1.conv1, model.block1.bn1, [0, 3])
    done, small = check(model, torch.randn(2, 3, 8, 8))
    assert small.stem[0].out_channels == small.block1.conv2.out_channels == small.block2.conv1.in_channels == 4
    assert small.block1.conv1.out_channels == 4
    assert small.block2.down[0].in_channels == 4
    assert done["block1.conv2"].units == (6, 4)
    assert done["stem.0"].kept == (("a live unit in the same place is read by block2.down.0", 1),)


def test_a_dead_branch_shrinks_to_one_unit_and_the_stream_stays():
    model = resnet()
    zero_behind(model.block1.conv2, model.block1.bn2, list(range(6)))
    _, small = check(model, torch.randn(2, 3, 8, 8))
    assert small.block1.conv1.out_channels == 1
    assert small.block1.conv2.out_channels == small.stem[0].out_channels == 6
    assert parameters(small) == parameters(model) - 2 * 5 * 6 * 9 - 2 * 5


def test_units_of_the_stream_that_nobody_reads_go_everywhere():
    model = resnet()
    ignore(model.head, [0, 3, 7])
    _, small = check(model, torch.randn(2, 3, 8, 8))
    assert small.block2.conv2.out_channels == small.block2.down[0].out_channels == small.head.in_features == 5
    assert small.block2.conv1.out_channels == 8


def test_constants_in_both_branches_add_up():
    model = resnet()
    for conv in (model.block2.conv2, model.block2.down[0]):
        kill(conv, [1, 6])
    done, small = check(model, torch.randn(2, 3, 8, 8))
    assert small.head.in_features == 6
    assert done["head"].folded >= 1


class ReadAndWritten(nn.Module):
    """A unit of the stream that only its own branch reads and writes."""

    def __init__(self):
        super().__init__()
        self.stem, self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x):
        x = self.stem(x)
        return self.head(x + self.down(F.relu(self.up(x))))


def test_a_loop_that_feeds_itself_alone_goes():
    model = ReadAndWritten()
    ignore(model.head, [5])
    with torch.no_grad():
        model.up.weight[:4, 5] = 0
        model.down.weight[:5, 4] = 0
    _, small = check(model, torch.randn(2, 4))
    assert (small.stem.out_features, small.up.out_features) == (5, 4)


class Dense(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 3, 3, padding=1)
        self.norm3 = nn.BatchNorm2d(9)
        self.conv3 = nn.Conv2d(9, 5, 1)
        self.fc = nn.Linear(5 * 9, 3)

    def forward(self, x):
        first = torch.cat([x, self.conv1(x)], dim=1)
        second = torch.cat([first, F.relu(self.conv2(F.relu(self.norm2(first))))], 1)
        return self.fc(F.avg_pool2d(F.relu(self.conv3(self.norm3(second))), 2).flatten(1))


def test_concatenation_as_in_a_densenet():
    model = randomised(Dense())
    kill(model.conv2, [0, 2])
    kill(model.conv1, [3])
    ignore(model.conv2, [3, 5])
    ignore(model.conv3, [3])
    done, small = check(model, torch.randn(2, 2, 6, 6))
    assert small.conv1.out_channels == 2
    assert small.norm2.num_features == small.conv2.in_channels == 4
    assert small.conv2.out_channels == 1
    assert small.norm3.num_features == small.conv3.in_channels == 5
    assert done["conv3"].folded == 3


class UNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down1 = nn.Conv2d(1, 5, 3, padding=1)
        self.down2 = nn.Conv2d(5, 7, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(7, 4, 2, stride=2)
        self.join = nn.Conv2d(9, 6, 3, padding=1)
        self.out = nn.Conv2d(6, 2, 1)

    def forward(self, x):
        skip = F.relu(self.down1(x))
        up = F.relu(self.up(F.relu(self.down2(skip))))
        return self.out(F.relu(self.join(torch.cat((up, skip), 1))))


def test_a_unet_with_a_transposed_convolution_and_a_skip():
    model = UNet()
    with torch.no_grad():
        for layer in (model.down1, model.down2, model.up):
            layer.bias.fill_(-0.1)
            layer.bias[0] = 0.2
    kill(model.down1, [1, 2])
    kill(model.down2, [3])
    kill(model.up, [0, 1])
    kill(model.join, [4, 5])
    done, small = check(model, torch.randn(2, 1, 8, 8))
    assert [layer.out_channels for layer in small.children()] == [3, 6, 3, 4, 2]
    assert small.join.in_channels == 6
    assert small.up.weight.shape == (6, 3, 2, 2)
    assert done["up"].kept == (("join cannot fold it: zero padding cuts it off at the border", 1),)


def test_a_constant_before_a_transposed_convolution_stays_unless_zero():
    model = nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.ConvTranspose2d(5, 3, 3, stride=2))
    kill(model[0], [0, 1])
    with torch.no_grad():
        model[0].bias[:2] = torch.tensor([0.5, -0.5])
    done, small = check(model, torch.randn(2, 1, 6, 6))
    assert small[0].out_channels == 4
    assert done["0"].kept == (("2 cannot fold it: a transposed convolution spreads it unevenly", 1),)


class Decoder(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.fc = nn.Linear(3, 6 * 4)
        self.up = nn.ConvTranspose2d(6, 2, 2)
        self.shape = shape

    def forward(self, z):
        return self.up(F.relu(self.fc(z)).view(z.shape[0], *self.shape))


def test_a_split_into_an_open_number_of_channels_is_followed_and_a_stated_one_kept():
    model = Decoder((-1, 2, 2))
    ignore(model.up, [1, 2])
    _, small = check(model, torch.randn(2, 3))
    assert (small.fc.out_features, small.up.in_channels) == (16, 4)
    stated = Decoder((6, 2, 2))
    stated.load_state_dict(model.state_dict())
    _, small = check(stated, torch.randn(2, 3))
    assert (small.fc.out_features, small.up.in_channels) == (24, 6)


class Separable(nn.Module):
    def __init__(self, multiplier=1):
        super().__init__()
        wide = 6 * multiplier
        self.inner = nn.Conv2d(2, 6, 1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.depth = nn.Conv2d(6, wide, 3, padding=1, groups=6, bias=False)
        self.norm2 = nn.BatchNorm2d(wide)
        self.point = nn.Conv2d(wide, 4, 1)

    def forward(self, x):
        x = F.relu6(self.norm(self.inner(x)))
        return self.point(F.relu6(self.norm2(self.depth(x))))


def test_depthwise_separable():
    model = randomised(Separable())
    kill(model.depth, [0, 1])
    ignore(model.point, [4])
    zero_behind(model.inner, model.norm, [5])
    done, small = check(model, torch.randn(2, 2, 6, 6))
    assert small.depth.groups == small.depth.in_channels == small.depth.out_channels == 2
    assert small.inner.out_channels == small.norm.num_features == small.norm2.num_features == 2
    assert small.depth.weight.shape == (2, 1, 3, 3)
    assert done["depth"].units == (6, 2)


def test_a_depthwise_multiplier_keeps_equally_many_outputs_for_each_channel():
    model = randomised(Separable(multiplier=2))
    ignore(model.point, [0, 1, 2, 5, 7, 9, 11])
    _, small = check(model, torch.randn(2, 2, 6, 6))
    assert (small.depth.groups, small.depth.out_channels, small.point.in_channels) == (5, 5, 5)
    ignore(model.point, [4])
    assert check(model, torch.randn(2, 2, 6, 6))[1].depth.out_channels == 4
    with torch.no_grad():
        model.point.weight[:, 2] = 1.0
        model.point.weight[:, 3] = 1.0
    assert check(model, torch.randn(2, 2, 6, 6))[1].depth.out_channels == 8


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv1d(2, 12, 1)
        self.second = nn.Conv1d(12, 9, 3, groups=3)
        self.third = nn.Conv1d(9, 2, 1)

    def forward(self, x):
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


def test_whole_groups_go_and_the_others_keep_equal_numbers_by_fillers():
    model = Grouped()
    ignore(model.third, [3, 4, 5])
    _, small = check(model, torch.randn(2, 2, 5))
    assert (small.second.groups, small.second.in_channels, small.second.out_channels) == (2, 8, 6)
    kill(model.first, [0, 1, 8])
    kill(model.second, [0])
    done, small = check(model, torch.randn(2, 2, 5))
    assert (small.second.groups, small.second.in_channels, small.second.out_channels) == (2, 6, 6)
    assert done["first"].kept == (("a filler that keeps the groups of second equal", 1),)
    assert done["second"].kept == (("a filler that keeps the groups of second equal", 1),)


def test_grouped_transposed_convolution():
    model = nn.Sequential(
        nn.Conv2d(2, 8, 1), nn.ReLU(), nn.ConvTranspose2d(8, 6, 3, 2, groups=2), nn.ReLU(), nn.Conv2d(6, 2, 1)
    )
    with torch.no_grad():
        model[0].bias.fill_(-0.5)
    kill(model[0], [0, 5])
    kill(model[2], [1, 3])
    _, small = check(model, torch.randn(2, 2, 4, 4))
    assert small[2].weight.shape == (6, 2, 3, 3)
    assert (small[2].groups, small[2].in_channels, small[2].out_channels) == (2, 6, 4)
    ignore(model[4], [3, 4, 5])
    _, small = check(model, torch.randn(2, 2, 4, 4))
    assert (small[2].groups, small[2].in_channels, small[2].out_channels) == (1, 3, 2)


class Gated(nn.Module):
    """Squeeze and excitation."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.squeeze, self.excite = nn.Conv2d(6, 4, 1), nn.Conv2d(4, 6, 1)
        self.out = nn.Conv2d(6, 2, 3)

    def forward(self, x):
        x = F.relu(self.conv(x))
        gate = F.adaptive_avg_pool2d(x, 1)
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(gate))))
        return self.out(x * gate)


def test_a_gate_goes_with_its_channel():
    model = Gated()
    with torch.no_grad():
        model.conv.bias[:2] = -0.5
    kill(model.conv, [0, 1])
    kill(model.squeeze, [3])
    done, small = check(model, torch.randn(2, 2, 6, 6))
    assert small.conv.out_channels == small.excite.out_channels == small.out.in_channels == 4
    assert (small.squeeze.in_channels, small.squeeze.out_channels) == (4, 3)
    assert done["excite"].folded in (0, 1)


def test_a_constant_gate_keeps_its_living_channel_and_two_constants_fold():
    model = Gated()
    with torch.no_grad():
        model.conv.bias[:2] = 0.5
    kill(model.excite, [0, 2])
    kill(model.conv, [0])
    _, small = check(model, torch.randn(2, 2, 6, 6))
    assert small.conv.out_channels == 5


def test_the_graph_prints_what_hangs_together():
    text = str(graph(resnet(), torch.randn(2, 3, 8, 8)))
    assert "stem.0 + block1.conv2: 6 units, removable together; read by block1.conv1, block2.conv1" in text
    assert "block2.down.0" in text
    assert "head: 4 units; 4 stay: an output of the model" in text


def test_the_cut_net_can_be_cut_again_exported_and_copied():
    model = resnet()
    ignore(model.head, [0])
    x = torch.randn(2, 3, 8, 8)
    cut(model, x)
    ignore(model.head, [0])
    cut(model, x)
    assert model.head.in_features == 6
    assert plan(model, x).parameters_before == plan(model, x).parameters_after
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), deepcopy(model)(x))
