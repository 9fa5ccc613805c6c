"""MergePlan: a recipe worked out tensor by tensor, so that all of its errors show before any weight is touched.

An output layer is made of one layer of every source of its slice, so slices may repeat, drop and reorder layers.
Precedence follows mergekit 0.1.5: a source's parameters before its slice's before the recipe's; tensors before the
layers read the first slice, tensors after them the last, both at t = 0; a one-layer slice has t = 1. A source's own
parameters are filtered by the name of its tensor, shared ones by the name of the output's.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from evomerge.errors import InputError, closest
from evomerge.layers import is_embedding, layer_count, layer_index, with_layer
from evomerge.merging import methods
from evomerge.merging.methods.base import Method, Parameter
from evomerge.recipe import Parameters, Recipe, Slice, Source, resolve_setting


@dataclass(frozen=True, slots=True)
class TensorMerge:
    """How one tensor of the output is made: its models with their tensors, positions (for masks) and parameters.

    base: the model that the method sets apart here, or None, with the name of its tensor. The mask of a random method
    is drawn by position and output name.
    """

    name: str
    models: tuple[str, ...]
    sources: tuple[str, ...]
    positions: tuple[int, ...]
    per_model: tuple[Mapping[str, Any], ...]
    shared: Mapping[str, Any]
    base: str | None
    base_source: str


@dataclass(frozen=True, slots=True)
class MergePlan:
    """Every tensor of a merge, in the order of the given names, and what each of its layers is made of.

    layers: for every output layer, the layer that each source (a base among them) gives to it.
    """

    method: Method
    seed: int
    rescale: str
    tensors: tuple[TensorMerge, ...]
    layers: tuple[Mapping[str, int], ...]

    @property
    def keeps_layers(self) -> bool:
        """Whether every output layer is made of the sources' layers of the same number."""
        return all(set(sources.values()) == {layer} for layer, sources in enumerate(self.layers))


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an output tensor comes from: the slice it reads, t within it, and how far into it its layer lies."""

    part: Slice
    t: float
    offset: int | None = None

    def source(self, source: Source, name: str) -> str:
        """The name of a source's tensor for the output's `name`."""
        if self.offset is None or source.layer_range is None:
            return name
        return with_layer(name, source.layer_range[0] + self.offset)


def make_plan(
    recipe: Recipe,
    names: Iterable[str],
    where: str = "the recipe",
    tables: Mapping[str, Iterable[str]] | None = None,
) -> MergePlan:
    """The plan of a recipe for a model with the given parameter names.

    tables: the names of models that have others, such as more layers. Raises InputError for what cannot be merged.
    """
    names = tuple(names)
    known = {reference: tuple((tables or {}).get(reference, names)) for reference in recipe.references}
    method = methods.get(recipe.merge_method, f"{where}: merge_method")
    slices = _slices(recipe, {reference: layer_count(table) for reference, table in known.items()}, where)
    for index, part in enumerate(slices):
        place = f"{where}: slices[{index}]" if recipe.slices else where
        _check_sources(method, part, _base(recipe, method, part), place)
    return MergePlan(
        method=method,
        seed=recipe.evomerge.seed,
        rescale=recipe.evomerge.rescale,
        tensors=tuple(_tensor_merges(recipe, method, slices, names, known, where)),
        layers=tuple(_layers(slices)),
    )


def unread_parameters(recipe: Recipe) -> Iterator[str]:
    """A sentence for each parameter that the recipe's method does not read where it stands, as in mergekit."""
    method = methods.METHODS.get(recipe.merge_method)
    if method is None:
        return
    per_model = [known.name for known in method.per_model]
    every = [*per_model, *(known.name for known in method.shared)]
    for key, parameters, of_source in _parameter_blocks(recipe):
        for name in parameters:
            if name not in every:
                close = closest(name, every)
                hint = f"; did you mean '{close}'?" if close else "."
                yield f"{key}.{name} is ignored, since merge_method {method.name} has no such parameter{hint}"
            elif of_source and name not in per_model:
                yield f"{key}.{name} is ignored, since all models share it; write it below the recipe's parameters."


def _parameter_blocks(recipe: Recipe) -> Iterator[tuple[str, Parameters, bool]]:
    """Every block of parameters with its key path, and whether it is one of a source."""
    yield "parameters", recipe.parameters, False
    for index, source in enumerate(recipe.models or ()):
        yield f"models[{index}].parameters", source.parameters, True
    for index, part in enumerate(recipe.slices or ()):
        yield f"slices[{index}].parameters", part.parameters, False
        for number, source in enumerate(part.sources):
            yield f"slices[{index}].sources[{number}].parameters", source.parameters, True


def _base(recipe: Recipe, method: Method, part: Slice) -> str | None:
    """The model that the method sets apart in a slice."""
    return (part.base_model or recipe.base_model) if method.uses_base else None


def _check_sources(method: Method, part: Slice, base: str | None, place: str) -> None:
    if method.needs_base and base is None:
        raise InputError(f"{place}: merge_method {method.name} needs a base_model; add one.")
    models = [source.model for source in part.sources]
    twice = next((model for model in models if models.count(model) > 1), None)
    if twice is not None:
        raise InputError(f"{place}: the model {twice} is given twice; merge it once, with one weight.")
    count = sum(model != base for model in models)
    if not method.accepts(count):
        besides = "besides the base" if method.uses_base else "counting a base_model"
        advice = "add one" if count < method.least else "remove one"
        raise InputError(
            f"{place}: merge_method {method.name} takes {method.count} {besides}, but there are {count}; {advice}."
        )
    if base is not None and base not in models:
        raise InputError(
            f"{place}: base_model {base} is none of its sources, so that nothing says which of its layers are meant; "
            "add it with a layer_range."
        )


def _slices(recipe: Recipe, counts: Mapping[str, int], where: str) -> tuple[Slice, ...]:
    """The recipe's slices; a `models` recipe is one slice of all layers, in which a base takes part like any model."""
    if recipe.models is not None:
        models = recipe.models
        if recipe.base_model and recipe.base_model not in [source.model for source in models]:
            models = (*models, Source(model=recipe.base_model))
        first = models[0].model
        for source in models:
            if counts[source.model] != counts[first]:
                raise InputError(
                    f"{where}: {source.model} has {counts[source.model]} layers, but {first} has {counts[first]}; "
                    "models are merged whole, so write slices that say which layers belong together."
                )
        layer_range = (0, counts[first])
        return (Slice(sources=tuple(source.model_copy(update={"layer_range": layer_range}) for source in models)),)
    slices = recipe.slices or ()
    for index, part in enumerate(slices):
        for source in part.sources:
            start, end = source.layer_range or (0, 0)
            if end > counts[source.model]:
                raise InputError(
                    f"{where}: slices[{index}] takes layers [{start}, {end}) of {source.model}, which has "
                    f"{counts[source.model]}; use a layer_range within [0, {counts[source.model]}]."
                )
    return slices


def _layers(slices: tuple[Slice, ...]) -> Iterator[Mapping[str, int]]:
    for part in slices:
        for offset in range(part.length):
            yield {source.model: source.layer_range[0] + offset for source in part.sources if source.layer_range}


def _tensor_merges(
    recipe: Recipe,
    method: Method,
    slices: tuple[Slice, ...],
    names: tuple[str, ...],
    tables: Mapping[str, tuple[str, ...]],
    where: str,
) -> list[TensorMerge]:
    """Every output tensor. A layer has the tensors of its slice's first source."""
    places = {
        name: _Place(slices[0] if is_embedding(name) else slices[-1], 0.0)
        for name in names
        if layer_index(name) is None
    }
    by_layer: dict[str, dict[int, list[str]]] = {}
    for reference in {part.sources[0].model for part in slices}:
        table = by_layer.setdefault(reference, {})
        for name in tables[reference]:
            if (layer := layer_index(name)) is not None:
                table.setdefault(layer, []).append(name)
    start = 0
    for part in slices:
        first = part.sources[0]
        for offset in range(part.length):
            place = _Place(part, offset / (part.length - 1) if part.length > 1 else 1.0, offset)
            for name in by_layer[first.model].get((first.layer_range or (0, 0))[0] + offset, []):
                places[with_layer(name, start + offset)] = place
        start += part.length
    order = {name: index for index, name in enumerate(names)}
    ordered = sorted(places.items(), key=lambda item: order.get(item[0], len(order)))
    return [_tensor_merge(recipe, method, place, name, where) for name, place in ordered]


def _tensor_merge(recipe: Recipe, method: Method, place: _Place, name: str, where: str) -> TensorMerge:
    base = _base(recipe, method, place.part)
    sources = [source for source in place.part.sources if source.model != base]
    base_source = next((place.source(source, name) for source in place.part.sources if source.model == base), name)

    def value(parameter: Parameter, source: Source | None) -> Any:
        tensor = name if source is None else place.source(source, name)
        return _value(parameter, _levels(recipe, place.part, source), tensor, place.t, source, where)

    per_model = tuple({known.name: value(known, source) for known in method.per_model} for source in sources)
    for source, parameters in zip(sources, per_model, strict=True):
        _check_epsilon(parameters, f"{where}: epsilon of {source.model} for {name}")
    return TensorMerge(
        name=name,
        models=tuple(source.model for source in sources),
        sources=tuple(place.source(source, name) for source in sources),
        positions=tuple(_position(recipe, source.model) for source in sources),
        per_model=per_model,
        shared={known.name: value(known, None) for known in method.shared},
        base=base,
        base_source=base_source,
    )


def _position(recipe: Recipe, model: str) -> int:
    return recipe.fine_tunes.index(model) if model in recipe.fine_tunes else -1


def _levels(recipe: Recipe, part: Slice, source: Source | None) -> Iterator[Parameters]:
    """Parameter blocks from the highest to the lowest precedence."""
    if source is not None:
        yield source.parameters
    yield part.parameters
    yield recipe.parameters


def _value(
    parameter: Parameter, levels: Iterator[Parameters], tensor: str, t: float, source: Source | None, where: str
) -> float | bool:
    what = f"{where}: {parameter.name}{f' of {source.model}' if source else ''}"
    for level in levels:
        try:
            found = resolve_setting(level.get(parameter.name), tensor, t, parameter.kind)
        except ValueError as error:
            raise InputError(f"{what} for {tensor} {error}.") from None
        if found is not None:
            return _in_range(parameter, found, f"{what} for {tensor}")
    if parameter.default is None:
        raise InputError(f"{what} is missing for {tensor}; give it a value.")
    return parameter.default


def _in_range(parameter: Parameter, value: float | bool, what: str) -> float | bool:
    if parameter.within is not None and not parameter.within[0] <= value <= parameter.within[1]:
        raise InputError(f"{what} is {value:g}; use a value in [{parameter.within[0]:g}, {parameter.within[1]:g}].")
    return value


def _check_epsilon(parameters: Mapping[str, Any], what: str) -> None:
    """Like mergekit, refuses an epsilon that leads from the density out of (0, 1), where it is used at all."""
    density, epsilon = parameters.get("density", 1.0), parameters.get("epsilon", 0.0)
    if 0 < density < 1 and not 0 < density - abs(epsilon) <= density + abs(epsilon) < 1:
        raise InputError(
            f"{what} is {epsilon:g}, which with density {density:g} leaves (0, 1); "
            f"use one below {min(density, 1 - density):g}."
        )
