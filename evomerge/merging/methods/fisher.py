"""Averages weighted by Fisher information: Fisher merging (Matena and Raffel 2022) and gradient matching (Daheim et al.
2023).

Both are elementwise. A model's Fisher information is divided by its mean over the whole model, so that neither the
number of tokens of an answer nor a model's confidence decides how much the model counts: weights do.
"""

from collections.abc import Iterator, Sequence

import torch

from evomerge.merging.methods.base import Inputs, Statistic
from evomerge.merging.methods.combination import around
from evomerge.merging.methods.kernels import divisor, indicator
from evomerge.merging.methods.passes import Numbers, Pass, Slope, Tensors, numbers_on
from evomerge.merging.methods.task_vectors import deltas_of, total_of


def merge_fisher(inputs: Inputs) -> Pass:
    """The pass of Fisher merging: base + lambda sum_i w_i F_i d_i / sum_i w_i F_i, elementwise (Matena and Raffel 2022,
    eq. 3, where the base cancels out with lambda = 1).

    Each F_i is at least `floor`, as a share of the model's mean. A tensor that was not measured gets equal shares for
    equal weights. Identical models merge to themselves with lambda = 1.
    """
    assert inputs.base is not None
    weights, factor = inputs.each("weight"), inputs.shared["lambda"]
    measured = _measured(inputs, range(len(inputs.tensors)))
    if measured is None:
        by = divisor(sum(weights))
        return around(inputs.base, inputs.tensors, 1.0, [factor * weight / by for weight in weights])
    numbers = numbers_on(
        inputs.device,
        weight=weights,
        factor=[factor],
        floor=[inputs.shared["floor"]],
        scale=[1.0 / each.mean for each in measured],
    )
    values = (each.values for each in measured)
    return Pass(_fisher, (inputs.base, *inputs.tensors, *values), numbers, slopes=_fisher_slopes)


def merge_gradient_matching(inputs: Inputs) -> Pass:
    """The pass of gradient matching: base + sum_i w_i (H_0 + H_i) d_i / (H_0 + sum_i w_i H_i), elementwise (Daheim et
    al. 2023, eq. 13 with diagonal Hessians).

    H_i is a model's Fisher information and H_0 the base's plus `delta`, all as shares of the model's mean. A tensor
    that was not measured is merged by task arithmetic, to which a large `delta` leads, too.
    """
    assert inputs.base is not None
    weights = inputs.each("weight")
    measured = _measured(inputs, range(-1, len(inputs.tensors)))
    if measured is None:
        return around(inputs.base, inputs.tensors, 1.0, weights)
    numbers = numbers_on(
        inputs.device,
        weight=weights,
        delta=[inputs.shared["delta"]],
        scale=[1.0 / each.mean for each in measured],
    )
    values = (each.values for each in measured)
    return Pass(_matching, (inputs.base, *inputs.tensors, *values), numbers, slopes=_matching_slopes)


def _measured(inputs: Inputs, models: range) -> list[Statistic] | None:
    """The Fisher information of models; None where one of them was not measured on this tensor."""
    found = [each for index in models if (each := inputs.statistic("fisher", index)) is not None]
    return found if len(found) == len(models) else None


def _fisher(tensors: Tensors, fields: Tensors, numbers: Numbers) -> torch.Tensor:
    base, deltas, information = _parts(tensors, numbers)
    shares = [own.mul_(weight) for own, weight in zip(information, numbers["weight"], strict=True)]
    for delta, share in zip(deltas, shares, strict=True):
        delta *= share
    merged = total_of(deltas)
    merged /= _not_zero(total_of(shares))
    merged *= numbers["factor"][0]
    base += merged
    return base


def _fisher_slopes(tensors: Tensors, fields: Tensors, numbers: Numbers) -> Iterator[Slope]:
    _, deltas, information = _parts(tensors, numbers)
    total, mean = _weighted_mean(deltas, information, numbers)
    for index, (delta, own) in enumerate(zip(deltas, information, strict=True)):
        yield "weight", index, own * (delta - mean) / total * numbers["factor"][0]
    yield "factor", 0, mean


def _parts(tensors: Tensors, numbers: Numbers) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """The base, the task vectors, and each model's Fisher information, floored; in the memory of `tensors`."""
    count = len(numbers["weight"])
    base, deltas = deltas_of(tensors[: count + 1])
    information = [
        torch.maximum(own.mul_(scale), numbers["floor"][0])
        for own, scale in zip(tensors[count + 1 :], numbers["scale"], strict=True)
    ]
    return base, deltas, information


def _weighted_mean(
    deltas: Sequence[torch.Tensor], information: Sequence[torch.Tensor], numbers: Numbers
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of w_i F_i, and the mean of the task vectors with these for weights."""
    shares = [own * weight for own, weight in zip(information, numbers["weight"], strict=True)]
    merged = total_of([delta * share for delta, share in zip(deltas, shares, strict=True)])
    total = _not_zero(total_of(shares))
    return total, merged / total


def _not_zero(total: torch.Tensor) -> torch.Tensor:
    """What is divided by: 1 where nothing is known, and the sum is 0, too."""
    total += indicator(torch.eq, total, 0.0)
    return total


def _matching(tensors: Tensors, fields: Tensors, numbers: Numbers) -> torch.Tensor:
    base, deltas, own, others = _hessians(tensors, numbers)
    total = own.clone()
    for delta, other, weight in zip(deltas, others, numbers["weight"], strict=True):
        delta *= other + own
        delta *= weight
        total += other.mul_(weight)
    merged = total_of(deltas)
    merged /= _not_zero(total)
    base += merged
    return base


def _matching_slopes(tensors: Tensors, fields: Tensors, numbers: Numbers) -> Iterator[Slope]:
    _, deltas, own, others = _hessians(tensors, numbers)
    weighted = zip(deltas, others, numbers["weight"], strict=True)
    total, pulled = own.clone(), [(other + own) * delta for delta, other in zip(deltas, others, strict=True)]
    merged = torch.zeros_like(own)
    for pull, (_, other, weight) in zip(pulled, weighted, strict=True):
        total += other * weight
        merged += pull * weight
    total = _not_zero(total)
    merged /= total
    for index, (pull, other) in enumerate(zip(pulled, others, strict=True)):
        yield "weight", index, (pull - merged * other) / total


def _hessians(
    tensors: Tensors, numbers: Numbers
) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor, list[torch.Tensor]]:
    """The base, the task vectors, H_0, and the models' H_i; in the memory of `tensors`."""
    count = len(numbers["weight"])
    base, deltas = deltas_of(tensors[: count + 1])
    own, *others = (values.mul_(scale) for values, scale in zip(tensors[count + 1 :], numbers["scale"], strict=True))
    own += numbers["delta"][0]
    return base, deltas, own, others
