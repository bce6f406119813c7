"""Taking dead words out of an embedding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vardrop.errors import ConversionError, GraphError, InvalidValueError


def shrink_vocabulary(model: nn.Module, name: str) -> Tensor:
    """Takes the words whose rows are all zero out of an embedding of a plain `model`, in place.

    They share one row of zeros afterwards; that of the padding stays the padding's, so that masks by its id hold. The
    model computes from ``new_ids[words]`` what it computed from ``words`` before, unless its forward also reads the
    weight outside the embedding.

    Args:
        model: plain, compacted or stripped.
        name: of an ``nn.Embedding`` in it.

    Returns:
        The new id of each old word, int64, ``(words,)``, on the device of the embedding.

    Raises:
        InvalidValueError: `model` has no such embedding.
        ConversionError: the embedding is noisy.
        GraphError: its weight is also that of another layer.

    Source: arXiv:1708.00077, where the words of an embedding are rows of a sparse weight.

    >>> net = torch.nn.Sequential(torch.nn.Embedding(5, 2)).requires_grad_(False)
    >>> net[0].weight[[1, 3]] = 0
    >>> vd.shrink_vocabulary(net, "0")
    tensor([0, 1, 2, 1, 3])
    >>> net
    Sequential(
      (0): Embedding(4, 2)
    )
    """
    layer = _embedding(model, name)
    live = (layer.weight.detach() != 0).any(dim=1)
    padding = layer.padding_idx
    if padding is not None:
        live[padding] = True
    if live.all():
        return torch.arange(layer.num_embeddings, device=live.device)
    shared = int(live.int().argmin())
    kept = live.clone()
    kept[shared] = True
    ids = kept.cumsum(0) - 1
    ids[~live] = ids[shared].clone()
    layer.weight = nn.Parameter(layer.weight.detach()[kept], requires_grad=layer.weight.requires_grad)
    layer.num_embeddings = int(kept.sum())
    layer.padding_idx = None if padding is None else int(ids[padding])
    return ids


def _embedding(model: nn.Module, name: str) -> nn.Embedding:
    layer = dict(model.named_modules()).get(name)
    if not isinstance(layer, nn.Embedding):
        found = [other for other, module in model.named_modules() if isinstance(module, nn.Embedding)]
        raise InvalidValueError(
            f"name={name!r} is no nn.Embedding of the model; there are: {', '.join(found) or 'none'}"
        )
    if type(layer) is not nn.Embedding:
        raise ConversionError(
            f"embedding {name!r} is a {type(layer).__name__}, not a plain nn.Embedding: call vardrop.compact or "
            "vardrop.strip first"
        )
    holders = [other for other, tensor in model.named_parameters(remove_duplicate=False) if tensor is layer.weight]
    if len(holders) > 1:
        raise GraphError(f"{' and '.join(holders)} are one parameter: words cannot be taken out of one of them alone")
    return layer
