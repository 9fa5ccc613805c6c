"""Methods on task vectors, the differences between fine-tunes and their base.

delta_i = x_i - base is sparsified (sparsify.py), weighted, optionally reduced to the elements that agree with the
elected sign (the sign of the weighted sum, TIES), summed, optionally normalized by the weights that took part, scaled
by lambda and added to the base: mergekit 0.1.5's order of operations, in float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce

import torch

from evomerge.merging.kernels import UNIFORM_STEPS, divisor, exact_l1
from evomerge.merging.methods.base import Inputs
from evomerge.merging.methods.sparsify import SPARSIFIERS

_NEGLIGIBLE_L1 = 1e-7


@dataclass(frozen=True, slots=True)
class TaskVectorMerge:
    """One member of the family: how deltas are sparsified, and whether a sign is elected."""

    sparsify: str | None
    consensus: bool

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        assert inputs.base is not None
        deltas = [self._delta(inputs, index) for index in range(len(inputs.tensors))]
        weights = [parameters["weight"] for parameters in inputs.per_model]
        merge = _agreeing if self.consensus else _all
        merged: torch.Tensor = merge(deltas, weights, inputs.shared["normalize"]) * inputs.shared["lambda"]
        return inputs.base + merged

    def _delta(self, inputs: Inputs, index: int) -> torch.Tensor:
        """The weighted, sparsified task vector of one model."""
        assert inputs.base is not None
        weight: float = inputs.per_model[index]["weight"]
        density: float = inputs.per_model[index].get("density", 1.0)
        delta = inputs.tensors[index] - inputs.base
        if self.sparsify is not None and density < 1:
            delta = _sparsified(self.sparsify, delta, density, inputs, index)
        return delta * weight


def _sparsified(how: str, delta: torch.Tensor, density: float, inputs: Inputs, index: int) -> torch.Tensor:
    if density <= 0 or delta.numel() == 0:
        return torch.zeros_like(delta)
    mask, probability = SPARSIFIERS[how](delta, inputs.per_model[index], lambda: inputs.uniforms(index))
    kept = delta * mask
    return kept * _scale(delta, kept, probability, inputs.rescale) if inputs.shared["rescale"] else kept


def _scale(
    delta: torch.Tensor, kept: torch.Tensor, probability: torch.Tensor | float, rescale: str
) -> torch.Tensor | float:
    """What restores a sparsified delta: 1 / its probability (DARE, eq. 4; DELLA, element by element) or the ratio of L1
    norms (mergekit)."""
    if rescale == "density":
        finest = 1.0 / UNIFORM_STEPS  # no mask is finer than that
        if isinstance(probability, torch.Tensor):
            return (1.0 / probability.clamp(min=finest)).to(torch.float32)
        return 1.0 / max(probability, finest)
    largest = delta.abs().amax()
    before, after = exact_l1(delta, largest), exact_l1(kept, largest)
    unit = largest.to(torch.float64) / (1 << 30)
    negligible = (before * unit < _NEGLIGIBLE_L1) | (after * unit < _NEGLIGIBLE_L1)
    ratio = before.to(torch.float64) / after.to(torch.float64).clamp(min=1.0)
    return torch.where(negligible, torch.ones_like(ratio), ratio).to(torch.float32)


def _all(deltas: Sequence[torch.Tensor], weights: Sequence[float], normalize: bool) -> torch.Tensor:
    """The sum of weighted task vectors, divided by the sum of their weights to `normalize`."""
    total = reduce(torch.add, deltas)
    return total / divisor(sum(weights), total) if normalize else total


def _agreeing(deltas: Sequence[torch.Tensor], weights: Sequence[float], normalize: bool) -> torch.Tensor:
    """The same, element by element, over those alone that have the sign of the sum of all (TIES)."""
    elected = reduce(torch.add, deltas) >= 0
    total, divisors = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for delta, weight in zip(deltas, weights, strict=True):
        agrees = torch.where(elected, delta > 0, delta < 0)
        total += delta * agrees
        divisors += agrees * weight
    return total / torch.where(divisors == 0, 1.0, divisors) if normalize else total
