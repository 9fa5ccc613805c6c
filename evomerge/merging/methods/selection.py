"""Methods that select, element by element, which models change the base, and by how much.

SCE (Wan et al. 2024), Reinforced Agent Merging (2026), NearSwap and Arcee Fusion. Elements tied at a threshold are
treated alike.
"""

from functools import reduce

import torch

from evomerge.merging.kernels import indicator, kth_smallest, ordered_sum, ordered_total
from evomerge.merging.methods.base import Inputs
from evomerge.merging.methods.gram import gram
from evomerge.merging.methods.task_vectors import deltas_of, sign_of, sum_of, total_of
from evomerge.merging.passes import Numbers, Pass, Tensors, numbers_on

_NEGLIGIBLE = 1e-6
_SMOOTHING = 1e-8


def merge_sce(inputs: Inputs) -> Pass:
    """Select the elements of highest variance, calculate a weight per model from its mean square, erase minorities."""
    models = range(len(inputs.tensors))
    mask = _most_varied(inputs) if inputs.shared["select_topk"] < 1 else None
    if mask is None:
        sums = gram(inputs).diagonal().unbind()
    else:
        sums = tuple(_masked_square(inputs, index, mask) for index in models)
    squares = [total.reshape(1) / inputs.count for total in sums]
    total = reduce(torch.add, squares)
    negligible = total < _NEGLIGIBLE
    shares = [torch.where(negligible, 1 / len(models), each / torch.where(negligible, 1.0, total)) for each in squares]
    fields = () if mask is None else (mask,)
    return Pass(_erase_minorities, (_base(inputs), *inputs.tensors), numbers_on(inputs.device, share=shares), fields)


def _erase_minorities(tensors: Tensors, fields: Tensors, numbers: Numbers) -> torch.Tensor:
    base, deltas = deltas_of(tensors)
    if fields:
        mask = fields[0].to(torch.float32)
        for delta in deltas:
            delta *= mask
    elected = sign_of(sum_of(deltas))
    weights = []
    for delta, share in zip(deltas, numbers["share"], strict=True):
        agreeing = delta * elected
        weights.append(indicator(torch.gt, agreeing, 0.0, out=agreeing).mul_(share))
        delta *= weights[-1]
    merged = total_of(deltas)
    merged /= total_of(weights).clamp_(min=_NEGLIGIBLE)
    base += merged
    return base


def _most_varied(inputs: Inputs) -> torch.Tensor:
    """A flat mask (bytes) of the elements with the highest variance between models, the share `select_topk` of those
    that vary at all."""
    variance = _variance(inputs)
    share = max(inputs.shared["select_topk"], 0.0)
    count: torch.Tensor = ((variance != 0).sum() * share).to(torch.int64)  # a product in float32, as in mergekit
    ordered = variance.sort(descending=True).values
    threshold = ordered[(count - 1).clamp(min=0).reshape(1)]
    mask: torch.Tensor = (variance >= threshold) & (count > 0)
    return mask.to(torch.uint8)


def _variance(inputs: Inputs) -> torch.Tensor:
    base = _base(inputs).to(torch.float32)
    wide = [(tensor.to(torch.float32) - base).flatten().to(torch.float64) for tensor in inputs.tensors]
    mean = reduce(torch.add, wide) / len(wide)
    return (reduce(torch.add, [(delta - mean).square() for delta in wide]) / len(wide)).to(torch.float32)


def _masked_square(inputs: Inputs, index: int, mask: torch.Tensor) -> torch.Tensor:
    base, tensor = _base(inputs).reshape(-1), inputs.tensors[index].reshape(-1)

    def squares(part: slice) -> torch.Tensor:
        return ((tensor[part].to(torch.float32) - base[part].to(torch.float32)) * mask[part]).to(torch.float64).square()

    return ordered_total(squares, inputs.count)


def merge_ram(inputs: Inputs) -> Pass:
    """Changes of one model alone are added in full, changes that models share are averaged over those models."""
    numbers = numbers_on(inputs.device, epsilon=[inputs.shared["epsilon"]])
    return Pass(_average_changes, (_base(inputs), *inputs.tensors), numbers)


def _average_changes(tensors: Tensors, fields: Tensors, numbers: Numbers) -> torch.Tensor:
    base, deltas = deltas_of(tensors)
    changed = []
    for delta in deltas:
        magnitude = delta.abs()
        changed.append(indicator(torch.gt, magnitude, numbers["epsilon"][0], out=magnitude))
        delta *= changed[-1]
    total = total_of(deltas)
    total /= total_of(changed).clamp_(min=1.0)
    base += total
    return base


def merge_nearswap(inputs: Inputs) -> Pass:
    """The other model where it is within `t` of the base, and ever less of it with the distance."""
    t = max(inputs.shared["t"], 0.0)
    numbers = numbers_on(inputs.device, t=[t], least=[max(t, _NEGLIGIBLE)])
    return Pass(_swap_near, (_base(inputs), *inputs.tensors), numbers)


def _swap_near(tensors: Tensors, fields: Tensors, numbers: Numbers) -> torch.Tensor:
    """base - (base - other) t / max(|base - other|, t): no distance below t can make the weight more than 1."""
    base, other = tensors
    away = torch.sub(base, other, out=other)
    weight = away.abs().clamp_(min=numbers["least"][0])
    away *= torch.div(numbers["t"][0], weight, out=weight)
    base -= away
    return base


def merge_arcee_fusion(inputs: Inputs) -> Pass:
    """The other model where its change matters most: above the median by one and a half interquartile ranges.

    Importance is |change| times the Kullback-Leibler divergence between softmaxed rows. The quartiles are those of all
    elements, where mergekit draws a million of a larger tensor.
    """
    mask = inputs.once("important changes", (-1, 0), lambda: _important(inputs))
    return Pass(_swap_important, (_base(inputs), *inputs.tensors), fields=(mask,))


def _swap_important(tensors: Tensors, fields: Tensors, numbers: Numbers) -> torch.Tensor:
    base, other = tensors
    mask = fields[0].to(torch.float32)
    other *= mask
    base *= 1 - mask
    other += base
    return other


def _important(inputs: Inputs) -> torch.Tensor:
    """A flat mask of bytes."""
    base, other = (tensor.to(torch.float32) for tensor in (_base(inputs), inputs.tensors[0]))
    importance = (other.to(torch.float64) - base).abs() * _divergence(other, base)
    last = importance.numel() - 1
    low, middle, high = (kth_smallest(importance, last * quarter // 4) for quarter in (1, 2, 3))
    return (importance >= middle + 1.5 * (high - low)).flatten().to(torch.uint8)


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
