"""Networks by name, as plain ``torch.nn``."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn

from vardrop.errors import DataError, InvalidValueError
from vardrop.modes import in_eval_mode
from vardrop.zoo.data import Data
from vardrop.zoo.own import call_own, is_own
from vardrop.zoo.text import VOCABULARY

Shape = tuple[int, ...]
Builder = Callable[[Shape, int, str], nn.Module]


def lenet_300_100(input_shape: Shape, num_classes: int, option: str = "") -> nn.Module:
    """784-300-100-10 with ReLU: 266 200 weights on MNIST."""
    return _authors_start(_dense((math.prod(input_shape), 300, 100, num_classes)))


def lenet_500_300(input_shape: Shape, num_classes: int, option: str = "") -> nn.Module:
    """784-500-300-10 with ReLU."""
    return _authors_start(_dense((math.prod(input_shape), 500, 300, num_classes)))


def lenet_5(input_shape: Shape, num_classes: int, option: str = "") -> nn.Sequential:
    """LeNet-5-Caffe, 20-50-800-500-10, ReLU after every layer but the last: 430 500 weights on MNIST.

    The ReLU stands behind the pooling, which gives the same values as before it for a quarter of the work.
    """
    channels, height, width = input_shape
    flat = 50 * _pooled(height) * _pooled(width)
    return _authors_start(
        nn.Sequential(
            nn.Conv2d(channels, 20, 5),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Conv2d(20, 50, 5),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(flat, 500),
            nn.ReLU(),
            nn.Linear(500, num_classes),
        )
    )


def lenet_5_bn(input_shape: Shape, num_classes: int, option: str = "") -> nn.Module:
    """LeNet-5-Caffe with batch-norm behind every layer but the last, as variance networks want it."""
    layers: list[nn.Module] = []
    for layer in lenet_5(input_shape, num_classes):
        layers.append(layer)
        if isinstance(layer, nn.Conv2d):
            layers.append(nn.BatchNorm2d(layer.out_channels))
        elif isinstance(layer, nn.Linear):
            layers.append(nn.BatchNorm1d(layer.out_features))
    return nn.Sequential(*layers[:-1])


def mlp(input_shape: Shape, num_classes: int, option: str) -> nn.Module:
    """Three hidden ReLU layers of the same width: ``mlp-340`` has width 340."""
    width = _whole("mlp", option, "a width such as mlp-340")
    return _dense((math.prod(input_shape), width, width, width, num_classes))


def conv_small(input_shape: Shape, num_classes: int, option: str = "") -> nn.Module:
    """Two 3x3 convolutions of stride 2 (32s and 64s channels) and two dense layers (128s), softplus between.

    ``conv-small`` has s = 1, ``conv-small-1.5`` has s = 1.5. Source: arXiv:1811.07533, section 5.2.
    """
    scale = _number("conv-small", option, "a scale such as conv-small-1.5") if option else 1.0
    narrow, wide, hidden = (max(1, int(scale * width)) for width in (32, 64, 128))
    channels, height, width = input_shape
    flat = wide * math.ceil(height / 4) * math.ceil(width / 4)
    return nn.Sequential(
        nn.Conv2d(channels, narrow, 3, stride=2, padding=1),
        nn.Softplus(),
        nn.Conv2d(narrow, wide, 3, stride=2, padding=1),
        nn.Softplus(),
        nn.Flatten(),
        nn.Linear(flat, hidden),
        nn.Softplus(),
        nn.Linear(hidden, hidden),
        nn.Softplus(),
        nn.Linear(hidden, num_classes),
    )


def vgg_like(input_shape: Shape, num_classes: int, option: str = "") -> nn.Module:
    """The VGG of the compression papers on CIFAR: 13 convolutions with batch-norm and 2 dense layers.

    ``vgg-like-0.5`` has half of the units in each, the k of arXiv:1701.05369, section 5.
    """
    channels, height, width = input_shape
    scale = _number("vgg-like", option or "1", "a factor on its widths such as vgg-like-0.5")
    layers: list[nn.Module] = []
    for widths in ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)):
        for out in (max(1, round(scale * whole)) for whole in widths):
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.BatchNorm2d(out), nn.ReLU()]
            channels = out
        layers.append(nn.MaxPool2d(2, ceil_mode=True))
    layers += [
        nn.Flatten(),
        nn.Linear(channels * math.ceil(height / 32) * math.ceil(width / 32), channels),
        nn.BatchNorm1d(channels),
        nn.ReLU(),
        nn.Linear(channels, num_classes),
    ]
    return nn.Sequential(*layers)


class CharLSTM(nn.Module):
    """One LSTM over one-hot characters and a dense layer: logits ``(N, characters, T)`` of the next ones.

    Source: arXiv:1708.00077, section 4.2.
    """

    def __init__(self, characters: int, units: int) -> None:
        super().__init__()
        self.register_buffer("one_hot", torch.eye(characters), persistent=False)
        self.lstm = nn.LSTM(characters, units, batch_first=True)
        self.output = nn.Linear(units, characters)
        nn.init.orthogonal_(cast(Tensor, self.lstm.weight_hh_l0))

    def forward(self, x: Tensor) -> Tensor:
        """Logits for int64 ids ``(N, T)``."""
        states, _ = self.lstm(torch.nn.functional.embedding(x, cast(Tensor, self.one_hot)))
        logits: Tensor = self.output(states)
        return logits.transpose(1, 2)


class WordLSTM(nn.Module):
    """An embedding of words, one LSTM, and a dense layer on its last state: logits ``(N, classes)``.

    Source: arXiv:1708.00077, section 4.1.
    """

    def __init__(self, classes: int, units: int, width: int = 300) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, width)
        self.lstm = nn.LSTM(width, units, batch_first=True)
        self.output = nn.Linear(units, classes)
        nn.init.orthogonal_(cast(Tensor, self.lstm.weight_hh_l0))

    def forward(self, x: Tensor) -> Tensor:
        """Logits for int64 ids ``(N, T)``."""
        states, _ = self.lstm(self.embedding(x))
        logits: Tensor = self.output(states[:, -1])
        return logits


def char_lstm(input_shape: Shape, num_classes: int, option: str) -> nn.Module:
    """The next character from one LSTM: ``char-lstm-256`` has 256 units."""
    return CharLSTM(num_classes, _whole("char-lstm", option, "a number of units such as char-lstm-256"))


def word_lstm(input_shape: Shape, num_classes: int, option: str) -> nn.Module:
    """The class of a text from one LSTM over its embedded words: ``word-lstm-128`` has 128 units."""
    return WordLSTM(num_classes, _whole("word-lstm", option, "a number of units such as word-lstm-128"))


NETS: dict[str, Builder] = {
    "lenet-300-100": lenet_300_100,
    "lenet-500-300": lenet_500_300,
    "lenet-5": lenet_5,
    "lenet-5-bn": lenet_5_bn,
    "mlp": mlp,
    "conv-small": conv_small,
    "vgg-like": vgg_like,
    "char-lstm": char_lstm,
    "word-lstm": word_lstm,
}
TAKE_OPTION = ("mlp", "conv-small", "vgg-like", "char-lstm", "word-lstm")


def build_net(spec: str, *, input_shape: Shape, num_classes: int) -> nn.Module:
    """The network called `spec` for inputs of `input_shape` (without the batch) and so many classes.

    Args:
        spec: a name from ``NETS``, with an option behind it where it takes one, such as ``mlp-340``,
            ``conv-small-1.5``, ``vgg-like-0.5``, ``char-lstm-256`` and ``word-lstm-128``, or one's own
            ``file.py:function``, which is called with whichever of ``input_shape`` and ``num_classes`` it takes.

    Raises:
        InvalidValueError: the name is unknown, or the function does not give a module.
        DataError: the net cannot be built for such inputs, or one's own file or function cannot be had.

    >>> from vardrop.zoo import build_net
    >>> net = build_net("lenet-300-100", input_shape=(1, 28, 28), num_classes=10)
    >>> sum(layer.weight.numel() for layer in net if hasattr(layer, "weight"))
    266200
    """
    if is_own(spec):
        net = call_own(spec, input_shape=input_shape, num_classes=num_classes)
        if not isinstance(net, nn.Module):
            raise InvalidValueError(f"net {spec!r} gave a {type(net).__name__}: must give a torch.nn.Module")
        return net
    name, option = spec, ""
    for family in TAKE_OPTION:
        if spec.startswith(f"{family}-"):
            name, option = family, spec.removeprefix(f"{family}-")
    if name not in NETS:
        near = difflib.get_close_matches(name, NETS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "."
        raise InvalidValueError(f"net {spec!r} is unknown{hint} Known are: {', '.join(NETS)}, or file.py:function")
    try:
        return NETS[name](input_shape, num_classes, option)
    except (ValueError, RuntimeError) as error:
        if isinstance(error, InvalidValueError):
            raise
        raise DataError(f"net {spec!r} cannot be built for inputs of shape {input_shape}: {error}") from error


def check_fits(spec: str, net: nn.Module, data: Data) -> None:
    """Runs one example through `net`, before any training.

    Raises:
        DataError: the images do not fit the net, or its outputs do not match the classes.
    """
    try:
        with in_eval_mode(net), torch.no_grad():
            output = net(data.train.x[:1].clone())
    except Exception as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(
            f"data {data.name!r} has inputs of shape {data.input_shape}, which do not fit the net {spec!r}: {reason}"
        ) from error
    wanted = (1, data.num_classes, *data.train.y.shape[1:])
    if not isinstance(output, Tensor):
        raise DataError(
            f"net {spec!r} gives a {type(output).__name__}: must give a tensor of logits, of shape {wanted}"
        )
    if output.shape != wanted:
        raise DataError(
            f"net {spec!r} gives outputs of shape {tuple(output.shape)} for one example of {data.name!r}: "
            f"must be {wanted}, one logit for each class of each label"
            + ("" if data.train.y.dim() == 1 else "; labels are the numbers of classes, not one-hot vectors")
        )


def _dense(widths: tuple[int, ...]) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Flatten()]
    for wide, narrow in pairwise(widths):
        layers += [nn.Linear(wide, narrow), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _authors_start(net: nn.Sequential) -> nn.Sequential:
    """The start of the sparse VD authors: dense weights N(0, 0.01^2), convolutions Glorot-uniform, biases zero."""
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.01)
        elif isinstance(layer, nn.Conv2d):
            nn.init.xavier_uniform_(layer.weight)
        if isinstance(layer, nn.Linear | nn.Conv2d) and layer.bias is not None:
            nn.init.zeros_(layer.bias)
    return net


def _pooled(size: int) -> int:
    """What two rounds of a 5x5 convolution and pooling by 2 leave of a side."""
    left = ((size - 4) // 2 - 4) // 2
    if left < 1:
        raise DataError(
            f"lenet-5 needs sides of at least 16 pixels, not {size}: a convolutional net for small images is conv-small"
        )
    return left


def _number(family: str, option: str, example: str) -> float:
    try:
        value = float(option)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise InvalidValueError(f"net '{family}-{option}': {family} takes {example}")
    return value


def _whole(family: str, option: str, example: str) -> int:
    value = _number(family, option, example)
    if not value.is_integer():
        raise InvalidValueError(f"net '{family}-{option}': {family} takes {example}, a whole number")
    return int(value)
