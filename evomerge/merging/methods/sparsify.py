"""Which elements of a task vector are kept: one row and one class per way to choose them.

Each says what must be known of a tensor beforehand (thresholds, probabilities, fields), and which elements are kept
then. Elements tied at a threshold are treated alike, where mergekit takes those that its sort happens to put first.
"""

import math
from collections.abc import Mapping
from typing import Protocol

import torch

from evomerge.merging.methods.base import Inputs, each_time
from evomerge.merging.methods.kernels import (
    UNIFORM_STEPS,
    as_field,
    below,
    field_steps,
    indicator,
    kth_smallest,
    steps_of,
)
from evomerge.merging.methods.order import order_statistics
from evomerge.merging.methods.passes import Tensors

Values = Mapping[str, float | torch.Tensor]


class Sparsifier(Protocol):
    """A way to choose the elements that are kept.

    A density of 1 or more keeps all of them, one of 0 or less none.
    """

    def numbers(self, inputs: Inputs, index: int) -> Values:
        """What the choice depends on for one model, the same names for all."""
        ...

    def fields(self, inputs: Inputs, index: int) -> Tensors:
        """The fields that it reads for one model, as many for all."""
        ...

    def keep(self, delta: torch.Tensor, fields: Tensors, numbers: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """1.0 for elements that are kept, else 0.0."""
        ...

    def probability(self, fields: Tensors, numbers: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """With what probability each element had been kept, where that is not the density."""
        ...


class _Plain:
    def fields(self, inputs: Inputs, index: int) -> Tensors:
        return ()

    def probability(self, fields: Tensors, numbers: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        return None


class Magnitude(_Plain):
    """The largest |delta|, at least one (TIES: Yadav et al. 2023)."""

    def numbers(self, inputs: Inputs, index: int) -> Values:
        density: float = inputs.per_model[index]["density"]
        if not 0 < density < 1:
            return {"lower": -1.0 if density >= 1 else math.inf}
        return {"lower": _magnitude_at(inputs, index, inputs.count - max(1, int(density * inputs.count)))}

    def keep(self, delta: torch.Tensor, fields: Tensors, numbers: Mapping[str, torch.Tensor]) -> torch.Tensor:
        magnitude = delta.abs()
        return indicator(torch.ge, magnitude, numbers["lower"], out=magnitude)


class Outliers(_Plain):
    """The largest |delta| below the share `gamma` of outliers (Model Breadcrumbs: Davari and Belilovsky 2023).

    Fewer outliers are left out where the density could not be reached otherwise.
    """

    def numbers(self, inputs: Inputs, index: int) -> Values:
        density: float = inputs.per_model[index]["density"]
        if density >= 1:
            return {"lower": -1.0, "upper": math.inf}
        kept = int(density * inputs.count)
        outliers = int(inputs.per_model[index]["gamma"] * inputs.count)
        below = max(0, inputs.count - kept - outliers)
        last = min(below + kept, inputs.count)
        if density <= 0 or below >= last:
            return {"lower": math.inf, "upper": -1.0}
        known = (
            inputs.per_model[index]["gamma"] * UNIFORM_STEPS
        ).is_integer()  # to the table without outliers left out
        beyond = 0 if known else outliers
        lower, upper = (_magnitude_at(inputs, index, rank, beyond) for rank in (below, last - 1))
        return {"lower": lower, "upper": upper}

    def keep(self, delta: torch.Tensor, fields: Tensors, numbers: Mapping[str, torch.Tensor]) -> torch.Tensor:
        magnitude = delta.abs()
        above = indicator(torch.ge, magnitude, numbers["lower"])
        return above * indicator(torch.le, magnitude, numbers["upper"])


class Uniform(_Plain):
    """Every element with the same probability (DARE: Yu et al. 2024)."""

    def numbers(self, inputs: Inputs, index: int) -> Values:
        return {"steps": steps_of(min(max(inputs.per_model[index]["density"], 0.0), 1.0))}

    def fields(self, inputs: Inputs, index: int) -> Tensors:
        return (inputs.uniforms(index),)

    def keep(self, delta: torch.Tensor, fields: Tensors, numbers: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return below(fields[0], numbers["steps"])


class MagPrune:
    """Larger |delta| with higher probability, from density - epsilon to density + epsilon by rank in its row (DELLA:
    Deep et al. 2024). A vector is one row; in a row of one element the probability is the density.
    """

    def numbers(self, inputs: Inputs, index: int) -> Values:
        density: float = min(max(inputs.per_model[index]["density"], 0.0), 1.0)
        last = _row_length(inputs) - 1
        epsilon = inputs.per_model[index]["epsilon"] if 0 < density < 1 and last else 0.0
        return {"density": density, "epsilon": epsilon, "last": float(max(last, 1))}

    def fields(self, inputs: Inputs, index: int) -> Tensors:
        ranks = inputs.once("ranks in rows", (-1, index), lambda: _row_ranks(inputs, index))
        return (inputs.uniforms(index), ranks)

    def keep(self, delta: torch.Tensor, fields: Tensors, numbers: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return indicator(torch.lt, field_steps(fields[0]), steps_of(self.probability(fields, numbers)))

    def probability(self, fields: Tensors, numbers: Mapping[str, torch.Tensor]) -> torch.Tensor:
        place = field_steps(fields[1]) * 2 / numbers["last"] - 1  # -1 for the smallest, 1 for the largest
        return numbers["density"] + place * numbers["epsilon"]


SPARSIFIERS: dict[str, Sparsifier] = {
    "magnitude": Magnitude(),
    "random": Uniform(),
    "outliers": Outliers(),
    "magprune": MagPrune(),
}


def magnitude(inputs: Inputs, index: int) -> torch.Tensor:
    """|delta| of one model, float32, of the whole tensor."""
    assert inputs.base is not None
    return (inputs.tensors[index].to(torch.float32) - inputs.base.to(torch.float32)).abs()


def delta_in(inputs: Inputs, index: int, part: slice) -> torch.Tensor:
    """A part of one model's flattened task vector, float32."""
    assert inputs.base is not None
    base, tensor = inputs.base.reshape(-1), inputs.tensors[index].reshape(-1)
    return tensor[part].to(torch.float32) - base[part].to(torch.float32)


def _magnitude_at(inputs: Inputs, index: int, rank: int, beyond: int = 0) -> torch.Tensor:
    if inputs.once is each_time:
        return kth_smallest(magnitude(inputs, index), rank)
    table = inputs.once(("magnitudes", beyond), (-1, index), lambda: order_statistics(magnitude(inputs, index), beyond))
    return table.at(rank, lambda: magnitude(inputs, index))


def _row_length(inputs: Inputs) -> int:
    shape = inputs.tensors[0].shape
    return shape[1] if len(shape) > 1 else inputs.count


def _row_ranks(inputs: Inputs, index: int) -> torch.Tensor:
    """The rank of each |delta| in its row, from 0 for the smallest, as a field."""
    rows = magnitude(inputs, index)
    rows = rows if rows.dim() > 1 else rows.reshape(1, -1)
    ranks = rows.argsort(dim=1, stable=True).argsort(dim=1).flatten()
    if _row_length(inputs) > UNIFORM_STEPS:
        return ranks.to(torch.int32)
    return as_field((ranks - 32768).to(torch.int16), inputs.planes)


def largest_epsilon(density: float, wanted: float) -> float:
    """`wanted`, or as much of it as keeps density ± epsilon inside (0, 1)."""
    return max(0.0, min(wanted, min(density, 1 - density) - 1e-6))
