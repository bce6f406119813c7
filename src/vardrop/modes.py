"""What a pass needs to leave a model and its inputs as they were: eval mode for a while, and copies."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map


@contextmanager
def in_eval_mode(*models: nn.Module) -> Iterator[None]:
    """Puts `models` into eval mode, and each of their modules back into its own mode afterwards.

    A module whose own ``train`` does more than that, such as to take merged weights apart, does so at both ends.
    """
    modes = {module: module.training for model in models for module in model.modules()}
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():  # parents come before their children
            if module.training != training:
                module.train(training)
        for module, training in modes.items():
            module.training = training


def copied(inputs: Any) -> Any:
    """`inputs` with copies of their tensors, for a model that changes them in place."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, inputs)
