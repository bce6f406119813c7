"""Every method and every layer: the two tables that the suite multiplies. A new one of either comes in by itself."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import vardrop as vd
from vardrop.layers import shows_units, takes_gates
from vardrop.noise import MaskedUnits, MaskedWeights


def convert(net: nn.Module, method: vd.Method | tuple[vd.Method, ...]) -> nn.Module:
    """Like vd.convert, with the stage before where `method` is a second one."""
    follows = getattr(method, "follows", None)
    return vd.convert(net if follows is None else vd.convert(net, follows(place=method.place)), method)


class First(nn.Module):
    """The output of a recurrent layer, without its last state."""

    def forward(self, outputs: tuple[Tensor, ...]) -> Tensor:
        return outputs[0]


class Net(nn.Sequential):
    """Of a plain Sequential the last layer's outputs are known to be the net's; of this one they are not."""


class SelfAttention(Net):
    """Attention of one tensor to itself, without the weights it gave."""

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self[0](x, x, x)[0]
        return output


class Conv1D(nn.Module):
    """A stand-in for the dense layer of transformers, which is known by its name."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(0.5 * torch.randn(nx, nf)), nn.Parameter(torch.randn(nf))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


Conv1D.__module__ = "transformers.pytorch_utils"


@dataclass(frozen=True)
class LayerCase:
    """A layer and the shape of an input to it: numbers, or words below `words`."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    words: int = 0

    def net(self) -> nn.Sequential:
        layer = self.build()
        if isinstance(layer, nn.MultiheadAttention):
            return SelfAttention(layer)
        return Net(layer, First()) if isinstance(layer, nn.RNNBase) else Net(layer)

    def converted(self, method: vd.Method | tuple[vd.Method, ...]) -> nn.Module:
        return convert(self.net(), method)

    def input(self, dtype: torch.dtype = torch.float32) -> Tensor:
        generator = torch.Generator().manual_seed(7)
        if self.words:
            return torch.randint(self.words, self.shape, generator=generator)
        return torch.randn(self.shape, dtype=dtype, generator=generator)

    @property
    def linear_in_the_weight(self) -> bool:
        return not isinstance(self.build(), nn.RNNBase | nn.MultiheadAttention)

    def takes(self, method: vd.Method | tuple[vd.Method, ...]) -> bool:
        """Whether `method` can be had on this layer: the units of some have no gate."""
        methods, layer = method if isinstance(method, tuple) else (method,), self.build()
        if any(one.follows for one in methods) and not shows_units(layer):
            return False
        return takes_gates(type(layer)) or not any(one.on_units for one in methods)


LAYERS = {
    "linear": LayerCase(lambda: nn.Linear(6, 5), (4, 6)),
    "linear-no-bias-3d": LayerCase(lambda: nn.Linear(6, 5, bias=False), (4, 3, 6)),
    "linear-of-transformers": LayerCase(lambda: Conv1D(5, 6), (4, 3, 6)),
    "conv1d-circular": LayerCase(lambda: nn.Conv1d(4, 6, 3, padding=1, padding_mode="circular"), (3, 4, 9)),
    "conv1d-replicate": LayerCase(lambda: nn.Conv1d(4, 6, 3, stride=2, padding=2, padding_mode="replicate"), (3, 4, 9)),
    "conv2d": LayerCase(lambda: nn.Conv2d(3, 4, 3, stride=2, padding=1), (3, 3, 7, 8)),
    "conv2d-groups": LayerCase(lambda: nn.Conv2d(4, 6, 3, groups=2, dilation=2, bias=False), (3, 4, 8, 8)),
    "conv2d-depthwise": LayerCase(lambda: nn.Conv2d(4, 8, 3, groups=4, padding="same"), (3, 4, 6, 6)),
    "conv2d-reflect": LayerCase(lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (3, 3, 7, 8)),
    "conv3d": LayerCase(lambda: nn.Conv3d(2, 3, 2, padding=(1, 0, 1)), (2, 2, 4, 4, 4)),
    "conv-transpose1d": LayerCase(lambda: nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2), (3, 4, 5)),
    "conv-transpose2d": LayerCase(
        lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), (3, 4, 5, 5)
    ),
    "conv-transpose3d": LayerCase(lambda: nn.ConvTranspose3d(2, 3, 2, dilation=2, bias=False), (2, 2, 3, 3, 3)),
    "rnn": LayerCase(lambda: nn.RNN(3, 4, nonlinearity="relu", bias=False), (5, 2, 3)),
    "lstm": LayerCase(lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True), (5, 2, 3)),
    "gru": LayerCase(lambda: nn.GRU(3, 4, batch_first=True), (2, 5, 3)),
    "attention": LayerCase(lambda: nn.MultiheadAttention(6, 2, batch_first=True), (3, 4, 6)),
    "embedding": LayerCase(lambda: nn.Embedding(7, 4, padding_idx=2), (3, 5), words=7),
    "embedding-bag": LayerCase(lambda: nn.EmbeddingBag(7, 4, mode="sum"), (3, 5), words=7),
}

QUIET = (MaskedWeights, MaskedUnits)
"""The noises that draw nothing."""

METHODS = {name: cls() for name, cls in vd.methods().items()}
VARIANTS = {
    **METHODS,
    "bernoulli-dropout-recurrent": vd.BernoulliDropout(rate=0.1, recurrent_rate=0.5),
    "concrete-dropout": vd.ConcreteDropout(init_rate=0.5),  # where the mean of the relaxed draws is exact
    "variational-dropout-input": vd.VariationalDropout(alpha="input"),
    "variational-dropout-output": vd.VariationalDropout(alpha="output"),
    "variational-dropout-weight": vd.VariationalDropout(alpha="weight", form="cubic"),
    "vbd-layer": vd.VBD(alpha="layer"),
    "vbd-input": vd.VBD(alpha="input"),
    "vbd-bounded": vd.VBD(low=0.0, high=1.0),
    # its quiet pass is the mean of the draws only where the clip of its input-dependent part does not act
    "dependent-beta-bernoulli": vd.DependentBetaBernoulli(init_shift=0.5, init_std=1e-3, threshold=0.0),
    "dependent-beta-bernoulli-input": vd.DependentBetaBernoulli(place="input", init_shift=2.0, init_std=1e-3),
    "variance-network-layer": vd.VarianceNetwork(parameterisation="layer"),
    "variance-network-input": vd.VarianceNetwork(parameterisation="input"),
    "variance-network-output": vd.VarianceNetwork(parameterisation="output", init_log_alpha=12.0),
    "variance-network-weight": vd.VarianceNetwork(parameterisation="weight"),
    "variance-network-additive": vd.VarianceNetwork(parameterisation="additive"),
    "variance-network-weight-sampling": vd.VarianceNetwork(sampling="weight"),
    "gaussian-dropout-on-inputs": vd.GaussianDropout(on="inputs"),
    "variational-dropout-on-inputs": vd.VariationalDropout(on="inputs", alpha="input"),
    "structured-bp-input": vd.StructuredBP(place="input", draws="example", init_log_sigma=-1.0),
    "beta-bernoulli-output": vd.BetaBernoulli(place="output", init_a=2.0, init_b=3.0),
    "gate-and-noise": (vd.BetaBernoulli(place="input", init_a=2.0), vd.SparseVD()),
    **{name: cls() for name, cls in vd.baselines().items()},
    "structured-sparsity-learning-input": vd.StructuredSparsityLearning(place="input", threshold=0.25),
    "structured-sparsity-learning-output": vd.StructuredSparsityLearning(place="output", threshold=0.25),
    "sparse-vd-weight-sampling": vd.SparseVD(sampling="weight", form="sigmoid", train_clip=True),
}
