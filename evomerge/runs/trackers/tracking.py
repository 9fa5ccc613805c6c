"""The listener that tells trackers of a search. A tracker that fails is left alone; it never stops the search."""

import time
from collections.abc import Callable

import numpy as np

from evomerge.archive.archive import Record, steering
from evomerge.config.tables import TRACKERS, imported
from evomerge.errors import first_line
from evomerge.events import Evaluated, Event, Finished, Listener, Stepped, Stopped, Warned
from evomerge.optimizers.pareto import hypervolume
from evomerge.runs.journal import BEST_FILE, Opened, OpenRun
from evomerge.runs.trackers.base import Tracker
from evomerge.search.best import means
from evomerge.search.controls import ESSENTIAL, family

_MOST_OBJECTIVES = 4  # with more, a hypervolume takes too long
_REST = 20.0  # times as long as working out a front took


class Tracking:
    """Tells the trackers that a config names."""

    def __init__(self, listener: Listener) -> None:
        """listener: is told of trackers that fail."""
        self._listener = listener
        self._trackers: dict[str, Tracker] = {}
        self._run: OpenRun | None = None
        self._due = 0.0

    def __call__(self, event: Event) -> None:
        """A listener of `Search`."""
        match event:
            case Opened(run):
                self._open(run)
            case Evaluated() if self._trackers:
                self._evaluated(event)
            case Stepped(_, losses) if self._trackers:
                self._numbers({f"loss/{name}": loss for name, loss in losses.items()})
            case Finished() if self._trackers:
                self._finish()
            case Stopped():
                self._each(lambda tracker: tracker.close())

    def _open(self, run: OpenRun) -> None:
        self._run = run
        for name in run.config.trackers:
            try:
                self._trackers[name] = imported(TRACKERS[name].make)(run)
            except Exception as error:
                self._warn(name, error)
        content = run.config.model_dump(mode="json", by_alias=True)
        self._each(lambda tracker: tracker.settings(content))

    def _evaluated(self, event: Evaluated) -> None:
        assert self._run is not None
        study, evaluation = event.study, event.evaluation
        goes_by = steering(self._run.config)  # the study of the scores that the search goes by
        if study in (goes_by, "subset"):
            name = "search" if study == goes_by else study
            values = {f"{name}/{metric}": score for metric, score in (evaluation.scores or {}).items()}
            if study == goes_by and evaluation.scores is not None:
                criteria = self._run.results.criteria(study)
                values["search/mean"] = means([Record(event.candidate, evaluation)], criteria)[0]
            self._numbers({**values, "seconds": evaluation.seconds})
        if time.monotonic() >= self._due:
            began = time.monotonic()
            self._numbers(summary(self._run))
            self._due = time.monotonic() + _REST * (time.monotonic() - began)

    def _finish(self) -> None:
        assert self._run is not None
        best = self._run.results.best()
        values = summary(self._run)
        if best is not None:
            heldout = self._run.archive.find(best.candidate.id, "heldout")
            scores = heldout.evaluation.scores if heldout is not None else None
            values |= {f"best_heldout/{name}": score for name, score in (scores or {}).items()}
        self._numbers(values)
        recipe = self._run.directory / BEST_FILE
        if recipe.exists():
            self._each(lambda tracker: tracker.file(recipe))
        self._each(lambda tracker: tracker.close())
        self._trackers.clear()

    def _numbers(self, values: dict[str, float]) -> None:
        assert self._run is not None
        step = len(self._run.archive.tried())
        finite = {name: float(value) for name, value in values.items() if np.isfinite(value)}
        self._each(lambda tracker: tracker.numbers(step, finite))

    def _each(self, tell: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            try:
                tell(tracker)
            except Exception as error:
                del self._trackers[name]
                self._warn(name, error)

    def _warn(self, name: str, error: Exception) -> None:
        self._listener(Warned(f"trackers: {name} failed ({first_line(error)}) and is told nothing more."))


def summary(run: OpenRun) -> dict[str, float]:
    """What a search has found so far, by name: the best mean, the size and the hypervolume of the front, the cost.

    The hypervolume counts above the lowest scores of base, parents and uniform merge. With more than four objectives
    there is none.

    run: the run.
    """
    results = run.results
    criteria, front, best = results.criteria(), results.front(), results.best()
    values = {"front/size": float(len(front)), "cost/forward_passes": results.equivalents}
    if best is not None:
        values["best/mean"] = means([best], criteria)[0]
        values |= {f"best/{name}": score for name, score in (best.evaluation.scores or {}).items()}
    controls = [record.evaluation for record in results.records() if family(record.candidate) in ESSENTIAL]
    scored = [evaluation for evaluation in controls if not evaluation.failed]
    if front and scored and len(run.config.objectives) <= _MOST_OBJECTIVES:
        scores = criteria.told([record.evaluation for record in front])
        values["front/hypervolume"] = hypervolume(scores, criteria.told(scored).min(axis=0))
    return values
