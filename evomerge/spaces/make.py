"""The search space that a config asks for."""

from evomerge.config.search import SearchConfig
from evomerge.config.tables import SPACES, imported
from evomerge.errors import naming
from evomerge.merging.naming import check_view
from evomerge.merging.sources.references import find_source
from evomerge.merging.sources.weights import model_config
from evomerge.spaces import SearchSpace


def make_space(config: SearchConfig, tensors: tuple[str, ...]) -> SearchSpace:
    folder = find_source(config.base, config.base).folder
    kind = model_config(folder)["model_type"]
    if config.space.changes_layers:
        with naming("space"):
            check_view(folder)
    space: SearchSpace = imported(SPACES[config.space.kind].make)(config, tensors, kind)
    return space
