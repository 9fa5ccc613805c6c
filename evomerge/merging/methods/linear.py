"""Weighted averages of models: model soups (Wortsman et al. 2022)."""

from evomerge.merging.methods.base import Inputs
from evomerge.merging.methods.combination import combination, heaviest
from evomerge.merging.methods.kernels import divisor
from evomerge.merging.methods.passes import Pass


def merge_linear(inputs: Inputs) -> Pass:
    """The pass that computes sum_i w_i x_i, divided by sum_i w_i unless `normalize` is false. A sum of weights below
    1e-8 divides by 1."""
    weights = inputs.each("weight")
    by = divisor(sum(weights)) if inputs.shared["normalize"] else 1.0
    shares = [weight / by for weight in weights]
    return combination(inputs.tensors, shares, sum(weights) / by, heaviest(weights))
