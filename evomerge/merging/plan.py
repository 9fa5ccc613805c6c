"""MergePlan: a recipe worked out tensor by tensor, so that all of its errors show before any weight is touched.

An output layer is made of one layer of every source of its slice, so slices may repeat, drop and reorder layers.
The rules are those of mergekit 0.1.5:

- A source's parameters take precedence over its slice's, and these over the recipe's.
- Tensors before the layers read the first slice, and tensors after the layers the last one, both at t = 0.
- A slice of one layer has t = 1.
- A source's parameters are filtered by the name of its own tensor, shared ones by the name of the output tensor.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from evomerge.errors import InputError, closest
from evomerge.layers import is_embedding, layer_count, layer_index, with_layer
from evomerge.merging import methods
from evomerge.merging.methods.base import Kind, Method, Parameter, needed
from evomerge.recipe import Blocks, Parameters, Recipe, Slice, Source, resolve_setting


@dataclass(frozen=True, slots=True)
class TensorMerge:
    """How one tensor of the output is made.

    name: its name in the output.
    models: the references of the models that are merged, without a base that is set apart.
    sources: the name of each model's tensor.
    positions: each model's position in the recipe; with `name` it decides the mask of a random method.
    per_model: each model's parameters by name.
    shared: the parameters that models share, by name.
    base: the reference of the base; None where the method does not set it apart.
    base_source: the name of the base's tensor.
    preferred: the reference of the model whose embeddings stand in where others lack a token, if it is merged, too: the
        base, whether or not the method sets it apart.
    """

    name: str
    models: tuple[str, ...]
    sources: tuple[str, ...]
    positions: tuple[int, ...]
    per_model: tuple[Mapping[str, Any], ...]
    shared: Mapping[str, Any]
    base: str | None
    base_source: str
    preferred: str | None = None

    @property
    def places(self) -> tuple[int, ...]:
        """An index for `source` for everything that is merged: the base's, where it is set apart, and the models'."""
        return (*((-1,) if self.base is not None else ()), *range(len(self.models)))

    def source(self, index: int) -> tuple[str, str]:
        """The reference of a model and the name of its tensor.

        index: the model's place in `models`; -1 is the base.
        """
        if index >= 0:
            return self.models[index], self.sources[index]
        assert self.base is not None
        return self.base, self.base_source


@dataclass(frozen=True, slots=True)
class MergePlan:
    """Every tensor of a merge, and what each of its layers is made of.

    method: the merge method.
    seed: of the masks of random methods.
    rescale: how sparsified task vectors are rescaled, `density` or `l1`.
    tensors: in the order of the names that the plan was made for.
    layers: for each output layer, the number of the layer that each source gives, by reference. A base is among them.
    parallel: the blocks of output layers that run side by side, as in `Provenance`.
    """

    method: Method
    seed: int
    rescale: str
    tensors: tuple[TensorMerge, ...]
    layers: tuple[Mapping[str, int], ...]
    parallel: Blocks = ()

    @property
    def statistics(self) -> tuple[tuple[Kind, str], ...]:
        """What must have been measured of which model, by its reference."""
        every = (pair for tensor in self.tensors for pair in needed(self.method, tensor.base, tensor.models))
        return tuple(dict.fromkeys(every)) if self.method.statistics else ()

    @property
    def keeps_layers(self) -> bool:
        """Whether every output layer is made of sources' layers that have the same number."""
        return all(set(sources.values()) == {layer} for layer, sources in enumerate(self.layers))


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an output tensor comes from.

    slice_: the slice that it reads.
    t: where it lies in the slice, from 0 for the first layer to 1 for the last.
    offset: the number of its layer, counted from the slice's first; None for a tensor outside of the layers.
    """

    slice_: Slice
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
    """The plan of a recipe.

    recipe: what to merge.
    names: the parameter names of the output, in its order.
    where: what the recipe is called, which opens an error's message.
    tables: the parameter names, by reference, of models whose names differ from `names`, as with more layers.
    Raises InputError for what cannot be merged.
    """
    names = tuple(names)
    names_of = {reference: tuple((tables or {}).get(reference, names)) for reference in recipe.references}
    method = methods.get(recipe.merge_method, f"{where}: merge_method")
    slices = _slices(recipe, {reference: layer_count(table) for reference, table in names_of.items()}, where)
    for index, slice_ in enumerate(slices):
        place = f"{where}: slices[{index}]" if recipe.slices else where
        _check_sources(method, slice_, _base(recipe, method, slice_), place)
    _check_blocks(recipe.evomerge.parallel, sum(slice_.length for slice_ in slices), where)
    return MergePlan(
        method=method,
        seed=recipe.evomerge.seed,
        rescale=recipe.evomerge.rescale,
        tensors=tuple(_tensor_merges(recipe, method, slices, names, names_of, where)),
        layers=tuple(_layers(slices)),
        parallel=recipe.evomerge.parallel,
    )


def unread_parameters(recipe: Recipe) -> Iterator[str]:
    """A warning, a whole sentence, for each parameter that the recipe's method does not read in its place, as in
    mergekit."""
    method = methods.find(recipe.merge_method)
    if method is None:
        return
    per_model = [parameter.name for parameter in method.per_model]
    every = [*per_model, *(parameter.name for parameter in method.shared)]
    for key, parameters, of_source in _parameter_blocks(recipe):
        for name in parameters:
            if name not in every:
                close = closest(name, every)
                hint = f"; did you mean '{close}'?" if close else "."
                yield f"{key}.{name} is ignored, since merge_method {method.name} has no such parameter{hint}"
            elif of_source and name not in per_model:
                yield f"{key}.{name} is ignored, since all models share it; write it below the recipe's parameters."


def _parameter_blocks(recipe: Recipe) -> Iterator[tuple[str, Parameters, bool]]:
    """Every block of parameters: its path of keys, its content, and whether it belongs to a source."""
    yield "parameters", recipe.parameters, False
    for index, source in enumerate(recipe.models or ()):
        yield f"models[{index}].parameters", source.parameters, True
    for index, slice_ in enumerate(recipe.slices or ()):
        yield f"slices[{index}].parameters", slice_.parameters, False
        for number, source in enumerate(slice_.sources):
            yield f"slices[{index}].sources[{number}].parameters", source.parameters, True


def _base(recipe: Recipe, method: Method, slice_: Slice) -> str | None:
    """The base of a slice; None where the method does not set it apart, or where there is none."""
    return (slice_.base_model or recipe.base_model) if method.uses_base else None


def _check_sources(method: Method, slice_: Slice, base: str | None, place: str) -> None:
    if method.needs_base and base is None:
        raise InputError(f"{place}: merge_method {method.name} needs a base_model; add one.")
    models = [source.model for source in slice_.sources]
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
    """The recipe's slices. A recipe with `models` is one slice of all layers, and its base is one of the sources."""
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
    for index, slice_ in enumerate(slices):
        for source in slice_.sources:
            start, end = source.layer_range or (0, 0)
            if end > counts[source.model]:
                raise InputError(
                    f"{where}: slices[{index}] takes layers [{start}, {end}) of {source.model}, which has "
                    f"{counts[source.model]}; use a layer_range within [0, {counts[source.model]}]."
                )
    return slices


def _check_blocks(blocks: Blocks, depth: int, where: str) -> None:
    if blocks and blocks[-1][1] > depth:
        raise InputError(
            f"{where}: evomerge.parallel names layers [{blocks[-1][0]}, {blocks[-1][1]}) of the output, which has "
            f"{depth}; use blocks within [0, {depth}]."
        )


def _layers(slices: tuple[Slice, ...]) -> Iterator[Mapping[str, int]]:
    for slice_ in slices:
        for offset in range(slice_.length):
            yield {source.model: source.layer_range[0] + offset for source in slice_.sources if source.layer_range}


def _tensor_merges(
    recipe: Recipe,
    method: Method,
    slices: tuple[Slice, ...],
    names: tuple[str, ...],
    tables: Mapping[str, tuple[str, ...]],
    where: str,
) -> list[TensorMerge]:
    """How every output tensor is made. A layer has the tensors of its slice's first source."""
    places = {
        name: _Place(slices[0] if is_embedding(name) else slices[-1], 0.0)
        for name in names
        if layer_index(name) is None
    }
    by_layer: dict[str, dict[int, list[str]]] = {}
    for reference in {slice_.sources[0].model for slice_ in slices}:
        table = by_layer.setdefault(reference, {})
        for name in tables[reference]:
            if (layer := layer_index(name)) is not None:
                table.setdefault(layer, []).append(name)
    start = 0
    for slice_ in slices:
        first = slice_.sources[0]
        for offset in range(slice_.length):
            place = _Place(slice_, offset / (slice_.length - 1) if slice_.length > 1 else 1.0, offset)
            for name in by_layer[first.model].get((first.layer_range or (0, 0))[0] + offset, []):
                places[with_layer(name, start + offset)] = place
        start += slice_.length
    order = {name: index for index, name in enumerate(names)}
    ordered = sorted(places.items(), key=lambda item: order.get(item[0], len(order)))
    return [_tensor_merge(recipe, method, place, name, where) for name, place in ordered]


def _tensor_merge(recipe: Recipe, method: Method, place: _Place, name: str, where: str) -> TensorMerge:
    base = _base(recipe, method, place.slice_)
    sources = [source for source in place.slice_.sources if source.model != base]
    base_source = next((place.source(source, name) for source in place.slice_.sources if source.model == base), name)

    def value(parameter: Parameter, source: Source | None) -> Any:
        tensor = name if source is None else place.source(source, name)
        return _value(parameter, _levels(recipe, place.slice_, source), tensor, place.t, source, where)

    per_model = tuple({own.name: value(own, source) for own in method.per_model} for source in sources)
    for source, parameters in zip(sources, per_model, strict=True):
        _check_epsilon(parameters, f"{where}: epsilon of {source.model} for {name}")
    return TensorMerge(
        name=name,
        models=tuple(source.model for source in sources),
        sources=tuple(place.source(source, name) for source in sources),
        positions=tuple(_position(recipe, source.model) for source in sources),
        per_model=per_model,
        shared={parameter.name: value(parameter, None) for parameter in method.shared},
        base=base,
        base_source=base_source,
        preferred=base or recipe.base_model,
    )


def _position(recipe: Recipe, model: str) -> int:
    return recipe.fine_tunes.index(model) if model in recipe.fine_tunes else -1


def _levels(recipe: Recipe, slice_: Slice, source: Source | None) -> Iterator[Parameters]:
    """Parameter blocks from the highest to the lowest precedence."""
    if source is not None:
        yield source.parameters
    yield slice_.parameters
    yield recipe.parameters


def _value(
    parameter: Parameter, levels: Iterator[Parameters], tensor: str, t: float, source: Source | None, where: str
) -> float | bool:
    what = f"{where}: {parameter.name}{f' of {source.model}' if source else ''}"
    for level in levels:
        try:
            setting = resolve_setting(level.get(parameter.name), tensor, t, parameter.kind)
        except ValueError as error:
            raise InputError(f"{what} for {tensor} {error}.") from None
        if setting is not None:
            return _in_range(parameter, setting, f"{what} for {tensor}")
    if parameter.default is None:
        raise InputError(f"{what} is missing for {tensor}; give it a value.")
    return parameter.default


def _in_range(parameter: Parameter, value: float | bool, what: str) -> float | bool:
    if parameter.within is not None and not parameter.within[0] <= value <= parameter.within[1]:
        raise InputError(f"{what} is {value:g}; use a value in [{parameter.within[0]:g}, {parameter.within[1]:g}].")
    return value


def _check_epsilon(parameters: Mapping[str, Any], what: str) -> None:
    """Raises InputError, like mergekit, where density ± epsilon leaves (0, 1). At a density of 0 or 1 the epsilon is
    not used, and so not checked."""
    density, epsilon = parameters.get("density", 1.0), parameters.get("epsilon", 0.0)
    if 0 < density < 1 and not 0 < density - abs(epsilon) <= density + abs(epsilon) < 1:
        raise InputError(
            f"{what} is {epsilon:g}, which with density {density:g} leaves (0, 1); "
            f"use one below {min(density, 1 - density):g}."
        )
