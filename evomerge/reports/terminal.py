"""What people see: rich tables and a live view on a terminal, plain lines elsewhere. The only module that imports
rich.
"""

import json
import math
import os
import re
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from evomerge.archive.archive import steering
from evomerge.config.search import SearchConfig
from evomerge.doctor import Finding
from evomerge.events import (
    AlignmentStarts,
    Evaluated,
    Event,
    Finished,
    ModelAligned,
    SearchStarts,
    StatisticsAwaited,
    StatisticsMeasured,
    Stepped,
    Warned,
    WorkersAwaited,
    WorkersReady,
)
from evomerge.evidence.comparison import sentence
from evomerge.export.card import percent
from evomerge.reports import views
from evomerge.reports.progress import clock, pace_of
from evomerge.runs.journal import Opened, OpenRun
from evomerge.search.results import Results

if TYPE_CHECKING:
    from evomerge.alignment.align import Alignment
    from evomerge.diagnosis.diagnose import Diagnosis
    from evomerge.export.adapter import WrittenAdapter

TITLES = {
    "subset": "search",
    "quantized": "search",
    "search": "search",
    "selection": "selection",
    "heldout": "held-out",
}
_RATE_WINDOW = 40
_PLAIN_EVERY = 25
_FRONT_ROWS = 8
_REDRAW = 0.5
_NAME = 12  # characters of a column's name that fit in one line
_WORDS = 30  # characters of a text that fit in one line
_LARGE = 1e6
_REASONS = 8  # of failure that a status lists


def console(stderr: bool = False) -> Console:
    """A console, which wraps no lines when its output goes to a file or a pipe.

    stderr: whether it writes to standard error, in place of standard output.
    """
    made = Console(stderr=stderr, highlight=False, soft_wrap=True)
    told = made.is_terminal or "COLUMNS" in os.environ
    return made if told else Console(stderr=stderr, highlight=False, soft_wrap=True, width=160)


class SearchView:
    """A listener that shows a search: a live table and progress bars on a terminal, a line now and then elsewhere."""

    def __init__(self, output: Console) -> None:
        """output: where the search is shown."""
        self._console = output
        self._run: OpenRun | None = None
        self._finished: deque[float] = deque(maxlen=_RATE_WINDOW)
        self._live: Live | None = None
        self._bars = Progress(TextColumn("{task.description:8}"), BarColumn(), MofNCompleteColumn())
        self._tables: list[Table] = []
        self._said: list[str] = []  # sentences below the bars
        self._controls: Any = None
        self._search: Any = None
        self._loss = ""
        self._truncated: set[str] = set()
        self._plain = 0  # evaluations that were told in lines
        self._begun = self._drawn = time.monotonic()

    def __call__(self, event: Event) -> None:
        """A listener of `Search`."""
        match event:
            case WorkersAwaited() if self._console.is_terminal:
                self._say("starting workers: each loads the models and prepares the tasks ...")
            case Warned(message):
                self._say(f"warning: {message}")
            case Opened(run):
                self._open(run)
            case WorkersReady(count):
                self._say(f"{count} worker{'s' * (count != 1)} ready after {time.monotonic() - self._begun:.0f} s")
                self._begun = time.monotonic()
            case AlignmentStarts(model, by):
                self._say(f"aligning {model} by {by} ...")
            case ModelAligned(model, brought, seconds):
                self._say(f"{model} is {brought} ({seconds:.1f} s)")
            case StatisticsAwaited(kinds):
                self._say(f"measuring {' and '.join(kind.replace('_', ' ') for kind in kinds)} ...")
            case StatisticsMeasured(kind, model, _, seconds):
                self._say(f"{kind.replace('_', ' ')} of {model} measured in {seconds:.1f} s")
            case SearchStarts(control):
                self._say(f"base, parents and uniform merge are scored; the search starts at {control}")
            case Evaluated():
                self._evaluated(event)
            case Stepped(step, losses):
                self._loss = f"loss {sum(losses.values()) / max(1, len(losses)):.3f} at step {step}"
                self._draw()
            case Finished():
                if self._live is None and self._run is not None:
                    self._say(self._line())
                self.close()

    def _open(self, run: OpenRun) -> None:
        self._run = run
        status = self._status()
        recorded = status.evaluations + status.controls.done
        self._say(
            f"{run.directory}: {len(run.prepared.space.genes)} genes, {len(run.config.objectives)} objectives, "
            f"{_budget(run.config)} and {status.controls.total} controls"
            + (f"; {recorded} already recorded" if recorded else "")
        )
        if self._console.is_terminal:
            self._controls = self._bars.add_task("controls", total=status.controls.total)
            self._search = self._bars.add_task("search", total=int(run.config.limit))
            self._live = Live(
                console=self._console, get_renderable=self._rendered, refresh_per_second=4, transient=True
            )
            self._live.start()
            self._draw(anyway=True)

    def _evaluated(self, event: Evaluated) -> None:
        assert self._run is not None
        candidate, study, truncated = event.candidate.id, event.study, event.evaluation.truncated
        if truncated and study not in self._truncated:
            self._truncated.add(study)
            self._say(f"warning: {study} items: {truncation(truncated)}")
        if event.evaluation.failed:
            self._say(f"{candidate} failed: {event.evaluation.error}")
        if study not in (steering(self._run.config), "subset"):
            self._said = [f"{'unquantized' if study == 'search' else TITLES[study]} scores, {self._elapsed}"]
            return
        if study != "subset" and self._run.archive.find(candidate, "subset") is not None:
            return  # counted when it was scored on the subset
        self._finished.append(time.monotonic())
        if self._live is not None:
            self._draw()
        else:
            self._plain += 1
            if self._plain % _PLAIN_EVERY == 0:
                self._say(self._line())

    def _draw(self, anyway: bool = False) -> None:
        """Works out what the live table shows; a front of thousands takes a while, so this is not done every time."""
        if self._live is None or (time.monotonic() - self._drawn < _REDRAW and not anyway):
            return
        assert self._run is not None
        self._drawn = time.monotonic()
        status, config = self._status(), self._run.config
        self._bars.update(self._controls, completed=status.controls.done)
        self._bars.update(self._search, completed=int(_done(status, config)))
        self._tables = progress_tables(status, config, self._console.width)
        self._said = [", ".join(filter(None, [status.phase, self._loss])), self._pace(status), progress_note(status)]

    def _rendered(self) -> Group:
        """What is live: the last table, the bars, and what is said below them."""
        said = [Text(sentence) for sentence in self._said if sentence]
        return Group(*self._tables, self._bars, *said)

    @property
    def _elapsed(self) -> str:
        return f"{clock(time.monotonic() - self._begun)} elapsed"

    def _pace(self, status: views.StatusView) -> str:
        assert self._run is not None
        done = _done(status, self._run.config)
        left = round(self._run.config.limit - done) + status.controls.total - status.controls.done
        return ", ".join(filter(None, [self._elapsed, pace_of(self._finished, left).phrase]))

    def _status(self) -> views.StatusView:
        assert self._run is not None
        return views.status(self._run.results, running=True)

    def _line(self) -> str:
        assert self._run is not None
        status = self._status()
        best = status.best
        none = "none keeps to the constraints yet" if status.infeasible else "nothing scored yet"
        shown = f"best {status.mean} {_mean(best.mean)} ({best.id})" if best else none
        rivals = [row for row in (status.best_parent, status.best_control) if row is not None]
        bars = "; ".join(f"{row.id} {_mean(row.mean)}" for row in rivals)
        parts = [
            _spent(status, self._run.config),
            f"controls {status.controls.done}/{status.controls.total}",
            status.phase,
            shown,
            f"to beat: {bars}" if bars else "",
            progress_note(status),
            self._pace(status),
        ]
        return "  ".join(filter(None, parts))

    def _say(self, text: str) -> None:
        target = self._live.console if self._live is not None else self._console
        target.print(escape(text), soft_wrap=not target.is_terminal)

    def close(self, interrupted: bool = False) -> None:
        """Ends the live table.

        interrupted: whether the search ended early, so that no table follows and the last one stays.
        """
        if self._live is None:
            return
        if interrupted:
            self._draw(anyway=True)
        self._live.stop()
        self._live = None
        if interrupted:
            self._console.print(self._rendered())


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table.

    name: its header.
    cells: one for every row.
    words: whether its cells may be wrapped; numbers and ids must not be.
    left: whether its cells are aligned to the left.
    extra: whether it is left out where it does not fit beside the other columns.
    """

    name: str
    cells: Sequence[str]
    words: bool = False
    left: bool = False
    extra: bool = False

    @property
    def header(self) -> str:
        """The name; a long name of a metric in several lines."""
        return self.name if cell_len(self.name) <= _NAME else re.sub(r"([/:,])", r"\1\n", self.name)

    @property
    def longest(self) -> int:
        """The width of the widest cell, in characters."""
        return max(map(cell_len, self.cells), default=0)

    @property
    def least(self) -> int:
        """The least width in characters: whole cells, or a few words of cells that may be wrapped, and the beginning of
        the name."""
        return max(min(self.longest, _WORDS) if self.words else self.longest, min(cell_len(self.name), _NAME))


def tables(title: str, columns: Sequence[Column], width: int) -> list[Table]:
    """Tables that show columns within a width, as far as the cells allow.

    Columns that do not fit into the first table follow in further tables. All tables begin with the first column.

    title: of the first table.
    columns: at least one.
    width: in characters.
    """
    first, *others = columns
    pages: list[list[Column]] = [[first]]
    for column in others:
        fits = len(pages[-1]) == 1 or _needed([*pages[-1], column]) <= width
        if not fits and not column.extra:
            pages.append([first])
        if fits or not column.extra:
            pages[-1].append(column)
    titles = [title, *[f"{title} (continued)" if title else ""] * (len(pages) - 1)]
    return [_table(name, page, width) for name, page in zip(titles, pages, strict=True)]


def _needed(columns: Sequence[Column]) -> int:
    """The width of a table in characters: every column has a blank on both sides and a line behind it."""
    return 1 + sum(column.least + 3 for column in columns)


def _table(title: str, columns: Sequence[Column], width: int) -> Table:
    """A table with fixed widths, since rich would cut numbers to make room. Columns of words get the width that is
    left."""
    needed = _needed(columns)
    left = max(0, width - needed)
    more = {id(column): min(left, max(0, column.longest - column.least)) for column in columns if column.words}
    table = Table(title=escape(title), title_justify="left", width=needed + sum(more.values()))
    for column in columns:
        table.add_column(
            escape(column.header),
            justify="left" if column.left or column.words else "right",
            width=column.least + more.get(id(column), 0),
            overflow="fold",
        )
    for cells in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*map(escape, cells))
    return table


def show_table(output: Console, title: str, columns: Sequence[Column]) -> None:
    """Prints a table, as several tables where the terminal is too narrow.

    Where a single column is too wide, the terminal wraps its lines, so that nothing is cut.

    output: where it is printed.
    title: the table's.
    columns: at least one.
    """
    for table in tables(title, columns, output.width):
        output.print(table)


def show_scores(
    output: Console,
    title: str,
    rows: Sequence[tuple[str, views.ScoresByName | None, float | None]],
    config: SearchConfig,
    mean: str = "mean",
) -> None:
    """Prints a table of scores.

    output: where it is printed.
    title: the table's.
    rows: for each a name, its scores by metric, and their mean.
    config: the search's; its metrics are the columns, and those that are only reported come last.
    mean: what the mean is called.
    """
    columns = [Column("", [name for name, _, _ in rows], left=True)]
    columns += [
        Column(metric.name, [_score(scores, metric.name) for _, scores, _ in rows]) for metric in config.measured
    ]
    columns.append(Column(mean, [_mean(value) for *_, value in rows]))
    beside = [metric.name for metric in config.report if any(metric.name in (scores or {}) for _, scores, _ in rows)]
    columns += [Column(name, [_score(scores, name) for _, scores, _ in rows]) for name in beside]
    show_table(output, title, columns)
    if beside:
        _sentence(output, f"only reported, so neither searched on nor in the {mean}: {', '.join(beside)}")


def show_adapter(output: Console, folder: Path, written: "WrittenAdapter") -> None:
    """Prints what a merge that was written as an adapter keeps.

    output: where it is printed.
    folder: the adapter's.
    written: what was written.
    """
    rows = written.kinds
    columns = [
        Column("matrices", [kind for kind, *_ in rows], left=True),
        Column("number", [str(count) for _, count, _, _ in rows]),
        Column("largest rank", [str(rank) for _, _, rank, _ in rows]),
        Column("kept, at least", [percent(kept) for *_, kept in rows]),
    ]
    show_table(output, f"What the LoRA keeps of the change of {written.base}", columns)
    verdict = "the one that was scored" if written.checked else "the recipe records none to compare"
    whole = len(written.whole)
    output.print(f"kept of all changes: {percent(written.kept)}; tensors stored whole: {whole}", markup=False)
    output.print(f"the merge: fingerprint {written.merged} ({verdict})", markup=False)
    output.print(f"{folder}: fingerprint {written.fingerprint} (of {written.base} with the LoRA)", markup=False)


def _score(scores: views.ScoresByName | None, name: str) -> str:
    return number(scores[name]) if scores and name in scores else "–"


def number(value: float) -> str:
    """A number with three decimals; with a power of ten where it would fill a line, as perplexities can."""
    return f"{value:.3f}" if abs(value) < _LARGE else f"{value:.3e}"


def _mean(mean: float | None) -> str:
    return number(mean) if mean is not None else "–"


def _explain(output: Console, mean: str) -> None:
    """Prints what a mean of unlike scores is."""
    if mean != "mean":
        _sentence(
            output,
            f"{mean}: how far the objectives lie above the base's, weighted, each in units of the range of base, "
            "parents and uniform merge on search items",
        )


def show_result(output: Console, run: OpenRun) -> None:
    """Prints the tables at the end of a run: the head of the front, then controls and evolved best on held-out items.

    output: where they are printed.
    run: the run.
    """
    _explain_end(output, run.results.early)
    show_front(output, run.results, _FRONT_ROWS)
    rows = [(title, row.heldout, row.heldout_mean) for title, row in views.comparison(run.results)]
    chosen_on = "other items" if run.config.items.selection else "search items"
    mean = run.results.criteria().mean_name
    show_scores(output, f"Held-out items (every row was chosen on {chosen_on})", rows, run.config, mean)
    _explain(output, mean)
    show_evidence(output, views.evidence(run.results))


def show_evidence(output: Console, evidence: views.EvidenceView) -> None:
    """Prints how the best candidate compares with the best parent and the best control, and what it keeps of each
    parent.

    output: where it is printed.
    evidence: that of the best candidate.
    """
    for compared in evidence.against:
        _sentence(output, f"{evidence.candidate}, beside the {compared.role}: {sentence(compared)}")
    rows = evidence.retention
    if not rows:
        return
    columns = [
        Column("", [row.parent for row in rows], left=True),
        Column("its best", [row.metric for row in rows], left=True),
        Column("its score", [number(row.parent_score) for row in rows]),
        Column("candidate's", [number(row.score) for row in rows]),
        Column("kept", ["–" if row.kept is None else f"{row.kept:.0%}" for row in rows]),
    ]
    show_table(output, f"Kept of each parent, on {TITLES[rows[0].items]} items", columns)


def show_front(output: Console, results: Results, most: int | None = None) -> None:
    """Prints the front, with search and held-out scores side by side.

    output: where it is printed.
    results: the search's.
    most: how many candidates are shown at most; None for all.
    """
    front, mean = views.on_front(results), results.criteria().mean_name
    rows = front[:most]
    title = f"Pareto front: {len(front)} candidate{'s' * (len(front) != 1)}"
    if most and most < len(front):
        title += f", the best {most}"
    columns = [
        Column("", [row.id for row in rows], left=True),
        *(Column(metric.name, [_both(row, metric.name) for row in rows]) for metric in results.config.measured),
        Column(mean, [f"{_mean(row.mean)} / {_mean(row.heldout_mean)}" for row in rows]),
    ]
    how = " (quantized)" if results.study == "quantized" else ""
    show_table(output, f"{title}, on search{how} / held-out items", [*columns, *_notes(rows)])
    _explain(output, mean)
    apart = views.off_front(results)
    if apart is not None:
        output.print(apart, markup=False)


def _both(row: views.CandidateView, name: str) -> str:
    return f"{_score(row.scores, name)} / {_score(row.heldout, name)}"


def show_candidates(output: Console, results: Results) -> None:
    """Prints every candidate with its search scores, its means on search and held-out items, and why it lacks a mean.

    output: where they are printed.
    results: the search's.
    """
    rows, mean = views.candidates(results), results.criteria().mean_name
    columns = [
        Column("id", [row.id for row in rows], left=True),
        *(Column(metric.name, [_score(row.scores, metric.name) for row in rows]) for metric in results.config.measured),
        Column(mean, [_mean(row.mean) for row in rows]),
        Column(f"held-out {mean}", [_mean(row.heldout_mean) for row in rows]),
        Column("items", [str(row.items) for row in rows]),
        *_notes(rows),
        Column("fingerprint", [row.fingerprint or "–" for row in rows], left=True, extra=True),
    ]
    show_table(output, "", columns)
    _explain(output, mean)


def _notes(rows: Sequence[views.CandidateView]) -> list[Column]:
    """A column with a note on every candidate; no column where there are no notes."""
    notes = [_note(row) for row in rows]
    return [Column("note", notes, words=True)] if any(notes) else []


def _note(row: views.CandidateView) -> str:
    """Why a candidate has no scores, cannot win, or has no held-out scores; empty where none of this holds."""
    if row.error:
        return f"failed: {row.error}"
    breaks = ["breaks a constraint"] if row.feasible is False else []
    scored = [f"scored in {row.quantize}"] if row.quantize is not None else []
    return "; ".join(dict.fromkeys([*scored, *breaks, *filter(None, [row.heldout_missing])]))


def progress_tables(status: views.StatusView, config: SearchConfig, width: int) -> list[Table]:
    """Tables of the best candidate so far, of the parent and the control that it must beat, and of the best score on
    each objective; none while there is no best. Candidates are rows where all objectives fit beside each other, else
    columns.

    status: the run's.
    config: the search's.
    width: of the terminal, in characters.
    """
    best = status.best
    if best is None or best.scores is None:
        return []
    names = [objective.name for objective in config.objectives]
    found = [status.best_per_objective[name] for name in names]
    rivals = [row for row in (status.best_parent, status.best_control) if row is not None and row.id != best.id]
    rows = [("best" if best.kind == "search" else "best control", best), *(("to beat", row) for row in rivals)]
    scores = [[*(_score(row.scores, name) for name in names), _mean(row.mean)] for _, row in rows]
    scores.append([*(number(leader.score) if leader else "–" for leader in found), ""])
    titles = [*(f"{title}, {row.id}" for title, row in rows), "best on each"]
    columns = [
        Column("", titles, left=True),
        *(Column(name, cells) for name, *cells in zip([*names, status.mean], *scores, strict=True)),
    ]
    if _needed(columns) > width:
        heads = [*(title for title, _ in rows), "on each"]
        ids = [*(row.id for _, row in rows), ""]
        cells = [[name, *own] for name, own in zip(ids, scores, strict=True)]
        columns = [
            Column("", ["", *names, status.mean], left=True),
            *(Column(*column) for column in zip(heads, cells, strict=True)),
        ]
    return tables("", columns, width)


def progress_note(status: views.StatusView) -> str:
    """What a table does not say: the size of the front, failures, items, and whether the best still has to beat a
    parent or a control."""
    best, rivals = status.best, (status.best_parent, status.best_control)
    reached = best.mean if best is not None and best.mean is not None else math.inf
    above = [row.id for row in rivals if row is not None and row.mean is not None and row.mean > reached]
    parts = [
        f"front {status.front_size}",
        f"failed {status.failed}",
        f"breaking a constraint {status.infeasible}" if status.infeasible else "",
        f"{best.items} items for each" if best else "",
        f"{best.id} is still below {' and '.join(dict.fromkeys(above))}" if best and above else "",
    ]
    return ", ".join(filter(None, parts))


def show_status(output: Console, status: views.StatusView, config: SearchConfig) -> None:
    """Prints where a run stands.

    output: where it is printed.
    status: the run's.
    config: the search's.
    """
    parts = [_spent(status, config), f"{status.controls.done}/{status.controls.total} controls", status.phase]
    _sentence(output, f"{status.state}: " + ", ".join(filter(None, [*parts, status.pace])))
    for table in progress_tables(status, config, output.width):
        output.print(table)
    _sentence(output, progress_note(status))
    _explain_end(output, status.early)
    show_failures(output, status.failures)
    for name, brought in status.aligned.items():
        _sentence(output, f"{name} is {brought}")
    if status.evidence is not None:
        show_evidence(output, status.evidence)


def _explain_end(output: Console, early: str) -> None:
    """Says why a search ended before its budget was spent, if it did."""
    if early:
        _sentence(output, f"The search ended before its budget was spent, since {early}.")


def _sentence(output: Console, text: str) -> None:
    """Prints a sentence, broken between words where a terminal is too narrow."""
    output.print(text, markup=False, soft_wrap=not output.is_terminal)


def _budget(config: SearchConfig) -> str:
    """What a search may take, in words."""
    equivalents = config.optimizer.equivalents
    return f"{config.budget} candidates" if equivalents is None else f"{equivalents:g} forward-pass equivalents"


def _done(status: views.StatusView, config: SearchConfig) -> float:
    """What a search has taken of its budget."""
    return status.evaluations if config.optimizer.equivalents is None and not status.steps else status.equivalents


def _spent(status: views.StatusView, config: SearchConfig) -> str:
    """What a search has taken, in words."""
    if config.optimizer.equivalents is None and not status.steps:
        return f"{status.evaluations}/{status.budget} candidates"
    steps = f"{status.steps} steps along gradients, " if status.steps else ""
    spent = f"{status.equivalents:.1f} of {config.limit:g} forward-pass equivalents"
    return f"{spent} ({steps}{status.evaluations} candidates)"


def show_findings(output: Console, findings: Sequence[Finding]) -> None:
    """Prints what the doctor found.

    output: where it is printed.
    findings: in the order of the checks.
    """
    columns = [
        Column("", ["ok" if finding.good else "OFF" for finding in findings], left=True),
        Column("check", [finding.check for finding in findings], words=True),
        Column("where", [finding.where for finding in findings], words=True),
        Column("expected", [finding.expected for finding in findings], words=True),
        Column("found", [finding.found for finding in findings], words=True),
    ]
    show_table(output, "", columns)
    off = sum(not finding.good for finding in findings)
    output.print(f"{len(findings)} findings, {f'{off} of them off' if off else 'all as expected'}", markup=False)


def show_summary(output: Console, summary: Mapping[str, Any]) -> None:
    """Prints what a search will take, a line for everything that it has.

    output: where it is printed.
    summary: as `evomerge check --json` prints it.
    """
    for key, value in summary.items():
        parts = value.items() if isinstance(value, Mapping) else None
        if parts is not None:
            named = [f"{name} {_plainly(part)}" for name, part in parts]
            shown = ("; " if any("," in part for part in named) else ", ").join(named)
        elif isinstance(value, list | tuple):
            shown = ", ".join(map(_plainly, value))
        else:
            shown = "" if value is None or (value == 0 and value is not False) else _plainly(value)
        if shown:
            _sentence(output, f"{key.replace('_', ' ')}: {shown}")


def _plainly(value: Any) -> str:
    """A value as people write it; large whole numbers in groups of three digits. No limit is all."""
    if value is None:
        return "all"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if value >= 10_000 else str(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def show_alignment(output: Console, folder: Path, found: "Alignment") -> None:
    """Prints what an alignment brought.

    output: where it is printed.
    folder: the aligned model's.
    found: what it brought.
    """
    rows = [("distance, as a share of the target's norm", found.before, found.after)]
    if found.barriers is not None:
        before, after = found.barriers
        rows.append(("loss of both models, in nats per token", before.ends, after.ends))
        rows.append(("loss of their average", before.middle, after.middle))
        rows.append(("barrier", before.height, after.height))
    columns = [
        Column("", [what for what, _, _ in rows], left=True, words=True),
        Column("before", [number(value) for _, value, _ in rows]),
        Column("aligned", [number(value) for *_, value in rows]),
    ]
    show_table(output, "", columns)
    moved = ", ".join(f"{count} of the {kind}" for kind, count in found.moved.items())
    output.print(f"moved: {moved}", markup=False)
    output.print(f"{folder}: written", markup=False)


def show_placements(output: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints what a search takes in each placement of its models.

    output: where it is printed.
    rows: as `summarize` has them.
    """
    columns = [
        Column("sources", [row["sources"] for row in rows], left=True),
        Column("fields", [row["fields"] for row in rows], left=True),
        *(
            [Column("adapters", [row["adapters"] for row in rows], left=True)]
            if any(row["adapters"] == "factors" for row in rows)
            else []
        ),
        Column("taken", ["yes" if row["chosen"] else "" for row in rows], left=True),
        Column("a worker", [f"{row['gib_per_worker']:.1f}" for row in rows]),
        Column("host", [f"{row['gib_host']:.1f}" for row in rows]),
        Column("disk", [f"{row['gib_from_disk']:.1f}" for row in rows]),
        Column("copied", [f"{row['gib_copied']:.1f}" for row in rows]),
        Column("merged", [f"{row['gib_merged']:.1f}" for row in rows]),
        Column("lacking here", [row["lacking"] or "" for row in rows], words=True, extra=True),
    ]
    show_table(
        output,
        "GiB in a worker's device and a node's host; and what each candidate reads from disk, copies and merges",
        columns,
    )
    if not any(row["chosen"] for row in rows):
        output.print(
            "The device is not here. A worker takes the first row that fits into 90 % of what its device has free.",
            markup=False,
        )


def show_forecast(output: Console, forecast: Mapping[str, Any]) -> None:
    """Prints how long a search will take.

    output: where it is printed.
    forecast: as `Forecast.parts` has it.
    """
    merge, score, whole = (forecast[name] for name in ("merge", "score", "search"))
    price = "" if forecast["price"] is None else f", which costs {forecast['price']:.2f}"
    output.print(
        f"forecast: {merge + score:.3g} s for a candidate ({merge:.3g} s to merge, {score:.3g} s to score), "
        f"{whole:.3g} s ({whole / 3600:.2f} h) for the search{price}",
        markup=False,
    )


def show_diagnosis(output: Console, diagnosis: "Diagnosis") -> None:
    """Prints what a diagnosis found.

    output: where it is printed.
    diagnosis: what was found.
    """
    weights, layers = diagnosis.weights, diagnosis.layers or {}
    columns = [Column("", [*weights.places, "all"], left=True)]
    for name, own in weights.models.items():
        columns.append(Column(f"{name}: distance", [number(value) for value in (*own.distance, own.whole)]))
    for relation in weights.relations:
        pair = " / ".join(relation.models)
        columns.append(Column(f"{pair}: cosine", [number(value) for value in (*relation.cosine, relation.whole)]))
        conflicts = (*relation.conflicts, relation.all_conflicts)
        columns.append(Column(f"{pair}: conflicts", [number(value) for value in conflicts]))
    for name, similar in layers.items():
        by_layer = {str(layer): number(value) for layer, value in enumerate(similar.similarity)}
        columns.append(Column(f"{name}: in / out", [by_layer.get(place, "") for place in (*weights.places, "all")]))
    show_table(output, "Fine-tunes less their base, by layer", columns)
    output.print(
        "distance: norm of the change, as a share of the base's norm. cosine: of the angle between two changes. "
        "conflicts: opposite signs where both change most.",
        markup=False,
    )
    if layers:
        output.print("in / out: cosine of a layer's input and output.", markup=False)
    for sentence_ in diagnosis.findings:
        output.print(f"- {sentence_}", markup=False)
    if not diagnosis.findings:
        output.print("nothing unusual", markup=False)


def show_failures(output: Console, counts: dict[str, int]) -> None:
    """Prints the commonest reasons why candidates failed.

    output: where they are printed.
    counts: how often each reason occurs, the commonest first.
    """
    for reason, count in list(counts.items())[:_REASONS]:
        _sentence(output, f"{count} failed: {reason}")
    if len(counts) > _REASONS:
        rest = sum(list(counts.values())[_REASONS:])
        output.print(f"{rest} failed for other reasons (`evomerge candidates` lists them)", markup=False)


def truncation(count: int) -> str:
    """A sentence about prompts that do not fit the model's context."""
    return f"{count} prompts do not fit the model's context and lose their beginning, as in lm-eval."


def fail(message: str) -> None:
    """Prints a line on standard error, opened by the program's name."""
    print(f"evomerge: {message}", file=sys.stderr)


def warn(message: str) -> None:
    """Prints a warning on standard error; the work goes on."""
    fail(f"warning: {message}")


def show_methods(output: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints the merge methods in groups, and then where each was published.

    rows: the methods as `evomerge methods --json` prints them.
    """
    on_base = [row for row in rows if row["base"] == "required"]
    groups = {
        "Several models on their base": [row for row in on_base if row["models"] != "1 model"],
        "One model and the base": [row for row in on_base if row["models"] == "1 model"],
        "Models, with or without a base": [row for row in rows if row["base"] != "required"],
    }
    for title, group in groups.items():
        columns = [
            Column("method", [row["name"] for row in group], left=True),
            Column("models", [re.sub(" models?$", "", row["models"]) for row in group], left=True),
            Column("for each", [", ".join(row["per_model"]) for row in group], words=True, left=True),
            Column("for all", [_defaults(row["shared"]) for row in group], words=True, left=True),
            Column("searched (on request)", [_searched(row) for row in group], words=True, left=True),
        ]
        show_table(output, title, columns)
    papers = [Column("method", [row["name"] for row in rows], left=True)]
    show_table(output, "Sources", [*papers, Column("source", [row["paper"] for row in rows], words=True, left=True)])


def _defaults(shared: Mapping[str, Any]) -> str:
    return ", ".join(name if value is None else f"{name} {_plain(value)}" for name, value in shared.items())


def _searched(row: Mapping[str, Any]) -> str:
    """The kinds of a method's genes, in brackets those that are searched on request only. Its own kinds go without its
    name."""
    anyway, asked = (
        ", ".join(
            gene["kind"].removeprefix(f"{row['name']}.") for gene in row["search"] if gene["searched"] is searched
        )
        for searched in (True, False)
    )
    return f"{anyway} ({asked})".strip() if asked else anyway


def show_spaces(output: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    """Prints the kinds of search spaces, each with its options and its genes.

    rows: the spaces as `evomerge spaces --json` prints them.
    """
    for row in rows:
        output.print(f"{row['kind']}: {row['description']}", markup=False)
        output.print(row["paper"], markup=False)
        options, genes = row["options"], row["genes"]
        values = Column("default", [_plain(value) for value in options.values()], words=True, left=True)
        show_table(output, "Options", [Column("option", list(options), left=True), values])
        columns = [
            Column("gene", [gene["kind"] for gene in genes], left=True),
            Column("values", [_values(gene) for gene in genes], words=True, left=True),
            Column("one per", [gene["per"] for gene in genes], words=True, left=True),
            Column("set by", [gene["where"] for gene in genes], left=True),
            Column("searched", ["yes" if gene["searched"] else "on request" for gene in genes], left=True),
        ]
        show_table(output, "Genes", columns)


def _values(gene: Mapping[str, Any]) -> str:
    choices: str | None = gene.get("choices")
    return choices or f"{gene['low']:g} to {gene['high']:g}"


def _plain(value: Any) -> str:
    """A value as a search file has it."""
    return value if isinstance(value, str) else json.dumps(value)
