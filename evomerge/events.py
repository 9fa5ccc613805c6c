"""Events: what a search tells while it runs, one frozen type each. The log has one line per event, by its name."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar

from evomerge.candidate import Candidate, Evaluation, Study


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened. `name` is what the log calls it."""

    name: ClassVar[str] = "event"

    def fields(self) -> dict[str, Any]:
        """What the log has of it, as JSON takes it."""
        return asdict(self)


Listener = Callable[[Event], None]


def unheard(_event: Event) -> None:
    """The listener of those that have none."""


@dataclass(frozen=True, slots=True)
class Started(Event):
    """A process began to work on a run.

    process: its id.
    recorded: how many evaluations the archive held by then.
    """

    name: ClassVar[str] = "started"
    process: int
    recorded: int


@dataclass(frozen=True, slots=True)
class Stopped(Event):
    """The process ended before the search did.

    reason: the type of the exception.
    message: what it says.
    """

    name: ClassVar[str] = "stopped"
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class WorkersAwaited(Event):
    """Workers are being started."""

    name: ClassVar[str] = "starting"


@dataclass(frozen=True, slots=True)
class WorkersReady(Event):
    """Workers have loaded their models.

    count: how many.
    pool: the kind of pool.
    """

    name: ClassVar[str] = "workers"
    count: int
    pool: str


@dataclass(frozen=True, slots=True)
class AlignmentStarts(Event):
    """A model is going to be aligned, which takes minutes for large ones.

    model: the model's name.
    by: what is compared.
    """

    name: ClassVar[str] = "aligning"
    model: str
    by: str


@dataclass(frozen=True, slots=True)
class ModelAligned(Event):
    """The aligned copy of a model lies in the run's folder.

    model: the model's name.
    brought: what the alignment brought, as a sentence.
    seconds: that it took; few where the copy was there.
    """

    name: ClassVar[str] = "aligned"
    model: str
    brought: str
    seconds: float


@dataclass(frozen=True, slots=True)
class StatisticsAwaited(Event):
    """Statistics are going to be measured, which takes minutes for large models.

    kinds: the kinds of statistics.
    """

    name: ClassVar[str] = "measuring"
    kinds: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StatisticsMeasured(Event):
    """A statistic of a model lies in the run's folder.

    kind: the kind of statistic.
    model: the model's reference; those of all models, where they are measured together.
    folder: the name of its folder.
    seconds: that a worker needed for it; next to none where it was there.
    """

    name: ClassVar[str] = "measured"
    kind: str
    model: str
    folder: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Warned(Event):
    """Something that the user should know, though the work goes on."""

    name: ClassVar[str] = "warning"
    message: str


@dataclass(frozen=True, slots=True)
class SearchStarts(Event):
    """The essential controls are scored.

    control: the best of them, at which the optimizer starts; or the weights that it starts with, in words.
    """

    name: ClassVar[str] = "start"
    control: str


@dataclass(frozen=True, slots=True)
class Evaluated(Event):
    """An evaluation was recorded.

    candidate: what was evaluated.
    evaluation: what became of it.
    study: the split, or `subset`.
    """

    name: ClassVar[str] = "evaluated"
    candidate: Candidate
    evaluation: Evaluation
    study: Study

    def fields(self) -> dict[str, Any]:
        return {
            "id": self.candidate.id,
            "split": self.study,
            "scores": self.evaluation.scores,
            "error": self.evaluation.error,
            "seconds": round(self.evaluation.seconds, 4),
        }


@dataclass(frozen=True, slots=True)
class Stepped(Event):
    """A step along a gradient was taken.

    step: its number, from 1.
    losses: the mean loss of each metric on the step's items, by name.
    seconds: that workers needed for it.
    """

    name: ClassVar[str] = "stepped"
    step: int
    losses: dict[str, float]
    seconds: float


@dataclass(frozen=True, slots=True)
class Finished(Event):
    """The search is at its end, with so many evaluations on all search items."""

    name: ClassVar[str] = "finished"
    evaluations: int


@dataclass(frozen=True, slots=True)
class StorageRetried(Event):
    """The storage refused an evaluation for now.

    id: of the candidate.
    reason: what the storage said.
    seconds: after which it is tried again.
    """

    name: ClassVar[str] = "storage_retry"
    id: str
    reason: str
    seconds: float


@dataclass(frozen=True, slots=True)
class WorkerLost(Event):
    """A worker died.

    worker: its number.
    node: the node that it was on.
    node_lost: whether the whole node is gone.
    """

    name: ClassVar[str] = "worker_lost"
    worker: int
    node: str | None
    node_lost: bool
    reason: str


@dataclass(frozen=True, slots=True)
class CandidateRetried(Event):
    """A candidate whose worker died is evaluated again.

    id: of the candidate.
    split: the study that it is evaluated for.
    deaths: how many workers have died of it.
    """

    name: ClassVar[str] = "candidate_retried"
    id: str
    split: Study
    deaths: int


@dataclass(frozen=True, slots=True)
class WorkerKilled(Event):
    """A worker was killed, since its candidate took too long.

    worker, node: the worker's number and place.
    id: of the candidate.
    """

    name: ClassVar[str] = "worker_killed"
    worker: int
    node: str | None
    id: str
    reason: str


@dataclass(frozen=True, slots=True)
class WorkerJoined(Event):
    """A worker takes jobs.

    worker, node: its number and place.
    seconds: that it took to load its models.
    """

    name: ClassVar[str] = "worker_joined"
    worker: int
    node: str
    seconds: float


@dataclass(frozen=True, slots=True)
class WorkerRestarted(WorkerJoined):
    """A worker takes jobs again, in a new process."""

    name: ClassVar[str] = "worker_restarted"


@dataclass(frozen=True, slots=True)
class WorkerRefused(Event):
    """A worker cannot be used, since its node lacks what the others have.

    worker, node: its number and place.
    reason: what is wrong there.
    """

    name: ClassVar[str] = "worker_refused"
    worker: int
    node: str
    reason: str
