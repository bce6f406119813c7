"""Prediction: the noise switch and the ensemble over draws."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import reduce
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from vardrop.errors import InvalidValueError
from vardrop.layers import samples_outputs
from vardrop.lrt import at_least_float32
from vardrop.modes import copied, in_eval_mode
from vardrop.noise import Noise
from vardrop.sites import Site, batched, sites

LARGEST_PASS = 2**22
"""Elements of the largest tensor up to which drawing several samples in one pass is worth its memory."""


class noise:
    """Switches the noise of `model` alone; batch-norm mode and pruning marks stay as they are.

    Takes effect at once; used with ``with``, the earlier state comes back at the end.

    Args:
        model: a converted model.
        on: ``True`` or ``False`` forces it; ``None`` lets it follow ``model.training`` again.
        generator: source of the draws from now on; ``None`` for torch's default, which alone is wound back where
            ``torch.utils.checkpoint`` computes a part of a pass again.

    Raises:
        InvalidValueError: `on` or `generator` is something else.

    >>> net = vd.convert(torch.nn.Linear(8, 4), vd.ARD()).eval()
    >>> x = torch.randn(2, 8)
    >>> with vd.noise(net, on=True):
    ...     bool((net(x) == net(x)).all())
    False
    >>> bool((net(x) == net(x)).all())
    True
    """

    def __init__(self, model: nn.Module, on: bool | None = True, *, generator: torch.Generator | None = None) -> None:
        if not (on is None or isinstance(on, bool)):
            raise InvalidValueError(f"on={on!r}: must be True, False, or None to follow model.training")
        if not isinstance(generator, torch.Generator | None):
            raise InvalidValueError(f"generator={generator!r}: must be a torch.Generator, or None for torch's default")
        self._before = [(site.noise, site.noise.on, site.noise.generator) for site in sites(model)]
        for module, _, _ in self._before:
            module.on, module.generator = on, generator

    def __enter__(self) -> noise:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for module, on, generator in self._before:
            module.on, module.generator = on, generator


def predict(
    model: nn.Module, x: Tensor | tuple[Any, ...], *, samples: int = 20, generator: torch.Generator | None = None
) -> Tensor:
    """Mean class probabilities over `samples` draws of the noise; batch-norm and plain dropout in eval mode.

    Probabilities are averaged, not logits. The model's mode and noise switch are as before afterwards.

    Args:
        model: returns logits ``(N, classes, *)``.
        x: one batch of inputs, or a tuple with the arguments of the model's forward.
        samples: number of draws, above 0.
        generator: source of the draws; by default that of :class:`vardrop.noise`, or torch's.

    Returns:
        Probabilities of the shape of the logits, in float32 or better; they sum to one over dimension 1.

    Raises:
        InvalidValueError: `samples` is below 1, or the model returns something else, or a single class.

    >>> net = vd.convert(torch.nn.Linear(8, 4), vd.ARD())
    >>> vd.predict(net, torch.randn(2, 8), samples=3).sum(dim=1)
    tensor([1., 1.])
    """
    with _noisy_eval(model, generator):
        parts = (_probabilities(part).sum(dim=0) for part in _passes(model, x, samples))
        return reduce(torch.add, parts) / samples


def _probabilities(logits: Tensor) -> Tensor:
    """Of logits ``(some, N, classes, *)``."""
    if logits.dim() < 3:
        raise InvalidValueError(f"the model returns shape {tuple(logits.shape[1:])}: must be (N, classes, *)")
    if logits.shape[2] == 1:
        raise InvalidValueError(
            f"the model returns shape {tuple(logits.shape[1:])}, a single class: must be (N, classes, *); for a "
            "regression take vardrop.draws, for a single logit vardrop.draws(model, x).sigmoid().mean(0)"
        )
    return torch.softmax(at_least_float32(logits), dim=2)


def draws(
    model: nn.Module, x: Tensor | tuple[Any, ...], *, samples: int = 20, generator: torch.Generator | None = None
) -> Tensor:
    """What `model` returns for `samples` independent draws of its noise: ``(samples, N, *)``, without gradients.

    As in :func:`predict`, all but the noise is in eval mode. The measures of :mod:`vardrop.uncertainty` take the log
    probabilities ``draws(model, x).log_softmax(dim=2)`` of a classifier, or the draws of a regression as they are.

    Args:
        model: returns a tensor ``(N, *)``.
        x: one batch of inputs, or a tuple with the arguments of the model's forward.
        samples: number of draws, above 0.
        generator: source of the draws; by default that of :class:`vardrop.noise`, or torch's.

    Raises:
        InvalidValueError: `samples` is below 1, or the model returns something else than a tensor.

    >>> net = vd.convert(torch.nn.Linear(8, 4), vd.ARD())
    >>> vd.draws(net, torch.randn(2, 8), samples=3).shape
    torch.Size([3, 2, 4])
    """
    with _noisy_eval(model, generator):
        return torch.cat(list(_passes(model, x, samples)))


@contextmanager
def _noisy_eval(model: nn.Module, generator: torch.Generator | None) -> Iterator[None]:
    """All of `model` in eval mode but its noise, and no gradients; modes and noise switches come back at the end."""
    with in_eval_mode(model), torch.no_grad(), noise(model, on=True, generator=generator) as switch:
        if generator is None:
            for module, _, own in switch._before:
                module.generator = own
        yield


def _passes(model: nn.Module, x: Tensor | tuple[Any, ...], samples: int) -> Iterator[Tensor]:
    """Independent draws of the output, ``(some, N, *)`` at a time, `samples` in all.

    The first is a plain call, which also tells how many fit into one pass. The others run under ``vmap``, in which
    every random number is drawn anew for each sample, be it one for each example or one for the whole minibatch.
    What ``vmap`` cannot follow, such as the recurrent layers of torch, is called once for each sample, and so is a
    model with hooks.
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise InvalidValueError(f"samples={samples!r}: must be a whole number, at least 1")
    inputs = x if isinstance(x, tuple) else (x,)
    first, size = _first_pass(model, copied(inputs))
    if not isinstance(first, Tensor):
        raise InvalidValueError(
            f"the model returns a {type(first).__name__}: must return a tensor; wrap it in a module that picks one"
        )
    yield first[None]
    left = samples - 1
    some = 1 if _is_watched(model) else min(left, LARGEST_PASS // size)
    while left > 0:
        together = _together(model, inputs, min(some, left)) if some > 1 else None
        if together is None:
            some = 1
            together = model(*copied(inputs))[None]
        yield together
        left -= len(together)


def _first_pass(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor, int]:
    """The output, and the elements of the largest tensor that a draw has of its own, as far as layers tell."""
    sizes = [1, *(site.weight.numel() for site in sites(model) if _draws_whole_weight(site))]

    def record(module: nn.Module, given: Any, output: Any) -> None:
        sizes.extend(value.numel() for value in (*given, output) if isinstance(value, Tensor))
        if isinstance(module, nn.RNNBase):
            sizes.append(4 * tree_leaves(output)[0].numel())  # the gates of all steps

    layers = (module for module in model.modules() if not isinstance(module, Noise))
    handles = [layer.register_forward_hook(record) for layer in layers]
    try:
        return model(*inputs), max(sizes)
    finally:
        for handle in handles:
            handle.remove()


def _is_watched(model: nn.Module) -> bool:
    """Whether somebody's hooks look at the passes of `model`: they are to see one at a time."""
    kinds = ((*module._forward_hooks.values(), *module._forward_pre_hooks.values()) for module in model.modules())
    hooks = (hook for found in kinds for hook in found)
    return any(not getattr(hook, "__module__", "").startswith("vardrop.") for hook in hooks)


def _draws_whole_weight(site: Site) -> bool:
    local = getattr(site.noise, "sampling", "local") == "local"
    return site.counts == "weights" and not (local and samples_outputs(site.layer))


def _together(model: nn.Module, inputs: tuple[Any, ...], samples: int) -> Tensor | None:
    """`samples` draws in one pass on the plain path; ``None`` where ``vmap`` cannot follow the model.

    It cannot follow one that keeps what it computes, on a module or in lists and dicts there: then the model is given
    back as it was.
    """
    before = [(holder, type(holder)(holder)) for holder in _holders(model)]
    found: Tensor | None
    try:
        with batched(model):
            each = torch.func.vmap(lambda _: model(*copied(inputs)), randomness="different")
            found = each(torch.empty(samples))
    except RuntimeError:
        found = None
    kept = (leaf for holder in _holders(model) for value in _values(holder) for leaf in _leaves(value))
    if found is None or any(torch._C._functorch.is_batchedtensor(leaf) for leaf in kept):
        for holder, content in before:
            holder.clear()
            holder.update(content) if isinstance(holder, dict) else holder.extend(content)
        return None
    return found


def _holders(model: nn.Module) -> list[dict[Any, Any] | list[Any]]:
    """The attributes of each module of `model`, and the lists and dicts among them, and within these.

    Those of a class of their own look after themselves.
    """
    found: dict[int, dict[Any, Any] | list[Any]] = {}
    left: list[Any] = [vars(module) for module in model.modules()]
    while left:
        holder = left.pop()
        if type(holder) in (dict, list) and id(holder) not in found:
            found[id(holder)] = holder
            left += _values(holder)
    return list(found.values())


def _values(holder: dict[Any, Any] | list[Any]) -> Iterable[Any]:
    return holder.values() if isinstance(holder, dict) else holder


def _leaves(value: Any) -> list[Tensor]:
    """The tensors in a `value` of a holder, but for those in holders of their own."""
    if isinstance(value, Tensor):
        return [value]
    if value is None or isinstance(value, str | int | float) or type(value) in (dict, list):
        return []
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
