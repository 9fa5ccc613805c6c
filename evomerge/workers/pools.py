"""The pool of workers that a config asks for."""

from functools import partial

from evomerge.config.search import SearchConfig
from evomerge.config.tables import POOLS, imported
from evomerge.workers import WorkerPool


def make_pool(config: SearchConfig, address: str | None = None) -> WorkerPool:
    """The configured pool, its workers ready."""
    from evomerge.workers.worker import Worker

    pool: WorkerPool = imported(POOLS[config.workers.pool].make)(config, partial(Worker, config), address)
    return pool
