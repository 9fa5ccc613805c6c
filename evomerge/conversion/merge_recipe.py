"""Merge recipes as search files, whose genes start at the recipe's numbers as far as a space can say it.

A space has one start for all genes of a kind. Where a recipe has several numbers, the genes start at their mean, and a
comment says which numbers there were.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import gcd
from pathlib import Path
from statistics import fmean
from typing import Any

from evomerge.conversion.draft import Draft, Folder, name_of, named
from evomerge.conversion.mergekit_evolve import running
from evomerge.conversion.options import Options
from evomerge.errors import InputError
from evomerge.merging import methods
from evomerge.merging.methods.base import Method, Parameter
from evomerge.merging.sources.located import load, located
from evomerge.recipe import FilteredValue, Parameters, Recipe, Setting, Slice, Source

_STEPS = {"weight": 0.3, "density": 0.03}
_BOUNDS = {"weight": (0.0, 1.5), "density": (0.1, 1.0)}
_LEAST_DENSITY = 0.01
_SILENT = ("normalize", "rescale", "int8_mask", "lambda", *_STEPS)  # dealt with elsewhere, or without effect
_OUTSIDE = ("embed", "lm_head", "wte", "model.norm.")  # groups of their own, whatever the filters
_SHOWN = 6


def draft_of(path: Path, options: Options, folder: Folder) -> Draft:
    """The search file of a recipe.

    path: the recipe's file.
    options: what a recipe does not say: its tasks, its base.
    folder: where the search file will lie.
    Raises InputError for a file that is no recipe, and for one that lacks a base where a search needs one.
    """
    draft = Draft()
    recipe = located(load(path, lambda warning: draft.lose("", warning.removeprefix(f"{path}: "))))
    method = methods.get(recipe.merge_method, f"{path}: merge_method")
    objectives = [_objective(text) for text in options.tasks]
    if not objectives:
        raise InputError(f"{path}: a recipe names no tasks, and a search needs some; give --task TASK once for each.")
    base = _base(recipe, method, options, path)
    models = [model for model in recipe.references if model != base]
    averaged = method.name == "linear" and base in [source.model for _, source in _sources(recipe)]
    if not models and method.name != "passthrough":
        raise InputError(f"{path}: the recipe has no model but {base}, so there is nothing to search.")
    draft.settings["base"] = folder.relocated(base)
    draft.settings["models"] = {name: folder.relocated(model) for name, model in named(models).items()}
    if options.base is None and not _stated_bases(recipe):
        draft.say("base", f"The recipe names no base. {base} was taken; `evomerge convert --base MODEL` takes another.")
    if options.task_paths:
        draft.settings["tasks"] = {"paths": [folder.place(text, is_path=True) for text in options.task_paths]}
    draft.settings["objectives"] = objectives
    if method.name == "passthrough":
        _layers(draft, recipe, base, named(models))
    else:
        _merge(draft, recipe, method, base, averaged, options)
    _rest(draft, recipe, options)
    running(draft, options)
    if options.seed is None and recipe.evomerge.seed > 0:
        draft.settings["seed"] = recipe.evomerge.seed
    return draft


def _objective(text: str) -> dict[str, str]:
    """An objective written as TASK, TASK:METRIC or TASK:METRIC:FILTER."""
    parts = text.split(":")
    if len(parts) > 3 or not all(parts):
        raise InputError(f"--task is '{text}'; write TASK, TASK:METRIC or TASK:METRIC:FILTER.")
    return dict(zip(("task", "metric", "filter"), parts, strict=False))


def _stated_bases(recipe: Recipe) -> list[str]:
    listed = [recipe.base_model, *(slice_.base_model for slice_ in recipe.slices or ())]
    return list(dict.fromkeys(model for model in listed if model is not None))


def _base(recipe: Recipe, method: Method, options: Options, path: Path) -> str:
    """The base of the search: the user's, the recipe's, or for an average its first model."""
    stated = _stated_bases(recipe)
    if options.base is not None:
        return options.base
    if stated:
        return stated[0]
    if method.name in ("linear", "passthrough"):
        return recipe.references[0]
    raise InputError(
        f"{path}: the recipe names no base_model, and a search needs one; give the model that the others were tuned "
        "from with --base."
    )


def _sources(recipe: Recipe) -> Iterator[tuple[Slice | None, Source]]:
    """Every source of a recipe, with the slice that it is in."""
    for source in recipe.models or ():
        yield None, source
    for slice_ in recipe.slices or ():
        for source in slice_.sources:
            yield slice_, source


def _setting(recipe: Recipe, slice_: Slice | None, source: Source | None, name: str) -> Setting | None:
    """The setting of a parameter that counts for a source: its own, its slice's or the recipe's."""
    levels: Sequence[Parameters] = (
        source.parameters if source else {},
        slice_.parameters if slice_ else {},
        recipe.parameters,
    )
    return next((level[name] for level in levels if name in level), None)


def _numbers(setting: Setting | None) -> list[float]:
    """The numbers of a setting, whatever tensors they are for."""
    if setting is None:
        return []
    if isinstance(setting, FilteredValue):
        return _numbers(setting.value)
    if isinstance(setting, list):
        return [number for item in setting for number in _numbers(item)]
    try:
        return [float(setting)]
    except ValueError:
        return []


def _merge(draft: Draft, recipe: Recipe, method: Method, base: str, averaged: bool, options: Options) -> None:
    """Writes the parameter space around a merge."""
    space: dict[str, Any] = {"method": "task_arithmetic" if averaged else method.name}
    draft.settings["space"] = space
    if averaged:
        draft.say(
            "space",
            f"{base} is one of the averaged models and the base. The average with weights that sum to 1 is the base "
            "plus weighted task vectors of the others, so the method is task_arithmetic instead of linear.",
        )
    _groups(draft, recipe)
    _filters(draft, recipe)
    for name, step in _STEPS.items():
        if method.takes(name):
            found = _shares(recipe, base) if averaged else _by_model(recipe, base, name)
            space[name] = _gene(draft, name, found, options.sigma or step)
    own = {parameter.name: gene for parameter in method.own if (gene := _own(draft, recipe, method, parameter))}
    if own:
        space["parameters"] = {method.name: own}
    if not averaged:
        _switches(draft, recipe, method)


def _by_model(recipe: Recipe, base: str, name: str) -> dict[str, list[float]]:
    """The numbers of a parameter by model, 1 where the recipe gives none."""
    numbers: dict[str, list[float]] = {}
    for slice_, source in _sources(recipe):
        if source.model != base:
            found = _numbers(_setting(recipe, slice_, source, name)) or [1.0]
            numbers.setdefault(source.model, []).extend(found)
    return numbers


def _shares(recipe: Recipe, base: str) -> dict[str, list[float]]:
    """The weights of an average by model, divided by their sum in every slice; those of the base are left out."""
    numbers: dict[str, list[float]] = {}
    for slice_ in recipe.slices or (None,):
        means = {
            source.model: fmean(_numbers(_setting(recipe, slice_, source, "weight")) or [1.0])
            for source in (slice_.sources if slice_ else recipe.models or ())
        }
        total = sum(means.values()) or 1.0
        for model, mean in means.items():
            if model != base:
                numbers.setdefault(model, []).append(mean / total)
    return numbers


def _gene(draft: Draft, name: str, found: Mapping[str, Sequence[float]], step: float) -> dict[str, float]:
    """Bounds that hold all numbers of a recipe, and a start at their mean."""
    values = [value for numbers in found.values() for value in numbers]
    start = _mean(draft, name, values, "; ".join(f"{model}: {_listed(numbers)}" for model, numbers in found.items()))
    low, high = _BOUNDS[name]
    low, high = min(low, *values), max(high, *values)
    if name == "density":
        low, high = max(low, _LEAST_DENSITY), 1.0
    return {"low": low, "high": high, "start": min(max(start, low), high), "step": step}


def _mean(draft: Draft, name: str, values: Sequence[float], shown: str) -> float:
    """The mean of numbers, with a comment where they differ."""
    mean = float(f"{fmean(values):.6g}")
    if len(set(values)) > 1:
        draft.lose("space", f"{name} has one start, {mean:g}, the mean of the recipe's numbers ({shown}).")
    return mean if len(set(values)) > 1 else values[0]


def _listed(numbers: Sequence[float]) -> str:
    shown = ", ".join(f"{number:g}" for number in numbers[:_SHOWN])
    return shown + (f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else "")


def _own(draft: Draft, recipe: Recipe, method: Method, parameter: Parameter) -> dict[str, float] | None:
    """The start of a parameter that belongs to one method; None where the recipe does not give it."""
    found = [
        number
        for slice_, source in _sources(recipe)
        for number in _numbers(_setting(recipe, slice_, source, parameter.name))
    ]
    table = parameter.search
    if not found or table is None or min(found) < 0:
        return None
    if parameter.kind is bool:
        return {"fixed": float(bool(found[0]))}
    start = _mean(draft, f"{method.name}.{parameter.name}", found, _listed(list(dict.fromkeys(found))))
    start = round(start) if parameter.kind is int else start
    low, high = {"low": start} if start < table.low else {}, {"high": start} if start > table.high else {}
    return {**low, **high, "start": start}


def _switches(draft: Draft, recipe: Recipe, method: Method) -> None:
    """Writes what holds for the whole merge, and says which parameters stay as the method has them."""
    space = draft.settings["space"]
    shared = {parameter.name: parameter for parameter in method.shared}
    if "normalize" in shared:
        given = recipe.parameters.get("normalize", shared["normalize"].default)
        space["normalize"] = str(given).lower() in ("true", "1", "1.0", "yes")
    if method.random:
        space["rescale"] = recipe.evomerge.rescale
    if str(recipe.parameters.get("rescale", True)).lower() in ("false", "0", "no") and method.random:
        draft.lose("space", "rescale is false: what random masks leave is always rescaled in a search.")
    lambdas = _numbers(recipe.parameters.get("lambda"))
    if "lambda" in shared and lambdas and fmean(lambdas) != 1.0:
        space["lambda"] = {"fixed": fmean(lambdas)}
    searched = {parameter.name for parameter in method.own}
    for name, parameter in shared.items():
        if name in recipe.parameters and name not in searched and name not in _SILENT:
            value = recipe.parameters[name]
            if value != parameter.default:
                draft.lose("space", f"{name} is {value}: a search has the method's own value, {parameter.default}.")


def _groups(draft: Draft, recipe: Recipe) -> None:
    """Writes the slices as runs of layers, where they are the layers of every model in order."""
    slices = [slice_ for slice_ in recipe.slices or () if slice_.length]
    ranges = [{source.layer_range for source in slice_.sources} for slice_ in slices]
    end, runs = 0, []
    for layers in ranges:
        first, last = next(iter(layers)) or (0, 0)
        if len(layers) > 1 or first != end:
            draft.lose(
                "space",
                "The recipe takes layers in another order, or other layers of one model than of another. A merge is "
                "searched over layers in order; space.kind hybrid searches orders too.",
            )
            return
        runs.append(f"{first}-{last - 1}")
        end = last
    if len(runs) > 1:
        draft.settings["space"]["layer_groups"] = runs
        draft.say("space", "layer_groups are the recipe's slices; they have to cover all layers of the base.")


def _filters(draft: Draft, recipe: Recipe) -> None:
    """Writes the filters of parameters, which divide the tensors in a run of layers."""
    levels = [recipe.parameters, *(slice_.parameters for slice_ in recipe.slices or ())]
    levels += [source.parameters for _, source in _sources(recipe)]
    filters = [text for level in levels for setting in level.values() for text in _filters_in(setting)]
    inside = [text for text in dict.fromkeys(filters) if not any(part in text for part in _OUTSIDE)]
    if any(text.endswith((".weight", ".bias")) for text in inside):
        draft.lose("space", "The recipe has numbers for single tensors; see space.tensor_weights.")
    elif inside:
        draft.settings["space"]["filters"] = inside


def _filters_in(setting: Setting) -> list[str]:
    items = setting if isinstance(setting, list) else [setting]
    filters = [item.filter for item in items if isinstance(item, FilteredValue)]
    return [text for text in filters if text not in (None, "", "*", "rest")]


def _layers(draft: Draft, recipe: Recipe, base: str, models: Mapping[str, str]) -> None:
    """Writes the data-flow space around a recipe that merges nothing: which layers, in what order."""
    ranges = [(source, source.layer_range) for _, source in _sources(recipe) if source.layer_range]
    used = dict.fromkeys(name_of(models, source.model) for _, source in _sources(recipe))
    space: dict[str, Any] = {"kind": "data_flow", "form": "path", "sources": list(used)}
    ends = [end for _, (first, last) in ranges for end in (first, last)]
    if ends:
        space |= {"granularity": gcd(*ends) or 1, "max_layers": sum(last - first for _, (first, last) in ranges) or 1}
    draft.settings["space"] = space
    order = ", ".join(f"{name_of(models, source.model)} {first}-{last - 1}" for source, (first, last) in ranges)
    draft.lose("space", f"A search of paths starts at the models' own layers, not at the recipe's ({order or 'all'}).")
    if any(_numbers(_setting(recipe, slice_, source, "scale")) for slice_, source in _sources(recipe)):
        draft.lose("space", "scale: the recipe scales layers; space.scale searches scales.")


def _rest(draft: Draft, recipe: Recipe, options: Options) -> None:
    """Writes what is no part of the space, and says what only a recipe can have."""
    optimizer = {"evaluations": options.max_fevals, "population": options.population}
    if any(optimizer.values()):
        draft.settings["optimizer"] = {key: value for key, value in optimizer.items() if value is not None}
    evaluation = {"dtype": recipe.dtype, "batch_size": options.batch_size}
    if any(evaluation.values()):
        draft.settings["evaluation"] = {key: value for key, value in evaluation.items() if value is not None}
    if recipe.out_dtype not in (None, recipe.dtype):
        draft.lose("evaluation", f"out_dtype is {recipe.out_dtype}: a search scores weights as evaluation.dtype.")
    if recipe.vocabulary is not None and recipe.vocabulary.model_dump(exclude_defaults=True) != {"source": "base"}:
        draft.lose("", "The recipe builds a tokenizer; candidates of a search have the base's. Add it to the export.")
    if recipe.evomerge.parallel:
        draft.lose(
            "space", "parallel: the recipe runs layers side by side; space.form parallel or looped searches that."
        )
    if recipe.chat_template is not None:
        draft.lose("", "The recipe sets a chat_template; candidates of a search have the base's. Add it to the export.")
