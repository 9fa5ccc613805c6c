"""The search space that a config asks for."""

from evomerge.config.search import SearchConfig
from evomerge.config.tables import SPACES, imported
from evomerge.errors import naming
from evomerge.merging.naming import check_view
from evomerge.merging.sources.models import Models
from evomerge.spaces import SearchSpace


def make_space(config: SearchConfig, models: Models) -> SearchSpace:
    """The space of a search.

    config: what may vary.
    models: the models of the search.
    Raises InputError where the models do not fit the space.
    """
    if config.space.changes_layers:
        with naming("space"):
            check_view(models.base.folder)
    space: SearchSpace = imported(SPACES[config.space.kind].make)(config, tuple(models.table), models.base.kind)
    return space
