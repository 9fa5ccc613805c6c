"""Methods on task vectors, the differences between fine-tunes and their base.

delta_i = x_i - base is sparsified (magnitude: Yadav et al. 2023; random: Yu et al. 2024), weighted, optionally reduced
to the elements that agree with the elected sign (the sign of the weighted sum, TIES), summed, optionally normalized by
the weights that took part, scaled by lambda and added to the base: mergekit 0.1.5's order of operations, in float32.
"""

from dataclasses import dataclass

import torch

from evomerge.merging.kernels import exact_l1, keep_mask, largest_magnitudes
from evomerge.merging.methods.base import Inputs

_NEGLIGIBLE_L1 = 1e-7
_NEGLIGIBLE_WEIGHT = 1e-8


@dataclass(frozen=True, slots=True)
class TaskVectorMerge:
    """One member of the family: how deltas are sparsified, and whether a sign is elected."""

    sparsify: str | None
    consensus: bool

    def __call__(self, inputs: Inputs) -> torch.Tensor:
        assert inputs.base is not None
        base, shared = inputs.base, inputs.shared
        strength: float = shared["lambda"]
        total = torch.zeros_like(base)
        divisor: torch.Tensor | float = torch.zeros_like(base) if self.consensus else 0.0
        deltas = [self._delta(inputs, index) for index in range(len(inputs.tensors))]
        elected = torch.stack(deltas).sum(dim=0) >= 0 if self.consensus else None
        for delta, parameters in zip(deltas, inputs.per_model, strict=True):
            if elected is None:
                total += delta
                divisor += parameters["weight"]
            else:
                agrees = torch.where(elected, delta > 0, delta < 0)
                total += delta * agrees
                divisor += agrees * parameters["weight"]
        if shared["normalize"]:
            total /= _safe(divisor)
        return base + total * strength

    def _delta(self, inputs: Inputs, index: int) -> torch.Tensor:
        """The weighted, sparsified task vector of one model."""
        assert inputs.base is not None
        weight: float = inputs.per_model[index]["weight"]
        density: float = inputs.per_model[index].get("density", 1.0)
        delta = inputs.tensors[index] - inputs.base
        if self.sparsify is not None and density < 1:
            delta = self._sparsified(delta, density, inputs, index)
        return delta * weight

    def _sparsified(self, delta: torch.Tensor, density: float, inputs: Inputs, index: int) -> torch.Tensor:
        if density <= 0 or delta.numel() == 0:
            return torch.zeros_like(delta)
        if self.sparsify == "magnitude":
            mask = largest_magnitudes(delta, max(1, int(density * delta.numel())))
        else:
            mask = keep_mask(inputs.uniforms(index), density).view_as(delta)
        kept = delta * mask
        return kept * _scale(delta, kept, density, inputs.rescale) if inputs.shared["rescale"] else kept


def _scale(delta: torch.Tensor, kept: torch.Tensor, density: float, rescale: str) -> torch.Tensor | float:
    """What restores a sparsified delta: 1 / density (DARE, eq. 4) or the ratio of L1 norms (mergekit)."""
    if rescale == "density":
        return 1.0 / density
    largest = delta.abs().amax()
    before, after = exact_l1(delta, largest), exact_l1(kept, largest)
    unit = largest.to(torch.float64) / (1 << 30)
    negligible = (before * unit < _NEGLIGIBLE_L1) | (after * unit < _NEGLIGIBLE_L1)
    ratio = before.to(torch.float64) / after.to(torch.float64).clamp(min=1.0)
    return torch.where(negligible, torch.ones_like(ratio), ratio).to(torch.float32)


def _safe(divisor: torch.Tensor | float) -> torch.Tensor | float:
    """A divisor without zeros: nothing took part there, so nothing is to be divided."""
    if isinstance(divisor, torch.Tensor):
        return torch.where(divisor == 0, torch.ones_like(divisor), divisor)
    return divisor if abs(divisor) >= _NEGLIGIBLE_WEIGHT else 1.0
