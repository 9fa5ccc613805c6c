"""Sees what a model multiplies by the weight matrices of its layers, whichever modules hold them: linear layers, layers
of GPT-2's kind, which store their weights the other way round, and experts, whose weights are slices of larger tensors.
"""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from evomerge.layers import layer_index
from evomerge.merging.naming import Naming

# where a function takes its inputs and a matrix, and the axis of the matrix along which the inputs' channels lie
_PRODUCTS: Mapping[Callable[..., Any], tuple[int, int, int]] = {
    torch.nn.functional.linear: (0, 1, 1),
    torch.addmm: (1, 2, 0),
    torch.mm: (0, 1, 0),
    torch.matmul: (0, 1, 0),
    torch.Tensor.matmul: (0, 1, 0),
    torch.Tensor.__matmul__: (0, 1, 0),
}


@dataclass(frozen=True)
class Matrix:
    """A matrix that inputs are multiplied by, as it lies in a parameter.

    tensor: the parameter's name in memory.
    offset: where its first element lies there.
    shape: how many channels the inputs have, and the outputs.
    strides: how many elements one channel of the inputs lies from the next, and one of the outputs.
    """

    tensor: str
    offset: int
    shape: tuple[int, int]
    strides: tuple[int, int]

    def alike(self, parameter: torch.Tensor) -> "list[Matrix]":
        """The matrices that lie in its parameter as it does: the same one of every expert where experts are stacked, or
        itself alone."""
        if parameter.dim() != 3:
            return [self]
        step = parameter.stride(0)
        return [replace(self, offset=self.offset % step + number * step) for number in range(len(parameter))]


Seen = Callable[[Matrix, Mapping[str, bool], torch.Tensor], None]
"""Is told of a product: the matrix; the names that its parts have in checkpoints, and for each whether it is stored the
other way round, with a row for each channel of the inputs; and the inputs."""


class Products(TorchFunctionMode):
    """A context in which products with the weight matrices of a model's layers are told. Nothing may change the
    addresses of the model's parameters meanwhile.

    names: the names of matrices in checkpoints.
    """

    def __init__(self, model: Any, naming: Naming, seen: Seen) -> None:
        """model: the model.
        naming: the names of its tensors in checkpoints.
        seen: is told of each product before it is computed.
        """
        super().__init__()
        self._seen = seen
        self.names = Names(naming)
        held = [(own.data_ptr(), name, own) for name, own in model.named_parameters() if name in self.names.tensors]
        self._held = sorted(held, key=lambda each: each[0])
        self._known: dict[tuple[Any, ...], Matrix | None] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        places = _PRODUCTS.get(func)
        if places is not None and len(args) > max(places[:2]):
            matrix = self._matrix(args[places[1]], places[2])
            if matrix is not None and (names := self.names.of(matrix)):
                self._seen(matrix, names, args[places[0]])
        return func(*args, **(kwargs or {}))

    def _matrix(self, weight: torch.Tensor, axis: int) -> Matrix | None:
        if weight.dim() != 2:
            return None
        key = weight.data_ptr(), weight.shape, weight.stride(), axis
        if key not in self._known:
            place = bisect_right(self._held, weight.data_ptr(), key=lambda each: each[0]) - 1
            self._known[key] = self._matrix_in(*self._held[place], weight, axis) if place >= 0 else None
        return self._known[key]

    @staticmethod
    def _matrix_in(start: int, name: str, parameter: torch.Tensor, weight: torch.Tensor, axis: int) -> Matrix | None:
        offset = (weight.data_ptr() - start) // parameter.element_size()
        if offset >= parameter.numel() or weight.dtype != parameter.dtype:
            return None
        shape, strides = (weight.shape[axis], weight.shape[1 - axis]), (weight.stride(axis), weight.stride(1 - axis))
        return Matrix(name, offset, shape, strides)


class Names:
    """The names that matrices of layers have in checkpoints.

    tensors: the parameters in memory that have some.
    """

    def __init__(self, naming: Naming) -> None:
        """naming: the names of a model's tensors in checkpoints."""
        self.tensors: dict[str, list[str]] = {}
        for name in naming.merged:
            piece = naming.pieces.get(name)
            if piece is not None and len(piece.shape) == 2 and layer_index(name) is not None:
                self.tensors.setdefault(piece.tensor, []).append(name)
        self._pieces = naming.pieces
        self._known: dict[Matrix, dict[str, bool]] = {}

    def of(self, matrix: Matrix) -> dict[str, bool]:
        """The names of the weights that a matrix is made of, its outputs' channels in order, and for each whether it is
        stored with a row for each channel of the inputs. Empty where none takes all inputs."""
        if matrix not in self._known:
            self._known[matrix] = {
                name: transposed
                for name in self.tensors[matrix.tensor]
                for transposed in (False, True)
                if self._is_part(name, transposed, matrix)
            }
        return self._known[matrix]

    def _is_part(self, name: str, transposed: bool, matrix: Matrix) -> bool:
        piece = self._pieces[name]
        (outputs, inputs), (out_step, in_step) = piece.shape, piece.strides
        if transposed:
            outputs, inputs, out_step, in_step = inputs, outputs, in_step, out_step
        if (inputs, in_step, out_step) != (matrix.shape[0], *matrix.strides):
            return False
        first, rest = divmod(piece.offset - matrix.offset, out_step)
        return rest == 0 and 0 <= first <= matrix.shape[1] - outputs


@contextmanager
def experts_apart(model: Any) -> Iterator[None]:
    """A context in which a model multiplies by its experts one by one, so that `Products` sees each.

    model: a model of transformers.
    """
    before = model.get_experts_implementation()
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)
