"""The hybrid space: a merge with its parameters, and a path through the merge's layers and those of its models.

Both halves stand in one genome. Moved one after the other (optimizer.stages) they are the staged search of Akiba et
al. 2025, section 3.3, where the best merge becomes a model of the data-flow search; moved together, a joint one. The
recipe is one of slices that repeat, drop and reorder layers, all merged by one method, in which a model by itself is a
merge of weight 1. Methods have no scale, so hops have none either.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from evomerge.config.search import SearchConfig
from evomerge.config.spaces import DataFlowConfig, HybridConfig, PinnedConfig
from evomerge.errors import InputError, naming
from evomerge.layers import layer_count
from evomerge.merging import methods
from evomerge.recipe import Parameters, Recipe, Slice, Source
from evomerge.spaces import Gene, Genome, SearchSpace
from evomerge.spaces.data_flow import BASE, DataFlowSpace
from evomerge.spaces.layer_path import Hop
from evomerge.spaces.parameter import ParameterSpace

MERGE = "merge"


def make(config: SearchConfig, tensors: Sequence[str], _model_type: str) -> "HybridSpace":
    """The space that a config asks for. tensors: the names of the base's."""
    assert isinstance(config.space, HybridConfig)
    with naming("space.parameter"):
        parameter = ParameterSpace(config.space.parameter, config.base, config.models, tensors, config.seed)
    return HybridSpace(config.space, parameter, config.base, config.models, layer_count(tensors))


class HybridSpace:
    """A parameter space and a path through what it decodes to."""

    def __init__(
        self, config: HybridConfig, parameter: SearchSpace, base: str, models: Mapping[str, str], layers: int
    ) -> None:
        """parameter: the space of the merge, whose recipes have a slice for every run of layers."""
        self._parameter, self._base, self._models, self._layers = parameter, base, dict(models), layers
        path = config.path
        pinned = PinnedConfig(model=MERGE, first=path.first, last=path.last) if path.first + path.last else None
        flow = DataFlowConfig(
            kind="data_flow",
            sources=(MERGE, *(name for name in path.sources if name != MERGE)),
            pinned=pinned,
            **path.model_dump(include={"granularity", "max_layers", "max_repeats", "max_distance"}),
        )
        self._flow = DataFlowSpace(flow, base, {**models, MERGE: MERGE}, layers, "")
        self._single = _parameters_of_one(config, path.sources)
        self.genes: tuple[Gene, ...] = (*parameter.genes, *self._flow.genes)
        self._cut = len(parameter.genes)

    def decode(self, genome: Sequence[float] | Genome) -> Recipe:
        """The recipe of a genome of shape (dimension,). Values outside the box are clipped to it."""
        vector = np.asarray(genome, dtype=np.float64)
        if vector.shape != (len(self.genes),):
            raise ValueError(f"expected a genome of shape ({len(self.genes)},), got {vector.shape}")
        merge = self._parameter.decode(vector[: self._cut])
        hops = self._flow.path(vector[self._cut :]).hops
        if [(hop.model, hop.layer) for hop in hops] == [(MERGE, layer) for layer in range(self._layers)]:
            return merge
        parts = merge.slices or ()
        runs = [self._merged(parts, run) if run[0].model == MERGE else [self._model(run)] for run in _runs(hops)]
        slices = [part for run in runs for part in run]
        return merge.model_copy(update={"slices": (_empty(parts[0], 0), *slices, _empty(parts[-1], self._layers))})

    def _merged(self, parts: Sequence[Slice], run: Sequence[Hop]) -> list[Slice]:
        """The merge's layers of a run, one slice for each of the merge's slices that it touches."""
        start, end = run[0].layer, run[-1].layer + 1
        found, first = [], 0
        for part in parts:
            low, high = max(start, first), min(end, first + part.length)
            if low < high:
                found.append(_narrowed(part, low, high))
            first += part.length
        return found

    def _model(self, run: Sequence[Hop]) -> Slice:
        """The layers of one model, unmerged."""
        layer_range = (run[0].layer, run[-1].layer + 1)
        base = Source(model=self._base, layer_range=layer_range)
        if run[0].model == BASE:
            other = Source(model=next(iter(self._models.values())), layer_range=layer_range, parameters=self._single[0])
        else:
            reference = self._models[run[0].model]
            other = Source(model=reference, layer_range=layer_range, parameters=self._single[1])
        return Slice(sources=(base, other), parameters=self._single[2])

    def encode(self, weights: Mapping[str, float]) -> Genome:
        """The genome of a merge with these weights everywhere, its layers in their own order."""
        return np.concatenate([self._parameter.encode(weights), self._flow.encode({MERGE: 1.0})])

    def draw(self, random: np.random.Generator) -> Genome:
        return np.concatenate([self._parameter.draw(random), self._flow.draw(random)])


def _parameters_of_one(config: HybridConfig, sources: Sequence[str]) -> tuple[Parameters, Parameters, Parameters]:
    """What a model gets for weight 0, for weight 1, and what its slice sets, so that the merge is a model by itself."""
    method = methods.get(config.parameter.methods[0], "space.parameter.method")
    if sources and not (
        len(config.parameter.methods) == 1 and method.needs_base and method.takes("weight") and method.accepts(1)
    ):
        raise InputError(
            f"space.path.sources names {sources[0]}, but {method.name} cannot give one model's layers unmerged; leave "
            "space.path.sources out, or use a method of task vectors such as task_arithmetic or dare_ties."
        )
    kept: Parameters = {"density": 1.0} if method.takes("density") else {}
    return {"weight": 0.0, **kept}, {"weight": 1.0, **kept}, {"lambda": 1.0} if method.shares("lambda") else {}


def _runs(hops: Sequence[Hop]) -> list[list[Hop]]:
    """Hops that follow each other in one model, together."""
    runs: list[list[Hop]] = []
    for hop in hops:
        if runs and runs[-1][-1].model == hop.model and runs[-1][-1].layer + 1 == hop.layer:
            runs[-1].append(hop)
        else:
            runs.append([hop])
    return runs


def _narrowed(part: Slice, start: int, end: int) -> Slice:
    sources = tuple(source.model_copy(update={"layer_range": (start, end)}) for source in part.sources)
    return part.model_copy(update={"sources": sources})


def _empty(part: Slice, at: int) -> Slice:
    """A slice of no layers, which merges the embeddings, or the final norm and the head, as `part` does."""
    return _narrowed(part, at, at)
