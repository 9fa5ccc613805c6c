"""What people see: rich tables and a live view on a terminal, plain lines elsewhere. The only module that imports
rich.
"""

import sys
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from evomerge import views
from evomerge.archive import Archive
from evomerge.config import SearchConfig
from evomerge.evidence import phrase
from evomerge.progress import pace_of
from evomerge.runs import OpenRun

TITLES = {"subset": "search", "search": "search", "selection": "selection", "heldout": "held-out"}
_RATE_WINDOW = 40
_PLAIN_EVERY = 25
_FRONT_ROWS = 8
_REDRAW = 0.5


def console(stderr: bool = False) -> Console:
    """A console that wraps nothing when its output goes to a file or a pipe."""
    made = Console(stderr=stderr, highlight=False, soft_wrap=True)
    return made if made.is_terminal else Console(stderr=stderr, highlight=False, soft_wrap=True, width=160)


class SearchView:
    """Follows a search: a live table and progress bar on a terminal, a line now and then elsewhere."""

    def __init__(self, output: Console) -> None:
        self._console = output
        self._run: OpenRun | None = None
        self._finished: deque[float] = deque(maxlen=_RATE_WINDOW)
        self._live: Live | None = None
        self._progress = Progress(
            TextColumn("[bold]{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[pace]}")
        )
        self._task: Any = None
        self._count = 0
        self._truncated: set[str] = set()
        self._drawn = 0.0

    def __call__(self, event: str, fields: dict[str, Any]) -> None:
        """A listener of `Search`."""
        if event == "starting" and self._console.is_terminal:
            self._say("starting workers ...")
        elif event == "warning":
            self._say(f"warning: {fields['message']}")
        elif event == "opened":
            self._open(fields["run"])
        elif event == "workers":
            self._say(f"{fields['count']} worker(s) ready")
        elif event == "start":
            self._say(f"controls evaluated; the search starts at {fields['control']}")
        elif event == "evaluated":
            self._evaluated(fields)
        if event == "finished":
            self.close()

    def _open(self, run: OpenRun) -> None:
        self._run = run
        status = views.status(run.archive, run.config, running=True)
        self._total = status["budget"] + status["controls"]["total"]
        self._count = status["evaluations"] + status["controls"]["done"]
        self._say(
            f"{run.directory}: {len(run.prepared.space.genes)} genes, {len(run.config.objectives)} objectives, "
            f"{status['budget']} candidates and {status['controls']['total']} controls"
            + (f"; {self._count} already recorded" if self._count else "")
        )
        if self._console.is_terminal:
            self._task = self._progress.add_task("search", total=self._total, completed=self._count, pace="")
            self._live = Live(self._progress, console=self._console, refresh_per_second=4, transient=True)
            self._live.start()

    def _evaluated(self, fields: dict[str, Any]) -> None:
        assert self._run is not None
        truncated = fields["evaluation"].truncated
        if truncated and fields["split"] not in self._truncated:
            self._truncated.add(fields["split"])
            self._say(f"warning: {fields['split']} items: {truncation(truncated)}")
        if fields["evaluation"].failed:
            self._say(f"{fields['candidate'].id} failed: {fields['evaluation'].error}")
        if fields["split"] not in ("search", "subset"):
            if self._live is not None:
                self._progress.update(self._task, description=f"{TITLES[fields['split']]} scores", pace="")
            return
        if fields["split"] == "search" and self._run.archive.find(fields["candidate"].id, "subset") is not None:
            return  # counted when it was scored on the subset
        self._count += 1
        self._finished.append(time.monotonic())
        if self._live is not None:
            self._progress.update(self._task, completed=self._count, pace=self._pace())
            if self._finished[-1] - self._drawn >= _REDRAW:  # a front of thousands takes a while to work out
                self._drawn = self._finished[-1]
                self._live.update(Group(self._table(), self._progress))
        elif self._count % _PLAIN_EVERY == 0 or self._count == self._total:
            self._say(self._line())

    def _pace(self) -> str:
        return str(pace_of(self._finished, self._total - self._count)["pace"])

    def _status(self) -> dict[str, Any]:
        assert self._run is not None
        return views.status(self._run.archive, self._run.config, running=True)

    def _line(self) -> str:
        status = self._status()
        best = status["best"]
        none = "none keeps to the constraints yet" if status["infeasible"] else "nothing scored yet"
        shown = f"best mean {best['mean']:.3f} ({best['id']})" if best else none
        return f"{self._count}/{self._total}  {shown}  front {status['front_size']}  {self._pace()}".rstrip()

    def _table(self) -> Table:
        assert self._run is not None
        return progress_table(self._status(), self._run.config)

    def _say(self, text: str) -> None:
        target = self._live.console if self._live is not None else self._console
        target.print(escape(text))

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def score_table(title: str, rows: Sequence[tuple[str, dict[str, Any]]], config: SearchConfig, split: str) -> Table:
    """Rows of (name, view) with one column per metric and the weighted mean of the objectives."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for metric in config.measured:
        table.add_column(escape(metric.name), justify="right")
    table.add_column("mean", justify="right")
    for name, row in rows:
        scores = row[split]
        cells = [f"{scores[metric.name]:.3f}" if scores else "–" for metric in config.measured]
        table.add_row(escape(name), *cells, _mean(scores, config))
    return table


def _mean(scores: dict[str, float] | None, config: SearchConfig) -> str:
    if not scores:
        return "–"
    total = sum(objective.weight for objective in config.objectives)
    return f"{sum(objective.weight * scores[objective.name] for objective in config.objectives) / total:.3f}"


def show_result(output: Console, run: OpenRun) -> None:
    """The tables at the end of a run: the head of the front, then controls and evolved best on held-out items."""
    show_front(output, run.archive, run.config, _FRONT_ROWS)
    rows = views.comparison(run.archive, run.config)
    chosen_on = "search items" if run.config.items.selection is None else "other items"
    output.print(score_table(f"Held-out items (every row was chosen on {chosen_on})", rows, run.config, "heldout"))
    show_evidence(output, views.evidence(run.archive, run.config))


def show_evidence(output: Console, evidence: dict[str, Any]) -> None:
    """What the best candidate gains over the best parent and the best control, and what it keeps of each parent."""
    for row in evidence["against"]:
        output.print(f"{evidence['candidate']} over the {row['role']} ({row['rival']}): {phrase(row)}", markup=False)
    if not evidence["retention"]:
        return
    items = TITLES[evidence["retention"][0]["items"]]
    table = Table(
        "",
        "its best",
        "its score",
        "candidate's",
        "kept",
        title=f"Kept of each parent, on {items} items",
        title_justify="left",
    )
    for row in evidence["retention"]:
        kept = "–" if row["kept"] is None else f"{row['kept']:.0%}"
        scores = (f"{row['parent_score']:.3f}", f"{row['score']:.3f}")
        table.add_row(escape(row["parent"]), escape(row["metric"]), *scores, kept)
    output.print(table)


def show_front(output: Console, archive: Archive, config: SearchConfig, most: int | None = None) -> None:
    """The front on held-out items as far as they were scored, else on search items."""
    rows = views.front(archive, config)
    split, items = ("heldout", TITLES["heldout"]) if rows and rows[0]["heldout"] else ("scores", TITLES["search"])
    named = [(row["id"], row) for row in rows[:most]]
    title = f"Pareto front: {len(rows)} candidates" + (f", the best {most}" if most and most < len(rows) else "")
    output.print(score_table(f"{title}, on {items} items", named, config, split))


def show_candidates(output: Console, archive: Archive, config: SearchConfig) -> None:
    table = Table()
    for column in (
        "id",
        "kind",
        *(metric.name for metric in config.measured),
        "mean",
        "fingerprint",
        "error",
    ):
        table.add_column(escape(column))
    for row in views.candidates(archive, config):
        scores = row["scores"]
        cells = [f"{scores[metric.name]:.3f}" if scores else "–" for metric in config.measured]
        table.add_row(
            row["id"],
            row["kind"],
            *cells,
            _mean(scores, config),
            row["fingerprint"] or "–",
            escape(_note(row)),
        )
    output.print(table)


def _note(row: dict[str, Any]) -> str:
    """What is to be said of a candidate's scores, if anything."""
    if row["error"]:
        return str(row["error"])
    if row["subset"] is not None:
        return f"on {row['items']} items"
    return "" if row["feasible"] else "breaks a constraint"


def progress_table(status: dict[str, Any], config: SearchConfig) -> Table:
    """The best candidate so far, and the best score of any candidate on each objective."""
    best = status["best"]
    table = Table("", *(escape(objective.name) for objective in config.objectives), "mean", "front", "failed")
    for column in table.columns[1:]:
        column.justify = "right"
    if best and best["scores"]:
        cells = [f"{best['scores'][objective.name]:.3f}" for objective in config.objectives]
        table.add_row(
            f"best, {best['id']}", *cells, f"{best['mean']:.3f}", str(status["front_size"]), str(status["failed"])
        )
        leaders = [status["best_per_objective"][objective.name] for objective in config.objectives]
        table.add_row("best on each", *(f"{leader['score']:.3f}" if leader else "–" for leader in leaders), "", "", "")
    return table


def show_status(output: Console, status: dict[str, Any], config: SearchConfig) -> None:
    output.print(
        f"{status['state']}: {status['evaluations']}/{status['budget']} candidates, "
        f"{status['controls']['done']}/{status['controls']['total']} controls"
        + (f", {status['pace']}" if status.get("pace") else "")
    )
    output.print(progress_table(status, config))
    show_evidence(output, status["evidence"])


def truncation(count: int) -> str:
    return f"{count} prompts do not fit the model's context and lose their beginning, as in lm-eval."


def fail(message: str) -> None:
    """One line on standard error."""
    print(f"evomerge: {message}", file=sys.stderr)


def warn(message: str) -> None:
    """A sentence that the user should read, though the work goes on."""
    fail(f"warning: {message}")
