"""Several runs that differ in their seed alone, trained as one: each step is one batched pass over all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vardrop.checkpoint import Epoch, draw_on_from, epochs_in, read, write
from vardrop.elbo import kl_at
from vardrop.errors import ApartError, InvalidValueError, TrainingError
from vardrop.methods import Method
from vardrop.noise import AdversarialNoise
from vardrop.sites import batched, sites
from vardrop.streams import noise_seed
from vardrop.surgery.prune import Pruned, count_alive, would_live
from vardrop.surgery.sizes import sizes
from vardrop.train import Loader, Schedule, accelerator_of, living, take_up

Losses = tuple[Tensor, Tensor, Tensor]
Autocast = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Member:
    """One of the runs.

    Args:
        net: as :func:`vardrop.train.train` takes it.
        batches: its training data; all members have equally many batches of equal sizes.
        schedule: how to train; those of two members differ in their seed alone.
        folder: where its checkpoint and its history go.
        identity: a text that tells it from other runs.
        evaluate: gives its validation and its test error.
        whole: what its history counts against; ``None`` for all that may live in its net.
    """

    net: nn.Module
    batches: Loader
    schedule: Schedule
    folder: Path
    identity: str
    evaluate: Callable[[nn.Module], tuple[float | None, float | None]]
    whole: Pruned | None = None


def train_together(
    members: Sequence[Member],
    *,
    num_data: int,
    on_epoch: Callable[[int, Epoch], None] = lambda member, epoch: None,
) -> list[list[Epoch]]:
    """Trains the nets of all `members` in place at once, and returns their histories.

    Each member sees the batches that it would see alone, with noise of its own, and learns from its own loss: what
    comes out has the law of single runs, and without noise their very figures. On a GPU, small nets cost together
    little more than one. The plain path is taken, not the fast one; nothing is logged but checkpoint and history, which
    are those of single runs, so that :func:`vardrop.train.train` can go on from them. The seconds of an epoch are
    each member's share.

    Broken off, the same members go on bit for bit. Members that stand at different epochs go on in groups.

    Args:
        members: the runs, at least one.
        num_data: labels of each training set, for the ELBO.
        on_epoch: called after every epoch with the number of the member and its line of the history.

    Raises:
        InvalidValueError: there are no members.
        MissingExtraError: accelerate is not installed.
        ApartError: the runs differ in more than the seed, or cannot be batched; says why.
        TrainingError: a loss is no longer finite; names the seed and the step.
        StorageError: a checkpoint is foreign or damaged, or cannot be written.
    """
    if not members:
        raise InvalidValueError("members=[]: must be at least one run")
    x, y = next(iter(members[0].batches))
    obstacle = why_apart([member.net for member in members], [member.schedule for member in members], x[:2], y[:2])
    if obstacle is not None:
        raise ApartError(f"these runs cannot train together: {obstacle}; train them one by one")
    stored = [read(member.folder, member.identity) for member in members]
    histories = [[] if found is None else epochs_in(found) for found in stored]
    groups: dict[int, list[int]] = {}
    for index, history in enumerate(histories):
        groups.setdefault(len(history), []).append(index)
    for _, at in sorted(groups.items()):
        _train(
            [members[index] for index in at],
            [stored[index] for index in at],
            [histories[index] for index in at],
            num_data,
            lambda index, epoch, at=at: on_epoch(at[index], epoch),  # type: ignore[misc]
        )
    return histories


def why_alone(schedule: Schedule, methods: Iterable[Method]) -> str | None:
    """Why no run with this `schedule` and these `methods` can train beside others, or ``None`` where one may."""
    if schedule.shrink_every is not None:
        return "each net would shrink to sizes of its own"
    for method in methods:
        if method.steps:
            return f"{type(method).__name__} looks at its net before each step"
    return None


def why_apart(nets: Sequence[nn.Module], schedules: Sequence[Schedule], x: Tensor, y: Tensor) -> str | None:
    """Why these converted nets cannot train in one batched pass, or ``None`` where they can; `x`, `y` are examples.

    >>> from vardrop.together import why_apart
    >>> from vardrop.train import Schedule
    >>> nets = [vd.convert(torch.nn.Linear(4, 2), vd.DynamicNetworkSurgery()) for _ in range(2)]
    >>> why_apart(nets, [Schedule(seed=0), Schedule(seed=1)], torch.randn(2, 4), torch.tensor([0, 1]))
    'DynamicNetworkSurgery looks at its net before each step'
    """
    if len({replace(schedule, seed=0) for schedule in schedules}) > 1:
        return "their schedules differ in more than the seed"
    shapes = [{name: value.shape for name, value in net.state_dict().items()} for net in nets]
    if any(other != shapes[0] for other in shapes):
        return "their nets have different shapes"
    learning = [{name for name, parameter in net.named_parameters() if parameter.requires_grad} for net in nets]
    if any(other != learning[0] for other in learning):
        return "not the same parameters learn in them"
    methods = [{site.name: site.method for site in sites(net)} for net in nets]
    if any(other != methods[0] for other in methods):
        return "their methods differ"
    found = list(sites(nets[0]))
    if (obstacle := why_alone(schedules[0], [site.method for site in found])) is not None:
        return obstacle
    for site in found:
        if isinstance(site.noise, AdversarialNoise):
            return f"{type(site.method).__name__} needs two passes a step"
    try:
        with torch.random.fork_rng(), _Stack([deepcopy(net) for net in nets[:2]]) as stack:
            pair = len(stack.nets)
            stack.losses(torch.stack([x] * pair), torch.stack([y] * pair), nullcontext)
    except RuntimeError as error:
        return f"torch cannot batch the net: {str(error).strip().splitlines()[0]}"
    return None


def _train(
    members: Sequence[Member],
    stored: Sequence[dict[str, Any] | None],
    histories: Sequence[list[Epoch]],
    num_data: int,
    on_epoch: Callable[[int, Epoch], None],
) -> None:
    """Takes members that stand at the same epoch to the end; their `histories` grow."""
    accelerator = accelerator_of()
    schedule = members[0].schedule
    wholes = [member.whole or count_alive(member.net) for member in members]
    for member, found in zip(members, stored, strict=True):
        member.batches.to(accelerator.device)
        if found is not None:
            take_up(member.net, found["model"], member.folder)
        member.net.to(accelerator.device)
    elbo = schedule.elbo(num_data)
    with _Stack([member.net for member in members]) as stack:
        optimizer = stack.optimizer(schedule)
        shares = [group["lr"] / schedule.lr for group in optimizer.param_groups]
        if stored[0] is not None:
            optimizer.load_state_dict(_joined([found["optimizer"] for found in stored if found is not None]))
            elbo.load_state_dict(stored[0]["elbo"])
            draw_on_from(stored[0])
        else:
            torch.manual_seed(schedule.seed)
        for epoch in range(len(histories[0]), schedule.epochs):
            started = perf_counter()
            elbo.step_epoch()
            for group, share in zip(optimizer.param_groups, shares, strict=True):
                group["lr"] = share * schedule.lr_at(epoch)
            errors, nlls, kls = _one_epoch(stack, members, epoch, optimizer, elbo.beta / num_data, accelerator)
            for index, member in enumerate(members):
                valid_error, test_error = member.evaluate(member.net)
                counted = would_live(member.net).against(wholes[index])
                line = Epoch(
                    epoch=epoch,
                    lr=schedule.lr_at(epoch),
                    beta=elbo.beta,
                    train_error=errors[index],
                    train_nll=nlls[index],
                    kl=kls[index],
                    valid_error=valid_error,
                    test_error=test_error,
                    seconds=(perf_counter() - started) / len(members),
                    **living(counted),
                )
                histories[index].append(line)
                on_epoch(index, line)
            for index, member in enumerate(members):
                state = {
                    "sizes": sizes(member.net),
                    "model": {name: value.clone() for name, value in member.net.state_dict().items()},
                    "optimizer": _part(optimizer.state_dict(), index),
                    "elbo": elbo.state_dict(),
                }
                apart = None if index == 0 else noise_seed(member.schedule.seed, epoch)
                write(member.folder, member.identity, state, histories[index], apart=apart)


def _one_epoch(
    stack: _Stack,
    members: Sequence[Member],
    epoch: int,
    optimizer: torch.optim.Optimizer,
    kl_weight: float,
    accelerator: Any,
) -> tuple[list[float], list[float], list[float]]:
    """Training error (a fraction), mean negative log-likelihood, and last KL (nats) of each member over one pass."""
    device = accelerator.device
    wrong, total = torch.zeros(2, len(members), dtype=torch.float64, device=device)
    kls, count = torch.zeros(len(members), device=device), 0
    for member in members:
        member.net.train()
        member.batches.set_epoch(epoch)
    for step, parts in enumerate(zip(*(member.batches for member in members), strict=True)):
        x, y = (torch.stack(tensors).to(device) for tensors in zip(*parts, strict=True))
        stack.project()
        nll, kls, logits = stack.losses(x, y, accelerator.autocast)
        loss = nll + kls * kl_weight
        if not bool(torch.isfinite(loss).all()):
            index = int((~torch.isfinite(loss)).nonzero()[0])
            raise TrainingError(
                f"the loss of seed {members[index].schedule.seed} is {loss[index].item()} at epoch {epoch}, step "
                f"{step}; the last finished epoch of all seeds is kept; train them one by one, or try a lower "
                "learning rate"
            )
        loss.sum().backward()
        if (bound := members[0].schedule.clip_norm) is not None:
            stack.clip(bound)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wrong += (logits.detach().argmax(dim=2) != y).flatten(1).sum(dim=1)
        total += nll.detach() * y[0].numel()
        count += y[0].numel()
    return (wrong / count).tolist(), (total / count).tolist(), kls.tolist()


class _Objective(nn.Module):
    """What one member's step computes: mean negative log-likelihood, KL, and logits."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.sites = list(sites(net))

    def forward(self, x: Tensor, y: Tensor, autocast: Autocast) -> Losses:
        with autocast():
            logits = self.net(x)
        logits = logits.float()
        return F.cross_entropy(logits, y), kl_at(self.net, self.sites), logits


class _Stack:
    """The parameters and buffers of several nets, each kind in one tensor that the nets hold views of.

    At the end of a ``with`` block the nets have tensors of their own again.
    """

    def __init__(self, nets: Sequence[nn.Module]) -> None:
        self.nets = nets
        self.objectives = [_Objective(net) for net in nets]
        self.parameters = _stacked([dict(one.named_parameters()) for one in self.objectives])
        self.buffers = _stacked([dict(one.named_buffers()) for one in self.objectives])

    def __enter__(self) -> _Stack:
        stacked = self.parameters | self.buffers
        for index, one in enumerate(self.objectives):
            for name, tensor in [*one.named_parameters(), *one.named_buffers()]:
                tensor.data = stacked[name].data[index]
        return self

    def __exit__(self, *_: object) -> None:
        for net in self.nets:
            for tensor in [*net.parameters(), *net.buffers()]:
                tensor.data = tensor.data.clone()

    def optimizer(self, schedule: Schedule) -> torch.optim.Optimizer:
        """The optimiser of a single run, with the stacked parameters in the places of its own."""
        optimizer = schedule.optimizer(self.nets[0])
        stacked = {parameter: self.parameters[name] for name, parameter in self.objectives[0].named_parameters()}
        for group in optimizer.param_groups:
            group["params"] = [stacked[parameter] for parameter in group["params"]]
        return optimizer

    def project(self) -> None:
        """Puts the parameters of all noise into their domain."""
        for one in self.objectives:
            for site in one.sites:
                site.method.project(site.noise)

    def losses(self, x: Tensor, y: Tensor, autocast: Autocast) -> Losses:
        """The losses ``(members,)``, the KLs, and the logits ``(members, N, classes, *)`` of one pass over all nets."""

        def one(parameters: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor, y: Tensor) -> Losses:
            tensors = (parameters, buffers)
            found: Losses = torch.func.functional_call(self.objectives[0], tensors, (x, y, autocast))
            return found

        with batched(self.nets[0]):
            each = torch.func.vmap(one, randomness="different")
            found: Losses = each(self.parameters, self.buffers, x, y)
        return found

    def clip(self, bound: float) -> None:
        """Scales each member's gradient to a norm of at most `bound`."""
        gradients = [parameter.grad for parameter in self.parameters.values() if parameter.grad is not None]
        squares = torch.stack([gradient.reshape(len(gradient), -1).square().sum(dim=1) for gradient in gradients])
        factor = (bound / (squares.sum(dim=0).sqrt() + 1e-6)).clamp(max=1.0)
        for gradient in gradients:
            gradient.mul_(factor.view(-1, *[1] * (gradient.dim() - 1)))


def _stacked(tensors: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors of several nets by name, each kind in one; parameters stay parameters."""
    found: dict[str, Tensor] = {}
    for name, first in tensors[0].items():
        together = torch.stack([own[name].detach() for own in tensors])
        is_parameter = isinstance(first, nn.Parameter)
        found[name] = nn.Parameter(together, requires_grad=first.requires_grad) if is_parameter else together
    return found


def _part(state: dict[str, Any], index: int) -> dict[str, Any]:
    """The optimiser's state of one member; what is not of a parameter's shape, such as the step, is everyone's."""
    parts = {
        key: {name: value[index].clone() if value.dim() else value.clone() for name, value in values.items()}
        for key, values in state["state"].items()
    }
    return {**state, "state": parts}


def _joined(states: list[dict[str, Any]]) -> dict[str, Any]:
    """The optimiser's state of all members, out of their parts."""
    first = states[0]["state"]
    together = {
        key: {
            name: value if name == "step" else torch.stack([state["state"][key][name] for state in states])
            for name, value in values.items()
        }
        for key, values in first.items()
    }
    return {**states[0], "state": together}
