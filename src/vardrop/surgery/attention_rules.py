"""How attention carries units: its heads."""

from __future__ import annotations

from torch.fx import Node

from vardrop.surgery.reading import Outcome, Reading, arguments, shape
from vardrop.surgery.units import Value, unknown


def attention(reading: Reading, node: Node) -> Outcome:
    """``softmax(q k^T) v`` works head by head; a head of the queries, the keys and the values goes as one."""
    given = arguments(node)
    head_dim = len(shape(node)) - 3
    sources: list[Node] = [given["query"], given["key"], given["value"]]
    values = [value for source in sources if (value := reading.value(source)) and value.dim == head_dim]
    mask: Node | None = given["attn_mask"]
    by_head = mask is not None and ((len(shape(mask)) > 2 and shape(mask)[-3] != 1) or reading.value(mask) is not None)
    if len(values) < 3 or len({len(value) for value in values}) > 1 or by_head:
        return reading.stop(node)
    for value in values[1:]:
        reading.classes.unite(values[0].ids, value.ids)
    return Value(head_dim, values[0].ids, unknown(len(values[0])))
