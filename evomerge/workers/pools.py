"""The pool of workers that a config asks for."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from evomerge.config.search import SearchConfig
from evomerge.config.tables import POOLS, imported
from evomerge.evaluation.loading import Target
from evomerge.evaluation.own_files import read_own
from evomerge.merging.sources.models import Models
from evomerge.merging.sources.statistics import Names
from evomerge.workers import WorkerPool


def make_pool(
    config: SearchConfig,
    models: Models,
    targets: Mapping[str, Target] | None = None,
    address: str | None = None,
    statistics: Path | None = None,
    names: Names | None = None,
) -> WorkerPool:
    """The pool that a config asks for, with its workers ready.

    config: the search's, resolved.
    models: the config's models. Workers in processes of their own do not take them, since they may be on other
        machines, and read the models there.
    targets: the config's tasks, loaded. Workers in processes of their own load them there.
    address: a Ray cluster's; by default none.
    statistics: the folder of statistics, which workers on other machines must see, too.
    names: the names of the statistics in it that the run has used before.
    Raises InputError where the pool cannot be made as the config asks.
    """
    from evomerge.workers.memory import make_worker

    row = POOLS[config.workers.pool]
    own = read_own(config)  # which travels with the worker, wherever that is made
    folder = statistics and statistics.absolute()
    loaded = () if row.processes else (models, targets)
    ready = partial(make_worker, config, *loaded, own=own, statistics=folder, names=names)
    pool: WorkerPool = imported(row.make)(config, ready, address)
    return pool
