"""MergePlan: a recipe worked out tensor by tensor, so that all of its errors show before any weight is touched.

Precedence follows mergekit 0.1.5: a source's parameters before its slice's before the recipe's; tensors before the
layers read the first slice, tensors after them the last, both at t = 0; a one-layer slice has t = 1.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from evomerge.errors import InputError
from evomerge.layers import is_embedding, layer_count, layer_index
from evomerge.merging import methods
from evomerge.merging.methods.base import Method, Parameter
from evomerge.recipe import Parameters, Recipe, Slice, Source, resolve_setting


@dataclass(frozen=True, slots=True)
class TensorMerge:
    """How one tensor is made: its models with their positions (for masks) and parameters."""

    name: str
    models: tuple[str, ...]
    positions: tuple[int, ...]
    per_model: tuple[Mapping[str, Any], ...]
    shared: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class MergePlan:
    """Every tensor of a merge, in the order of the base's parameters; `base` is the one that the method sets apart."""

    method: Method
    base: str | None
    seed: int
    rescale: str
    tensors: tuple[TensorMerge, ...]


def make_plan(recipe: Recipe, names: Iterable[str], where: str = "the recipe") -> MergePlan:
    """The plan of a recipe for a model with the given parameter names. Raises InputError for what cannot be merged."""
    names = tuple(names)
    method = methods.get(recipe.merge_method, f"{where}: merge_method")
    if method.needs_base and recipe.base_model is None:
        raise InputError(f"{where}: merge_method {method.name} needs a base_model; add one.")
    slices = _slices(recipe, layer_count(names), where)
    base = recipe.base_model if method.uses_base else None
    for index, part in enumerate(slices):
        _check_count(method, part, base, f"{where}: slices[{index}]" if recipe.slices else where)
    tensors = tuple(_tensor_merge(recipe, method, slices, name, where) for name in names)
    return MergePlan(method, base, recipe.evomerge.seed, recipe.evomerge.rescale, tensors)


def _check_count(method: Method, part: Slice, base: str | None, place: str) -> None:
    count = sum(source.model != base for source in part.sources)
    if method.accepts(count):
        return
    besides = "besides the base" if method.uses_base else "counting a base_model"
    advice = "add one" if count < method.least else "remove one"
    raise InputError(
        f"{place}: merge_method {method.name} takes {method.count} {besides}, but there are {count}; {advice}."
    )


def _slices(recipe: Recipe, layers: int, where: str) -> tuple[Slice, ...]:
    """The recipe's slices; a `models` recipe is one slice of all layers, in which a base takes part like any model."""
    if recipe.models is not None:
        models = recipe.models
        if recipe.base_model and recipe.base_model not in [source.model for source in models]:
            models = (*models, Source(model=recipe.base_model))
        return (Slice(sources=tuple(source.model_copy(update={"layer_range": (0, layers)}) for source in models)),)
    slices = recipe.slices or ()
    expected = 0
    for index, part in enumerate(slices):
        start, end = part.layer_range
        if start != expected or end <= start:
            raise InputError(
                f"{where}: slices[{index}] covers layers [{start}, {end}), expected them to start at {expected}; "
                "slices must cover the layers once, in order."
            )
        expected = end
    if expected != layers:
        raise InputError(f"{where}: slices cover {expected} layers, but the model has {layers}; cover them all.")
    return slices


def _tensor_merge(recipe: Recipe, method: Method, slices: tuple[Slice, ...], name: str, where: str) -> TensorMerge:
    part, t = _place(slices, name)
    sources = [source for source in part.sources if not (method.uses_base and source.model == recipe.base_model)]

    def value(parameter: Parameter, source: Source | None) -> Any:
        return _value(parameter, _levels(recipe, part, source), name, t, source, where)

    per_model = tuple({known.name: value(known, source) for known in method.per_model} for source in sources)
    for source, parameters in zip(sources, per_model, strict=True):
        _check_epsilon(parameters, f"{where}: epsilon of {source.model} for {name}")
    return TensorMerge(
        name=name,
        models=tuple(source.model for source in sources),
        positions=tuple(_position(recipe, source.model) for source in sources),
        per_model=per_model,
        shared={known.name: value(known, None) for known in method.shared},
    )


def _place(slices: tuple[Slice, ...], name: str) -> tuple[Slice, float]:
    """The slice that a tensor reads its parameters from, and its t within it."""
    layer = layer_index(name)
    if layer is None:
        return (slices[0] if is_embedding(name) else slices[-1]), 0.0
    part = next(part for part in slices if part.layer_range[0] <= layer < part.layer_range[1])
    start, end = part.layer_range
    return part, (layer - start) / (end - start - 1) if end - start > 1 else 1.0


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
