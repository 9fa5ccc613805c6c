"""How runs show themselves in a notebook."""

import sys
import time
from collections.abc import Sequence
from html import escape
from typing import Any

from evomerge.events import Evaluated, Event, Finished, Stepped
from evomerge.reports import views
from evomerge.runs.journal import Opened, OpenRun

_PAUSE = 1.0  # seconds between two drawings at least


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    if "IPython" not in sys.modules:
        return False
    shell = sys.modules["IPython"].get_ipython()
    return shell is not None and shell.has_trait("kernel")


class Progress:
    """A callback that shows how far a search is, in one place of a notebook that is drawn again and again."""

    def __init__(self) -> None:
        self._run: OpenRun | None = None
        self._handle: Any = None
        self._drawn = 0.0

    def __call__(self, event: Event) -> None:
        """See `evomerge.library.callbacks`."""
        if isinstance(event, Opened):
            self._run = event.run
        ends = isinstance(event, Finished)
        due = isinstance(event, Evaluated | Stepped) and time.monotonic() - self._drawn >= _PAUSE
        if self._run is not None and (ends or due):
            self._draw(progress_html(self._run, not ends))
            self._drawn = time.monotonic()

    def _draw(self, html: str) -> None:
        from IPython.display import HTML, display

        if self._handle is None:
            self._handle = display(HTML(html), display_id=True)
        else:
            self._handle.update(HTML(html))


def progress_html(run: OpenRun, running: bool) -> str:
    """How far a search is: a bar and a sentence.

    run: the run.
    running: whether a process is at work on it.
    """
    status = views.status(run.results, running)
    spent, limit = status.equivalents, run.config.limit
    best = "nothing scored yet"
    if status.best is not None and status.best.mean is not None:
        best = f"best {status.mean} {status.best.mean:.3f} on search items ({status.best.id})"
    told = f"{status.state}: {spent:.0f} of at most {limit:.0f} forward passes, {best}, front {status.front_size}"
    return f'<progress value="{spent:.1f}" max="{limit:.1f}"></progress> {escape(told)}'


def table_html(rows: Sequence[tuple[str, dict[str, float], float | None]], mean: str) -> str:
    """A table of scores.

    rows: a title, the scores by name, and their mean.
    mean: what the mean is called.
    """
    names = list(dict.fromkeys(name for _, scores, _ in rows for name in scores))
    head = "".join(f"<th>{escape(name)}</th>" for name in ["", *names, mean])
    body = "".join(
        "<tr>"
        + f'<th style="text-align:left">{escape(title)}</th>'
        + "".join(f"<td>{_number(scores.get(name))}</td>" for name in names)
        + f"<td>{_number(average)}</td></tr>"
        for title, scores, average in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
