"""Noisy embeddings: one draw of the rows for a minibatch, so a word means the same wherever it stands in it.

An embedding is a linear map of one-hot inputs (words), with its weight transposed: ``(inputs, outputs)``. The draw is
shared like that of a recurrent weight (arXiv:1708.00077).
"""

from __future__ import annotations

import torch
import torch.nn.functional
from torch import Tensor, nn

from vardrop.noise import Gate, Layout, noises_of

WORDS_BY_FEATURES = Layout(out_axis=1, in_axis=0)


class NoisyEmbedding(nn.Embedding):
    """``nn.Embedding`` whose weight is a posterior mean; ``noise`` holds the rest. The padding row has no noise.

    A ``gate`` multiplies whole rows (words) or columns, by one draw for the minibatch.
    """

    gate: Gate

    @property
    def layout(self) -> Layout:
        return WORDS_BY_FEATURES

    def forward(self, input: Tensor) -> Tensor:
        weight = _table(self)
        if self.padding_idx is not None and weight is not self.weight:
            weight = weight.index_fill(0, torch.tensor(self.padding_idx, device=weight.device), 0.0)
        return torch.nn.functional.embedding(
            input, weight, self.padding_idx, scale_grad_by_freq=self.scale_grad_by_freq
        )


class NoisyEmbeddingBag(nn.EmbeddingBag):
    """``nn.EmbeddingBag`` whose weight is a posterior mean; ``noise`` holds the rest, ``gate`` as in an embedding."""

    gate: Gate

    @property
    def layout(self) -> Layout:
        return WORDS_BY_FEATURES

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        return torch.nn.functional.embedding_bag(
            input,
            _table(self),
            offsets,
            scale_grad_by_freq=self.scale_grad_by_freq,
            mode=self.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
            padding_idx=self.padding_idx,
        )


def _table(layer: nn.Embedding | nn.EmbeddingBag) -> Tensor:
    """The weight of `layer` for one pass, through its noise and its gate, whichever it has."""
    weight = layer.weight
    for noise in noises_of(layer).values():
        weight = noise.sample_weight(weight)
    gate = layer._modules.get("gate")
    return gate.gated_table(weight) if isinstance(gate, Gate) else weight


def unsupported_lookup(layer: nn.Embedding | nn.EmbeddingBag) -> str | None:
    """Why `layer` has no noisy form; ``None`` where it has."""
    if layer.sparse:
        return "sparse=True is not supported, because the KL has a gradient in every row; make it with sparse=False"
    if layer.max_norm is not None:
        return f"max_norm={layer.max_norm} is not supported, because a lookup would change the means; leave it out"
    if layer.padding_idx is not None and bool(layer.weight.detach()[layer.padding_idx].any()):
        return f"its padding row {layer.padding_idx} is not zero; the KL would pull at it, so set it to zero"
    return None
