"""The way out: from a converted, pruned model to a plain and smaller one."""

from __future__ import annotations

import warnings
from typing import Any, Literal, overload

from torch import nn
from torch.optim.swa_utils import AveragedModel

from vardrop.errors import CompactionWarning
from vardrop.sites import sites
from vardrop.surgery.cut import cut, plan
from vardrop.surgery.graph import as_arguments
from vardrop.surgery.plain import plain_copy, trained_alone
from vardrop.surgery.plan import Plan
from vardrop.surgery.prune import would_live


@overload
def compact(
    model: nn.Module, example_inputs: Any, *, dry_run: Literal[False] = False, on_unknown: str = "refuse"
) -> nn.Module: ...


@overload
def compact(model: nn.Module, example_inputs: Any, *, dry_run: Literal[True], on_unknown: str = "refuse") -> Plan: ...


def compact(
    model: nn.Module, example_inputs: Any, *, dry_run: bool = False, on_unknown: str = "refuse"
) -> nn.Module | Plan:
    """A smaller copy of `model` in plain torch.nn, with the outputs of the pruned model in eval mode.

    A unit goes if no living weight reads it, or if it is a constant that moves exactly into the bias of its
    readers. Modules keep their classes and names. The result is held against the model before it is returned: on the
    example, on random inputs of its shape, and on a batch of one and a larger one. What a forward decides by the size
    of its input, it is taken to decide as for the example.

    Args:
        model: a converted model, or a plain one whose weights hold zeros; it is left as it is. Of one that is wrapped
            for several devices, for averaged weights or by the compiler, the model inside is taken.
        example_inputs: one tensor, or a tuple with the arguments of the model's forward.
        dry_run: return the plan alone; ``print`` shows what goes, what is folded, and what stays and why.
        on_unknown: ``"refuse"`` raises at an operation without a rule, ``"keep"`` keeps all units around it.

    Raises:
        GraphError: the model cannot be traced, holds an operation without a rule, states sizes in its code
            that the cut changes, does not give the same outputs after the cut, or uses a noisy weight elsewhere too.
        InvalidValueError: `on_unknown` is something else, or `model` is no module.

    Warns:
        CompactionWarning: a layer runs in training alone, the model holds what it knows in variances, or weights are
            dead and yet no unit could go.

    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    >>> net = vd.convert(net, vd.ARD())
    >>> for site in vd.sites(net):
    ...     site.noise.mask = torch.ones_like(site.weight, dtype=torch.bool)
    >>> next(vd.sites(net)).noise.mask[:5] = False
    >>> vd.compact(net, torch.randn(1, 4))
    Sequential(
      (0): Linear(in_features=4, out_features=3, bias=True)
      (1): ReLU()
      (2): Linear(in_features=3, out_features=2, bias=True)
    )
    """
    model = _unwrapped(model)
    _warn_of_what_is_not_marked(model)
    small = plain_copy(model, example_inputs)
    if dry_run:
        return plan(small, example_inputs, on_unknown=on_unknown)
    alone = trained_alone(small, as_arguments(example_inputs))
    done = cut(small, example_inputs, on_unknown=on_unknown)
    if done.parameters_after == done.parameters_before and done.obstacles and _has_dead_weights(small):
        warnings.warn(
            f"weights are dead, but no unit could be taken out: {'; '.join(done.obstacles[:3])}; "
            "print(vardrop.compact(model, example_inputs, dry_run=True)) shows all",
            CompactionWarning,
            stacklevel=2,
        )
    if alone and done.parameters_after < done.parameters_before:
        warnings.warn(
            f"layer {alone[0]!r} runs in training but not in eval mode and is left as it was: the small net cannot be "
            "trained on with it",
            CompactionWarning,
            stacklevel=2,
        )
    return small


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of torch's wrappers: of several devices, of averaged weights, of the compiler."""
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel | AveragedModel):
        model = model.module
    inner = getattr(model, "_orig_mod", None)
    return _unwrapped(inner) if isinstance(inner, nn.Module) else model


def _warn_of_what_is_not_marked(model: nn.Module) -> None:
    found = list(sites(model))
    if found and all(site.noise.mask is None for site in found):
        counted = would_live(model)
        if counted.alive < counted.total:
            warnings.warn(
                f"nothing is marked dead, though {counted.total - counted.alive:,} of {counted.total:,} would be: call "
                "vardrop.prune(model) first",
                CompactionWarning,
                stacklevel=3,
            )


def _has_dead_weights(plain: nn.Module) -> bool:
    return any(bool((weight == 0).any()) for weight in plain.parameters() if weight.dim() >= 2)
