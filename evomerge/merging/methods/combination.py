"""Linear combinations of models: the pass that computes averages, arcs and means on spheres."""

from collections.abc import Iterator, Sequence

import torch

from evomerge.merging.methods.parts import Elements
from evomerge.merging.methods.passes import Numbers, Pass, Slope, Tensors, numbers_on

Coefficient = float | torch.Tensor


def around(anchor: Elements, tensors: Sequence[Elements], own: Coefficient, others: Sequence[Coefficient]) -> Pass:
    """The pass that computes own * anchor + sum_i others_i (x_i - anchor).

    Differences from one of the models make float32 enough for equal models to come back bit for bit.

    anchor: the model whose differences from the others are taken.
    tensors: the other models x_i, each of the anchor's shape.
    own: the anchor's coefficient.
    others: the coefficients of the differences, in the order of `tensors`.
    """
    kept = isinstance(own, float) and own == 1
    numbers = numbers_on(anchor.device, own=[] if kept else [own], others=others)
    factor = own if isinstance(own, float) and not tensors else None
    return Pass(_around, (anchor, *tensors), numbers, factor=factor, slopes=_around_slopes)


def combination(
    tensors: Sequence[Elements], coefficients: Sequence[Coefficient], total: Coefficient, anchor: int = 0
) -> Pass:
    """The pass that computes sum_i coefficients_i x_i. An anchor that has all of the weight comes back bit for bit.

    tensors: the models x_i, all of one shape.
    coefficients: one for each model.
    total: the sum of the coefficients.
    anchor: the index of the model that `around` takes differences from.
    """
    others = [index for index in range(len(tensors)) if index != anchor]
    return around(tensors[anchor], [tensors[i] for i in others], total, [coefficients[i] for i in others])


def heaviest(weights: Sequence[float]) -> int:
    """The index of the weight of the largest magnitude, the first one of equals."""
    return max(range(len(weights)), key=lambda index: abs(weights[index]))


def _around(tensors: Tensors, fields: Tensors, numbers: Numbers) -> torch.Tensor:
    anchor, *away = tensors
    for tensor, coefficient in zip(away, numbers["others"], strict=True):
        torch.sub(anchor, tensor, out=tensor).mul_(coefficient)
    for own in numbers["own"]:
        anchor *= own
    if not away:
        return anchor
    total, *others = away
    for difference in others:
        total += difference
    anchor -= total  # a difference of two equal zeros would lose the sign of the first as a sum
    return anchor


def _around_slopes(tensors: Tensors, fields: Tensors, numbers: Numbers) -> Iterator[Slope]:
    """By a difference's coefficient the difference, and by the anchor's own coefficient the anchor."""
    anchor, *others = tensors
    for index, tensor in enumerate(others):
        yield "others", index, tensor - anchor
    if numbers["own"]:
        yield "own", 0, anchor
