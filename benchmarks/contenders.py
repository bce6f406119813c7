"""Who is compared: plain PyTorch, vardrop on its two paths, and every peer that is installed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor, nn

import vardrop as vd

Step = Callable[[], None]
NUM_DATA = 60_000


@dataclass(frozen=True)
class Contender:
    """A way to make a layer Bayesian: `dense` and `conv` build it, `price` gives its KL after a forward pass."""

    name: str
    dense: Callable[[int, int], nn.Module]
    conv: Callable[[int, int], nn.Module] | None
    price: Callable[[nn.Module], Tensor] | None


class LastStep(nn.Module):
    """The output of a batch-first recurrent layer at its last time step."""

    def forward(self, outputs: tuple[Tensor, ...]) -> Tensor:
        return outputs[0][:, -1]


def own() -> list[Contender]:
    """Plain first: all ratios are to it."""
    return [
        Contender("plain", nn.Linear, _conv, None),
        _vardrop("vardrop SparseVD, reference", vd.SparseVD(), None),
        _vardrop("vardrop SparseVD, fast", vd.SparseVD(), True),
        _vardrop("vardrop SparseVD, fast, not compiled", vd.SparseVD(), False),
        _vardrop("vardrop ARD, reference", vd.ARD(), None),
        _vardrop("vardrop ARD, fast", vd.ARD(), True),
    ]


def peers() -> list[Contender]:
    """The peers that can be imported here."""
    makers = {
        "cplxmodule": _cplxmodule,
        "bayesian_torch": _bayesian_torch,
        "torchbnn": _torchbnn,
        "blitz": _blitz,
        "torch_ard": _torch_ard,
    }
    return [contender for name, make in makers.items() if find_spec(name) for contender in make()]


def layer_step(contender: Contender, layer: nn.Module, x: Tensor) -> Step:
    """Forward, KL and backward of one layer in the middle of a net: the input wants its gradient too."""
    x = x.clone().requires_grad_()

    def step() -> None:
        x.grad = None
        layer.zero_grad(set_to_none=True)
        output = layer(x)
        if isinstance(output, tuple):
            output, price = output
        else:
            price = contender.price(layer) if contender.price else None
        loss = output.square().mean()
        (loss if price is None else loss + price / NUM_DATA).backward()

    return step


def training_step(net: nn.Module, x: Tensor, y: Tensor, *, fused: bool) -> Step:
    """A whole step with Adam."""
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, fused=fused)
    noisy = next(vd.sites(net), None) is not None
    elbo = vd.ELBO(NUM_DATA)

    def step() -> None:
        loss = nn.functional.cross_entropy(net(x), y)
        (elbo(net, loss) if noisy else loss).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _conv(inputs: int, outputs: int) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def _vardrop(name: str, method: vd.Method, compiled: bool | None) -> Contender:
    def noisy(layer: nn.Module) -> nn.Module:
        vd.convert(layer, method)
        return layer if compiled is None else vd.fast(layer, compiled=compiled)

    return Contender(
        name, lambda inputs, outputs: noisy(nn.Linear(inputs, outputs)), lambda i, o: noisy(_conv(i, o)), vd.kl
    )


def _cplxmodule() -> list[Contender]:
    from cplxmodule.nn import relevance

    def price(layer: nn.Module) -> Tensor:
        return sum(relevance.penalties(layer))

    return [
        Contender(
            f"cplxmodule {kind}",
            getattr(relevance, f"Linear{kind}"),
            lambda i, o, kind=kind: getattr(relevance, f"Conv2d{kind}")(i, o, 3, padding=1),
            price,
        )
        for kind in ("VD", "ARD")
    ]


def _bayesian_torch() -> list[Contender]:
    from bayesian_torch import layers

    return [
        Contender(
            "bayesian-torch",
            layers.LinearReparameterization,
            lambda i, o: layers.Conv2dReparameterization(i, o, 3, padding=1),
            None,
        )
    ]


def _torchbnn() -> list[Contender]:
    import torchbnn

    settings = {"prior_mu": 0.0, "prior_sigma": 0.1}
    return [
        Contender(
            "torchbnn",
            lambda i, o: torchbnn.BayesLinear(in_features=i, out_features=o, **settings),
            lambda i, o: torchbnn.BayesConv2d(in_channels=i, out_channels=o, kernel_size=3, padding=1, **settings),
            torchbnn.BKLLoss(reduction="sum"),
        )
    ]


def _blitz() -> list[Contender]:
    from blitz import modules

    return [
        Contender(
            "blitz",
            modules.BayesianLinear,
            lambda i, o: modules.BayesianConv2d(i, o, kernel_size=(3, 3), padding=1),
            lambda layer: layer.log_variational_posterior - layer.log_prior,
        )
    ]


def _torch_ard() -> list[Contender]:
    import torch_ard

    return [
        Contender(
            "pytorch-ard",
            torch_ard.LinearARD,
            lambda i, o: torch_ard.Conv2dARD(i, o, 3, padding=1),
            torch_ard.get_ard_reg,
        )
    ]
