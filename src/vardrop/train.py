"""The training loop behind the command line, on accelerate: checkpoints, exact resume, logs."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from vardrop import warmup
from vardrop.checkpoint import Epoch, draw_on_from, epochs_in, read, write
from vardrop.elbo import ELBO
from vardrop.errors import InvalidValueError, MissingExtraError, StorageError, TrainingError
from vardrop.methods.base import check_number
from vardrop.sites import parameter_groups, sites
from vardrop.streams import noise_seed
from vardrop.surgery.prune import Pruned, count_alive, would_live
from vardrop.surgery.shrink import shrink
from vardrop.surgery.sizes import resize, sizes


@dataclass(frozen=True)
class Schedule:
    """How a run trains: everything but the net, the data and the method.

    Args:
        epochs: passes over the training data.
        batch_size: examples a step.
        lr: Adam's learning rate, constant up to epoch `decay_from` and then on a straight line to 0 at `epochs`.
        gate_lr: that of gates, which falls with the other; ``None`` for the same.
        decay_from: that epoch.
        warmup_start: the last epoch with a KL weight of 0.
        warmup_epochs: the epoch at which the KL weight reaches 1; 0 for the full KL from the start.
        kl_factor: constant factor on the KL.
        seed: of initialisation, order and noise.
        weight_decay: factor of ``|w|^2 / 2`` on the loss, over the net's own parameters; noise is left out.
        clip_norm: greatest norm of the gradient of a step; ``None`` for no bound.
        shrink_every: epochs after which dead units leave the net for good, again and again; ``None`` for never.
    """

    epochs: int = 200
    batch_size: int = 100
    lr: float = 1e-3
    decay_from: int = 100
    warmup_start: int = 5
    warmup_epochs: int = 20
    kl_factor: float = 1.0
    seed: int = 0
    gate_lr: float | None = None
    weight_decay: float = 0.0
    clip_norm: float | None = None
    shrink_every: int | None = None

    def __post_init__(self) -> None:
        for known in fields(self):
            check_number(self, known)
        if not 0 <= self.seed < 2**32:
            raise InvalidValueError(f"seed={self.seed}: must lie in 0 to {2**32 - 1}")
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise InvalidValueError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.shrink_every is not None and self.shrink_every < 1:
            raise InvalidValueError(f"shrink_every={self.shrink_every}: must be at least 1")
        if not 0.0 <= self.weight_decay < math.inf:
            raise InvalidValueError(f"weight_decay={self.weight_decay}: must be a finite number, at least 0")
        for name in ("lr", "gate_lr", "clip_norm"):
            rate = getattr(self, name)
            if rate is not None and not 0.0 < rate < math.inf:
                raise InvalidValueError(f"{name}={rate}: must be a finite number above 0")
        if not 0.0 <= self.kl_factor < math.inf:
            raise InvalidValueError(f"kl_factor={self.kl_factor}: must be a finite number, at least 0")
        if self.warmup_epochs < 0:
            raise InvalidValueError(f"warmup_epochs={self.warmup_epochs}: must be at least 0")
        if self.warmup_start < 0 or 0 < self.warmup_epochs <= self.warmup_start:
            raise InvalidValueError(
                f"warmup_start={self.warmup_start}: must be at least 0 and below warmup_epochs={self.warmup_epochs}, "
                "at which the KL weight reaches 1"
            )
        if not 0 <= self.decay_from <= self.epochs:
            raise InvalidValueError(f"decay_from={self.decay_from}: must lie in 0 to {self.epochs}, the epochs")

    def lr_at(self, epoch: int) -> float:
        """Learning rate of an epoch, counted from 0."""
        if epoch < self.decay_from:
            return self.lr
        return self.lr * (self.epochs - epoch) / (self.epochs - self.decay_from)

    def optimizer(self, net: nn.Module) -> torch.optim.Optimizer:
        """Adam on the parameters of `net`, on its gates with their own learning rate."""
        gate_lr = self.lr if self.gate_lr is None else self.gate_lr
        groups = parameter_groups(net, lr=self.lr, gate_lr=gate_lr)
        return torch.optim.Adam(groups, weight_decay=self.weight_decay, fused=True)

    def elbo(self, num_data: int) -> ELBO:
        """The objective of this schedule for `num_data` labels to train on."""
        ramp = warmup.linear(self.warmup_epochs, start=self.warmup_start) if self.warmup_epochs else None
        return ELBO(num_data, warmup=ramp, kl_factor=self.kl_factor)


class Loader(Protocol):
    """Minibatches in an order that follows from the epoch alone."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...
    def __len__(self) -> int: ...
    def set_epoch(self, epoch: int) -> None: ...
    def to(self, device: torch.device) -> None: ...
    def share(self, processes: int) -> None: ...


def train(
    net: nn.Module,
    batches: Loader,
    schedule: Schedule,
    folder: Path,
    *,
    num_data: int,
    evaluate: Callable[[nn.Module], tuple[float | None, float | None]],
    identity: str,
    whole: Pruned | None = None,
    on_epoch: Callable[[Epoch], None] = lambda epoch: None,
) -> list[Epoch]:
    """Trains a converted `net` in place and returns the history, one entry an epoch.

    After each epoch ``history.jsonl`` and ``checkpoint.pt`` in `folder` are replaced in one stroke each. When
    `folder` holds a checkpoint of the same `identity`, the run goes on from there, and every number that follows is
    the one that an unbroken run would have given.

    Args:
        net: the converted network.
        batches: the training data.
        schedule: how to train.
        folder: where checkpoint, history and TensorBoard log go; made if missing.
        num_data: labels of the training data, for the ELBO.
        evaluate: gives the validation and the test error of the net in eval mode, each a fraction or ``None``.
        identity: a text that tells this run from others; a checkpoint with another one is refused.
        whole: what the history counts against; ``None`` for all that may live in `net`.
        on_epoch: called after every epoch with its line of the history, and first with the last stored one.

    Raises:
        InvalidValueError: the net is to shrink, but in several processes, or these have too few examples a step.
        MissingExtraError: accelerate is not installed.
        TrainingError: the loss is no longer finite; names the first layer concerned and the step.
        StorageError: the checkpoint is foreign or damaged, or cannot be written.
    """
    accelerator = _accelerator(folder)
    batches.to(accelerator.device)
    if schedule.shrink_every is not None and accelerator.num_processes > 1:
        raise InvalidValueError(f"shrink_every={schedule.shrink_every}: a net can shrink in a single process only")
    if accelerator.num_processes > 1 and schedule.batch_size < 2 * accelerator.num_processes:
        raise InvalidValueError(
            f"batch_size={schedule.batch_size}: must give each of {accelerator.num_processes} processes two examples"
        )
    batches.share(accelerator.num_processes)
    whole = whole or count_alive(net)
    optimizer = schedule.optimizer(net)
    shares = [group["lr"] / schedule.lr for group in optimizer.param_groups]
    elbo = schedule.elbo(num_data)
    history = _resume(folder, identity, net, optimizer, elbo, shrinks=schedule.shrink_every is not None)
    if history:
        on_epoch(history[-1])
    model, optimizer = accelerator.prepare(net, optimizer)
    for epoch in range(len(history), schedule.epochs):
        started = perf_counter()
        elbo.step_epoch()
        batches.set_epoch(epoch)
        if accelerator.process_index:  # the first process draws on from its stored state, the others draw apart from it
            torch.manual_seed(noise_seed(schedule.seed, epoch, process=accelerator.process_index))
        if schedule.shrink_every and epoch and epoch % schedule.shrink_every == 0:
            example = next(iter(batches))[0][:2].to(accelerator.device)
            shrink(net, optimizer, example)
        for group, share in zip(optimizer.param_groups, shares, strict=True):
            group["lr"] = share * schedule.lr_at(epoch)
        error, nll = _one_epoch(model, batches, optimizer, elbo, schedule.clip_norm, accelerator)
        valid_error, test_error = evaluate(net)
        counted = would_live(net).against(whole)
        history.append(
            Epoch(
                epoch=epoch,
                lr=schedule.lr_at(epoch),
                beta=elbo.beta,
                train_error=error,
                train_nll=nll,
                kl=float(elbo.kl),
                valid_error=valid_error,
                test_error=test_error,
                seconds=perf_counter() - started,
                **living(counted),
            )
        )
        if accelerator.is_main_process:
            write(folder, identity, _state(net, optimizer, elbo), history)
        accelerator.log(_scalars(history[-1], num_data), step=epoch)
        on_epoch(history[-1])
    accelerator.free_memory()
    del model
    for tracker in accelerator.trackers:  # end_training would take the process group from what follows, too
        tracker.finish()
    return history


def living(counted: Pruned) -> dict[str, Any]:
    """What a line of the history says of the weights and units that are `counted`."""
    return {
        "nonzero": counted.alive,
        "compression": counted.compression,
        "alive": {name: count.alive for name, count in counted.layers.items()},
        "units": counted.units,
    }


def _one_epoch(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: torch.optim.Optimizer,
    elbo: ELBO,
    clip_norm: float | None,
    accelerator: Any,
) -> tuple[float, float]:
    """Training error (fraction) and mean negative log-likelihood (nats) of one pass, both under noise."""
    device = accelerator.device
    model.train()
    wrong = torch.zeros((), device=device)
    nll = torch.zeros((), device=device)
    count = 0
    for step, (inputs, labels) in enumerate(batches):
        own = slice(accelerator.process_index, None, accelerator.num_processes)
        x, y = inputs[own].to(device), labels[own].to(device)
        share = accelerator.num_processes * y.numel() / labels.numel()  # the gradients of all processes are averaged
        passes: list[Tensor] = []
        loss = elbo(model, partial(_nll, model, x, y, share, accelerator, passes))
        logits = passes[0]
        if not math.isfinite(loss.item()):
            raise TrainingError(
                f"the loss is {loss.item()} at epoch {elbo.epoch}, step {step}: {_culprit(model, x)}; "
                "the last finished epoch is kept; try a lower learning rate"
            )
        accelerator.backward(loss)
        if clip_norm is not None:
            accelerator.clip_grad_norm_(model.parameters(), clip_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wrong += (logits.detach().argmax(dim=1) != y).sum()
        nll += elbo.nll * y.numel() / share
        count += y.numel()
    wrong, nll, total = accelerator.reduce(
        torch.stack([wrong, nll, torch.tensor(float(count), device=device)])
    ).tolist()
    return wrong / total, nll / total


def _nll(model: nn.Module, x: Tensor, y: Tensor, share: float, accelerator: Any, passes: list[Tensor]) -> Tensor:
    """`share` times the mean negative log-likelihood, nats, of one pass, whose logits join `passes`."""
    with accelerator.autocast():
        logits = model(x.clone())  # a second pass of adversarial dropout begins with the same inputs
    passes.append(logits.float())
    return share * F.cross_entropy(passes[-1], y)


def _culprit(model: nn.Module, x: Tensor) -> str:
    """Names the first layer with a parameter, and else the first with an output, that is not finite."""
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            layer, _, kind = name.removeprefix("module.").rpartition(".")
            return f"layer {_without_noise(layer)!r} has a {kind} that is not finite"
    if not torch.isfinite(x).all():
        return "the input is not finite"
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
            if not all(torch.isfinite(tensor).all() for tensor in tensors):
                found.append(_without_noise(name))

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    for site in sites(model):
        if not torch.isfinite(site.method.kl(site.noise, site.weight)):
            return f"the KL of layer {site.name!r} is not finite"
    return f"layer {found[0]!r} gives an output that is not finite" if found else "no layer stands out"


def _without_noise(name: str) -> str:
    """The weight or layer that the noise or gate called `name` hangs on; any other name as it is."""
    return name.removesuffix(".noise").removesuffix(".gate").replace(".noise.", ".")


def _accelerator(folder: Path) -> Any:
    accelerator = accelerator_of(log_with="tensorboard", project_dir=str(folder))
    accelerator.init_trackers("tensorboard")
    return accelerator


def accelerator_of(**options: str) -> Any:
    """accelerate's ``Accelerator(**options)``.

    Raises:
        MissingExtraError: accelerate is not installed.
    """
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise MissingExtraError("the training loop", "cli") from error
    cpu = not torch.accelerator.is_available()  # unless it is said, processes on a CPU do not find each other
    return Accelerator(cpu=cpu, **options)


def is_first_process() -> bool:
    """Whether this process trains alone, or is the first of those that a launcher such as torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def end_process_group() -> None:
    """Ends the group of processes that trained together, where there is one, once no net of it lives any more."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _scalars(epoch: Epoch, num_data: int) -> dict[str, float]:
    values = {**asdict(epoch), "kl_per_example": epoch.kl / num_data}
    return {name: float(value) for name, value in values.items() if isinstance(value, int | float)}


def _state(net: nn.Module, optimizer: torch.optim.Optimizer, elbo: ELBO) -> dict[str, Any]:
    return {
        "sizes": sizes(net),
        "model": net.state_dict(),
        "optimizer": optimizer.state_dict(),
        "elbo": elbo.state_dict(),
    }


def take_up(net: nn.Module, state: dict[str, Any], folder: Path) -> None:
    """Loads the `state` that a checkpoint in `folder` holds.

    Raises:
        StorageError: it is that of another net, as where one's own code has changed since.
    """
    try:
        net.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).strip().rpartition("\n")[2].strip()
        raise StorageError(
            f"the checkpoint in {folder} is that of another net ({reason}): has its code changed? choose another folder"
        ) from error


def _resume(
    folder: Path, identity: str, net: nn.Module, optimizer: torch.optim.Optimizer, elbo: ELBO, *, shrinks: bool
) -> list[Epoch]:
    stored = read(folder, identity)
    if stored is None:
        return []
    if shrinks:
        resize(net, stored["sizes"], stored["model"])
    take_up(net, stored["model"], folder)
    optimizer.load_state_dict(stored["optimizer"])
    elbo.load_state_dict(stored["elbo"])
    draw_on_from(stored)
    return epochs_in(stored)
