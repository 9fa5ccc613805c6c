"""The pool of workers that a config asks for."""

from collections.abc import Mapping
from functools import partial

from evomerge.config.search import SearchConfig
from evomerge.config.tables import POOLS, imported
from evomerge.evaluation.loading import Target
from evomerge.merging.sources.models import Models
from evomerge.workers import WorkerPool


def make_pool(
    config: SearchConfig, models: Models, targets: Mapping[str, Target] | None = None, address: str | None = None
) -> WorkerPool:
    """The configured pool, its workers ready.

    models, targets: those of the config, found and loaded here. Workers in processes of their own, which may be on
    other machines, find and load theirs there.
    address: of a cluster.
    """
    from evomerge.workers.worker import Worker

    row = POOLS[config.workers.pool]
    make_worker = partial(Worker, config) if row.processes else partial(Worker, config, models, targets)
    pool: WorkerPool = imported(row.make)(config, make_worker, address)
    return pool
