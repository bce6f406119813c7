"""Minibatches cut from tensors in memory, in an order that follows from the seed and the epoch alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from vardrop.streams import order_seed
from vardrop.zoo.data import Split


class Batches:
    """Shuffled minibatches of a split; the order of an epoch depends on nothing but `seed` and its number.

    So a run that was broken off goes on with the very batches that it would have seen. A single example left at the end
    joins the batch before it: batch-norm cannot train on one alone, nor can one of several `processes`.
    """

    def __init__(self, split: Split, batch_size: int, *, seed: int) -> None:
        self.split = split
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        self.processes = 1

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next pass."""
        self.epoch = epoch

    def to(self, device: torch.device) -> None:
        """Keeps all examples on `device`, where they find room there; else each minibatch is brought when it is due."""
        self.split = self.split.on(device)

    def share(self, processes: int) -> None:
        """Makes every minibatch large enough for so many `processes` to have two examples of it each."""
        self.processes = processes

    def __len__(self) -> int:
        return len(self._sizes())

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(order_seed(self.seed, self.epoch))
        order = torch.randperm(len(self.split.y), generator=generator)
        for indices in order.to(self.split.x.device).split(self._sizes()):
            yield self.split.x[indices], self.split.y[indices]

    def _sizes(self) -> list[int]:
        whole, left = divmod(len(self.split.y), self.batch_size)
        sizes = [self.batch_size] * whole + [left] * (left > 0)
        if whole and 0 < left < 2 * self.processes:
            sizes[-2:] = [self.batch_size + left]
        return sizes
