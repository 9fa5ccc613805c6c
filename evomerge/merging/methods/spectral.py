"""Methods on singular vectors: TSV-M (Gargiulo et al. 2024), Iso-C (Marczak et al. 2025), KnOTS (Stoica et al. 2024).

See `matrices` for the tensors that they take, and for what becomes of the others.
"""

from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import reduce
from typing import TypeVar

import torch

from evomerge.merging.methods.base import Inputs
from evomerge.merging.methods.matrices import (
    Matrices,
    added,
    is_layer_matrix,
    on_one_thread,
    parts,
    scaled,
    singular,
    weighted,
    wide,
)
from evomerge.merging.methods.passes import Pass, write
from evomerge.merging.methods.task_vectors import TaskVectorMerge

T = TypeVar("T")
_SUPPORTED = 1e-5  # the share of the largest singular value from which on a direction is one of the basis
_TIES = TaskVectorMerge(sparsify="magnitude", consensus=True)


def merge_tsv(inputs: Inputs) -> Pass:
    """The pass of TSV-M. Each of T task vectors keeps the first r / T of its r singular vectors. All of the kept left
    vectors are then made orthogonal to each other, by the nearest matrix with that property, and so are the right ones.

    A model's weight multiplies its singular values. Models whose vectors are the same do not merge to themselves.
    """
    return weighted(inputs, "singular vectors apart", _apart)


def _apart(deltas: Matrices) -> Matrices:
    rank = max(1, min(deltas[0].shape) // len(deltas))
    left, values, right = zip(*(singular(delta) for delta in deltas), strict=True)
    lefts = _orthogonal(torch.cat([columns[:, :rank] for columns in left], dim=1)).chunk(len(deltas), dim=1)
    rights = _orthogonal(torch.cat([rows[:rank] for rows in right], dim=0)).chunk(len(deltas), dim=0)
    return [(u * s[:rank]) @ v for u, s, v in zip(lefts, values, rights, strict=True)]


def _orthogonal(vectors: torch.Tensor) -> torch.Tensor:
    """The matrix with orthonormal columns (or rows, where there are fewer) that is nearest to a matrix."""
    left, _, right = singular(vectors)
    return left @ right


def merge_iso(inputs: Inputs) -> Pass:
    """The pass of Iso-C: base + alpha times the sum of the task vectors with all of its singular values replaced by
    their mean.

    A lone model does not come back as it was, either. The mean is that of the values that are not 0.
    """
    return scaled(inputs, "equal singular values", _isotropic)


def _isotropic(deltas: Matrices) -> Matrices:
    left, values, right = singular(reduce(torch.add, deltas))
    mean = values.sum() / (values > 0).sum().clamp(min=1)
    return [mean * (left @ right)]


def merge_knots(inputs: Inputs) -> Pass:
    """The pass of KnOTS with TIES. The task vectors side by side are decomposed once; what is left of each model, its
    coordinates in the common basis of left singular vectors, is merged by TIES, and multiplied by the basis.

    Identical models merge to themselves under `normalize`. Tensors that are no matrices of layers are merged by TIES
    as they are. The product is computed for every candidate; it is cheap for LoRA adapters, whose basis is small.
    """
    assert inputs.base is not None
    if not is_layer_matrix(inputs):
        return _TIES(inputs)
    basis, *coordinates = parts(inputs, "common basis", _common_basis)
    every = (-1, *range(len(inputs.tensors)))

    def once(what: Hashable, models: tuple[int, ...], make: Callable[[], T], /) -> T:
        return inputs.once(("common basis", what, models), every, make)

    merged = torch.empty_like(coordinates[0])
    origin = torch.zeros_like(merged)
    write(merged, _TIES(replace(inputs, base=origin, tensors=tuple(coordinates), once=once)))
    with on_one_thread():
        delta = (wide(basis) @ wide(merged)).to(torch.float32).to(inputs.device)
    return added(inputs.base, (delta,), [1.0])


def _common_basis(deltas: Matrices) -> Matrices:
    left, values, right = torch.linalg.svd(torch.cat(deltas, dim=1), full_matrices=False)
    if not values.is_meta:
        rank = max(1, int((values > _SUPPORTED * values[0]).sum()))
        left, values, right = left[:, :rank], values[:rank], right[:rank]
    return [left, *(values[:, None] * right).chunk(len(deltas), dim=1)]
