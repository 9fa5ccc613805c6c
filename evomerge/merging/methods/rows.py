"""Row weights: a step before a merge that weighs the rows of every model's task vectors.

A model x is read as base + r (x - base), where r has one number for each row of a weight matrix of a layer, and one for
any other tensor. The numbers are statistics, which gradients have learned (`workers.row_weights`). Yang et al. 2024
(AdaMerging, arXiv:2310.02575) learn one number for each tensor in this way.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import torch

from evomerge.devices import widened
from evomerge.errors import InputError
from evomerge.merging.methods.base import Inputs, Latest, MergeFunction, Once, each_time
from evomerge.merging.methods.kernels import pieces
from evomerge.merging.methods.parts import Elements, part_of
from evomerge.merging.methods.passes import Pass
from evomerge.merging.methods.slopes import Key

T = TypeVar("T")
_STEP = "rows"


def row_count(shape: Sequence[int], in_layer: bool) -> int:
    """How many numbers a tensor has: one for each row of a weight matrix of a layer, else one.

    shape: the tensor's.
    in_layer: whether it belongs to a layer.
    """
    return torch.Size(shape[:-1]).numel() if in_layer and len(shape) > 1 else 1


def per_element(numbers: torch.Tensor, elements: int, piece: slice) -> torch.Tensor:
    """The number of each element of a piece; one for all of them where there is one, and at most one where there are no
    elements.

    numbers: those of the rows, shape (rows,).
    elements: how many elements the tensor has.
    piece: which of its elements.
    """
    if len(numbers) == 1 or elements == 0:
        return numbers[:1]
    columns = elements // len(numbers)
    first, last = piece.start // columns, -(-piece.stop // columns)
    inside = slice(piece.start - first * columns, piece.stop - first * columns)
    return numbers[first:last, None].expand(-1, columns).reshape(-1)[inside]


class RowWeighted:
    """A tensor (`parts.Held`) that is made of a model's and of the base's where it is read; float32."""

    def __init__(self, base: Elements, tensor: Elements, numbers: torch.Tensor) -> None:
        """base: the base's tensor.
        tensor: the model's, in its shape.
        numbers: the weights of its rows, shape (rows,); see `row_count`.
        """
        self.shape, self.dtype, self.device = tensor.shape, torch.float32, tensor.device
        self._base, self._tensor, self._numbers = base, tensor, numbers.to(tensor.device, torch.float32)

    def numel(self) -> int:
        return self._tensor.numel()

    def part(self, piece: slice) -> torch.Tensor:
        base = part_of(self._base, piece).to(torch.float32)
        change = part_of(self._tensor, piece).to(torch.float32) - base
        change *= per_element(self._numbers, self.numel(), piece)
        change += base
        return change

    def ahead(self, piece: slice) -> None:
        for own in (self._base, self._tensor):
            if not isinstance(own, torch.Tensor):
                own.ahead(piece)

    def done(self, piece: slice) -> None:
        for own in (self._base, self._tensor):
            if not isinstance(own, torch.Tensor):
                own.done(piece)


@dataclass(frozen=True, slots=True)
class WithRowWeights:
    """A merge function on models whose rows are weighted.

    function: merges them.
    """

    function: MergeFunction

    def __call__(self, inputs: Inputs) -> Pass | Elements:
        return self.function(row_weighted(inputs))


def row_weighted(inputs: Inputs) -> Inputs:
    """The inputs with weighted rows. Models that have no weights for the tensor stay as they are.

    Raises InputError where a tensor has another number of weights than `row_count` says.
    """
    assert inputs.base is not None
    tensors: list[Elements] = []
    for index, tensor in enumerate(inputs.tensors):
        learned = inputs.statistic("row_weights", index)
        if learned is not None:
            assert isinstance(learned.values, torch.Tensor)
            count, shape = row_count(tensor.shape, inputs.in_layer), list(learned.values.shape)
            if shape != [count]:
                raise InputError(
                    f"row_weights: a tensor of shape {list(tensor.shape)} has weights of shape {shape}, expected "
                    f"[{count}]; measure them again with `evomerge measure SEARCH.yaml --kind row_weights`."
                )
            tensor = RowWeighted(inputs.base, tensor, learned.values)
        tensors.append(tensor)

    return replace(inputs, tensors=tuple(tensors), once=inputs.once if inputs.once is each_time else _Kept(inputs.once))


@dataclass(frozen=True, slots=True)
class _Kept:
    """A `base.Once` that keeps what depends on weighted rows apart from what depends on models as they are.

    once: keeps it.
    """

    once: Once

    def __call__(self, what: Hashable, models: tuple[int, ...], make: Callable[[], T], /) -> T:
        key = Latest((_STEP, what.what), what.value) if isinstance(what, Latest) else (_STEP, what)
        return self.once(key, models, make)


def row_slopes(inputs: Inputs, gradient: torch.Tensor) -> dict[Key, torch.Tensor]:
    """The derivatives of a loss by the weights of rows, where the base and all weighted task vectors are added up:
    float64, shape (rows,), under `weight` and the index of the model. On the inputs' device, or on the CPU where it has
    no float64.

    inputs: the tensors of the models, with rows as they are.
    gradient: the loss's gradient on the merged tensor, in its shape.
    """
    assert inputs.base is not None
    rows = row_count(gradient.shape, inputs.in_layer)
    if gradient.numel() == 0:
        return {("weight", index): widened(gradient.new_zeros(rows)) for index in range(len(inputs.tensors))}
    flat, columns = gradient.reshape(-1), gradient.numel() // rows
    parts: dict[Key, list[torch.Tensor]] = {("weight", index): [] for index in range(len(inputs.tensors))}
    for block in pieces(rows, gradient.device, columns):
        piece = slice(block.start * columns, block.stop * columns)
        base, wide = part_of(inputs.base, piece).to(torch.float32), widened(flat[piece])
        for tensor, own in zip(inputs.tensors, parts.values(), strict=True):
            change = part_of(tensor, piece).to(torch.float32) - base
            own.append((widened(change) * wide).view(-1, columns).sum(dim=1))
    return {key: torch.cat(own) for key, own in parts.items()}
