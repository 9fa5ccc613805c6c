"""Matching of weights: the permutations that bring a model's weights closest to another's.

Coordinate descent (Ainsworth et al. 2022, arXiv:2209.04836, algorithm 1): with all other permutations fixed, the best
one of a kind is a linear assignment by inner products, which scipy solves exactly. The residual stream is matched first
by what no other permutation touches: embeddings, head and norms.
"""

from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from evomerge.alignment.structure import KEYS, QUERIES, RESIDUAL, UNITS, Order, Permutations, Structure
from evomerge.layers import layer_index
from evomerge.merging.sources.models import Model

Similarities = NDArray[np.float64]
_SWEEPS = 100


def match_weights(target: Model, model: Model, structure: Structure) -> Permutations:
    """The permutations of a model that bring its weights close to a target's.

    target: the model that stays.
    model: the one that moves.
    structure: that of both.
    """
    found = Permutations.identity(structure)
    matching = _Matching(target, model, found)
    matching.residual(free_alone=True)
    for _ in range(_SWEEPS):
        changed = False
        for layer in range(structure.layers):
            changed |= matching.units(layer) | matching.heads(layer)
        changed |= matching.residual()
        if not changed:
            break
    return found


class _Matching:
    """Two models that are being matched; `found` is changed in place. Every method says whether it changed anything."""

    def __init__(self, target: Model, model: Model, found: Permutations) -> None:
        self._target, self._model, self._found = target, model, found
        self._structure = found.structure
        self._names: dict[int | None, list[str]] = {}
        for name in target.table:
            self._names.setdefault(layer_index(name), []).append(name)

    def units(self, layer: int) -> bool:
        """Matches the units of an MLP."""
        best = assigned(self._similarities(self._names.get(layer, []), UNITS))
        changed = not np.array_equal(best, self._found.units[layer])
        self._found.units[layer] = best
        return changed

    def heads(self, layer: int) -> bool:
        """Matches the heads of a layer: groups with each other, and heads within them."""
        names = self._names.get(layer, [])
        best = assigned_heads(
            self._by_head(self._similarities(names, QUERIES)),
            self._by_head(self._similarities(names, KEYS)),
            self._structure.per_group,
        )
        changed = not np.array_equal(best, self._found.heads[layer])
        self._found.heads[layer] = best
        return changed

    def residual(self, free_alone: bool = False) -> bool:
        """Matches the residual stream.

        free_alone: whether only tensors count that no other permutation touches.
        """
        names = [name for own in self._names.values() for name in own if not free_alone or self._is_free(name)]
        best = assigned(self._similarities(names, RESIDUAL))
        changed = not np.array_equal(best, self._found.residual)
        self._found.residual = best
        return changed

    def _is_free(self, name: str) -> bool:
        return set(self._axes(name)) <= {RESIDUAL, None}

    def _axes(self, name: str) -> tuple[str | None, ...]:
        return self._structure.axes(name, self._target.table[name].shape)

    def _similarities(self, names: list[str], axis: str) -> Similarities:
        """The inner products of every place of the target with every place of the model, summed over tensors. All else
        is where the permutations so far bring it."""
        total: torch.Tensor | None = None
        for ours, theirs in self._pairs(names, axis):
            products = ours @ theirs.T
            total = products if total is None else total.add_(products)
        return total.double().numpy() if total is not None else np.zeros((0, 0))

    def _pairs(self, names: list[str], axis: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for name in names:
            axes = self._axes(name)
            if axis not in axes:
                continue
            moved = self._found.apply(name, self._model.weights.read(name), but=axis)
            place = axes.index(axis)
            yield _by_place(self._target.weights.read(name), place), _by_place(moved, place)
            self._target.weights.close()
            self._model.weights.close()

    def _by_head(self, similarities: Similarities) -> Similarities:
        return by_head(similarities, self._structure.width)


def _by_place(tensor: torch.Tensor, dimension: int) -> torch.Tensor:
    """A tensor as one row for each place of a dimension, in float32."""
    return tensor.float().movedim(dimension, 0).reshape(tensor.shape[dimension], -1)


def assigned(similarities: Similarities) -> Order:
    """For each row, its column in the assignment with the largest sum; shape (rows,).

    similarities: shape (places of the target, places of the model).
    """
    _, columns = linear_sum_assignment(similarities, maximize=True)
    return np.asarray(columns, dtype=np.int64)


def by_head(similarities: Similarities, width: int) -> Similarities:
    """The similarities of heads, whose places stay in their order; shape (heads, heads).

    similarities: of all places, shape (heads * width, heads * width).
    width: of a head.
    """
    heads = len(similarities) // width
    blocks = similarities.reshape(heads, width, heads, width)
    return np.asarray(np.einsum("awbw->ab", blocks))


def assigned_heads(queries: Similarities, keys: Similarities, per_group: int) -> Order:
    """For each head of the target, the head of the model that fits best where groups stay together; shape (heads,).

    queries: the similarities of heads, shape (heads, heads).
    keys: those of the groups' keys and values, shape (groups, groups).
    per_group: how many heads a group has.
    """
    groups = len(queries) // per_group
    within: dict[tuple[int, int], Order] = {}
    sums = np.array(keys, dtype=np.float64)
    for ours in range(groups):
        for theirs in range(groups):
            block = queries[_of(ours, per_group), _of(theirs, per_group)]
            within[ours, theirs] = assigned(block)
            sums[ours, theirs] += block[np.arange(per_group), within[ours, theirs]].sum()
    chosen = assigned(sums)
    return np.concatenate([theirs * per_group + within[ours, int(theirs)] for ours, theirs in enumerate(chosen)])


def _of(group: int, per_group: int) -> slice:
    return slice(group * per_group, (group + 1) * per_group)
