"""Views: what a run holds, as frozen values. Tables show them, and `as_json` turns them into the output of `--json`.

Nothing in a view of candidates depends on when or where a candidate ran.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from typing import Any

from evomerge.archive.archive import Record, steering
from evomerge.candidate import Evaluation, Study
from evomerge.config.base import SPLITS
from evomerge.evidence.comparison import Comparison, Kept, against, retention
from evomerge.evidence.table import compared
from evomerge.reports.progress import Pace, phase
from evomerge.search import failures
from evomerge.search.best import HELDOUT_FRONT, best_of, means
from evomerge.search.controls import BASE, PARENT, count_controls, family
from evomerge.search.criteria import Criteria
from evomerge.search.results import Results

ScoresByName = dict[str, float]


@dataclass(frozen=True, slots=True)
class CandidateView:
    """A candidate with all of its scores.

    id: its name, as in g0003-05 or parent-math.
    kind: `search` or `control`.
    generation: the number of its generation; -1 for controls.
    index: its place in the generation, or among the controls.
    genome: a number per gene; None for controls that are no point of the space.
    genes: the values of its genes, by name; genes that a condition switches off are left out. None without a genome.
    scores: on search items, by objective and constraint; None where it failed.
    state: `done` or `failed`.
    feasible: whether it keeps to the constraints; None where it was scored only on a subset.
    error: why it failed; None where it did not.
    items: how many items it was scored on.
    subset: the share of the search items that it was scored on; None where it was scored on all.
    quantize: how its weights were quantized for `scores`, which compare only with scores of the same kind; None where
        they were not.
    quantized: a finalist's scores from when its weights were quantized; None where it has none besides `scores`.
    fingerprint: of its weights; None where it failed before they were merged.
    mean: the weighted mean of the scores on search items; None where it failed.
    selection: the scores on selection items; None where it has none.
    selection_mean: the weighted mean of these; None likewise.
    heldout: the scores on held-out items; None where it has none.
    heldout_mean: the weighted mean of these; None likewise.
    heldout_missing: why it has no held-out scores; None where it has them.
    """

    id: str
    kind: str
    generation: int
    index: int
    genome: list[float] | None
    genes: dict[str, float | int | str] | None
    scores: ScoresByName | None
    state: str
    feasible: bool | None
    error: str | None
    items: int
    subset: float | None
    quantize: str | None
    quantized: ScoresByName | None
    fingerprint: str | None
    mean: float | None
    selection: ScoresByName | None
    selection_mean: float | None
    heldout: ScoresByName | None
    heldout_mean: float | None
    heldout_missing: str | None


@dataclass(frozen=True, slots=True)
class FrontView(CandidateView):
    """A candidate on the front.

    against: how it compares with the best parent and the best control on held-out items.
    """

    against: list[Comparison]


@dataclass(frozen=True, slots=True)
class EvidenceView:
    """What held-out items say about the best candidate.

    candidate: the candidate's id; None while there is no best candidate.
    against: how it compares with the best parent and the best control.
    retention: what it keeps of each parent.
    """

    candidate: str | None
    against: list[Comparison]
    retention: list[Kept]


@dataclass(frozen=True, slots=True)
class Count:
    """How much is done.

    done: how many are done.
    total: how many there are in all.
    """

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Leader:
    """The best candidate on an objective.

    id: the candidate's id.
    score: its score on the objective.
    """

    id: str
    score: float


@dataclass(frozen=True, slots=True)
class StatusView:
    """Where a run stands.

    state: `running`, `interrupted` or `finished`.
    evaluations: how many search candidates have been evaluated.
    budget: how many search candidates there are at most; controls are not among them.
    equivalents: what the search has cost, controls left out, in forward passes over all search items.
    steps: how many steps along gradients have been taken.
    phase: the stage of the search, where there are several, and its step or its generation; empty before the first.
    controls: how many controls have been evaluated.
    on_all_items: how many search candidates were scored on all search items.
    failed: how many candidates failed.
    failures: how often each reason of failure occurs.
    infeasible: how many candidates, scored on all search items, break a constraint.
    front_size: how many candidates are on the front.
    best_per_objective: the best candidate on each objective; None where no candidate keeps to the constraints.
    mean: what the mean is called.
    best: the best candidate; None where no candidate keeps to the constraints.
    best_parent: the best parent, which a search must beat; None while none is scored.
    best_control: the best of the controls that are neither base nor parents; None likewise.
    evidence: what held-out items say about the best candidate.
    aligned: what the alignment of models brought, by the model's name; empty where none was aligned.
    rate: evaluations per minute; None where the run has stopped or its log does not say.
    seconds_left: seconds until the last evaluation; None likewise.
    pace: rate and time left as people read them; empty likewise.
    early: why the search ended before its budget was spent; empty where it did not.
    """

    state: str
    evaluations: int
    budget: int
    equivalents: float
    steps: int
    phase: str
    controls: Count
    on_all_items: int
    failed: int
    failures: dict[str, int]
    infeasible: int
    front_size: int
    best_per_objective: dict[str, Leader | None]
    mean: str
    best: CandidateView | None
    best_parent: CandidateView | None = None
    best_control: CandidateView | None = None
    evidence: EvidenceView | None = None
    aligned: dict[str, str] = field(default_factory=dict)
    rate: float | None = None
    seconds_left: int | None = None
    pace: str = ""
    early: str = ""

    def at(self, pace: Pace) -> "StatusView":
        """The same status, with how fast the run goes."""
        return replace(self, rate=pace.rate, seconds_left=pace.seconds_left, pace=pace.phrase)


def as_json(value: Any) -> Any:
    """A view, or a list of views, as values that JSON can hold."""
    return [as_json(view) for view in value] if isinstance(value, list) else asdict(value)


def candidates(results: Results) -> list[CandidateView]:
    """Every evaluated candidate, in the order of the search."""
    looked = _Look(results)
    return [looked.at(record) for record in results.archive.tried()]


def on_front(results: Results) -> list[CandidateView]:
    """The Pareto front on all search items, best mean first, without the tests of `front`, which take seconds."""
    looked = _Look(results)
    return [looked.at(record) for record in looked.why.front]


def front(results: Results) -> list[FrontView]:
    """The Pareto front on all search items, best mean first."""
    rows = on_front(results)
    compared = against(results, [row.id for row in rows])
    return [FrontView(**_fields(row), against=compared[row.id]) for row in rows]


def off_front(results: Results) -> str | None:
    """A sentence where the best candidate is not on the front, which says why; None where it is, or there is none."""
    best, shown = results.best(), results.front()
    if best is None or any(record.candidate.id == best.candidate.id for record in shown):
        return None
    name = best.candidate.id
    same = next((one for one in shown if one.evaluation.fingerprint == best.evaluation.fingerprint), None)
    if same is not None:
        return f"The best, {name}, has the same weights as {same.candidate.id}, which stands for both on the front."
    count = sum(
        candidate.kind == "search" and results.archive.find(candidate.id, "selection") is not None
        for candidate in results.reported()
    )
    if count:
        return (
            f"The best, {name}, is not on the front: the front is made by search items, and the best was chosen by "
            f"selection items, among the {count} candidates that were scored on them."
        )
    return f"The best, {name}, is not on the front: its mean is the best, but others beat it on single objectives."


def _fields(row: CandidateView) -> dict[str, Any]:
    return {field.name: getattr(row, field.name) for field in fields(row)}


def evidence(results: Results) -> EvidenceView:
    """How the best candidate compares with the best parent and the best control, and what it keeps of each parent."""
    best = results.best()
    if best is None:
        return EvidenceView(None, [], [])
    name = best.candidate.id
    return EvidenceView(name, against(results, [name])[name], retention(results, name))


class _Look:
    """Makes views of candidates, by the criteria of every split."""

    def __init__(self, results: Results) -> None:
        self._archive = results.archive
        known: list[Study] = list(dict.fromkeys([*SPLITS, steering(results.config)]))
        self._criteria: Mapping[Study, Criteria] = {study: results.criteria(study) for study in known}
        self.why = _HeldoutReasons(results, self._criteria[results.study])

    def at(self, record: Record) -> CandidateView:
        candidate, evaluation = record.candidate, record.evaluation
        selection, heldout = (self._archive.find(candidate.id, split) for split in SPLITS[1:])
        whole, how = evaluation.subset is None, evaluation.quantize
        before = self._archive.find(candidate.id, "quantized") if how is None else None
        criteria = self._criteria["search" if how is None else "quantized"]
        return CandidateView(
            id=candidate.id,
            kind=candidate.kind,
            generation=candidate.generation,
            index=candidate.index,
            genome=list(candidate.genome) if candidate.genome is not None else None,
            genes=self._archive.genes(candidate),
            scores=_scores(evaluation),
            state="failed" if evaluation.failed else "done",
            feasible=criteria.feasible(evaluation) if whole else None,
            error=evaluation.error,
            items=evaluation.items,
            subset=evaluation.subset.share if evaluation.subset is not None else None,
            quantize=how,
            quantized=_scores(before.evaluation) if before else None,
            fingerprint=evaluation.fingerprint,
            mean=_mean(record, criteria),
            selection=_scores(selection.evaluation) if selection else None,
            selection_mean=_mean(selection, self._criteria["selection"]),
            heldout=_scores(heldout.evaluation) if heldout else None,
            heldout_mean=_mean(heldout, self._criteria["heldout"]),
            heldout_missing=self.why(record),
        )


def _scores(evaluation: Evaluation) -> ScoresByName | None:
    return dict(evaluation.scores) if evaluation.scores is not None else None


def _mean(record: Record | None, criteria: Criteria) -> float | None:
    return means([record], criteria)[0] if record is not None and not record.evaluation.failed else None


class _HeldoutReasons:
    """Says why a candidate has no held-out scores; None where it has them."""

    def __init__(self, results: Results, criteria: Criteria) -> None:
        self._results, self._archive, self._criteria = results, results.archive, criteria

    @cached_property
    def front(self) -> list[Record]:
        return self._results.front()

    @cached_property
    def _on_front(self) -> set[str]:
        return {record.candidate.id for record in self.front}

    @cached_property
    def _first(self) -> dict[str | None, str]:
        return {record.evaluation.fingerprint: record.candidate.id for record in self.front}

    @cached_property
    def _chosen(self) -> set[str]:
        return {candidate.id for candidate in self._results.reported()}

    def __call__(self, record: Record) -> str | None:
        name, evaluation = record.candidate.id, record.evaluation
        heldout = self._archive.find(name, "heldout")
        if heldout is not None:
            return f"failed on held-out items: {heldout.evaluation.error}" if heldout.evaluation.failed else None
        if evaluation.failed:
            return "failed"
        if evaluation.subset is not None:
            return "scored on a subset of the search items only"
        if evaluation.quantize is not None and self._results.study == "search":
            return "scored with quantized weights only, and not among the finalists"
        if name in self._chosen:
            return "not scored on held-out items yet"
        if name in self._on_front:
            return f"only the best {HELDOUT_FRONT} of the front get held-out scores"
        return self._why_not_on_front(record)

    def _why_not_on_front(self, record: Record) -> str:
        if not self._criteria.feasible(record.evaluation):
            return "breaks a constraint"
        first = self._first.get(record.evaluation.fingerprint)
        if first is not None:
            return f"has the same weights as {first}"
        return "not on the front" + (", nor the best of its kind" if record.candidate.kind == "control" else "")


def status(results: Results, running: bool) -> StatusView:
    """Where a run stands, without its evidence, whose tests take longer than everything else here.

    results: the run's.
    running: whether a process is at work on the run.
    """
    archive, config, criteria = results.archive, results.config, results.criteria()
    records, tried, best = results.records(), archive.tried(), results.best()
    steered = archive.records(steering(config))
    told = results.criteria(steering(config))
    looked = _Look(results)
    searched = [record for record in tried if record.candidate.kind == "search"]
    controls = Count(len(tried) - len(searched), count_controls(config))
    return StatusView(
        state="running" if running else "finished" if results.finished else "interrupted",
        evaluations=len(searched),
        budget=config.budget,
        equivalents=round(results.equivalents, 2),
        steps=results.steps,
        phase=phase([record.candidate for record in searched], results.steps, config.optimizer),
        controls=controls,
        on_all_items=sum(record.candidate.kind == "search" for record in steered),
        failed=sum(record.evaluation.failed for record in tried),
        failures=failures.counted(record.evaluation for record in tried),
        infeasible=sum(not record.evaluation.failed and not told.feasible(record.evaluation) for record in steered),
        front_size=len(looked.why.front),
        best_per_objective=_best_per_objective(records, criteria),
        mean=criteria.mean_name,
        best=looked.at(best) if best else None,
        best_parent=_best_of(records, lambda kind: kind == PARENT, criteria, looked),
        best_control=_best_of(records, lambda kind: kind not in ("search", BASE, PARENT), criteria, looked),
        early=results.early,
        aligned={name: own.sentence for name, own in archive.aligned.items()},
    )


def _best_of(
    records: Sequence[Record], wanted: Callable[[str], bool], criteria: Criteria, looked: _Look
) -> CandidateView | None:
    """The best candidate of some families."""
    best = best_of([record for record in records if wanted(family(record.candidate))], criteria)
    return looked.at(best) if best is not None else None


def _best_per_objective(records: Sequence[Record], criteria: Criteria) -> dict[str, Leader | None]:
    """The best candidate on each objective, among those that keep to the constraints."""
    leaders: dict[str, Leader | None] = {}
    for objective in criteria.objectives:
        alone = objective.model_copy(update={"weight": 1.0})  # a cost may have no weight
        best = best_of(records, replace(criteria, objectives=(alone,)))
        scores = _scores(best.evaluation) if best else None
        leaders[objective.name] = Leader(best.candidate.id, scores[objective.name]) if best and scores else None
    return leaders


def comparison(results: Results) -> list[tuple[str, CandidateView]]:
    """The title and the view of every control worth comparing with, and of the evolved best, which is last."""
    looked = _Look(results)
    return [(title, looked.at(record)) for title, record in compared(results)]
