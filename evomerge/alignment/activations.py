"""Matching of activations: the permutations that bring together what two models compute on the same texts.

The similarity of two places is the correlation of their activations over all tokens (Li et al. 2016, arXiv:1511.07543;
Ainsworth et al. 2022, section 3.1). Units are looked at behind the activation function, heads before their projection,
and the residual stream behind every layer.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from evomerge.alignment.matching import Similarities, assigned, assigned_heads, by_head
from evomerge.alignment.structure import Permutations, Structure
from evomerge.merging.loading import load_source
from evomerge.merging.sources.models import Model

_LARGEST = 2 << 30  # bytes of similarities that are kept at a time


class Read(Protocol):
    """What models read."""

    @property
    def ids(self) -> torch.Tensor:
        """Tokens, shape (1, tokens)."""
        ...


def match_activations(target: Model, model: Model, structure: Structure, read: Sequence[Read]) -> Permutations:
    """The permutations of a model that bring its activations close to a target's.

    target: the model that stays.
    model: the one that moves.
    structure: that of both.
    read: what both read.
    """
    rows = [reading.ids for reading in read]
    pair = [load_source(own.source, torch.float32) for own in (target, model)]
    found = Permutations.identity(structure)
    together = max(1, _LARGEST // (4 * structure.units**2))
    residual = np.zeros((structure.hidden, structure.hidden))
    for first in range(0, structure.layers, together):
        layers = range(first, min(first + together, structure.layers))
        sums = _correlations(pair, rows, layers)
        for layer in layers:
            found.units[layer] = assigned(sums[f"{layer}.units"])
            heads = by_head(sums[f"{layer}.heads"], structure.width)
            found.heads[layer] = assigned_heads(heads, np.zeros((structure.groups,) * 2), structure.per_group)
            residual += sums[f"{layer}.residual"]
    found.residual = assigned(residual)
    return found


def _correlations(pair: Sequence[Any], rows: Sequence[torch.Tensor], layers: range) -> dict[str, Similarities]:
    """The correlations of every place of the first model with every place of the second, by place of a layer."""
    seen: list[dict[str, torch.Tensor]] = [{}, {}]
    handles = [
        handle
        for model, own in zip(pair, seen, strict=True)
        for layer in layers
        for handle in _watch(model.model.layers[layer], layer, own)
    ]
    sums: dict[str, _Moments] = {}
    try:
        with torch.no_grad():
            for ids in rows:
                for model in pair:
                    model(input_ids=ids, use_cache=False)
                for name, ours in seen[0].items():
                    sums.setdefault(name, _Moments()).add(ours, seen[1][name])
    finally:
        for handle in handles:
            handle.remove()
    return {name: moments.correlations() for name, moments in sums.items()}


def _watch(layer: Any, number: int, seen: dict[str, torch.Tensor]) -> list[Any]:
    """Keeps what a layer computes last, by name, shape (tokens, places)."""

    def entering(name: str) -> Callable[..., None]:
        def keep(module: Any, given: tuple[torch.Tensor, ...]) -> None:
            seen[f"{number}.{name}"] = given[0].flatten(0, -2)

        return keep

    def leaving(module: Any, given: Any, output: Any) -> None:
        state = output[0] if isinstance(output, tuple) else output
        seen[f"{number}.residual"] = state.flatten(0, -2)

    return [
        layer.mlp.down_proj.register_forward_pre_hook(entering("units")),
        layer.self_attn.o_proj.register_forward_pre_hook(entering("heads")),
        layer.register_forward_hook(leaving),
    ]


class _Moments:
    """Sums over tokens from which correlations follow."""

    def __init__(self) -> None:
        self._count = 0
        self._sums: list[torch.Tensor] = []  # of ours, theirs, their squares, and the products

    def add(self, ours: torch.Tensor, theirs: torch.Tensor) -> None:
        """Adds the activations of both models, each of shape (tokens, places)."""
        a, b = ours.double(), theirs.double()
        parts = [a.sum(0), b.sum(0), a.square().sum(0), b.square().sum(0), a.T @ b]
        self._count += len(a)
        self._sums = [old + new for old, new in zip(self._sums, parts, strict=True)] if self._sums else parts

    def correlations(self) -> Similarities:
        """The correlation of each place of ours with each place of theirs; 0 where one never changes."""
        first, second, squares, others, products = self._sums
        count = self._count
        covariance = products / count - torch.outer(first, second) / count**2
        spread = [square / count - (total / count) ** 2 for square, total in ((squares, first), (others, second))]
        scale = torch.outer(*(values.clamp(min=0).sqrt() for values in spread))
        return torch.where(scale > 0, covariance / scale.clamp(min=1e-300), torch.zeros_like(scale)).numpy()
