"""Gram matrices: the scalar products of models, from which their norms and angles follow."""

import torch

from evomerge.devices import widened
from evomerge.merging.methods.base import Inputs
from evomerge.merging.methods.kernels import ordered_total
from evomerge.merging.methods.parts import Elements, part_of


def gram(inputs: Inputs, with_base: bool = False) -> torch.Tensor:
    """The scalar products of the models' tensors, or of their task vectors where there is a base; float64, shape
    (models, models). They are computed once for all candidates.

    inputs: the tensors of the models.
    with_base: whether the base counts as the first model, so that products of tensors are taken, not of task vectors.
    """
    assert not with_base or inputs.base is not None
    models = range(-1 if with_base else 0, len(inputs.tensors))
    origin = None if with_base else inputs.base
    rows: list[list[torch.Tensor]] = []
    for i in models:
        rows.append([_product(inputs, i, j, origin) for j in models if j <= i])
    count = len(rows)
    return torch.stack([torch.cat([rows[max(i, j)][min(i, j)] for j in range(count)]) for i in range(count)])


def _product(inputs: Inputs, i: int, j: int, origin: Elements | None) -> torch.Tensor:
    def flat(tensor: Elements, piece: slice) -> torch.Tensor:
        return widened(part_of(tensor, piece))

    def vector(index: int, piece: slice) -> torch.Tensor:
        tensor = inputs.base if index < 0 else inputs.tensors[index]
        assert tensor is not None
        return flat(tensor, piece) if origin is None else flat(tensor, piece) - flat(origin, piece)

    def products(piece: slice) -> torch.Tensor:
        return vector(i, piece) * vector(j, piece)

    models = tuple(dict.fromkeys([i, j] if origin is None else [-1, i, j]))
    what = ("product", i == j, origin is None)
    return inputs.once(what, models, lambda: ordered_total(products, inputs.count, inputs.device))
