"""Learns row weights: Adam on a number for every row of every model's weight matrices, by the losses of the objectives.

The merge is base + sum_i r_i d_i, where the numbers r_i of a model multiply the rows of its task vectors d_i, one for
each row of a weight matrix of a layer and one for any other tensor (`methods.rows`). They start at the base, a model or
the uniform merge, whichever has the least loss. A step reads a mini-batch of search items. The gradient on a merged
tensor becomes one by its rows as soon as it is complete, so memory grows by a tensor's gradient and not by a model's.
The mean squared distance of the numbers from the mean of their tensor is added to the loss, times `pull`, since so many
numbers can fit the items of a search better than its tasks. The numbers that are kept are the mean of the last steps
(Polyak and Juditsky 1992).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from evomerge.config.spaces import RowsConfig
from evomerge.layers import layer_index
from evomerge.merging.methods.base import Kind
from evomerge.merging.methods.rows import row_count
from evomerge.merging.methods.slopes import Place
from evomerge.merging.plan import MergePlan
from evomerge.merging.resident.models import ResidentModels
from evomerge.merging.sources.statistics import Readable
from evomerge.optimizers.adam import Adam, Array, falling
from evomerge.recipe import Recipe, Source
from evomerge.workers.measuring import Measurement, Tensors

METHOD = "task_arithmetic+rows"
_AVERAGED = 1 / 6  # of the steps, at the end; chosen on zoos 101 and 102, as are the defaults of `RowsConfig`
_LOW, _HIGH = 0.0, 1.5
Loss = Callable[[int, bool], float]


@dataclass
class _Numbers:
    """The numbers of one tensor.

    values: the numbers, shape (models, rows).
    last: the mean of the values after the last steps, as far as they are taken.
    """

    values: Array
    last: Array = field(init=False)
    _adam: Adam = field(init=False)

    def __post_init__(self) -> None:
        self.last, self._adam = np.zeros(self.values.shape), Adam(self.values.shape)

    @property
    def spread(self) -> Array:
        """How far each number is from the mean of its model's."""
        spread: Array = self.values - self.values.mean(axis=1, keepdims=True)
        return spread

    def follow(self, gradient: Array, rate: float) -> None:
        """Takes one step, and stays in the box.

        gradient: the derivative of the loss by each number.
        rate: how far a number moves, about.
        """
        self.values = np.clip(self.values - self._adam.move(gradient, rate), _LOW, _HIGH)


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
        return _float32(self.numbers[name].values[self.model])


def row_weights(
    models: ResidentModels, base: str, references: Sequence[str], loss: Loss, settings: RowsConfig
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
    rows = _Rows(models, models.plan(recipe), references, loss)
    layout = {name: (tuple(own.shape), torch.float32) for name, own in rows.parts(lambda numbers: numbers.values)}

    def tensors() -> Tensors:
        rows.learn(settings)
        for name, own in rows.parts(lambda numbers: numbers.last):
            yield name, _float32(own)

    return Measurement(layout, tensors())


class _Rows:
    """The numbers of all tensors while they are learned."""

    def __init__(self, models: ResidentModels, plan: MergePlan, references: Sequence[str], loss: Loss) -> None:
        """plan: the merge of all models with weighted rows. See `row_weights`."""
        self._models, self._plan, self._references, self._loss = models, plan, references, loss
        self._numbers: dict[str, _Numbers] = {}
        for tensor in plan.tensors:
            count = row_count(models.shape_of(tensor), layer_index(tensor.name) is not None)
            self._numbers[tensor.name] = _Numbers(np.zeros((len(references), count)))

    def parts(self, of: Callable[[_Numbers], Array]) -> Iterator[tuple[str, Array]]:
        """What is written, by the names of the files' tensors: one vector for each tensor and model.

        of: which numbers of a tensor.
        """
        for name, own in self._numbers.items():
            for place, numbers in enumerate(of(own)):
                yield f"{place}:{name}", numbers

    def learn(self, settings: RowsConfig) -> None:
        """Takes all steps."""
        self._merge(self._start())
        averaged = max(1, round(_AVERAGED * settings.steps))
        pull = 2 * settings.pull / sum(own.values.size for own in self._numbers.values())
        for step in range(1, settings.steps + 1):
            with self._models.following_rows() as followed:
                self._loss(step, True)
            rate = falling(settings.rate, step, settings.steps)
            for name, own in self._numbers.items():
                own.follow(self._gradient(followed.sums, name) + pull * own.spread, rate)
                if step > settings.steps - averaged:
                    own.last += own.values / averaged
            self._merge()

    def _merge(self, weights: Sequence[float] | None = None) -> None:
        """Makes the merge.

        weights: a weight for all rows of each model; None for their own.
        """
        if weights is not None:
            for own in self._numbers.values():
                own.values[:] = np.array(weights)[:, None]
        self._models.make_with(self._plan, self._held)

    def _held(self, _: Kind, reference: str) -> Readable:
        return _Held(self._numbers, self._references.index(reference))

    def _start(self) -> Sequence[float]:
        """The weights of the models with the least loss on the first mini-batch; of equal ones the first."""
        found = []
        for weights in starts(len(self._references)):
            self._merge(weights)
            found.append((self._loss(0, False), weights))
        return min(found, key=lambda pair: pair[0])[1]

    def _gradient(self, sums: Mapping[Place, torch.Tensor], name: str) -> Array:
        """The derivative of the loss by each number of a tensor; zeros where the loss does not depend on it."""
        found = [sums.get((name, reference, "weight")) for reference in self._references]
        zero = np.zeros(self._numbers[name].values.shape[1])
        return np.stack([zero if own is None else own.to("cpu").numpy() for own in found])


def starts(count: int) -> list[tuple[float, ...]]:
    """Where learning may start, as a weight for each model: at the base, at a model, or at the uniform merge.

    count: how many models there are.
    """
    parents = [tuple(float(place == own) for place in range(count)) for own in range(count)]
    return [(0.0,) * count, *parents, *([(1.0 / count,) * count] if count > 1 else [])]


def _float32(numbers: Array) -> torch.Tensor:
    return torch.from_numpy(numbers.astype(np.float32))
