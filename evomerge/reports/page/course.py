"""The course of a search: what each candidate brought, what it cost until then, and how losses fell."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from evomerge.archive.archive import Record, steering, studies
from evomerge.archive.gradients import GradientRecord
from evomerge.candidate import is_learned
from evomerge.config.running import StageConfig
from evomerge.reports.progress import stage_starts
from evomerge.search.best import means
from evomerge.search.criteria import Criteria
from evomerge.search.results import Results, passes

_SECONDS_PER_HOUR = 3600.0


@dataclass(frozen=True, slots=True)
class Spent:
    """What a search has cost up to some point, its controls left out.

    evaluations: how many candidates have been evaluated.
    steps: how many steps along gradients have been taken.
    passes: the cost in forward passes over all search items.
    items: how many items were read, counted as forward passes.
    hours: how long workers have worked.
    """

    evaluations: int = 0
    steps: int = 0
    passes: float = 0.0
    items: float = 0.0
    hours: float = 0.0


@dataclass(frozen=True, slots=True)
class Point:
    """A search candidate on the course.

    id: the candidate's id.
    spent: what the search had cost when it was evaluated.
    mean: its mean on the items that it was scored on; None where it failed.
    best: the best mean so far among candidates that keep to the constraints on all search items; None before the first.
    share: the share of the search items that it was scored on.
    """

    id: str
    spent: Spent
    mean: float | None
    best: float | None
    share: float


@dataclass(frozen=True, slots=True)
class Mark:
    """Where something begins.

    at: the index of the first point behind it.
    text: what begins.
    """

    at: int
    text: str


@dataclass(frozen=True, slots=True)
class Course:
    """The course of a search.

    points: the search candidates, in the order of the search.
    marks: the beginnings of stages, but for the first, and of other subset sizes.
    losses: by metric, the mean loss of each step along gradients, with the number of the step.
    mean: what the mean is called.
    """

    points: tuple[Point, ...]
    marks: tuple[Mark, ...]
    losses: dict[str, tuple[tuple[int, float], ...]]
    mean: str


@dataclass(frozen=True, slots=True)
class Costs:
    """What a run has cost.

    searched: the search, its controls left out.
    controls: how many controls were evaluated.
    hours: how long workers have worked in all, on controls and on selection and held-out items too.
    """

    searched: Spent
    controls: int
    hours: float


def course(results: Results) -> Course:
    """The course of a search. Search candidates come in the order of the search, or in the order of their arrival where
    the search waits for no generation."""
    criteria = results.criteria(steering(results.config))
    records = _in_order(results)
    spent = list(_spending(results, records))
    points: list[Point] = []
    best: float | None = None
    for record, cost in zip(records, spent, strict=True):
        mean = _mean(record, criteria)
        subset = record.evaluation.subset
        if mean is not None and subset is None and criteria.feasible(record.evaluation):
            best = mean if best is None else max(best, mean)
        points.append(Point(record.candidate.id, cost, mean, best, 1.0 if subset is None else subset.share))
    marks = (*_stage_marks(records, results.config.optimizer.stages), *_share_marks(points))
    return Course(tuple(points), marks, losses(results.archive.gradients()), criteria.mean_name)


def costs(results: Results) -> Costs:
    """What a run has cost so far."""
    archive, records = results.archive, _in_order(results)
    last = list(_spending(results, records))[-1] if records else _before(results)
    tried = archive.tried()
    seconds = sum(record.seconds for record in archive.gradients())
    for study in studies(results.config):
        seconds += sum(record.evaluation.seconds for record in archive.records(study))
    ahead = [record for record in archive.gradients() if record.step > last.steps or not records]
    trailing = _learned(results, ahead)
    searched = _added(last, trailing)
    return Costs(searched, len(tried) - len(records), seconds / _SECONDS_PER_HOUR)


def losses(gradients: Sequence[GradientRecord]) -> dict[str, tuple[tuple[int, float], ...]]:
    """By metric, the mean loss of each step along gradients, with the number of the step; steps that failed have none.

    gradients: the records of all shards of all steps.
    """
    totals: dict[str, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for record in gradients:
        if record.step > 0:
            for name, loss in record.losses.items():
                totals[name][record.step] += loss
    return {name: tuple(sorted(by_step.items())) for name, by_step in totals.items()}


def _in_order(results: Results) -> list[Record]:
    records = [record for record in results.archive.steered() if record.candidate.kind == "search"]
    return sorted(records, key=lambda record: record.arrival.number if record.arrival else -1)


def _mean(record: Record, criteria: Criteria) -> float | None:
    return None if record.evaluation.failed else means([record], criteria)[0]


def _spending(results: Results, records: Sequence[Record]) -> Iterator[Spent]:
    """What the search had cost when each of the records was there. A candidate that gradients led to comes after its
    steps."""
    gradients = results.archive.gradients()
    spent, taken = _before(results), 0
    for record in records:
        if is_learned(record.candidate):
            number = int(record.candidate.id.removeprefix("l"))
        else:  # evolution begins where the steps end
            number = gradients[-1].step if gradients else 0
        due = [gradient for gradient in gradients[taken:] if gradient.step <= number]
        taken += len(due)
        spent = _added(_added(spent, _learned(results, due)), _evaluated(results, record))
        yield spent


def _before(results: Results) -> Spent:
    """What the search had cost before its first step and candidate, times left out."""
    cost = results.passes_for_rows
    return Spent(passes=cost, items=cost * _all_items(results))


def _added(first: Spent, second: Spent) -> Spent:
    return Spent(
        first.evaluations + second.evaluations,
        first.steps + second.steps,
        first.passes + second.passes,
        first.items + second.items,
        first.hours + second.hours,
    )


def _learned(results: Results, gradients: Sequence[GradientRecord]) -> Spent:
    """What steps along gradients cost."""
    cost = passes(results.config, gradients)
    hours = sum(record.seconds for record in gradients) / _SECONDS_PER_HOUR
    steps = len({record.step for record in gradients if record.step > 0})
    return Spent(0, steps, cost, cost * _all_items(results), hours)


def _evaluated(results: Results, record: Record) -> Spent:
    """What a candidate cost: on all search items, and before that on a subset of them."""
    identity = record.candidate.id
    found = [results.archive.find(identity, study) for study in (steering(results.config), "subset")]
    evaluations = [other.evaluation for other in found if other is not None]
    passes = sum(1.0 if evaluation.subset is None else evaluation.subset.share for evaluation in evaluations)
    items = sum(evaluation.items for evaluation in evaluations)
    return Spent(1, 0, passes, items, sum(evaluation.seconds for evaluation in evaluations) / _SECONDS_PER_HOUR)


def _all_items(results: Results) -> int:
    """How many search items there are in all tasks."""
    return max((record.evaluation.items for record in results.archive.records(steering(results.config))), default=0)


def _stage_marks(records: Sequence[Record], stages: Sequence[StageConfig]) -> Iterator[Mark]:
    """The beginnings of the stages, but for the first."""
    for index, number in stage_starts([record.candidate for record in records], stages):
        stage = stages[number - 1]
        name = f" by {stage.name}" if stage.name else ""
        yield Mark(index, f"stage {number}: {', '.join(stage.genes)}{name}")


def _share_marks(points: Sequence[Point]) -> Iterator[Mark]:
    """Where candidates are first scored on another share of the items than those before."""
    before: float | None = None
    for index, point in enumerate(points):
        if point.share < 1 and point.share != before:
            before = point.share
            yield Mark(index, f"{point.share:.0%} of the items first")
