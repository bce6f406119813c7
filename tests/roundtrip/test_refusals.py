"""What is not followed is refused by name, and an error leaves the model as it was."""

from copy import deepcopy

import pytest
import torch
from exactness import check, ignore, kill, parameters
from torch import nn
from torch.nn import functional as F

import vardrop as vd
from vardrop.errors import GraphError, InvalidValueError
from vardrop.surgery import cut as cut_module
from vardrop.surgery.cut import cut, plan


class Net(nn.Module):
    def __init__(self, between, outputs=6):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(outputs, 2)
        self.between = between

    def forward(self, x):
        x = torch.sigmoid(self.first(x))
        x = self.between(x)
        return self.last(x)


def net(between, outputs=6):
    model = Net(between, outputs)
    kill(model.first, [0, 1])
    return model


def refuse(model, message, inputs=None):
    before = deepcopy(model.state_dict())
    names = repr(model)
    with pytest.raises(GraphError, match=message):
        cut(model, torch.randn(2, 4) if inputs is None else inputs)
    assert repr(model) == names
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def check_nothing_goes(model):
    return parameters(model) == cut(deepcopy(model), torch.randn(2, 4)).parameters_after


def test_an_operation_without_a_rule_is_named_with_its_line():
    model = net(lambda x: torch.special.i0(x))
    refuse(model, r"'special_i0' in `x = self.between\(x\)` \(test_refusals.py:\d+\); pass on_unknown='keep'")
    done, small = check(model, torch.randn(2, 4), on_unknown="keep")
    assert parameters(small) == parameters(model)
    assert done["first"].kept[0][0].startswith("read by special_i0 in")


def test_complex_units_stay_and_complex_outputs_are_compared():
    model = nn.Sequential(nn.Linear(4, 6, dtype=torch.cfloat), nn.Tanh(), nn.Linear(6, 2, dtype=torch.cfloat))
    with torch.no_grad():
        model[0].weight[:3] = 0
    x = torch.randn(2, 4, dtype=torch.cfloat)
    small = deepcopy(model)
    cut(small, x)
    torch.testing.assert_close(small(x), model(x))
    assert not cut_module.equal([x], [x + 1j])


def test_an_unknown_operation_on_the_inputs_alone_is_no_obstacle():
    model = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 2))
    kill(model[0], [0])
    model.register_forward_pre_hook(lambda module, args: (torch.special.i0(args[0]),))
    assert check(model, torch.randn(2, 4))[1][0].out_features == 5


@torch.library.custom_op("vardrop_test::double", mutates_args=())
def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


@double.register_fake
def _(x):
    return torch.empty_like(x)


def test_a_users_own_operation_is_named():
    refuse(net(lambda x: torch.ops.vardrop_test.double(x)), "'vardrop_test::double'")


def test_a_switch_of_gradients_is_named():
    def between(x):
        with torch.enable_grad():
            return x * 2

    refuse(net(between), "wrap_with_set_grad_enabled")


def test_a_branch_on_the_data_cannot_be_traced():
    refuse(net(lambda x: x if x.sum() > 0 else -x), "Net cannot be traced by torch.export")


def test_inputs_that_do_not_fit_are_named_before_anything_is_traced():
    with pytest.raises(GraphError, match=r"Linear does not run on inputs of shape \(1, 7\)"):
        vd.compact(vd.convert(nn.Linear(4, 2), vd.ARD()), torch.ones(1, 7))


def test_a_typo_in_on_unknown():
    with pytest.raises(InvalidValueError, match="on_unknown='skip': must be 'refuse' or 'keep'"):
        plan(net(torch.relu), torch.randn(2, 4), on_unknown="skip")


class HardCoded(nn.Module):
    def __init__(self, flatten):
        super().__init__()
        self.conv, self.hidden, self.out = nn.Conv2d(1, 5, 3), nn.Linear(80, 6), nn.Linear(6, 2)
        self.flatten = flatten

    def forward(self, x):
        x = torch.sigmoid(self.conv(x))
        x = self.flatten(x)
        return self.out(F.relu(self.hidden(x)))


@pytest.mark.parametrize("flatten", [lambda x: x.view(-1, 80), lambda x: x.reshape(x.shape[0], 80)])
def test_a_size_in_the_code_is_named_and_kept_on_request(flatten):
    model = HardCoded(flatten)
    kill(model.conv, [2])
    kill(model.hidden, [0, 1])
    line = r"(view|reshape) in `x = self.flatten\(x\)` \(test_refusals.py:\d+\)"
    refuse(
        model,
        f"{line} states the size 80, of which 64 are left: write torch.flatten",
        torch.randn(2, 1, 6, 6),
    )
    _, small = check(model, torch.randn(2, 1, 6, 6), on_unknown="keep")
    assert (small.conv.out_channels, small.hidden.in_features, small.hidden.out_features) == (5, 80, 4)


def test_another_size_in_the_code():
    def between(x):
        if x.shape[1] != 6:
            raise ValueError("six, please")
        return x

    refuse(net(between), r"fails in `raise ValueError.*` \(test_refusals.py:\d+\): six, please")


def test_a_size_used_as_a_number_is_seen_by_the_comparison():
    refuse(net(lambda x: x / x.shape[1]), "gives other outputs; its code may use the sizes")


def test_a_batch_size_used_as_a_number_is_seen_by_the_comparison():
    refuse(net(lambda x: x / x.shape[0]), "gives other outputs")


def test_a_random_network_cannot_be_compared():
    model = net(lambda x: F.dropout(x, 0.5, training=True))
    assert check_nothing_goes(model)
    ignore(model.last, [5])
    refuse(model, "other outputs each time in eval mode")


ALIASES = {
    "view": lambda x: (x.view(-1).add_(1), x)[1],
    "select": lambda x: (x[:, 0].fill_(0.0), x)[1],
    "view before": lambda x: (x.view(2, -1), x.relu_())[0],
    "eval dropout": lambda x: (F.dropout(x, 0.5, False).mul_(2), x)[1],
    "chunk": lambda x: torch.cat([x.chunk(2, 1)[0].neg_(), x[:, 3:]], 1),
}


@pytest.mark.parametrize("between", ALIASES.values(), ids=ALIASES.keys())
def test_a_change_in_place_that_another_view_sees_is_refused(between):
    refuse(net(between), r"changes a tensor in place that is read again .*without the change in place")


def test_harmless_changes_in_place_are_followed():
    model = net(lambda x: F.relu(x.mul_(2).sub_(1), inplace=True).view(x.shape[0], -1).neg_())
    assert check(model, torch.randn(2, 4))[1].first.out_features == 4


def test_a_wrong_cut_would_be_caught(monkeypatch):
    right = cut_module.contribution
    monkeypatch.setattr(cut_module, "contribution", lambda weights, const: 1.01 * right(weights, const))
    refuse(net(torch.relu), "gives other outputs")
    monkeypatch.setattr(cut_module, "contribution", lambda weights, const: 0 * right(weights, const))
    refuse(net(torch.relu), "gives other outputs")


def test_a_model_that_only_runs_in_float32_is_compared_in_float32():
    model = net(lambda x: x.float())
    large = deepcopy(model)
    cut(model, torch.randn(2, 4))
    assert model.first.out_features == 4
    x = torch.randn(5, 4)
    torch.testing.assert_close(model(x), large(x))


def test_weights_that_are_computed_keep_their_units():
    model = nn.Sequential(nn.Linear(4, 6), nn.Sigmoid(), nn.Linear(6, 5), nn.Sigmoid(), nn.Linear(5, 2))
    kill(model[0], [0])
    ignore(model[4], [1])
    nn.utils.parametrizations.weight_norm(model[2])
    done = cut(model, torch.randn(2, 4))
    assert model[0].out_features == 6
    assert done.notes == ("linear is kept as it is: its weight is computed, not a parameter",)


@pytest.mark.parametrize("times", [1, 3])
def test_a_branch_on_the_batch_size_is_seen_by_the_comparison(times):
    model = net(lambda x: x * 2 if (len(x) > 5) == (times == 3) else x)
    refuse(model, "gives other outputs", torch.randn(times, 4))


class Gained(nn.Module):
    def __init__(self, persistent):
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
        self.register_buffer("gain", torch.linspace(1.0, 2.0, 6), persistent=persistent)

    def forward(self, x):
        return self.last(self.first(x).sigmoid() * self.gain)


@pytest.mark.parametrize(("persistent", "width"), [(False, 6), (True, 4)])
def test_a_buffer_that_is_not_stored_keeps_its_units(persistent, width):
    model = Gained(persistent)
    ignore(model.last, [2, 3])
    _, small = check(model, torch.randn(2, 4))
    assert small.first.out_features == len(small.gain) == width


def test_a_layer_that_reads_packed_sequences_is_named():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.reader, self.last = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, 2)

        def forward(self, x, lengths):
            packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            return self.last(self.reader(packed)[1][0][-1])

    with pytest.raises(GraphError, match="layer 'reader' reads packed sequences, .* padded ones"):
        plan(Packed(), (torch.randn(2, 3, 4), torch.tensor([3, 2])), on_unknown="keep")


def test_what_torch_says_of_a_failed_trace_is_not_printed(capfd):
    with pytest.raises(GraphError, match="follows no branch on the data"):
        cut(net(lambda x: x if x.sum() > 0 else -x), torch.randn(2, 4))
    assert capfd.readouterr() == ("", "")
