"""Which elements of a task vector are kept: one row and one function per way to choose them.

Each returns a mask, and the probability with which an element had been kept: a number, or one per element. Elements
tied at a threshold are treated alike, where mergekit takes those that its sort happens to put first.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from evomerge.merging.kernels import keep_mask, kth_smallest, largest_magnitudes

Kept = tuple[torch.Tensor, torch.Tensor | float]
Sparsifier = Callable[[torch.Tensor, Mapping[str, Any], Callable[[], torch.Tensor]], Kept]


def _magnitude(delta: torch.Tensor, parameters: Mapping[str, Any], uniforms: Callable[[], torch.Tensor]) -> Kept:
    """The largest |delta|, at least one (TIES: Yadav et al. 2023)."""
    density: float = parameters["density"]
    return largest_magnitudes(delta, max(1, int(density * delta.numel()))), density


def _random(delta: torch.Tensor, parameters: Mapping[str, Any], uniforms: Callable[[], torch.Tensor]) -> Kept:
    """Every element with the same probability (DARE: Yu et al. 2024)."""
    density: float = parameters["density"]
    return keep_mask(uniforms(), density).view_as(delta), density


def _outliers(delta: torch.Tensor, parameters: Mapping[str, Any], uniforms: Callable[[], torch.Tensor]) -> Kept:
    """The largest |delta| below the share `gamma` of outliers (Model Breadcrumbs: Davari and Belilovsky 2023).

    Fewer outliers are left out where the density could not be reached otherwise.
    """
    density: float = parameters["density"]
    count = delta.numel()
    kept = int(density * count)
    below = max(0, count - kept - int(parameters["gamma"] * count))
    last = min(below + kept, count)
    if below >= last:
        return torch.zeros_like(delta, dtype=torch.bool), density
    magnitude = delta.abs()
    return (magnitude >= kth_smallest(magnitude, below)) & (magnitude <= kth_smallest(magnitude, last - 1)), density


def _magprune(delta: torch.Tensor, parameters: Mapping[str, Any], uniforms: Callable[[], torch.Tensor]) -> Kept:
    """Larger |delta| with higher probability, from density - epsilon to density + epsilon by rank in its row (DELLA:
    Deep et al. 2024). A vector is one row; in a row of one element the probability is the density.
    """
    density: float = parameters["density"]
    rows = delta.abs() if delta.dim() > 1 else delta.abs().reshape(1, -1)
    ranks = rows.argsort(dim=1, stable=True).argsort(dim=1).to(torch.float64)
    last = rows.shape[1] - 1
    place = 2.0 * ranks / last - 1.0 if last else torch.zeros_like(ranks)  # -1 for the smallest, 1 for the largest
    probability = (density + place * parameters["epsilon"]).reshape(delta.shape)
    return keep_mask(uniforms().view_as(delta), probability), probability


SPARSIFIERS: dict[str, Sparsifier] = {
    "magnitude": _magnitude,
    "random": _random,
    "outliers": _outliers,
    "magprune": _magprune,
}


def largest_epsilon(density: float, wanted: float) -> float:
    """`wanted`, or as much of it as keeps density ± epsilon inside (0, 1)."""
    return max(0.0, min(wanted, min(density, 1 - density) - 1e-6))
