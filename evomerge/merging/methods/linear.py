"""Weighted averages of models: model soups (Wortsman et al. 2022)."""

import torch

from evomerge.merging.kernels import divisor
from evomerge.merging.methods.base import Inputs


def merge_linear(inputs: Inputs) -> torch.Tensor:
    """sum_i w_i x_i, divided by sum_i w_i unless `normalize` is false (a sum below 1e-8 divides by 1).

    Summed in float64, so that equal models average to themselves bit for bit; product and sum are rounded apart, since
    a fused multiply-add exists on some devices only.
    """
    weights: list[float] = [parameters["weight"] for parameters in inputs.per_model]
    total = inputs.tensors[0].to(torch.float64) * weights[0]
    for tensor, weight in zip(inputs.tensors[1:], weights[1:], strict=True):
        total += tensor.to(torch.float64) * weight
    if inputs.shared["normalize"]:
        total /= divisor(sum(weights), total)
    return total.to(torch.float32)
