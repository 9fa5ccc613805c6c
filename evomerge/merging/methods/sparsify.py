"""Which elements of a task vector are kept: one class for each way to choose them.

A class computes what the choice depends on (thresholds, probabilities, fields), and then says which elements are kept.
Elements that equal a threshold are treated alike; mergekit takes those that its sort happens to put first.
"""

import math
from collections.abc import Mapping
from typing import Protocol

import numpy as np
import torch

from evomerge.merging.methods.base import Inputs, each_time
from evomerge.merging.methods.drawn import Field
from evomerge.merging.methods.kernels import (
    UNIFORM_STEPS,
    as_field,
    below,
    counted,
    field_steps,
    indicator,
    limit_of,
    pieces,
    steps_of,
)
from evomerge.merging.methods.order import OrderStatistics, elements_at, order_statistics
from evomerge.merging.methods.parts import part_of
from evomerge.merging.methods.passes import Number, Tensors

Values = Mapping[str, Number]
Scalars = Mapping[str, torch.Tensor]


class Sparsifier(Protocol):
    """A way to choose the elements that are kept.

    A density of 1 or more keeps all elements, and a density of 0 or less keeps none.
    """

    def numbers(self, inputs: Inputs, index: int) -> Values:
        """The numbers that the choice depends on for one model, by name. All models have the same names.

        inputs: the tensors of all models.
        index: the model's index in `inputs.tensors`.
        """
        ...

    def fields(self, inputs: Inputs, index: int) -> tuple[Field, ...]:
        """The fields that the choice reads for one model. All models have the same number of fields.

        inputs: the tensors of all models.
        index: the model's index in `inputs.tensors`.
        """
        ...

    def keep(
        self, delta: torch.Tensor, fields: Tensors, numbers: Scalars, value: torch.Tensor | None = None
    ) -> torch.Tensor:
        """`value` for elements that are kept, else 0.0; float32, in the shape of `delta`.

        delta: a flat task vector, or a piece of one.
        fields: the same piece of what `fields` returned.
        numbers: what `numbers` returned, as scalar tensors.
        value: a scalar, not negative; by default 1.0.
        """
        ...

    def probability(self, fields: Tensors, numbers: Scalars) -> torch.Tensor | None:
        """The probability with which each element is kept; None where it is the density.

        fields: what `fields` returned, or the same piece of each.
        numbers: what `numbers` returned, as scalar tensors.
        """
        ...


class _Plain:
    def fields(self, inputs: Inputs, index: int) -> tuple[Field, ...]:
        return ()

    def probability(self, fields: Tensors, numbers: Scalars) -> torch.Tensor | None:
        return None


class Magnitude(_Plain):
    """Keeps the largest |delta|, at least one element (TIES: Yadav et al. 2023)."""

    def numbers(self, inputs: Inputs, index: int) -> Values:
        density: float = inputs.per_model[index]["density"]
        if not 0 < density < 1:
            return {"lower": -1.0 if density >= 1 else math.inf}
        return {"lower": _magnitude_at(inputs, index, inputs.count - max(1, int(density * inputs.count)))}

    def keep(
        self, delta: torch.Tensor, fields: Tensors, numbers: Scalars, value: torch.Tensor | None = None
    ) -> torch.Tensor:
        magnitude = delta.abs()
        return indicator(torch.ge, magnitude, numbers["lower"], out=magnitude, value=value)


class Outliers(_Plain):
    """Drops the share `gamma` of the largest |delta|, the outliers, and keeps the largest of the others (Model
    Breadcrumbs: Davari and Belilovsky 2023).

    Fewer outliers are dropped where the density could not be reached otherwise.
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
        # A gamma in steps of 1/65536 is one of the shares in the table of all elements; any other needs a table of its
        # own, which counts from behind the outliers.
        in_steps = (inputs.per_model[index]["gamma"] * UNIFORM_STEPS).is_integer()
        beyond = 0 if in_steps else outliers
        lower, upper = (_magnitude_at(inputs, index, rank, beyond) for rank in (below, last - 1))
        return {"lower": lower, "upper": upper}

    def keep(
        self, delta: torch.Tensor, fields: Tensors, numbers: Scalars, value: torch.Tensor | None = None
    ) -> torch.Tensor:
        magnitude = delta.abs()
        above = indicator(torch.ge, magnitude, numbers["lower"])
        return above * indicator(torch.le, magnitude, numbers["upper"], value=value)


class Uniform(_Plain):
    """Keeps every element with the same probability, the density (DARE: Yu et al. 2024)."""

    def numbers(self, inputs: Inputs, index: int) -> Values:
        steps = steps_of(min(max(inputs.per_model[index]["density"], 0.0), 1.0))
        return {"steps": steps, "limit": limit_of(float(steps))}

    def fields(self, inputs: Inputs, index: int) -> tuple[Field, ...]:
        return (inputs.uniforms(index),)

    def keep(
        self, delta: torch.Tensor, fields: Tensors, numbers: Scalars, value: torch.Tensor | None = None
    ) -> torch.Tensor:
        return below(fields[0], numbers["steps"], numbers["limit"], value)


class MagPrune:
    """Keeps larger |delta| with higher probability (DELLA: Deep et al. 2024).

    The probability rises with the rank of |delta| in its row, from density - epsilon to density + epsilon. A vector is
    one row. In a row of one element the probability is the density.
    """

    def numbers(self, inputs: Inputs, index: int) -> Values:
        density: float = min(max(inputs.per_model[index]["density"], 0.0), 1.0)
        last = _row_length(inputs) - 1
        epsilon = inputs.per_model[index]["epsilon"] if 0 < density < 1 and last else 0.0
        return {"density": density, "epsilon": epsilon, "last": float(max(last, 1))}

    def fields(self, inputs: Inputs, index: int) -> tuple[Field, ...]:
        ranks = inputs.once("ranks in rows", (-1, index), lambda: _row_ranks(inputs, index))
        return (inputs.uniforms(index), ranks)

    def keep(
        self, delta: torch.Tensor, fields: Tensors, numbers: Scalars, value: torch.Tensor | None = None
    ) -> torch.Tensor:
        least = steps_of(self.probability(fields, numbers))
        return indicator(torch.lt, field_steps(counted(fields[0])), least, value=value)

    def probability(self, fields: Tensors, numbers: Scalars) -> torch.Tensor:
        place = field_steps(fields[1]) * 2 / numbers["last"] - 1  # -1 for the smallest, 1 for the largest
        return numbers["density"] + place * numbers["epsilon"]


SPARSIFIERS: dict[str, Sparsifier] = {
    "magnitude": Magnitude(),
    "random": Uniform(),
    "outliers": Outliers(),
    "magprune": MagPrune(),
}


def largest_magnitude(inputs: Inputs, index: int) -> torch.Tensor:
    """The largest |delta| of one model, a scalar, found piece by piece.

    inputs: the tensors of all models, and the base.
    index: the model's index in `inputs.tensors`.
    """
    cuts = list(pieces(inputs.count, inputs.device))
    found = torch.empty(len(cuts), dtype=torch.float32, device=inputs.device)
    for number, piece in enumerate(cuts):
        found[number] = delta_in(inputs, index, piece).abs_().amax()  # a list would leave holes in malloc's memory
    return found.amax()


def delta_in(inputs: Inputs, index: int, piece: slice) -> torch.Tensor:
    """A piece of one model's flat task vector, float32.

    inputs: the tensors of all models, and the base.
    index: the model's index in `inputs.tensors`.
    piece: which elements.
    """
    assert inputs.base is not None
    base, tensor = part_of(inputs.base, piece), part_of(inputs.tensors[index], piece)
    return tensor.to(torch.float32) - base.to(torch.float32)


def _magnitude_at(inputs: Inputs, index: int, rank: int, beyond: int = 0) -> torch.Tensor:
    def magnitudes(piece: slice) -> torch.Tensor:
        return delta_in(inputs, index, piece).abs_()

    if inputs.once is each_time:
        return elements_at(magnitudes, inputs.count, np.array([rank]), inputs.device)[0]
    table: OrderStatistics = inputs.once(
        ("magnitudes", beyond), (-1, index), lambda: order_statistics(magnitudes, inputs.count, inputs.device, beyond)
    )
    return table.at(rank, magnitudes)


def _row_length(inputs: Inputs) -> int:
    shape = inputs.tensors[0].shape
    return shape[1] if len(shape) > 1 else inputs.count


def _row_ranks(inputs: Inputs, index: int) -> torch.Tensor:
    """The rank of each |delta| in its row, from 0 for the smallest, as a field."""
    length = _row_length(inputs)
    side_by_side = math.prod(inputs.tensors[0].shape[2:])  # rows, where a tensor has more than two dimensions
    block = length * side_by_side
    narrow = length <= UNIFORM_STEPS
    ranks = torch.empty(inputs.count, dtype=torch.int16 if narrow else torch.int32, device=inputs.device)
    for blocks in pieces(inputs.count // block, inputs.device, block):
        piece = slice(blocks.start * block, blocks.stop * block)
        magnitudes = delta_in(inputs, index, piece).abs_().view(-1, length, side_by_side)
        own = magnitudes.argsort(dim=1, stable=True).argsort(dim=1)
        ranks[piece].copy_((own - 32768 if narrow else own).flatten())
    return as_field(ranks, inputs.planes) if narrow else ranks


def largest_epsilon(density: float, wanted: float) -> float:
    """The largest epsilon up to `wanted` that keeps density ± epsilon inside (0, 1).

    density: from 0 to 1.
    wanted: the epsilon to have if possible.
    """
    return max(0.0, min(wanted, min(density, 1 - density) - 1e-6))
