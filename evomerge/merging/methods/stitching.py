"""Methods that keep an element of a task vector where models agree on it, or where it is among a model's largest.

They are Consensus task arithmetic with TALL masks (Wang et al. 2024) and Localize-and-Stitch without data (He et al.
2024). With weights of 1 they are those of the papers, whose one coefficient is `lambda`.
"""

from collections.abc import Iterator

import torch

from evomerge.merging.methods.base import Inputs
from evomerge.merging.methods.kernels import indicator
from evomerge.merging.methods.passes import Numbers, Pass, Slope, Tensors, numbers_on
from evomerge.merging.methods.sparsify import Magnitude
from evomerge.merging.methods.task_vectors import deltas_of, sum_of, total_of


def merge_consensus(inputs: Inputs) -> Pass:
    """The pass of Consensus task arithmetic: base + lambda m sum_i w_i d_i.

    A model claims an element where |d_i| >= threshold_i |sum_j d_j - d_i|; the sum is that of all task vectors, without
    weights. The mask m keeps what at least `agree` models claim, or all of them where there are fewer.
    """
    assert inputs.base is not None
    numbers = numbers_on(
        inputs.device,
        weight=inputs.each("weight"),
        threshold=inputs.each("threshold"),
        agree=[float(min(inputs.shared["agree"], len(inputs.tensors)))],
        **{"lambda": [inputs.shared["lambda"]]},
    )
    return Pass(_consensus, (inputs.base, *inputs.tensors), numbers, slopes=_consensus_slopes)


def _consensus(tensors: Tensors, fields: Tensors, numbers: Numbers) -> torch.Tensor:
    base, deltas = deltas_of(tensors)
    kept = _agreed(deltas, numbers)
    return _add(base, deltas, kept, numbers)


def _agreed(deltas: list[torch.Tensor], numbers: Numbers) -> torch.Tensor:
    """1.0 for the elements that enough models claim, else 0.0."""
    total = sum_of(deltas)
    claims = []
    for delta, threshold in zip(deltas, numbers["threshold"], strict=True):
        others = (total - delta).abs_().mul_(threshold)
        claims.append(indicator(torch.ge, delta.abs(), others))
    return indicator(torch.ge, total_of(claims), numbers["agree"][0])


def _consensus_slopes(tensors: Tensors, fields: Tensors, numbers: Numbers) -> Iterator[Slope]:
    _, deltas = deltas_of(tensors)
    kept = _agreed(deltas, numbers)
    yield from _slopes_of([delta * kept for delta in deltas], numbers)


def merge_localize_and_stitch(inputs: Inputs) -> Pass:
    """The pass of Localize-and-Stitch without data: base + lambda sum_i w_i m_i d_i / sum_i m_i.

    The mask m_i keeps the share `density` of the largest |d_i|. Where several models keep an element, their changes are
    averaged. The paper takes the largest elements of a whole model, this method those of each tensor, as `ties` does.
    """
    assert inputs.base is not None
    choose = Magnitude()
    lower = [choose.numbers(inputs, index)["lower"] for index in range(len(inputs.tensors))]
    numbers = numbers_on(
        inputs.device, weight=inputs.each("weight"), lower=lower, **{"lambda": [inputs.shared["lambda"]]}
    )
    return Pass(_stitch, (inputs.base, *inputs.tensors), numbers, slopes=_stitch_slopes)


def _stitch(tensors: Tensors, fields: Tensors, numbers: Numbers) -> torch.Tensor:
    base, deltas = deltas_of(tensors)
    return _add(base, deltas, _shares(deltas, numbers), numbers)


def _shares(deltas: list[torch.Tensor], numbers: Numbers) -> torch.Tensor:
    """Drops what models do not keep, in place. Returns 1 / the number of models that keep an element, or 1."""
    masks = [indicator(torch.ge, delta.abs(), lower) for delta, lower in zip(deltas, numbers["lower"], strict=True)]
    for delta, mask in zip(deltas, masks, strict=True):
        delta *= mask
    return total_of(masks).clamp_(min=1.0).reciprocal_()


def _stitch_slopes(tensors: Tensors, fields: Tensors, numbers: Numbers) -> Iterator[Slope]:
    _, deltas = deltas_of(tensors)
    share = _shares(deltas, numbers)
    yield from _slopes_of([delta * share for delta in deltas], numbers)


def _add(base: torch.Tensor, deltas: list[torch.Tensor], share: torch.Tensor, numbers: Numbers) -> torch.Tensor:
    """base + lambda share sum_i w_i d_i, in the memory of `base`."""
    for delta, weight in zip(deltas, numbers["weight"], strict=True):
        delta *= weight
    merged = total_of(deltas)
    merged *= share
    merged *= numbers["lambda"][0]
    base += merged
    return base


def _slopes_of(shares: list[torch.Tensor], numbers: Numbers) -> Iterator[Slope]:
    """The derivatives of lambda sum_i w_i p_i by weights and by lambda, with masks held fixed."""
    for index, share in enumerate(shares):
        yield "weight", index, share * numbers["lambda"][0]
    yield "lambda", 0, sum_of([share * weight for share, weight in zip(shares, numbers["weight"], strict=True)])
