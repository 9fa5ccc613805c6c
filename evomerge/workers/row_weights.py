"""Learns row weights: Adam on a number for every row of every model's weight matrices, by the losses of the objectives.

The merge is base + sum_i r_i d_i, where the numbers r_i of a model multiply the rows of its task vectors d_i, one for
each row of a weight matrix of a layer and one for any other tensor (`methods.rows`). They start at the base, a model or
the uniform merge, whichever has the least loss. A step reads a mini-batch of search items. The gradient on a merged
tensor becomes one by its rows as soon as it is complete, so memory grows by a tensor's gradient and not by a model's.
The mean squared distance of the numbers from the mean of their tensor is added to the loss, times `pull`, since so many
numbers can fit the items of a search better than its tasks. The numbers that are kept are the mean of the last steps
(Polyak and Juditsky 1992).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from evomerge.config.spaces import RowsConfig
from evomerge.layers import layer_index
from evomerge.merging.methods.base import Kind
from evomerge.merging.methods.rows import row_count
from evomerge.merging.methods.slopes import Place
from evomerge.merging.resident.models import ResidentModels
from evomerge.merging.sources.statistics import Readable
from evomerge.recipe import Recipe, Source
from evomerge.workers.measuring import Measurement, Tensors

METHOD = "task_arithmetic+rows"
# Chosen on zoos 101 and 102 (scripts/train_zoo --seed), as are the defaults of `RowsConfig`.
_BETAS = (0.9, 0.95)
_EPSILON = 1e-12
_FALLS_TO = 0.1
_AVERAGED = 1 / 6  # of the steps, at the end
_LOW, _HIGH = 0.0, 1.5


@dataclass
class _Numbers:
    """The numbers of one tensor.

    values: the numbers, float64 on the CPU, shape (models, rows).
    mean, square: Adam's moments.
    last: the mean of the values after the last steps, as far as they are taken.
    """

    values: torch.Tensor
    mean: torch.Tensor = field(init=False)
    square: torch.Tensor = field(init=False)
    last: torch.Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.mean, self.square, self.last = (torch.zeros_like(self.values) for _ in range(3))

    def put(self, weights: Sequence[float]) -> None:
        """Sets all rows of a model to its weight."""
        self.values.copy_(torch.tensor(weights, dtype=torch.float64)[:, None].expand_as(self.values))

    @property
    def spread(self) -> torch.Tensor:
        """How far each number is from the mean of its model's."""
        return self.values - self.values.mean(dim=1, keepdim=True)

    def follow(self, gradient: torch.Tensor, step: int, rate: float) -> None:
        """Takes one step of Adam (Kingma and Ba 2015, algorithm 1), and stays in the box.

        gradient: the derivative of the loss by each number.
        step: the number of the step, from 1.
        rate: how far a number moves at most, about.
        """
        first, second = _BETAS
        self.mean.mul_(first).add_(gradient, alpha=1 - first)
        self.square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        mean, square = self.mean / (1 - first**step), self.square / (1 - second**step)
        self.values.sub_(rate * mean / (square.sqrt() + _EPSILON)).clamp_(_LOW, _HIGH)


@dataclass(frozen=True, slots=True)
class _Held:
    """Row weights that are not written yet, as a method reads them (`statistics.Readable`).

    numbers: those of each tensor.
    model: the place of the model among those that are merged.
    """

    numbers: Mapping[str, _Numbers]
    model: int
    mean: float = 1.0

    def tensor_of(self, name: str) -> str | None:
        return name if name in self.numbers else None

    def transposed(self, name: str) -> bool:
        return False

    def read(self, name: str) -> torch.Tensor:
        return self.numbers[name].values[self.model].to(torch.float32)


def row_weights(
    models: ResidentModels,
    base: str,
    references: Sequence[str],
    loss: Callable[[int, bool], float],
    settings: RowsConfig,
) -> Measurement:
    """The weights of the rows of all models, learned together.

    models: the models, of which the one in memory is written over.
    base: the base's reference.
    references: those of the models.
    loss: number of a mini-batch -> the candidate's loss on it; where the flag is set, its backward pass runs, too.
    settings: how they are learned.
    """
    recipe = Recipe(
        merge_method=METHOD,
        base_model=base,
        models=tuple(Source(model=reference, parameters={"weight": 1.0}) for reference in references),
        parameters={"normalize": False},
    )
    plan, count = models.plan(recipe), len(references)
    numbers = {
        tensor.name: _Numbers(
            torch.zeros(
                (count, row_count(models.shape_of(tensor), layer_index(tensor.name) is not None)), dtype=torch.float64
            )
        )
        for tensor in plan.tensors
    }
    layout = {
        f"{place}:{name}": ((own.values.shape[1],), torch.float32)
        for name, own in numbers.items()
        for place in range(count)
    }

    def held(_: Kind, reference: str) -> Readable:
        return _Held(numbers, references.index(reference))

    def merge(weights: Sequence[float] | None = None) -> None:
        if weights is not None:
            for own in numbers.values():
                own.put(weights)
        models.make_with(plan, held)

    def start() -> Sequence[float]:
        """The weights of the models with the least loss on the first mini-batch."""
        found = []
        for weights in starts(count):
            merge(weights)
            found.append((loss(0, False), weights))
        return min(found, key=lambda pair: pair[0])[1]

    def tensors() -> Tensors:
        merge(start())
        averaged = max(1, round(_AVERAGED * settings.steps))
        pull = 2 * settings.pull / sum(own.values.numel() for own in numbers.values())
        for step in range(1, settings.steps + 1):
            with models.following_rows() as followed:
                loss(step, True)
            rate = settings.rate * (1 - (1 - _FALLS_TO) * (step - 1) / settings.steps)
            for name, own in numbers.items():
                gradient = _gradient(followed.sums, name, references, own.values)
                own.follow(gradient + pull * own.spread, step, rate)
                if step > settings.steps - averaged:
                    own.last += own.values / averaged
            merge()
        for name, own in numbers.items():
            for place in range(count):
                yield f"{place}:{name}", own.last[place].to(torch.float32)

    return Measurement(layout, tensors())


def starts(count: int) -> list[tuple[float, ...]]:
    """Where learning may start, as a weight for each model: at the base, at a model, or at the uniform merge.

    count: how many models there are.
    """
    parents = [tuple(float(place == own) for place in range(count)) for own in range(count)]
    return [(0.0,) * count, *parents, *([(1.0 / count,) * count] if count > 1 else [])]


def _gradient(
    sums: Mapping[Place, torch.Tensor], name: str, references: Sequence[str], like: torch.Tensor
) -> torch.Tensor:
    """The derivative of the loss by each number of a tensor; zeros where the loss does not depend on it."""
    found = [sums.get((name, reference, "weight")) for reference in references]
    return torch.stack([torch.zeros_like(like[0]) if own is None else own.to("cpu") for own in found])
