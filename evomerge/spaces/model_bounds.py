"""Bounds of weights and densities by model: those of all models, with what a search file changes for one of them.

Such a change is a floor under a safety model's weight, or a range below zero for a model that is to be taken out.
"""

from collections.abc import Mapping, Sequence

from evomerge.config.base import GeneChange, GeneConfig
from evomerge.config.documents import validate
from evomerge.config.spaces import ParameterSpaceConfig
from evomerge.errors import InputError, choices

KINDS = ("weight", "density")
Bounds = Mapping[tuple[str, str], GeneConfig]


def model_bounds(config: ParameterSpaceConfig, models: Sequence[str]) -> Bounds:
    """The bounds of each kind of gene and model, by kind and model.

    config: the `space` block of a search file.
    models: the names of the models.
    Raises InputError for unknown models, and for bounds that contradict each other.
    """
    for name in config.models:
        if name not in models:
            raise InputError(f"space.models.{name} is none of the models; {choices(name, models)}.")
    return {(kind, model): _bounds(config, kind, model) for kind in KINDS for model in models}


def _bounds(config: ParameterSpaceConfig, kind: str, model: str) -> GeneConfig:
    usual: GeneConfig = getattr(config, kind)
    change: GeneChange | None = getattr(config.models[model], kind) if model in config.models else None
    if change is None:
        return usual
    where, given = f"space.models.{model}.{kind}", change.model_dump(exclude_none=True)
    low, high = given.get("low", usual.low), given.get("high", usual.high)
    start = None if usual.start is None else min(max(usual.start, low), high)
    fixed = None if given else usual.fixed
    gene = validate(GeneConfig, {**usual.model_dump(), "start": start, "fixed": fixed, **given}, where)
    for key in ("low", "high", "fixed"):
        value = getattr(gene, key)
        if kind == "density" and value is not None and not 0 < value <= 1:
            raise InputError(f"{where}.{key} is {value:g}; use a value in (0, 1].")
    return gene
