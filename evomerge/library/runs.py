"""Runs, as programs and notebooks make and use them."""

import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.config.base import SPLITS, Split
from evomerge.config.search import SearchConfig
from evomerge.errors import InputError, choices
from evomerge.events import Event, Warned
from evomerge.export.choice import choose
from evomerge.library.callbacks import Callback, StopSearch, listener_of
from evomerge.library.candidates import RunCandidate
from evomerge.library.notebook import Progress, in_notebook, table_html
from evomerge.library.searches import GIVEN, AnySearch, Objective, overriding, prepared
from evomerge.reports import views
from evomerge.reports.page.story import Story, facts, headline
from evomerge.runs import directory as runs
from evomerge.runs.journal import OpenRun
from evomerge.runs.lock import is_running

if TYPE_CHECKING:
    from pandas import DataFrame

_NUMBERED = ("id", "kind", "generation", "index", "state", "feasible", "error", "items", "subset", "fingerprint")
_MEANS = ("mean", "selection_mean", "heldout_mean")


def search(
    search: AnySearch,
    *,
    output: str | Path,
    objectives: Iterable[Objective] | None = None,
    settings: Mapping[str, Any] | None = None,
    callbacks: Sequence[Callback] = (),
    address: str | None = None,
    resume: bool = True,
    progress: bool | None = None,
) -> "Run":
    """Runs a search and returns the run, finished, or interrupted where a callback has stopped it.

    search: a search file, its content as a mapping, or a config. Paths in a mapping are relative to the working folder.
    output: the run directory.
    objectives: take the place of the search's objectives, each a mapping as in a search file, or a function of a model,
        a tokenizer and a split (`evomerge.evaluation.own_scores`); a mapping may have one as `python`, too.
    settings: take the place of other settings, by key path: {"optimizer.equivalents": 100}.
    callbacks: functions that see every event. One that raises `StopSearch` stops the search.
    address: a Ray cluster's; None for this machine.
    resume: whether the search goes on where the directory already holds it.
    progress: whether a line in the notebook shows how far the search is; None where this is a notebook.
    Raises InputError for a search that cannot run, and WorkFailed where the work fails. Warnings are told by
    `warnings.warn`.
    """
    directory, overrides = Path(output).expanduser(), overriding(settings)
    where = search if isinstance(search, str | Path) else GIVEN
    listen = listener_of([_warned, *_shown(progress), *callbacks])
    with tempfile.TemporaryDirectory(prefix="evomerge-") as sources, suppress(StopSearch):
        made = partial(prepared, search, objectives, overrides, address, Path(sources))
        return Run(runs.begin(made, where, directory, address, listen, resume))
    return _stopped(directory)


def _resume(
    directory: Path,
    settings: Mapping[str, Any] | None = None,
    callbacks: Sequence[Callback] = (),
    address: str | None = None,
    progress: bool | None = None,
) -> "Run":
    """Goes on with an interrupted run, or extends a finished one; see `search`, which explains the parameters.

    directory: the run directory.
    """
    listen = listener_of([_warned, *_shown(progress), *callbacks])
    with suppress(StopSearch):
        return Run(runs.resume(directory, overriding(settings), address, listen))
    return _stopped(directory)


def open_run(directory: str | Path) -> "Run":
    """A run as it stands, for reading. Another process may be at work on it; `Run.refresh` reads it again.

    directory: the run directory.
    Raises InputError where it is no run directory, or nothing has been evaluated yet.
    """
    return Run(runs.read(Path(directory).expanduser()))


class Run:
    """A run of a search: the best candidate, the front, tables of everything, and a page to look at."""

    def __init__(self, opened: OpenRun) -> None:
        """opened: the run directory, opened."""
        self._opened = opened

    def __repr__(self) -> str:
        return f"<run {self.directory}: {self.state}>"

    def _repr_html_(self) -> str:
        story = Story(self._opened, is_running(self.directory), str(self.directory))
        told = ", ".join(f"{title} {value}" for title, value in facts(story))
        rows = []
        for title, view in views.comparison(self._opened.results):
            scores = view.heldout if view.heldout is not None else view.scores
            mean = view.heldout_mean if view.heldout is not None else view.mean
            split = "" if view.heldout is not None else " (search items)"
            if scores is not None:
                rows.append((title + split, scores, mean))
        table = table_html(rows, story.status.mean)
        return f"<p><b>{escape(headline(story))}</b></p><p>{escape(told)}</p>{table}"

    @property
    def directory(self) -> Path:
        """The run directory."""
        return self._opened.directory

    @property
    def config(self) -> SearchConfig:
        """The search's config, resolved."""
        return self._opened.config

    @property
    def state(self) -> str:
        """`running`, `interrupted` or `finished`."""
        return views.status(self._opened.results, is_running(self.directory)).state

    def refresh(self) -> "Run":
        """The run as it stands now, read again."""
        return open_run(self.directory)

    @property
    def best(self) -> RunCandidate | None:
        """The best candidate; None while there is none that keeps to the constraints."""
        best = self._opened.results.best()
        return self.candidate(best.candidate.id) if best is not None else None

    @property
    def front(self) -> list[RunCandidate]:
        """The Pareto front on all search items, best mean first."""
        by_id = self._views
        return [
            RunCandidate(self._opened, record, by_id[record.candidate.id]) for record in self._opened.results.front()
        ]

    def candidate(self, id: str) -> RunCandidate:
        """A candidate or control by its id. Raises InputError where there is none."""
        by_id = {record.candidate.id: record for record in self._opened.archive.tried()}
        if id not in by_id:
            raise InputError(f"{id}: no such candidate in {self.directory}; {choices(id, by_id)}.")
        return RunCandidate(self._opened, by_id[id], self._views[id])

    def preferring(self, **weights: float) -> RunCandidate:
        """The candidate of the front with the best mean by other weights of the objectives.

        weights: by objective. Raises InputError for an unknown objective.
        """
        record = choose(self._opened.results, None, [f"{name}={weight}" for name, weight in weights.items()])
        return self.candidate(record.candidate.id)

    @property
    def _views(self) -> dict[str, views.CandidateView]:
        return {view.id: view for view in views.candidates(self._opened.results)}

    @property
    def candidates(self) -> "DataFrame":
        """Every candidate and control, a row each, by id, in the order of the search. Scores have columns such as
        `search.math`, `selection.math` and `heldout.math`, genes such as `gene.weight:math:all`."""
        from pandas import DataFrame

        return DataFrame([_row(view) for view in self._views.values()]).set_index("id")

    def items(self, id: str, split: Split = "heldout", text: bool = False) -> "DataFrame":
        """What became of every item of a candidate: a row for each metric and item.

        id: the candidate's.
        split: `search`, `selection` or `heldout`.
        text: whether the questions and the right answers of held-out items stand beside; the tasks are loaded for it.
        Raises InputError where the candidate was not scored on the split.
        """
        from pandas import DataFrame

        if split not in SPLITS:
            raise InputError(f"split is {split}; {choices(split, SPLITS)}.")
        record = self._opened.archive.find(id, split)
        if record is None or record.evaluation.failed:
            raise InputError(f"{id} has no scores on {split} items; candidates with scores are in `candidates`.")
        if text and split != "heldout":
            raise InputError(f"text is only there for held-out items, and split is {split}.")
        asked = self._questions() if text else {}
        rows: list[dict[str, Any]] = []
        for metric, outcomes in record.evaluation.outcomes.items():
            margins = outcomes.margins
            for number, value in enumerate(outcomes.values.tolist()):
                row = {"metric": metric, "item": number, "value": value}
                row["margin"] = None if margins is None else float(margins[number])
                if text:
                    question = asked[metric][number] if number < len(asked.get(metric, [])) else None
                    row["question"] = None if question is None else question.text
                    row["answer"] = None if question is None else question.answer
                rows.append(row)
        columns = ["metric", "item", "value", "margin", *(["question", "answer"] if text else [])]
        return DataFrame(rows, columns=columns)

    def _questions(self) -> Mapping[str, Sequence[Any]]:
        from evomerge.reports.page.items import questions

        return questions(self.config, self._opened.prepared.models)

    def report(self, path: str | Path | None = None, items: bool = False, ablate: bool = False) -> Path:
        """Writes the page about the run and returns its path.

        path: the file; by default report.html in the run directory.
        items: whether it has the text of items that flipped.
        ablate: whether the winner is first scored without its parts, which is recorded beside the search.
        Raises InputError where it cannot be written, or the winner cannot be ablated.
        """
        from evomerge.reports.page import writing

        output = self.directory / "report.html" if path is None else Path(path)
        writing.check_output(output)
        if ablate:
            runs.ablate(self.directory, (), None, listener_of([_warned]))
        writing.write(self.directory, output, items)
        return output

    def resume(
        self,
        settings: Mapping[str, Any] | None = None,
        callbacks: Sequence[Callback] = (),
        address: str | None = None,
        progress: bool | None = None,
    ) -> "Run":
        """Goes on with the search, or extends it, and returns the run.

        settings: take the place of others, by key path, such as {"optimizer.evaluations": 600}.
        The other parameters are those of `evomerge.search`, which raises the same errors.
        """
        return _resume(self.directory, settings, callbacks, address, progress)


def _row(view: views.CandidateView) -> dict[str, Any]:
    row: dict[str, Any] = {name: getattr(view, name) for name in _NUMBERED}
    row |= {name: getattr(view, name) for name in _MEANS}
    for split, scores in (("search", view.scores), ("selection", view.selection), ("heldout", view.heldout)):
        row |= {f"{split}.{name}": value for name, value in (scores or {}).items()}
    return row | {f"gene.{name}": value for name, value in (view.genes or {}).items()}


def _shown(progress: bool | None) -> list[Callback]:
    return [Progress()] if (in_notebook() if progress is None else progress) else []


def _stopped(directory: Path) -> "Run":
    """A run that a callback has stopped. Raises StopSearch where it was stopped before anything was evaluated."""
    try:
        return open_run(directory)
    except InputError:
        raise StopSearch(f"{directory}: stopped before anything was evaluated") from None


def _warned(event: Event) -> None:
    if isinstance(event, Warned):
        warnings.warn(event.message, stacklevel=2)
