"""The hybrid space: a merge with its parameters, and a path through the merge's layers and those of its models.

One genome holds both. A search that moves them one after the other (optimizer.stages) is the staged search of Akiba et
al. 2025, section 3.3, where the best merge becomes a model of the data-flow search. A search that moves both at once is
a joint one. The recipe has slices that repeat, drop and reorder layers, all merged by one method. Layers of one model
alone are a merge in which it has weight 1. These methods have no scale, so hops have none.
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
    """The space that a config asks for.

    config: a search config with a hybrid space.
    tensors: the names of the base's tensors.
    Raises InputError where the space does not fit the models.
    """
    assert isinstance(config.space, HybridConfig)
    with naming("space.parameter"):
        parameter = ParameterSpace(config.space.parameter, config.base, config.models, tensors, config.seed)
    return HybridSpace(config.space, parameter, config.base, config.models, layer_count(tensors))


class HybridSpace:
    """A parameter space and a path through what it decodes to."""

    def __init__(
        self, config: HybridConfig, parameter: SearchSpace, base: str, models: Mapping[str, str], layers: int
    ) -> None:
        """config: the `space` block of a search file.
        parameter: the space of the merge, whose recipes have a slice for every run of layers.
        base: the base's reference.
        models: the models' references, by name.
        layers: how many layers each model has.
        Raises InputError where the method cannot give one model's layers unmerged, and the path asks for them.
        """
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
        merged = merge.slices or ()
        runs = [self._merged(merged, run) if run[0].model == MERGE else [self._model(run)] for run in _runs(hops)]
        slices = [slice_ for run in runs for slice_ in run]
        return merge.model_copy(update={"slices": (_empty(merged[0], 0), *slices, _empty(merged[-1], self._layers))})

    def _merged(self, slices: Sequence[Slice], run: Sequence[Hop]) -> list[Slice]:
        """The slices of a run of the merge's layers: one for each slice of the merge that the run overlaps."""
        start, end = run[0].layer, run[-1].layer + 1
        narrowed, first = [], 0
        for slice_ in slices:
            low, high = max(start, first), min(end, first + slice_.length)
            if low < high:
                narrowed.append(_narrowed(slice_, low, high))
            first += slice_.length
        return narrowed

    def _model(self, run: Sequence[Hop]) -> Slice:
        """The slice of a run of one model's layers, unmerged."""
        layer_range = (run[0].layer, run[-1].layer + 1)
        base = Source(model=self._base, layer_range=layer_range)
        if run[0].model == BASE:
            other = Source(model=next(iter(self._models.values())), layer_range=layer_range, parameters=self._single[0])
        else:
            reference = self._models[run[0].model]
            other = Source(model=reference, layer_range=layer_range, parameters=self._single[1])
        return Slice(sources=(base, other), parameters=self._single[2])

    def encode(self, weights: Mapping[str, float]) -> Genome:
        """The genome of a merge with the same weights everywhere and its layers in their own order.

        weights: the weight of each model, by name.
        """
        return np.concatenate([self._parameter.encode(weights), self._flow.encode({MERGE: 1.0})])

    def draw(self, random: np.random.Generator) -> Genome:
        return np.concatenate([self._parameter.draw(random), self._flow.draw(random)])


def _parameters_of_one(config: HybridConfig, sources: Sequence[str]) -> tuple[Parameters, Parameters, Parameters]:
    """The parameters of a slice whose merge is one model unchanged: of a model with weight 0, of the model with weight
    1, and of the slice."""
    method = methods.get(config.parameter.methods[0], "space.parameter.method")
    if sources and not (
        len(config.parameter.methods) == 1 and method.needs_base and method.takes("weight") and method.accepts(1)
    ):
        raise InputError(
            f"space.path.sources names {sources[0]}, but {method.name} cannot give one model's layers unmerged; leave "
            "space.path.sources out, or use a method of task vectors such as task_arithmetic or dare_ties."
        )
    kept: Parameters = {"density": 1.0} if method.takes("density") else {}
    whole: Parameters = {name: 1.0 for name in ("lambda", "omega") if method.shares(name)}
    return {"weight": 0.0, **kept}, {"weight": 1.0, **kept}, whole


def _runs(hops: Sequence[Hop]) -> list[list[Hop]]:
    """The hops, divided into runs of layers that follow each other in one model."""
    runs: list[list[Hop]] = []
    for hop in hops:
        if runs and runs[-1][-1].model == hop.model and runs[-1][-1].layer + 1 == hop.layer:
            runs[-1].append(hop)
        else:
            runs.append([hop])
    return runs


def _narrowed(slice_: Slice, start: int, end: int) -> Slice:
    sources = tuple(source.model_copy(update={"layer_range": (start, end)}) for source in slice_.sources)
    return slice_.model_copy(update={"sources": sources})


def _empty(slice_: Slice, at: int) -> Slice:
    """A slice without layers, which merges the embeddings, or the final norm and the head, as `slice_` does."""
    return _narrowed(slice_, at, at)
