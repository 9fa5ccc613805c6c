"""The models of a search, diagnosed: what their weights say, and on request how much their layers do."""

from dataclasses import asdict, dataclass
from typing import Any

from evomerge.config.search import SearchConfig
from evomerge.config.spaces import HybridConfig, ParameterSpaceConfig
from evomerge.diagnosis.activations import LayerSimilarity, layer_similarity
from evomerge.diagnosis.findings import sentences
from evomerge.diagnosis.weights import WeightDiagnosis, diagnose_weights
from evomerge.evaluation.items import Division
from evomerge.evaluation.loading import distinct_tasks, load_targets
from evomerge.merging.naming import naming_in
from evomerge.search.preparation import Prepared

BASE = "base"


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What can be said of the models of a search before it runs.

    weights: what their weights say.
    layers: how much each layer changes its input, by model, the base among them; None where it was not measured.
    findings: what to know of it, as sentences.
    """

    weights: WeightDiagnosis
    layers: dict[str, LayerSimilarity] | None
    findings: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """The diagnosis as one JSON document."""
        return asdict(self)


def diagnose(prepared: Prepared, texts: int = 0) -> Diagnosis:
    """The diagnosis of a search's models.

    prepared: the search.
    texts: how many search items of each task the models read to see how much their layers do; 0 for none.
    """
    config, models = prepared.config, prepared.models
    named = {reference: name for name, reference in config.models.items() if reference != config.base}
    moved = naming_in(models.base.folder).vocabulary if config.space.tokenizer_source is not None else frozenset()
    weights = diagnose_weights(models, named, moved)
    layers = None
    if texts:
        read = _search_texts(prepared, texts)
        sources = {BASE: models.base.source, **{name: models[own].source for own, name in named.items()}}
        device = config.evaluation.device
        layers = {name: layer_similarity(source, read, device) for name, source in sources.items()}
    return Diagnosis(weights, layers, tuple(sentences(weights, layers, _methods(config))))


def _search_texts(prepared: Prepared, count: int) -> list[str]:
    """The first search items of each task, as the models would read them."""
    config = prepared.config
    targets = prepared.targets or load_targets(config.measured, config.tasks, config.evaluation)
    tasks = distinct_tasks(targets)
    division = Division(tasks, config.items)
    items = [item for task in tasks for item in division.items(task, "search")[:count] if item.error is None]
    return [item.text if isinstance(item.text, str) else str(item.choices[int(item.text)]) for item in items]


def _methods(config: SearchConfig) -> set[str]:
    """The merge methods that a search may use."""
    space = config.space.parameter if isinstance(config.space, HybridConfig) else config.space
    if not isinstance(space, ParameterSpaceConfig):
        return set()
    return {space.method} if isinstance(space.method, str) else set(space.method)
