"""Methods on task vectors, the differences between fine-tunes and their base.

The steps are those of mergekit 0.1.5, in its order, in float32:

1. delta_i = x_i - base is sparsified (sparsify.py) and weighted.
2. With a consensus, elements whose sign differs from the elected one, the sign of the weighted sum, are dropped (TIES).
3. The deltas are added up and, with `normalize`, divided by the weights that took part.
4. The sum is multiplied by lambda and added to the base.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from evomerge.devices import widened
from evomerge.merging.methods.base import Inputs
from evomerge.merging.methods.drawn import Field, field_part
from evomerge.merging.methods.kernels import UNIFORM_STEPS, divisor, exact_l1, indicator, l1_steps, pieces, sums_below
from evomerge.merging.methods.passes import Number, Numbers, Pass, Slope, Tensors, numbers_on
from evomerge.merging.methods.sparsify import SPARSIFIERS, Values, delta_in, largest_magnitude

_NEGLIGIBLE_L1 = 1e-7
_FINEST = 1.0 / UNIFORM_STEPS  # the least density above 0 that a mask can have


@dataclass(frozen=True, slots=True)
class TaskVectorMerge:
    """A merge function on task vectors.

    sparsify: the name of the way in which deltas are sparsified (`sparsify.SPARSIFIERS`); None where they are not.
    consensus: whether a sign is elected.
    """

    sparsify: str | None
    consensus: bool

    def __call__(self, inputs: Inputs) -> Pass:
        assert inputs.base is not None
        weights = inputs.each("weight")
        sparse = self.sparsify is not None and any(parameters["density"] < 1 for parameters in inputs.per_model)
        chosen = self.sparsify if sparse else None
        by = divisor(sum(weights)) if inputs.shared["normalize"] and not self.consensus else 1.0
        numbers: dict[str, Sequence[Number]] = {
            "weight": weights,
            "lambda": [inputs.shared["lambda"]],
            "by": [by],
        }
        fields: tuple[Field, ...] = ()
        if chosen is not None:
            sparsifier, models = SPARSIFIERS[chosen], range(len(inputs.tensors))
            choices = [sparsifier.numbers(inputs, index) for index in models]
            fields = tuple(field for index in models for field in sparsifier.fields(inputs, index))
            numbers |= {name: [values[name] for values in choices] for name in choices[0]}
            if inputs.shared["rescale"]:
                numbers["scale"] = [_scale(inputs, index, chosen, choices[index]) for index in models]
        element = TaskVectorPass(
            sparsify=chosen,
            consensus=self.consensus,
            normalize=inputs.shared["normalize"],
            scaled=bool(inputs.shared["lambda"] != 1),
            per_element=chosen == "magprune" and inputs.shared["rescale"] and inputs.rescale == "density",
        )
        moved = numbers_on(inputs.device, **numbers)
        return Pass(element, (inputs.base, *inputs.tensors), moved, fields, slopes=element.slopes)


@dataclass(frozen=True, slots=True)
class TaskVectorPass:
    """What happens to each element.

    sparsify: the name of the way in which deltas are sparsified; None where they are not.
    consensus: whether a sign is elected.
    normalize: whether the sum is divided by the weights that took part.
    scaled: whether lambda is other than 1.
    per_element: whether each element that is kept is divided by the probability of keeping it.
    """

    sparsify: str | None
    consensus: bool
    normalize: bool
    scaled: bool
    per_element: bool

    def __call__(self, tensors: Tensors, fields: Tensors, numbers: Numbers) -> torch.Tensor:
        base, deltas = deltas_of(tensors)
        for index, delta in enumerate(deltas):
            self._sparsify(delta, index, len(deltas), fields, numbers)
            delta *= numbers["weight"][index]
        merged = self._agreeing(deltas, numbers["weight"]) if self.consensus else total_of(deltas)
        if self.normalize and not self.consensus:
            merged /= numbers["by"][0]
        if self.scaled:
            merged *= numbers["lambda"][0]
        base += merged
        return base

    def _sparsify(self, delta: torch.Tensor, index: int, models: int, fields: Tensors, numbers: Numbers) -> None:
        """Sparsifies and rescales a task vector in place."""
        if self.sparsify is not None:
            sparsifier = SPARSIFIERS[self.sparsify]
            per_model = len(fields) // models
            own = fields[index * per_model : (index + 1) * per_model]
            values = {name: scalars[index] for name, scalars in numbers.items() if len(scalars) == models}
            delta *= sparsifier.keep(delta, own, values, None if self.per_element else values.get("scale"))
            if self.per_element:
                probability = sparsifier.probability(own, values)
                assert probability is not None
                delta *= 1.0 / probability.clamp(min=_FINEST)

    def slopes(self, tensors: Tensors, fields: Tensors, numbers: Numbers) -> Iterator[Slope]:
        """The derivatives by weights, by the sum of weights (`by`) and by lambda (see `Pass`). Masks and elected signs
        are held fixed."""
        _, deltas = deltas_of(tensors)
        for index, delta in enumerate(deltas):
            self._sparsify(delta, index, len(deltas), fields, numbers)
        yield from self._slopes_agreeing(deltas, numbers) if self.consensus else self._slopes_summed(deltas, numbers)

    def _slopes_summed(self, deltas: Sequence[torch.Tensor], numbers: Numbers) -> Iterator[Slope]:
        by = numbers["by"][0] if self.normalize else torch.ones_like(numbers["by"][0])
        total = sum_of([delta * weight for delta, weight in zip(deltas, numbers["weight"], strict=True)])
        for index, delta in enumerate(deltas):
            yield "weight", index, delta * (numbers["lambda"][0] / by)
        if self.normalize:
            yield "by", 0, total * (-numbers["lambda"][0] / by.square())
        yield "lambda", 0, total / by

    def _slopes_agreeing(self, deltas: Sequence[torch.Tensor], numbers: Numbers) -> Iterator[Slope]:
        """A model of weight 0 counts as one of a very small weight, or else it would never move away from 0."""
        weights = numbers["weight"]
        weighted = [delta * weight for delta, weight in zip(deltas, weights, strict=True)]
        elected = sign_of(sum_of(weighted))
        agreeing = [
            indicator(torch.gt, (delta if weight == 0 else own) * elected, 0.0)
            for delta, own, weight in zip(deltas, weighted, weights, strict=True)
        ]
        merged = sum_of([own * agrees for own, agrees in zip(weighted, agreeing, strict=True)])
        lost = torch.zeros_like(merged)
        if self.normalize:
            divisors = sum_of([agrees * weight for agrees, weight in zip(agreeing, weights, strict=True)])
            divisors += indicator(torch.eq, divisors, 0.0)
            merged /= divisors
            agreeing, lost = [agrees / divisors for agrees in agreeing], merged
        for index, (delta, agrees) in enumerate(zip(deltas, agreeing, strict=True)):
            yield "weight", index, agrees * (delta - lost) * numbers["lambda"][0]
        yield "lambda", 0, merged

    def _agreeing(self, deltas: Sequence[torch.Tensor], weights: Tensors) -> torch.Tensor:
        """The sum of the deltas, element by element, without those whose sign differs from that of the sum of all
        (TIES). With `normalize` it is divided by the weights of the deltas that agree."""
        total = sum_of(deltas)
        if not self.normalize and torch.compiler.is_compiling():  # the same sums, none of which waits for the sign
            above = [delta.relu() for delta in deltas]
            under = [delta - positive for delta, positive in zip(deltas, above, strict=True)]
            return torch.where(total >= 0.0, sum_of(above), sum_of(under))
        elected = sign_of(total)
        for delta in deltas:
            delta *= elected
            delta.relu_()
        if not self.normalize:
            return total_of(deltas).mul_(elected)
        merged = sum_of(deltas).mul_(elected)
        divisors = total_of(
            [indicator(torch.gt, delta, 0.0, out=delta).mul_(own) for delta, own in zip(deltas, weights, strict=True)]
        )
        divisors += indicator(torch.eq, divisors, 0.0, out=elected)
        merged /= divisors
        return merged


def deltas_of(tensors: Tensors) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The base and the task vectors.

    tensors: the base, then the models, whose memory the task vectors take.
    """
    base, *others = tensors
    for tensor in others:
        tensor -= base
    return base, others


def sum_of(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of tensors, added up in their order, in new memory."""
    first, *others = tensors
    return total_of([first + others[0], *others[1:]]) if others else first.clone()


def total_of(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of tensors, added up in their order, in the memory of the first."""
    total, *others = tensors
    for tensor in others:
        total += tensor
    return total


def sign_of(total: torch.Tensor) -> torch.Tensor:
    """1 where an element is 0 or more, else -1; in the memory of `total`, except in compiled code."""
    if torch.compiler.is_compiling():
        return torch.where(total >= 0.0, 1.0, -1.0)
    return indicator(torch.ge, total, 0.0, out=total).mul_(2).sub_(1)


def _scale(inputs: Inputs, index: int, how: str, numbers: Values) -> float | torch.Tensor:
    """The factor that a sparsified delta is multiplied by: 1 / density (DARE, eq. 4), or the ratio of its L1 norms
    before and after (mergekit)."""
    density: float = inputs.per_model[index]["density"]
    if density >= 1:
        return 1.0
    if density <= 0:
        return 0.0
    if inputs.rescale == "density":
        return 1.0 / max(density, _FINEST)
    largest = inputs.once("largest magnitude", (-1, index), lambda: largest_magnitude(inputs, index))
    before, after = map(widened, _l1(inputs, index, how, numbers, largest))
    unit = widened(largest) / (1 << 30)
    negligible = (before * unit < _NEGLIGIBLE_L1) | (after * unit < _NEGLIGIBLE_L1)
    ratio = before / after.clamp(min=1.0)
    return torch.where(negligible, torch.ones_like(ratio), ratio)


def _l1(
    inputs: Inputs, index: int, how: str, values: Values, largest: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The exact L1 norms of a delta and of what is kept of it, in units of `largest` / 2^30."""
    if how == "random" and inputs.drawn and inputs.count > UNIFORM_STEPS:
        table = inputs.once(("l1 below", inputs.drawn[index]), (-1, index), lambda: _l1_below(inputs, index, largest))
        steps = values["steps"]
        assert isinstance(steps, float)
        return table[-1], table[int(steps)]
    sparsifier = SPARSIFIERS[how]
    fields = sparsifier.fields(inputs, index)
    moved = numbers_on(inputs.device, **{name: [value] for name, value in values.items()})
    numbers = {name: scalars[0] for name, scalars in moved.items()}
    before, after = torch.zeros((2, 1), dtype=torch.int64, device=inputs.device)
    for piece in pieces(inputs.count, inputs.device):
        delta = delta_in(inputs, index, piece)
        own = tuple(field_part(field, piece, inputs.device) for field in fields)
        kept = sparsifier.keep(delta, own, numbers)
        before += exact_l1(delta, largest)
        after += exact_l1(delta * kept, largest)
    return before.sum(), after.sum()


def _l1_below(inputs: Inputs, index: int, largest: torch.Tensor) -> torch.Tensor:
    """A table of L1 norms, int64, shape (65537,): entry k adds up |delta| over the elements whose uniform number is
    less than k, in units of `largest` / 2^30."""
    field = inputs.uniforms(index)
    return sums_below(
        field, inputs.count, lambda piece: l1_steps(delta_in(inputs, index, piece), largest), inputs.device
    )
