"""A recipe as a picture: the numbers of each model by layer and kind of tensor, and the path through the layers.

Everything comes from the plan of a recipe, tensor by tensor. So it works for every method and every space.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev

from evomerge.config.search import SearchConfig
from evomerge.layers import EMBEDDINGS, HEAD, layer_index, place_of, place_order, with_layer
from evomerge.merging.plan import MergePlan, TensorMerge, make_plan
from evomerge.merging.sources.models import Models
from evomerge.recipe import Blocks, Recipe

SHARED, MERGE, BASE = "all models", "merge", "base"
_ALL = "all tensors"
_LAYER = re.compile(r"(?:^|\.)\d+\.")

Row = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Grid:
    """The values of one parameter: a row for each model and kind of tensor, a column for each place.

    rows: the model, or `all models`, and the kind of tensor, or `all tensors` where all kinds have the same values.
    columns: the places: `embeddings`, the numbers of the layers, `head`.
    values: by row and column; None where a recipe has no such value.
    """

    rows: tuple[Row, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]


@dataclass(frozen=True, slots=True)
class Stop:
    """A layer of a path.

    lane: the model that it comes from; `merge` where it is merged of several.
    layer: the number of the layer there.
    scale: by what its output is multiplied.
    """

    lane: str
    layer: int
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class Path:
    """The layers of a model in their order.

    stops: a layer each.
    embeddings: where the embeddings come from, a lane.
    head: where the final norm and the head come from, a lane.
    parallel: the blocks of stops that run side by side, as in `Provenance`.
    """

    stops: tuple[Stop, ...]
    embeddings: str
    head: str
    parallel: Blocks = ()

    def block_of(self, index: int) -> tuple[int, int] | None:
        """The block of a stop, as its first stop and the one after its last; None where the stop runs alone."""
        return next((block for block in self.parallel if block[0] <= index < block[1]), None)


@dataclass(frozen=True, slots=True)
class Picture:
    """What a recipe does.

    method: the merge method.
    grids: by parameter; empty where no weights are merged.
    path: the layers; None in a space that leaves layers where they are.
    """

    method: str
    grids: dict[str, Grid]
    path: Path | None


def picture(recipe: Recipe, config: SearchConfig, models: Models) -> Picture:
    """The picture of a recipe.

    recipe: the recipe, whose references are those of the config.
    config: the search's, which names the models.
    models: the models of the search.
    Raises InputError for a recipe that cannot be merged.
    """
    plan = make_plan(recipe, models.table)
    names = {config.base: BASE, **{reference: name for name, reference in config.models.items()}}
    lanes = [_lane(plan, layer, names) for layer in range(len(plan.layers))]
    unmerged = plan.method.name == "passthrough" or len(recipe.references) == 1
    grids = {} if unmerged else _grids(plan, names)
    return Picture(plan.method.name, grids, _path(plan, lanes, names) if config.space.changes_layers else None)


def spread(grids: Sequence[Grid]) -> tuple[Grid, Grid]:
    """The mean of grids and their standard deviation, over all that have a value in a cell. A row has a kind of tensor
    of its own where some grid has.

    grids: at least one.
    """
    columns = tuple(dict.fromkeys(column for grid in grids for column in grid.columns))
    columns = tuple(sorted(columns, key=place_order))
    models = dict.fromkeys(model for grid in grids for model, _ in grid.rows)
    rows = [
        (model, kind)
        for model in models
        for kind in _kinds([kind for grid in grids for owner, kind in grid.rows if owner == model])
    ]
    looked_up = [_lookup(grid) for grid in grids]
    cells = [
        [[value for values in looked_up if (value := _at(values, row, column)) is not None] for column in columns]
        for row in rows
    ]
    means = tuple(tuple(fmean(cell) if cell else None for cell in row) for row in cells)
    deviations = tuple(tuple(pstdev(cell) if cell else None for cell in row) for row in cells)
    return Grid(tuple(rows), columns, means), Grid(tuple(rows), columns, deviations)


def _kinds(kinds: Sequence[str]) -> list[str]:
    distinct = list(dict.fromkeys(kinds))
    return [kind for kind in distinct if kind != _ALL] or distinct


def _lookup(grid: Grid) -> dict[tuple[Row, str], float]:
    return {
        (row, column): value
        for row, values in zip(grid.rows, grid.values, strict=True)
        for column, value in zip(grid.columns, values, strict=True)
        if value is not None
    }


def _at(values: Mapping[tuple[Row, str], float], row: Row, column: str) -> float | None:
    return values.get((row, column), values.get(((row[0], _ALL), column)))


def kind_of(tensor: str) -> str:
    """The kind of a tensor: its name without the layers before it, as in `self_attn.q_proj`."""
    if layer_index(tensor) is None:
        return ""
    return _LAYER.split(with_layer(tensor, 0), maxsplit=1)[-1].removesuffix(".weight")


def _grids(plan: MergePlan, names: Mapping[str, str]) -> dict[str, Grid]:
    """The grids of a plan. Parameters that models share are left out where they always have their default."""
    defaults = {parameter.name: parameter.default for parameter in plan.method.shared}
    cells: dict[str, dict[tuple[str, str, str], list[float]]] = defaultdict(lambda: defaultdict(list))
    for tensor in plan.tensors:
        place, kind = place_of(tensor.name), kind_of(tensor.name)
        for model, parameters in zip(tensor.models, tensor.per_model, strict=True):
            for name, value in parameters.items():
                cells[name][names.get(model, model), kind, place].append(float(value))
        for name, value in tensor.shared.items():
            cells[name][SHARED, kind, place].append(float(value))
    always_default = {
        name
        for name, default in defaults.items()
        if default is not None and all(value == float(default) for values in cells[name].values() for value in values)
    }
    return {name: _grid(by_cell) for name, by_cell in cells.items() if name not in always_default}


def _grid(cells: Mapping[tuple[str, str, str], Sequence[float]]) -> Grid:
    """The grid of one parameter. A model whose kinds of tensors all have the same value in every layer has one row."""
    columns = tuple(sorted({place for _, _, place in cells}, key=place_order))
    rows: list[Row] = []
    values: list[tuple[float | None, ...]] = []
    for model in dict.fromkeys(owner for owner, _, _ in cells):
        by_place: dict[str, dict[str, float]] = defaultdict(dict)
        for (owner, kind, place), found in cells.items():
            if owner == model:
                by_place[place][kind] = fmean(found)
        uniform = all(max(kinds.values()) - min(kinds.values()) < 1e-12 for kinds in by_place.values())
        inside = [kind for kind in dict.fromkeys(kind for kinds in by_place.values() for kind in kinds) if kind]
        for kind in [_ALL] if uniform or not inside else inside:
            rows.append((model, kind))
            values.append(tuple(_value(by_place.get(column, {}), kind) for column in columns))
    return Grid(tuple(rows), columns, tuple(values))


def _value(kinds: Mapping[str, float], kind: str) -> float | None:
    """The value of a kind of tensor in one place; outside of the layers, the mean of that place stands in every row."""
    if not kinds:
        return None
    return fmean(kinds.values()) if kind == _ALL or "" in kinds else kinds.get(kind)


def _lane(plan: MergePlan, layer: int, names: Mapping[str, str]) -> str:
    """The model that an output layer comes from unchanged but for a scale; `merge` where several are merged."""
    tensors = [tensor for tensor in plan.tensors if layer_index(tensor.name) == layer]
    return _common([_origin(tensor, plan) for tensor in tensors], names)


def _common(origins: Sequence[str | None], names: Mapping[str, str]) -> str:
    distinct = set(origins)
    only = origins[0] if len(distinct) == 1 else None
    return MERGE if only is None else names.get(only, only)


def _origin(tensor: TensorMerge, plan: MergePlan) -> str | None:
    """The model that gives a tensor alone; None where several do."""
    if plan.method.name == "passthrough" or (len(tensor.models) == 1 and tensor.base is None):
        return tensor.models[0]
    if len(tensor.models) != 1 or tensor.base is None or "weight" not in tensor.per_model[0]:
        return None
    weight, density = (tensor.per_model[0].get(name, 1.0) for name in ("weight", "density"))
    if weight == 0:
        return tensor.base
    return tensor.models[0] if weight == density == 1.0 and tensor.shared.get("lambda", 1.0) == 1.0 else None


def _path(plan: MergePlan, lanes: Sequence[str], names: Mapping[str, str]) -> Path:
    stops = tuple(
        Stop(lane, _layer(plan.layers[index], lane, names), _scale(plan, index)) for index, lane in enumerate(lanes)
    )
    outside = {
        place: _common([_origin(tensor, plan) for tensor in plan.tensors if place_of(tensor.name) == place], names)
        for place in (EMBEDDINGS, HEAD)
        if any(place_of(tensor.name) == place for tensor in plan.tensors)
    }
    return Path(stops, outside.get(EMBEDDINGS, MERGE), outside.get(HEAD, MERGE), plan.parallel)


def _layer(sources: Mapping[str, int], lane: str, names: Mapping[str, str]) -> int:
    by_name = {names.get(reference, reference): layer for reference, layer in sources.items()}
    return by_name.get(lane, next(iter(sources.values())))


def _scale(plan: MergePlan, layer: int) -> float:
    """The scale of a layer: of its tensors' scales the one that is farthest from 1."""
    scales = [
        float(parameters["scale"])
        for tensor in plan.tensors
        if layer_index(tensor.name) == layer
        for parameters in tensor.per_model
        if "scale" in parameters
    ]
    return max(scales, key=lambda scale: abs(scale - 1.0), default=1.0)
