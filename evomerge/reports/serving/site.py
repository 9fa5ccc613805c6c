"""The pages of several runs, drawn when somebody looks and something has changed.

A run is only read. One that cannot be read, or of which nothing is there yet, is shown as a sentence, and does not keep
others from being shown.
"""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from evomerge.errors import EvomergeError, first_line
from evomerge.evidence.comparison import Comparison
from evomerge.files import DATABASE, SEARCH_FILE
from evomerge.reports import views
from evomerge.reports.page import html
from evomerge.reports.page.story import Story
from evomerge.reports.progress import pace
from evomerge.runs import directory as runs
from evomerge.runs import reading
from evomerge.runs.journal import LOG_FILE
from evomerge.runs.lock import is_running

_WATCHED = (SEARCH_FILE, DATABASE, f"{DATABASE}-wal", LOG_FILE)
_REST = 5.0  # times as long as a page took before it is drawn again, so that the search keeps the machine


@dataclass(frozen=True, slots=True)
class Shown:
    """A page.

    text: the page as HTML.
    tag: changes with the text, and names it to browsers.
    """

    text: str
    tag: str

    @classmethod
    def of(cls, text: str) -> "Shown":
        """A page with its tag."""
        return cls(text, f'"{hashlib.sha256(text.encode()).hexdigest()[:32]}"')


@dataclass(frozen=True, slots=True)
class _Kept:
    """What was drawn, of which state of the run it was drawn, and when it may be drawn again."""

    drawn: Any
    stamp: Any
    due: float


class Site:
    """The pages of several runs, each with a number from 1."""

    def __init__(
        self,
        directories: Sequence[Path],
        every: float,
        items: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """directories: the run directories.
        every: seconds between two looks at a run at least.
        items: whether pages have the text of items that flipped.
        clock: the time in seconds.
        """
        self._directories, self._every, self._items, self._clock = tuple(directories), every, items, clock
        self._kept: dict[tuple[str, int], _Kept] = {}

    def index(self) -> Shown:
        """The page with a line for each run."""
        rows = [
            self._renewed("line", number, partial(_line, directory))
            | {"name": str(directory), "address": f"/runs/{number}"}
            for number, directory in enumerate(self._directories, start=1)
        ]
        return Shown.of(html.index(rows, self._every))

    def run(self, number: int) -> Shown | None:
        """The page of a run by its number; None where there is no such number."""
        if not 1 <= number <= len(self._directories):
            return None
        page: Shown = self._renewed("page", number, lambda: self._page(self._directories[number - 1]))
        return page

    def _page(self, directory: Path) -> Shown | None:
        """The page of a run; None where the run cannot be read."""
        story = Story(runs.read(directory), is_running(directory), str(directory), self._items)
        return Shown.of(html.page(story, live=self._every))

    def _renewed(self, kind: str, number: int, draw: Callable[[], Any]) -> Any:
        """What is drawn of a run, which is drawn again where the run has changed, but not too often. What could not be
        drawn is tried again, whatever has changed."""
        directory, kept = self._directories[number - 1], self._kept.get((kind, number))
        if kept is not None and self._clock() < kept.due:
            return kept.drawn
        stamp = _stamp(directory)
        if kept is not None and kept.stamp is not None and kept.stamp == stamp:
            return kept.drawn
        began = self._clock()
        try:
            drawn = draw()
        except EvomergeError as error:
            drawn, stamp = self._broken(kind, directory, str(error)), None
        except Exception as error:  # a run that is being written or is damaged raises anything
            drawn, stamp = self._broken(kind, directory, f"It cannot be shown ({first_line(error)})."), None
        ended = self._clock()
        self._kept[kind, number] = _Kept(drawn, stamp, ended + max(self._every, _REST * (ended - began)))
        return drawn

    def _broken(self, kind: str, directory: Path, why: str) -> Any:
        """What stands for a run that cannot be read."""
        if kind == "line":
            return {"broken": why}
        return Shown.of(html.render(str(directory), why, (), (), live=self._every))


def _stamp(directory: Path) -> Any:
    """What changes with a run: whether a process is at work on it, and sizes and times of its files."""
    return is_running(directory), tuple(map(_mark, (directory / name for name in _WATCHED)))


def _mark(file: Path) -> tuple[int, int] | None:
    try:
        known = file.stat()
    except OSError:
        return None
    return known.st_mtime_ns, known.st_size


def _line(directory: Path) -> Mapping[str, str]:
    """What the line of a run says, without any model being opened."""
    results = reading.results(directory)
    running = is_running(directory)
    status = views.status(results, running)
    if running:
        status = status.at(pace(directory, status.budget + status.controls.total - status.evaluations))
    against = views.evidence(results).against
    best = status.best
    return {
        "broken": "",
        "state": f"{status.state}{f' ({status.pace})' if status.pace else ''}",
        "evaluations": f"{status.evaluations:,} of {status.budget:,}, {status.equivalents:,.0f} forward passes",
        "best": _called(best),
        "scores": ", ".join(f"{name} {value:.3f}" for name, value in ((best.scores or {}) if best else {}).items()),
        "parent": _called(status.best_parent),
        "control": _called(status.best_control),
        "verdict": "; ".join(map(_verdict, against)) or "nothing yet",
    }


def _verdict(one: Comparison) -> str:
    joint = "from" if one.verdict == "not distinguishable" else "than"
    return f"{one.verdict} {joint} {one.rival} ({one.difference:+.3f})"


def _called(row: views.CandidateView | None) -> str:
    """A candidate with its mean."""
    return "none yet" if row is None else row.id if row.mean is None else f"{row.id} {row.mean:.3f}"
