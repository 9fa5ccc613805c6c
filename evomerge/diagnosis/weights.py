"""How far fine-tunes are from their base and from each other, layer by layer, one tensor at a time.

A task vector is a fine-tune less its base (Ilharco et al. 2023, arXiv:2212.04089). Sign conflicts are counted as TIES
trims (Yadav et al. 2023, arXiv:2306.01708): among the elements that are in the largest fifth of both task vectors.
"""

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING

from evomerge.layers import place_of, place_order
from evomerge.merging.sources.models import Models

if TYPE_CHECKING:
    import torch

LARGE = 0.03  # an element of a task vector beyond this is too large for DARE (Yu et al. 2024, arXiv:2311.03099)
_TRIMMED = 0.2  # the share of elements that TIES keeps


@dataclass(frozen=True, slots=True)
class Differences:
    """What a fine-tune changes.

    distance: the norm of its task vector, as a share of the norm of the base, by place.
    whole: the same for all places together.
    mean: the mean magnitude of the task vector's elements.
    large: the share of its elements with a magnitude above `LARGE`.
    """

    distance: tuple[float, ...]
    whole: float
    mean: float
    large: float


@dataclass(frozen=True, slots=True)
class Relation:
    """How two task vectors lie to each other.

    models: the names of the two.
    cosine: of the angle between them, by place; 0 where one of them is zero.
    whole: the same for all places together.
    conflicts: the share of elements with opposite signs, among those in the largest fifth of both, by place.
    all_conflicts: the same for all places together.
    """

    models: tuple[str, str]
    cosine: tuple[float, ...]
    whole: float
    conflicts: tuple[float, ...]
    all_conflicts: float


@dataclass(frozen=True, slots=True)
class WeightDiagnosis:
    """What the weights of models say.

    places: `embeddings`, the numbers of the layers, `head`.
    models: what each fine-tune changes, by name.
    relations: of every two fine-tunes.
    """

    places: tuple[str, ...]
    models: Mapping[str, Differences]
    relations: tuple[Relation, ...]


@dataclass(slots=True)
class _Sums:
    """Sums over the tensors of one place.

    square: of the base's elements.
    squares: of each task vector's elements.
    magnitudes: of their magnitudes.
    large: the number of those that are large.
    products: of every two task vectors.
    both: the number of elements that are in the largest fifth of both.
    opposite: the number of those with opposite signs.
    count: the number of elements.
    """

    square: float = 0.0
    squares: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    magnitudes: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    large: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    products: dict[tuple[str, str], float] = field(default_factory=lambda: defaultdict(float))
    both: dict[tuple[str, str], int] = field(default_factory=lambda: defaultdict(int))
    opposite: dict[tuple[str, str], int] = field(default_factory=lambda: defaultdict(int))
    count: int = 0


def diagnose_weights(models: Models, names: Mapping[str, str], left_out: Collection[str] = ()) -> WeightDiagnosis:
    """What the weights of fine-tunes say. Memory holds one tensor of every model.

    models: the base, and the fine-tunes by reference.
    names: the fine-tunes' names, by reference. Tensors that one of them lacks, or that have another shape there, do not
        count.
    left_out: the names of tensors that do not count either, such as those with rows in another order.
    """
    places: dict[str, _Sums] = defaultdict(_Sums)
    for name, base, vectors in _task_vectors(models, names, left_out):
        _add(places[place_of(name)], base, vectors)
    order = sorted(places, key=place_order)
    everywhere = _together(places.values())
    pairs = list(combinations(names.values(), 2))
    return WeightDiagnosis(
        places=tuple(order),
        models={name: _differences(name, [places[place] for place in order], everywhere) for name in names.values()},
        relations=tuple(_relation(pair, [places[place] for place in order], everywhere) for pair in pairs),
    )


def _task_vectors(
    models: Models, names: Mapping[str, str], left_out: Collection[str]
) -> "Iterator[tuple[str, torch.Tensor, dict[str, torch.Tensor]]]":
    """Every tensor's name, its values in the base, and the task vectors by the model's name, in float32."""
    for tensor, info in models.base.table.items():
        found = {reference: models[reference].weights.find(tensor) for reference in names}
        if tensor in left_out or any(own is None or own.shape != info.shape for own in found.values()):
            continue
        base = models.base.weights.read(tensor).float().flatten()
        vectors = {name: models[own].weights.read(tensor).float().flatten() - base for own, name in names.items()}
        yield tensor, base, vectors
        for model in (models.base, *(models[reference] for reference in names)):
            model.weights.close()


def _add(sums: _Sums, base: "torch.Tensor", vectors: "dict[str, torch.Tensor]") -> None:
    sums.count += base.numel()
    sums.square += float(base.double().square().sum())
    kept = {}
    for name, vector in vectors.items():
        magnitude = vector.abs()
        sums.squares[name] += float(vector.double().square().sum())
        sums.magnitudes[name] += float(magnitude.double().sum())
        sums.large[name] += int((magnitude > LARGE).sum())
        most = max(1, round(_TRIMMED * vector.numel()))
        threshold = magnitude.kthvalue(vector.numel() - most + 1).values
        kept[name] = (magnitude >= threshold) & (magnitude > 0)
    for pair in combinations(vectors, 2):
        one, other = (vectors[name] for name in pair)
        sums.products[pair] += float((one.double() * other.double()).sum())
        both = kept[pair[0]] & kept[pair[1]]
        sums.both[pair] += int(both.sum())
        sums.opposite[pair] += int((both & ((one > 0) != (other > 0))).sum())


def _together(places: Iterable[_Sums]) -> _Sums:
    total = _Sums()
    for sums in places:
        total.square += sums.square
        total.count += sums.count
        for key in ("squares", "magnitudes", "large", "products", "both", "opposite"):
            for name, value in getattr(sums, key).items():
                getattr(total, key)[name] += value
    return total


def _differences(name: str, places: Sequence[_Sums], everywhere: _Sums) -> Differences:
    return Differences(
        distance=tuple(_ratio(sums.squares[name], sums.square) for sums in places),
        whole=_ratio(everywhere.squares[name], everywhere.square),
        mean=everywhere.magnitudes[name] / max(1, everywhere.count),
        large=everywhere.large[name] / max(1, everywhere.count),
    )


def _ratio(square: float, of: float) -> float:
    return math.sqrt(square / of) if of else 0.0


def _relation(pair: tuple[str, str], places: Sequence[_Sums], everywhere: _Sums) -> Relation:
    return Relation(
        models=pair,
        cosine=tuple(_cosine(sums, pair) for sums in places),
        whole=_cosine(everywhere, pair),
        conflicts=tuple(_conflicts(sums, pair) for sums in places),
        all_conflicts=_conflicts(everywhere, pair),
    )


def _cosine(sums: _Sums, pair: tuple[str, str]) -> float:
    norm = math.sqrt(sums.squares[pair[0]] * sums.squares[pair[1]])
    return sums.products[pair] / norm if norm else 0.0


def _conflicts(sums: _Sums, pair: tuple[str, str]) -> float:
    return sums.opposite[pair] / sums.both[pair] if sums.both[pair] else 0.0
