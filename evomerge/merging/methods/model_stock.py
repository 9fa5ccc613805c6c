"""Model Stock: how far to go from the base to the average, from the angle between fine-tunes (Jang et al. 2024)."""

from itertools import combinations

import torch

from evomerge.devices import widened
from evomerge.merging.methods.base import Inputs
from evomerge.merging.methods.combination import around
from evomerge.merging.methods.gram import gram
from evomerge.merging.methods.kernels import ordered_sum, pieces
from evomerge.merging.methods.parts import Elements, part_of
from evomerge.merging.methods.passes import Pass

_LEAST_NORM = 1e-6
_SINGULAR = 1e-6


def merge_model_stock(inputs: Inputs) -> Pass | torch.Tensor:
    """(1 - t) base + t average, where t = N c / (1 + (N - 1) c) and c is the mean cosine between task vectors.

    With `filter_wise` each row has a t of its own; otherwise the tensor has one t.
    """
    assert inputs.base is not None
    if inputs.shared["filter_wise"] and len(inputs.base.shape) > 1:
        return _by_rows(inputs)
    products, count = gram(inputs), len(inputs.tensors)
    step = _ratio({(i, j): products[i, j] for i in range(count) for j in range(count)}, count) / count
    return around(inputs.base, inputs.tensors, 1.0, [step] * count)


def _by_rows(inputs: Inputs) -> torch.Tensor:
    assert inputs.base is not None
    count, rows = len(inputs.tensors), inputs.base.shape[0]
    out = torch.empty(inputs.base.shape, dtype=torch.float32, device=inputs.device)
    for piece in pieces(rows, inputs.device, inputs.count // max(1, rows)):
        base = widened(_rows(inputs.base, piece))
        deltas = [widened(_rows(tensor, piece)) - base for tensor in inputs.tensors]
        products = {(i, j): ordered_sum(deltas[i] * deltas[j]) for i in range(count) for j in range(i, count)}
        average = deltas[0]
        for delta in deltas[1:]:
            average = average + delta
        out[piece].copy_(base + _ratio(products, count) * (average / count))
    return out


def _rows(tensor: Elements, rows: slice) -> torch.Tensor:
    width = tensor.numel() // max(1, tensor.shape[0])
    return part_of(tensor, slice(rows.start * width, rows.stop * width)).view(-1, *tensor.shape[1:])


def _ratio(products: dict[tuple[int, int], torch.Tensor], count: int) -> torch.Tensor:
    """t, from the scalar products of the task vectors. Where task vectors oppose each other, the divisor may vanish,
    and then t = 0."""
    norms = [products[i, i].sqrt() for i in range(count)]
    cosine = torch.zeros_like(norms[0])
    for i, j in combinations(range(count), 2):
        cosine = cosine + (products[i, j] / (norms[i] * norms[j]).clamp(min=_LEAST_NORM)).clamp(-1, 1)
    cosine = cosine / (count * (count - 1) // 2)
    divisor = 1 + (count - 1) * cosine
    singular = divisor.abs() < _SINGULAR
    return torch.where(singular, 0.0, count * cosine / torch.where(singular, 1.0, divisor))
