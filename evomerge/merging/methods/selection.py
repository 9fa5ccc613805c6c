"""Methods that select, element by element, which models change the base, and by how much.

SCE (Wan et al. 2024), Reinforced Agent Merging (2026), NearSwap and Arcee Fusion. Elements tied at a threshold are
treated alike.
"""

from functools import reduce

import torch

from evomerge.merging.kernels import kth_smallest, ordered_sum
from evomerge.merging.methods.base import Inputs

_NEGLIGIBLE = 1e-6
_SMOOTHING = 1e-8


def merge_sce(inputs: Inputs) -> torch.Tensor:
    """Select the elements of highest variance, calculate a weight per model from its mean square, erase minorities."""
    deltas = _deltas(inputs)
    if inputs.shared["select_topk"] < 1:
        mask = _most_varied(deltas, inputs.shared["select_topk"])
        deltas = [delta * mask for delta in deltas]
    elected = reduce(torch.add, deltas) >= 0
    squares = [ordered_sum(delta.flatten().to(torch.float64).square()) / delta.numel() for delta in deltas]
    total = reduce(torch.add, squares)
    negligible = total < _NEGLIGIBLE
    merged, divisors = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for delta, square in zip(deltas, squares, strict=True):
        share = torch.where(negligible, 1 / len(deltas), square / torch.where(negligible, 1.0, total))
        weight = torch.where(elected, delta > 0, delta < 0) * share.to(torch.float32)
        merged += delta * weight
        divisors += weight
    return _base(inputs) + merged / divisors.clamp(min=_NEGLIGIBLE)


def _most_varied(deltas: list[torch.Tensor], share: float) -> torch.Tensor:
    """A mask of the elements with the highest variance between models, `share` of those that vary at all."""
    wide = [delta.to(torch.float64) for delta in deltas]
    mean = reduce(torch.add, wide) / len(wide)
    variance = (reduce(torch.add, [(delta - mean).square() for delta in wide]) / len(wide)).to(torch.float32)
    count: torch.Tensor = ((variance != 0).sum() * max(share, 0.0)).to(
        torch.int64
    )  # a product in float32, as in mergekit
    ordered = variance.flatten().sort(descending=True).values
    threshold = ordered[(count - 1).clamp(min=0).reshape(1)]
    mask: torch.Tensor = (variance >= threshold) & (count > 0)
    return mask


def merge_ram(inputs: Inputs) -> torch.Tensor:
    """Changes of one model alone are added in full, changes that models share are averaged over those models."""
    deltas = _deltas(inputs)
    total, counts = torch.zeros_like(deltas[0]), torch.zeros_like(deltas[0])
    for delta in deltas:
        changed = delta.abs() > inputs.shared["epsilon"]
        total += delta * changed
        counts += changed
    return _base(inputs) + total / counts.clamp(min=1.0)


def merge_nearswap(inputs: Inputs) -> torch.Tensor:
    """The other model where it is within `t` of the base, and ever less of it with the distance."""
    a, b = _base(inputs).to(torch.float64), inputs.tensors[0].to(torch.float64)
    t: float = inputs.shared["t"]
    weight = (t / (a - b).abs().clamp(min=_NEGLIGIBLE)).clamp(0, 1)
    return (weight * b + (1 - weight) * a).to(torch.float32)


def merge_arcee_fusion(inputs: Inputs) -> torch.Tensor:
    """The other model where its change matters most: above the median by one and a half interquartile ranges.

    Importance is |change| times the Kullback-Leibler divergence between softmaxed rows. The quartiles are those of all
    elements, where mergekit draws a million of a larger tensor.
    """
    base, other = _base(inputs), inputs.tensors[0]
    importance = (other.to(torch.float64) - base).abs() * _divergence(other, base)
    last = importance.numel() - 1
    low, middle, high = (kth_smallest(importance, last * quarter // 4) for quarter in (1, 2, 3))
    return torch.where(importance < middle + 1.5 * (high - low), base, other)


def _divergence(other: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """KL(softmax(other) || softmax(base)) by rows, kept as a last dimension of size 1."""
    p, q = (_softmax(tensor.to(torch.float64)) + _SMOOTHING for tensor in (other, base))
    return ordered_sum(p * torch.log(p / q))


def _softmax(rows: torch.Tensor) -> torch.Tensor:
    raised = torch.exp(rows - rows.amax(dim=-1, keepdim=True))
    return raised / ordered_sum(raised)


def _base(inputs: Inputs) -> torch.Tensor:
    assert inputs.base is not None
    return inputs.base


def _deltas(inputs: Inputs) -> list[torch.Tensor]:
    return [tensor - _base(inputs) for tensor in inputs.tensors]
