"""Weighted averages of models: model soups (Wortsman et al. 2022)."""

import torch

from evomerge.merging.methods.base import Inputs


def merge_linear(inputs: Inputs) -> torch.Tensor:
    """sum_i w_i x_i, divided by sum_i w_i unless `normalize` is false (a sum below 1e-8 divides by 1).

    Summed in float64, so that equal models average to themselves bit for bit.
    """
    total = torch.zeros_like(inputs.tensors[0], dtype=torch.float64)
    for tensor, parameters in zip(inputs.tensors, inputs.per_model, strict=True):
        total.add_(tensor.to(torch.float64), alpha=parameters["weight"])
    divisor = sum(parameters["weight"] for parameters in inputs.per_model)
    if inputs.shared["normalize"] and abs(divisor) >= 1e-8:
        total.div_(divisor)
    return total.to(torch.float32)
