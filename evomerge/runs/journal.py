"""An open run, and what is written beside its archive while it goes on: log.jsonl and best.yaml."""

import json
import math
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from evomerge.archive.archive import Archive, Record, steering
from evomerge.config.search import SearchConfig
from evomerge.events import Evaluated, Event, Finished
from evomerge.files import STATISTICS, unwritten, write_text
from evomerge.search.best import means
from evomerge.search.results import Results

if TYPE_CHECKING:
    from evomerge.merging.sources.statistics import Shelf
    from evomerge.search.preparation import Prepared  # what only shows a run waits for no model library

LOG_FILE, BEST_FILE = "log.jsonl", "best.yaml"


@dataclass(frozen=True, slots=True)
class OpenRun:
    """A run directory, opened.

    directory: the run directory.
    prepared: its search.
    archive: its archive.
    """

    directory: Path
    prepared: "Prepared"
    archive: Archive

    @property
    def config(self) -> SearchConfig:
        """The search's config, resolved."""
        return self.prepared.config

    @property
    def statistics(self) -> "Shelf":
        """The statistics that its methods use."""
        from evomerge.merging.sources.statistics import Shelf

        again = f"resume the run with `evomerge resume {self.directory}`, which measures it"
        return Shelf([self.directory / STATISTICS], self.archive.statistics, str(self.directory), again=again)

    @property
    def results(self) -> Results:
        """What the search has found so far."""
        return Results(self.archive, self.config)


@dataclass(frozen=True, slots=True)
class Opened(Event):
    """A run is about to be worked on."""

    name: ClassVar[str] = "opened"
    run: OpenRun


class Journal:
    """Appends events to log.jsonl and keeps best.yaml up to date."""

    def __init__(self, run: OpenRun) -> None:
        self._run = run
        _end_line(run.directory / LOG_FILE)
        best, study = run.results.best(), run.results.study
        alike = best is not None and study == steering(run.config)
        self._best = means([best], run.results.criteria())[0] if best and alike else -math.inf

    def __call__(self, event: Event) -> None:
        """A listener of `Search`. Raises WorkFailed where the log cannot be written."""
        line = {"time": round(time.time(), 3), "event": event.name, **event.fields()}
        try:
            with (self._run.directory / LOG_FILE).open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")
        except OSError as error:
            raise unwritten(self._run.directory / LOG_FILE, error) from None
        if isinstance(event, Evaluated) and event.study == steering(self._run.config):
            criteria = self._run.results.criteria(event.study)
            mean = means([Record(event.candidate, event.evaluation)], criteria)[0]
            if mean > self._best and criteria.feasible(event.evaluation):
                self._best = mean
                self._write_best()
        elif isinstance(event, Finished):
            self._write_best()

    def _write_best(self) -> None:
        from evomerge.export.recipe import shared_recipe

        best = self._run.results.best()
        if best is None:
            (self._run.directory / BEST_FILE).unlink(missing_ok=True)  # a longer search may have changed the choice
            return
        folder = self._run.directory / STATISTICS
        recipe = shared_recipe(best, self._run.results, self._run.prepared.models, folder)
        write_text(self._run.directory / BEST_FILE, recipe.to_yaml())


def _end_line(log: Path) -> None:
    """Cuts off the line that a kill or a full disk has left half-written."""
    with suppress(FileNotFoundError), log.open("rb+") as stream:
        whole = stream.read().rfind(b"\n") + 1
        stream.truncate(whole)
