"""Linear combinations of models: the pass in which averages, arcs and means on spheres all end."""

from collections.abc import Sequence

import torch

from evomerge.merging.methods.passes import Numbers, Pass, Tensors, numbers_on

Coefficient = float | torch.Tensor


def around(
    anchor: torch.Tensor, tensors: Sequence[torch.Tensor], own: Coefficient, others: Sequence[Coefficient]
) -> Pass:
    """own * anchor + sum_i others_i (x_i - anchor).

    Written around one of them so that float32 is enough for equal models to come back bit for bit.
    """
    kept = isinstance(own, float) and own == 1
    numbers = numbers_on(anchor.device, own=[] if kept else [own], others=others)
    factor = own if isinstance(own, float) and not tensors else None
    return Pass(_around, (anchor, *tensors), numbers, factor=factor)


def combination(
    tensors: Sequence[torch.Tensor], coefficients: Sequence[Coefficient], total: Coefficient, anchor: int = 0
) -> Pass:
    """sum_i coefficients_i x_i, where `total` is the sum of the coefficients. A model that has all of the weight comes
    back bit for bit if it is the anchor."""
    others = [index for index in range(len(tensors)) if index != anchor]
    return around(tensors[anchor], [tensors[i] for i in others], total, [coefficients[i] for i in others])


def heaviest(weights: Sequence[float]) -> int:
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
    for part in others:
        total += part
    anchor -= total  # a difference of two equal zeros would lose the sign of the first as a sum
    return anchor
