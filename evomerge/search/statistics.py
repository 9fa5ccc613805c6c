"""Has the workers of a search measure what its methods need of the models, before the first candidate."""

from collections.abc import Iterator

from evomerge.candidate import Candidate, Measured
from evomerge.config.search import SearchConfig
from evomerge.errors import WorkFailed
from evomerge.events import Listener, StatisticsAwaited, StatisticsMeasured
from evomerge.merging import methods
from evomerge.merging.methods.base import JOINT, Kind, needed
from evomerge.recipe import single
from evomerge.workers import Job, WorkerPool

Names = dict[str, dict[str, str]]


def wanted(config: SearchConfig) -> list[tuple[Kind, str]]:
    """The statistics that the methods of a search need: kinds, with the references of the models."""
    space = config.space.merging
    rows = [methods.get(name, "space.method") for name in space.methods] if space is not None else []
    pairs = [pair for row in rows for pair in needed(row, config.base, config.models.values())]
    if config.optimizer.follows_gradients and config.optimizer.learning.loss == "activations":
        pairs += [("outputs", reference) for reference in (config.base, *config.models.values())]
    return list(dict.fromkeys(pairs))


def measure(pairs: list[tuple[Kind, str]], pool: WorkerPool, listener: Listener) -> Names:
    """The names of the folders with statistics, by the model's reference and the kind. What is missing is measured.

    pairs: what is wanted, with the references of the models.
    pool: the search's workers.
    listener: is told of each.
    Raises WorkFailed where one cannot be measured.
    """
    names: Names = {}
    jobs = list(_jobs(pairs))
    if jobs:
        listener(StatisticsAwaited(tuple(dict.fromkeys(str(kind) for kind, _ in pairs))))
    for job in jobs:
        pool.submit(job)
    for _ in jobs:
        job, result = pool.wait()
        kind, model = job.statistic, job.candidate.recipe.references[0]
        if not isinstance(result, Measured):
            reason = getattr(result, "error", None) or "the worker gave no result"
            raise WorkFailed(f"statistics: the {kind} of {model} could not be measured ({reason}).")
        of = [other for same, other in pairs if same == kind] if kind in JOINT else [model]
        listener(StatisticsMeasured(str(kind), " and ".join(of), result.name, result.seconds))
        for reference in of:
            names.setdefault(reference, {})[str(kind)] = result.name
    return names


def _jobs(pairs: list[tuple[Kind, str]]) -> Iterator[Job]:
    """A job for each statistic, but one alone for a kind that is measured for all models at once."""
    together: set[Kind] = set()
    for kind, reference in pairs:
        if kind not in together:
            candidate = Candidate(f"{kind} of {reference}", "control", 0, 0, single(reference))
            yield Job(candidate, "search", statistic=kind)
        together |= {kind} & set(JOINT)
