"""The parameter space: weights and densities per model and per group of tensors (Akiba et al. 2025, section 3.1).

Groups are the embeddings, runs of layers (each optionally split by name filters), and the final norm with the head. A
genome decodes to a recipe of slices, one per run of layers, so that mergekit reads it as it is. Not here yet: methods
whose models have no weight, and other parameters than weight, density and lambda, which keep their defaults.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evomerge.config import GeneConfig, SpaceConfig
from evomerge.errors import InputError
from evomerge.layers import embedding_names, head_names, layer_count, layer_index
from evomerge.merging import methods
from evomerge.merging.methods.base import Method
from evomerge.merging.methods.sparsify import largest_epsilon
from evomerge.recipe import Condition, Parameters, Provenance, Recipe, Setting, Slice, Source
from evomerge.spaces import Gene, Genome

EMBEDDINGS, HEAD, REST = "embeddings", "head", "rest"


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """A run of layers, half-open."""

    start: int
    end: int

    @property
    def label(self) -> str:
        return f"layers_{self.start}-{self.end - 1}" if self.end - self.start > 1 else f"layer_{self.start}"


class ParameterSpace:
    """Weights and densities of one merge method over groups of tensors."""

    def __init__(
        self, config: SpaceConfig, base: str, models: Mapping[str, str], tensors: Sequence[str], seed: int
    ) -> None:
        """models: short names with references. tensors: the base's tensor names. seed: of the masks in every recipe."""
        self._config, self._base, self._models, self._seed = config, base, dict(models), seed
        self._method = _searchable(config.method, len(models))
        self._layers = layer_groups(config, layer_count(tensors))
        self._embeddings, self._head = embedding_names(tensors), head_names(tensors)
        _check_filters(config.filters, tensors)
        self.genes = tuple(self._make_genes())
        self._index = {gene.name: position for position, gene in enumerate(self.genes)}

    def _make_genes(self) -> list[Gene]:
        genes = []
        for kind, gene in self._kinds().items():
            if gene.fixed is None:
                default = (
                    gene.start if gene.start is not None else min(max(1.0 / len(self._models), gene.low), gene.high)
                )
                genes += [
                    Gene(_name(kind, model, group), kind, group, gene.low, gene.high, default, gene.step)
                    for group in self.groups
                    for model in self._models
                ]
        shared = self._config.lambda_
        if shared.fixed is None and self._method.shares("lambda"):
            start = 1.0 if shared.start is None else shared.start
            genes.append(Gene("lambda", "lambda", "lambda", shared.low, shared.high, start, shared.step))
        if not genes:
            raise InputError("space: every kind of gene is fixed, so there is nothing to search; free one of them.")
        return genes

    def _kinds(self) -> dict[str, GeneConfig]:
        kinds = {"weight": self._config.weight}
        if self._method.takes("density"):
            kinds["density"] = self._config.density
        return kinds

    @property
    def groups(self) -> list[str]:
        """Labels of the groups of tensors, in the model's order."""
        parts = [*self._config.filters, REST]
        layers = [
            f"{run.label}.{part}" if self._config.filters else run.label
            for run in self._layers
            for part in parts
            if self._config.filters or part == REST
        ]
        return [EMBEDDINGS] * bool(self._embeddings) + layers + [HEAD] * bool(self._head)

    def decode(self, genome: Sequence[float] | Genome) -> Recipe:
        """The recipe of a genome of shape (dimension,). Values outside the box are clipped to it."""
        values = self._clipped(genome)
        slices = tuple(Slice(sources=tuple(self._sources(values, run))) for run in self._layers)
        return Recipe(
            merge_method=self._method.name,
            base_model=self._base if self._method.uses_base else None,
            slices=slices,
            parameters=self._shared(values),
            evomerge=Provenance(seed=self._seed, rescale=self._config.rescale),
        )

    def _sources(self, values: Genome, run: LayerGroup) -> list[Source]:
        layer_range = (run.start, run.end)
        base = [Source(model=self._base, layer_range=layer_range)] if self._method.uses_base else []
        return base + [
            Source(model=reference, layer_range=layer_range, parameters=self._parameters(values, model, run))
            for model, reference in self._models.items()
        ]

    def _clipped(self, genome: Sequence[float] | Genome) -> Genome:
        vector = np.asarray(genome, dtype=np.float64)
        if vector.shape != (len(self.genes),):
            raise ValueError(f"expected a genome of shape ({len(self.genes)},), got {vector.shape}")
        return np.clip(vector, [gene.low for gene in self.genes], [gene.high for gene in self.genes])

    def _value(self, values: Genome, kind: str, model: str, group: str) -> float:
        position = self._index.get(_name(kind, model, group))
        if position is not None:
            return float(values[position])
        fixed = self._kinds()[kind].fixed
        assert fixed is not None
        return fixed

    def _parameters(self, values: Genome, model: str, run: LayerGroup) -> Parameters:
        found = {kind: self._setting(values, kind, model, run) for kind in self._kinds()}
        if self._method.takes("epsilon"):
            found["epsilon"] = self._setting(values, "density", model, run, _epsilon)
        return found

    def _setting(
        self, values: Genome, kind: str, model: str, run: LayerGroup, of: Callable[[float], float] = float
    ) -> Setting:
        """A plain number, or conditions: embeddings ride on the first slice, norm and head on the last."""
        prefix = f"{run.label}." if self._config.filters else run.label
        conditions = []
        for group, names, owner in (
            (EMBEDDINGS, self._embeddings, self._layers[0]),
            (HEAD, self._head, self._layers[-1]),
        ):
            if run == owner:
                value = of(self._value(values, kind, model, group)) if names else 0.0
                conditions += [Condition(filter=name, value=value) for name in names]
        for part in self._config.filters:
            conditions.append(Condition(filter=part, value=of(self._value(values, kind, model, prefix + part))))
        rest = of(self._value(values, kind, model, prefix + REST if self._config.filters else prefix))
        return [*conditions, Condition(value=rest)] if conditions else rest

    def _shared(self, values: Genome) -> dict[str, Any]:
        shared: dict[str, Any] = {"normalize": self._config.normalize} if self._method.shares("normalize") else {}
        if self._method.shares("lambda"):
            fixed = self._config.lambda_.fixed
            shared["lambda"] = float(values[self._index["lambda"]]) if fixed is None else fixed
        if self._method.random:
            shared["rescale"] = True
        return shared

    def encode(self, weights: Mapping[str, float]) -> Genome:
        """The genome that gives these weights to every group, clipped to the box; other genes stand at their start."""
        genome = [
            weights.get(gene.name.split(":")[1], 0.0) if gene.kind == "weight" else gene.start for gene in self.genes
        ]
        return self._clipped(genome)


def _searchable(name: str, models: int) -> Method:
    """The method to search, if its models have weights and it takes as many as there are."""
    method = methods.get(name, "space.method")
    if not method.takes("weight"):
        known = [other.name for other in methods.METHODS.values() if other.takes("weight")]
        raise InputError(
            f"space.method is {name}, whose models have no weights to search; use one of {', '.join(known)}."
        )
    if not method.accepts(models):
        raise InputError(
            f"space.method is {name}, which takes {method.count} besides the base, but models lists {models}; "
            "change either."
        )
    return method


def _epsilon(density: float) -> float:
    """DELLA's epsilon for a density: mergekit's default, less where density ± epsilon would leave (0, 1)."""
    return largest_epsilon(density, wanted=0.15)


def _name(kind: str, model: str, group: str) -> str:
    return f"{kind}:{model}:{group}"


def layer_groups(config: SpaceConfig, layers: int) -> list[LayerGroup]:
    """The runs of layers that share genes: as listed, of `layer_granularity` layers each, or all in one."""
    if config.layer_groups is not None:
        return _listed_groups(config.layer_groups, layers)
    size = config.layer_granularity or layers
    if layers % size:
        raise InputError(
            f"space.layer_granularity is {size}, which does not divide the model's {layers} layers; "
            "use a divisor, or list space.layer_groups."
        )
    return [LayerGroup(start, start + size) for start in range(0, layers, size)]


def _listed_groups(listed: Sequence[str], layers: int) -> list[LayerGroup]:
    groups, expected = [], 0
    for index, text in enumerate(listed):
        first, _, last = text.partition("-")
        last = last or first
        if not (first.isdigit() and last.isdigit()):
            raise InputError(f"space.layer_groups[{index}] is '{text}'; write one layer ('3') or a range ('0-3').")
        if int(first) != expected or int(last) < int(first) or int(last) >= layers:
            raise InputError(
                f"space.layer_groups[{index}] is '{text}'; expected a range that starts at layer {expected} and ends "
                f"by {layers - 1}, since groups cover the model's {layers} layers once, in order."
            )
        groups.append(LayerGroup(int(first), int(last) + 1))
        expected = int(last) + 1
    if expected != layers:
        raise InputError(
            f"space.layer_groups end at layer {expected - 1}, but the model's last layer is {layers - 1}; "
            "cover all of them."
        )
    return groups


def _check_filters(filters: Sequence[str], tensors: Sequence[str]) -> None:
    inside = [name for name in tensors if layer_index(name) is not None]
    for index, part in enumerate(filters):
        if part == REST or not any(part in name for name in inside):
            raise InputError(
                f"space.filters[{index}] is '{part}', which no tensor name in the layers contains; "
                f"names look like {inside[0] if inside else '(none)'}."
            )
