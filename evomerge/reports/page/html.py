"""Pages as text: sections put into templates. The only module that makes pages with jinja2.

A page that is a file holds everything that it needs. Nothing is loaded from elsewhere, and the page's own policy
forbids it: only the scripts that were written into the page may run, by their hashes. A live page comes from a server,
which sends its scripts and its policy too; it asks again and again whether it has changed.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from typing import Any

from evomerge.reports.page import sections
from evomerge.reports.page.blocks import Drawing, Section
from evomerge.reports.page.figures import plotly_script
from evomerge.reports.page.story import Story, facts, headline

_RELOAD = 20  # seconds after which a page of a running search is read again


def page(story: Story, watched: bool = False, live: float | None = None) -> str:
    """The page of a run as HTML.

    story: the run.
    watched: whether the file is written again while the search runs; then the page reads itself again.
    live: after how many seconds a page that a server shows asks for changes; None for a file.
    """
    made = sections.sections(story)
    reload = _RELOAD if watched and story.running else None
    return render(story.directory, headline(story), facts(story), made, reload, live)


def render(
    title: str,
    headline: str,
    facts: Sequence[tuple[str, str]],
    made: Sequence[Section],
    reload: int | None = None,
    live: float | None = None,
) -> str:
    """A page as HTML.

    title: what the run is called.
    headline: the sentence at the top.
    facts: short facts with their titles.
    made: the sections.
    reload: after how many seconds the page reads itself again; None for a page that does not.
    live: after how many seconds a page that a server shows asks for changes; None for a file.
    """
    from markupsafe import Markup

    titles = {block.id: block.title for section in made for block in section.blocks}
    return _filled(
        "page.html.j2",
        live,
        title=title,
        headline=headline,
        facts=facts,
        sections=made,
        questions=[(question, block, titles[block]) for question, block in sections.answers(made)],
        reload=reload,
        drawings=Markup(embedded(_drawings(made))),
    )


def index(rows: Sequence[Mapping[str, str]], live: float) -> str:
    """The page of several runs side by side, with a line for each.

    rows: for each run its `name`, its `address` and either `broken`, a sentence, or what is known of it: `state`,
        `evaluations`, `best`, `scores`, `parent`, `control` and `verdict`.
    live: after how many seconds it asks for changes.
    """
    return _filled("index.html.j2", live, title=f"{len(rows)} run{'s' * (len(rows) != 1)}", rows=rows, reload=None)


def _filled(template: str, live: float | None, **values: Any) -> str:
    import jinja2
    from markupsafe import Markup

    loader = jinja2.DictLoader({name: _asset(name) for name in ("frame.html.j2", template)})
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    own, plotly = _asset("page.js"), plotly_script()
    return environment.get_template(template).render(
        live=live,
        style=Markup(_asset("page.css")),
        plotly=Markup(plotly),
        script=Markup(own),
        hashes=Markup(" ".join(f"'{_hash(script)}'" for script in (plotly, own))),
        **values,
    )


SCRIPTS: Mapping[str, Callable[[], str]] = {
    "plotly.js": plotly_script,
    "page.js": lambda: _asset("page.js"),
    "live.js": lambda: _asset("live.js"),
}
"""What makes the scripts of live pages, by the names that these have below `/scripts/`."""


def _drawings(made: Sequence[Section]) -> dict[str, Any]:
    return {name: _drawing(drawing) for name, drawing in sections.drawings(made).items()}


def _drawing(drawing: Drawing) -> dict[str, Any]:
    selects = [{"axis": select.axis, "options": select.options} for select in drawing.selects]
    return {"figure": drawing.figure, "selects": selects, "variants": dict(drawing.variants)}


def embedded(content: Any) -> str:
    """A value as JSON that can stand in a script element: nothing in it ends the element or begins a comment."""
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(script: str) -> str:
    """The hash by which a policy names a script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def _asset(name: str) -> str:
    return (files("evomerge.reports.page") / name).read_text(encoding="utf-8")
