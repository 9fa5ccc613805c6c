"""Methods that select, element by element, which models change the base, and by how much.

They are SCE (Wan et al. 2024), Reinforced Agent Merging (RAM and RAM+, 2026), NearSwap and Arcee Fusion. Elements that
equal a threshold are treated alike.
"""

import math
from collections.abc import Iterator, Sequence
from functools import partial, reduce

import torch

from evomerge.devices import exact_device, widened
from evomerge.merging.methods.base import Inputs, Latest, each_time
from evomerge.merging.methods.gram import gram
from evomerge.merging.methods.kernels import (
    UNIFORM_STEPS,
    as_field,
    ascending,
    below,
    indicator,
    kth_smallest,
    limit_of,
    ordered_sum,
    pieces,
    square_steps,
    sum_of_squares,
    sums_below,
)
from evomerge.merging.methods.parts import Elements, whole_of
from evomerge.merging.methods.passes import Number, Numbers, Pass, Slope, Tensors, numbers_on
from evomerge.merging.methods.sparsify import delta_in, largest_magnitude
from evomerge.merging.methods.task_vectors import deltas_of, sign_of, sum_of, total_of

_NEGLIGIBLE = 1e-6
_SMOOTHING = 1e-8


def merge_sce(inputs: Inputs) -> Pass:
    """The pass of SCE, in three steps: select the elements of highest variance, calculate each model's weight from the
    mean square of its changes, erase the changes whose sign is in the minority."""
    share = max(inputs.shared["select_topk"], 0.0)
    models = (-1, *range(len(inputs.tensors)))
    numbers: dict[str, Sequence[Number]] = {}
    fields: tuple[torch.Tensor, ...] = ()
    if share >= 1:
        sums = gram(inputs).diagonal().unbind()
    elif inputs.once is not each_time and inputs.count > UNIFORM_STEPS and (share * UNIFORM_STEPS).is_integer():
        steps = int(share * UNIFORM_STEPS)
        field = inputs.once("ranks of variance", models, lambda: _variance_ranks(inputs))
        tables = [
            inputs.once(("squares", index), models, partial(_squares_below, inputs, index, field))
            for index in range(len(inputs.tensors))
        ]
        fields, sums = (field,), tuple(table[steps] for table in tables)
        numbers = {"steps": [steps], "limit": [limit_of(steps)]}
    else:
        mask = _most_varied(inputs, share)
        fields, sums = (mask,), tuple(_masked_square(inputs, index, mask) for index in range(len(inputs.tensors)))
    squares = [total.reshape(1) / inputs.count for total in sums]
    total = reduce(torch.add, squares)
    negligible = total < _NEGLIGIBLE
    equal = 1 / len(squares)
    shares = [torch.where(negligible, equal, square / torch.where(negligible, 1.0, total)) for square in squares]
    scalars = numbers_on(inputs.device, share=shares, **numbers)
    return Pass(_erase_minorities, (_base(inputs), *inputs.tensors), scalars, fields)


def _erase_minorities(tensors: Tensors, fields: Tensors, numbers: Numbers) -> torch.Tensor:
    base, deltas = deltas_of(tensors)
    if fields:
        (field,) = fields
        ranked = "steps" in numbers
        mask = below(field, numbers["steps"][0], numbers["limit"][0]) if ranked else field.to(torch.float32)
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


def _most_varied(inputs: Inputs, share: float) -> torch.Tensor:
    """A flat mask (bytes) of the elements with the highest variance between models; `share` is their share of the
    elements that vary at all."""
    variance = _variance(inputs)
    mask: torch.Tensor = variance >= _least_variances(variance, [share])
    return mask.to(torch.uint8)


def _variance_ranks(inputs: Inputs) -> torch.Tensor:
    """The rank of each element by variance, as a field: an element belongs to the most varied share k / 65536 where its
    rank, counted from 0, is less than k."""
    variance = _variance(inputs)
    least = _least_variances(variance, [step / UNIFORM_STEPS for step in range(UNIFORM_STEPS)]).flip(0).contiguous()
    ranks = torch.empty(variance.shape, dtype=torch.int16, device=variance.device)
    for piece in pieces(inputs.count, inputs.device):
        reached = torch.searchsorted(least, variance[piece], right=True)  # how many of the shares have the element
        ranks[piece].copy_(UNIFORM_STEPS - 1 - reached - 32768)
    return as_field(ranks, inputs.planes)


def _least_variances(variance: torch.Tensor, shares: Sequence[float]) -> torch.Tensor:
    """For each share, the least variance that an element in it has; shape (shares,). A share counts the elements that
    vary at all, the most varied first; infinity where it has none."""
    varying = (variance != 0).sum().to(torch.float32)  # a product in float32, as in mergekit
    counts = (varying * torch.tensor(shares, dtype=torch.float32).to(variance.device)).to(torch.int64)
    last = ascending(variance)[(variance.numel() - counts).clamp(max=variance.numel() - 1)]
    return torch.where(counts > 0, last, math.inf)


def _variance(inputs: Inputs) -> torch.Tensor:
    """The variance of every element's change between the models: flat, float32, computed piece by piece."""
    variance = torch.empty(inputs.count, dtype=torch.float32, device=inputs.device)
    for piece in pieces(inputs.count, inputs.device):
        wide = [widened(delta_in(inputs, index, piece)) for index in range(len(inputs.tensors))]
        mean = reduce(torch.add, wide) / len(wide)
        variance[piece].copy_(reduce(torch.add, [(delta - mean).square() for delta in wide]) / len(wide))
    return variance


def _masked_square(inputs: Inputs, index: int, mask: torch.Tensor) -> torch.Tensor:
    largest, total = largest_magnitude(inputs, index), torch.zeros(1, dtype=torch.int64, device=inputs.device)
    for piece in pieces(inputs.count, inputs.device):
        total += (square_steps(delta_in(inputs, index, piece), largest) * mask[piece]).sum()
    return sum_of_squares(total, largest)


def _squares_below(inputs: Inputs, index: int, ranks: torch.Tensor) -> torch.Tensor:
    """A table of sums, float64, shape (65537,): entry k adds up the squared changes of the elements whose rank is less
    than k."""
    largest = largest_magnitude(inputs, index)
    steps = sums_below(
        ranks, inputs.count, lambda piece: square_steps(delta_in(inputs, index, piece), largest), inputs.device
    )
    return sum_of_squares(steps, largest)


def merge_ram(inputs: Inputs) -> Pass:
    """The pass that adds a change of one model in full, and the mean of changes that several models make to the same
    element. A change counts where it is larger than `epsilon`."""
    numbers = numbers_on(inputs.device, epsilon=[inputs.shared["epsilon"]])
    return Pass(_average_changes, (_base(inputs), *inputs.tensors), numbers)


def merge_ramplus_tl(inputs: Inputs) -> Pass:
    """The pass of RAM that strengthens the changes that one model alone makes: by 1 + r rho, where rho is the number of
    the model's changes that others share, divided by the number of those that it makes alone, but at most `alpha`.

    Both are counted in each tensor (`tl`: tensor-local).
    """
    epsilon, most = inputs.shared["epsilon"], inputs.shared["alpha"]
    models = (-1, *range(len(inputs.tensors)))
    counts = inputs.once(Latest("shared and own changes", epsilon), models, lambda: _changes(inputs, epsilon))
    shared, alone = counts.to(exact_device(inputs.device)).to(torch.float64).unbind(1)
    more = inputs.shared["r"] * (shared / alone.clamp(min=1.0)).clamp(min=0.0, max=most)
    numbers = numbers_on(inputs.device, epsilon=[epsilon], more=more.unbind())
    return Pass(_average_changes, (_base(inputs), *inputs.tensors), numbers)


def _changes(inputs: Inputs, epsilon: float) -> torch.Tensor:
    """For each model, how many of its changes others share, and how many it makes alone; int64, shape (models, 2)."""
    (bound,) = numbers_on(inputs.device, epsilon=[epsilon])["epsilon"]
    counts = torch.zeros(len(inputs.tensors), 2, dtype=torch.int64, device=inputs.device)
    for piece in pieces(inputs.count, inputs.device):
        changed = torch.stack([delta_in(inputs, index, piece).abs() > bound for index in range(len(inputs.tensors))])
        many = changed.sum(0)
        counts[:, 0] += (changed & (many > 1)).sum(1)
        counts[:, 1] += (changed & (many == 1)).sum(1)
    return counts


def _average_changes(tensors: Tensors, fields: Tensors, numbers: Numbers) -> torch.Tensor:
    """Without `more`, changes that one model alone makes are as strong as they are."""
    base, deltas = deltas_of(tensors)
    changed = []
    for delta in deltas:
        size = delta.abs()
        changed.append(indicator(torch.gt, size, numbers["epsilon"][0], out=size))
        delta *= changed[-1]
    many = total_of(changed)
    if "more" in numbers:
        alone = indicator(torch.eq, many, 1.0)
        for delta, more in zip(deltas, numbers["more"], strict=True):
            delta *= alone * more + 1.0
    total = total_of(deltas)
    total /= many.clamp_(min=1.0)
    base += total
    return base


def merge_nearswap(inputs: Inputs) -> Pass:
    """The pass that takes the other model's element where it is within `t` of the base's, and a smaller share of the
    change the farther away it is."""
    t = max(inputs.shared["t"], 0.0)
    numbers = numbers_on(inputs.device, t=[t], least=[max(t, _NEGLIGIBLE)])
    return Pass(_swap_near, (_base(inputs), *inputs.tensors), numbers, slopes=_swap_near_slopes)


def _swap_near(tensors: Tensors, fields: Tensors, numbers: Numbers) -> torch.Tensor:
    """base - (base - other) t / max(|base - other|, t); the maximum keeps the weight from exceeding 1."""
    base, other = tensors
    away = torch.sub(base, other, out=other)
    weight = away.abs().clamp_(min=numbers["least"][0])
    away *= torch.div(numbers["t"][0], weight, out=weight)
    base -= away
    return base


def _swap_near_slopes(tensors: Tensors, fields: Tensors, numbers: Numbers) -> Iterator[Slope]:
    """By `t` and by `least`, which bounds the divisor. Both follow the parameter, so their parts add up: to the sign of
    the change where it is farther away than `t`, and to nothing where the other model's element is taken."""
    base, other = tensors
    away = base - other
    weight = away.abs().clamp_(min=numbers["least"][0])
    yield "t", 0, -away / weight
    near = indicator(torch.le, away.abs(), numbers["least"][0])
    yield "least", 0, near * away * numbers["t"][0] / weight.square()


def merge_arcee_fusion(inputs: Inputs) -> Pass:
    """The pass that takes the other model's element where its change is important, and the base's elsewhere.

    Importance is |change| times the Kullback-Leibler divergence between softmaxed rows. A change is important from the
    median plus one and a half interquartile ranges on. The quartiles are those of all elements; mergekit draws a
    million elements of a larger tensor.
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
    """The mask of the important changes: flat, bytes."""
    base, other = (whole_of(tensor).to(torch.float32) for tensor in (_base(inputs), inputs.tensors[0]))
    importance = (widened(other) - widened(base)).abs() * _divergence(other, base)
    last = importance.numel() - 1
    low, middle, high = (kth_smallest(importance, last * quarter // 4) for quarter in (1, 2, 3))
    return (importance >= middle + 1.5 * (high - low)).flatten().to(torch.uint8).to(inputs.device)


def _divergence(other: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """KL(softmax(other) || softmax(base)) of each row; the last dimension stays with size 1."""
    p, q = (_softmax(widened(tensor)) + _SMOOTHING for tensor in (other, base))
    return ordered_sum(p * torch.log(p / q))


def _softmax(rows: torch.Tensor) -> torch.Tensor:
    raised = torch.exp(rows - rows.amax(dim=-1, keepdim=True))
    return raised / ordered_sum(raised)


def _base(inputs: Inputs) -> Elements:
    assert inputs.base is not None
    return inputs.base
