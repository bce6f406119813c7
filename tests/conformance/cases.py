"""Every method and every layer: the two tables that the suite multiplies. A new one of either comes in by itself."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import vardrop as vd


class First(nn.Module):
    """The output of a recurrent layer, without its last state."""

    def forward(self, outputs: tuple[Tensor, ...]) -> Tensor:
        return outputs[0]


@dataclass(frozen=True)
class LayerCase:
    """A layer and the shape of an input to it: numbers, or words below `words`."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    words: int = 0

    def net(self) -> nn.Sequential:
        layer = self.build()
        return nn.Sequential(layer, First()) if isinstance(layer, nn.RNNBase) else nn.Sequential(layer)

    def input(self, dtype: torch.dtype = torch.float32) -> Tensor:
        generator = torch.Generator().manual_seed(7)
        if self.words:
            return torch.randint(self.words, self.shape, generator=generator)
        return torch.randn(self.shape, dtype=dtype, generator=generator)

    @property
    def linear_in_the_weight(self) -> bool:
        return not isinstance(self.build(), nn.RNNBase)


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
    "rnn": LayerCase(lambda: nn.RNN(3, 4, nonlinearity="relu", bias=False), (5, 2, 3)),
    "lstm": LayerCase(lambda: nn.LSTM(3, 4, num_layers=2, bidirectional=True), (5, 2, 3)),
    "gru": LayerCase(lambda: nn.GRU(3, 4, batch_first=True), (2, 5, 3)),
    "embedding": LayerCase(lambda: nn.Embedding(7, 4, padding_idx=2), (3, 5), words=7),
    "embedding-bag": LayerCase(lambda: nn.EmbeddingBag(7, 4, mode="sum"), (3, 5), words=7),
}

METHODS = {name: cls() for name, cls in vd.methods().items()}
VARIANTS = {
    **METHODS,
    "variational-dropout-input": vd.VariationalDropout(alpha="input"),
    "variational-dropout-output": vd.VariationalDropout(alpha="output"),
    "variational-dropout-weight": vd.VariationalDropout(alpha="weight", form="cubic"),
    "vbd-layer": vd.VBD(alpha="layer"),
    "vbd-input": vd.VBD(alpha="input"),
    "vbd-bounded": vd.VBD(low=0.0, high=1.0),
    "sparse-vd-weight-sampling": vd.SparseVD(sampling="weight", form="sigmoid", train_clip=True),
}
