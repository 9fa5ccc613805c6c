"""Models that tests name as they like, as the package takes them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evomerge.merging.methods import METHODS
from evomerge.merging.resident.models import ResidentModels
from evomerge.merging.sources.models import Model, Models, find_models
from evomerge.merging.sources.preflight import preflight
from evomerge.merging.sources.references import ModelSource
from evomerge.merging.sources.weights import Weights, model_config

UNMEASURED = [name for name, method in METHODS.items() if not method.statistics]  # methods that need no statistics


def models(sources: Mapping[str, ModelSource | Path], base: Path) -> Models:
    """Models by any names, over a base that need not be one of them."""

    def found(name: str, source: ModelSource | Path) -> Model:
        source = source if isinstance(source, ModelSource) else ModelSource(source)
        return Model(name, source, model_config(source.folder), Weights(source))

    return Models(found(str(base), base), {name: found(name, source) for name, source in sources.items()})


def load_models(sources_: Mapping[str, ModelSource | Path], base: Path, *given: Any, **named: Any) -> ResidentModels:
    """These models in memory."""
    return ResidentModels(models(sources_, base), *given, **named)


def check_models(base: str, references: Mapping[str, str]) -> list[str]:
    """What `preflight` says of models by the names that they have in a message."""
    return preflight(find_models(base, references.values()), {where: name for name, where in references.items()})
