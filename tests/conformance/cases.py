"""Every method and every layer: the two tables that the suite multiplies. A new one of either comes in by itself."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import vardrop as vd


def convert(net: nn.Module, method: vd.Method | tuple[vd.Method, ...]) -> nn.Module:
    """Like vd.convert, with the stage before where `method` is a second one."""
    follows = getattr(method, "follows", None)
    return vd.convert(net if follows is None else vd.convert(net, follows(place=method.place)), method)


class Net(nn.Sequential):
    """Of a plain Sequential the last layer's outputs are known to be the net's; of this one they are not."""


@dataclass(frozen=True)
class LayerCase:
    """A layer and the shape of an input to it."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def converted(self, method: vd.Method | tuple[vd.Method, ...]) -> nn.Module:
        return convert(Net(self.build()), method)

    def input(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(self.shape, dtype=dtype, generator=torch.Generator().manual_seed(7))


LAYERS = {
    "linear": LayerCase(lambda: nn.Linear(6, 5), (4, 6)),
    "linear-no-bias-3d": LayerCase(lambda: nn.Linear(6, 5, bias=False), (4, 3, 6)),
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
}

METHODS = {name: cls() for name, cls in vd.methods().items()}
VARIANTS = {
    **METHODS,
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
    "gaussian-dropout-on-inputs": vd.GaussianDropout(on="inputs"),
    "variational-dropout-on-inputs": vd.VariationalDropout(on="inputs", alpha="input"),
    "structured-bp-input": vd.StructuredBP(place="input", draws="example", init_log_sigma=-1.0),
    "beta-bernoulli-output": vd.BetaBernoulli(place="output", init_a=2.0, init_b=3.0),
    "gate-and-noise": (vd.BetaBernoulli(place="input", init_a=2.0), vd.SparseVD()),
    "sparse-vd-weight-sampling": vd.SparseVD(sampling="weight", form="sigmoid", train_clip=True),
}
