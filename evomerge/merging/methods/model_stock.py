"""Model Stock: how far to go from the base to the average, from the angle between fine-tunes (Jang et al. 2024)."""

from itertools import combinations

import torch

from evomerge.merging.kernels import ordered_sum
from evomerge.merging.methods.base import Inputs

_LEAST_NORM = 1e-6
_SINGULAR = 1e-6


def merge_model_stock(inputs: Inputs) -> torch.Tensor:
    """(1 - t) base + t average with t = N c / (1 + (N - 1) c), c the mean cosine between task vectors.

    By rows with `filter_wise`, else for the whole tensor. Task vectors that oppose each other so that the divisor
    vanishes say nothing: t = 0.
    """
    assert inputs.base is not None
    base = _rows(inputs.base, inputs.shared["filter_wise"])
    tensors = [_rows(tensor, inputs.shared["filter_wise"]) for tensor in inputs.tensors]
    deltas = [tensor - base for tensor in tensors]
    norms = [ordered_sum(delta * delta).sqrt() for delta in deltas]
    cosine, count = torch.zeros_like(norms[0]), len(deltas)
    for i, j in combinations(range(count), 2):
        cosine += (ordered_sum(deltas[i] * deltas[j]) / (norms[i] * norms[j]).clamp(min=_LEAST_NORM)).clamp(-1, 1)
    cosine /= count * (count - 1) // 2
    divisor = 1 + (count - 1) * cosine
    singular = divisor.abs() < _SINGULAR
    t = torch.where(singular, 0.0, count * cosine / torch.where(singular, 1.0, divisor))

    average = tensors[0]
    for tensor in tensors[1:]:
        average = average + tensor
    merged = t * (average / count) + (1 - t) * base
    return merged.reshape(inputs.base.shape).to(torch.float32)


def _rows(tensor: torch.Tensor, filter_wise: bool) -> torch.Tensor:
    return (tensor if filter_wise and tensor.dim() > 1 else tensor.reshape(1, -1)).to(torch.float64)
