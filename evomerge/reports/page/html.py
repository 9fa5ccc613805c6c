"""The page as text: sections put into a template, with everything that it needs inside. The only module that makes
pages with jinja2.

Nothing is loaded from elsewhere, and the page's own policy forbids it: only the scripts that were written into the page
may run, by their hashes.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from evomerge.reports.page import sections
from evomerge.reports.page.blocks import Drawing, Section
from evomerge.reports.page.figures import plotly_script
from evomerge.reports.page.story import Story, facts, headline

_RELOAD = 20  # seconds after which a page of a running search is read again


def page(story: Story, watched: bool = False) -> str:
    """The page of a run as HTML.

    story: the run.
    watched: whether the file is written again while the search runs; then the page reads itself again.
    """
    made = sections.sections(story)
    return render(
        story.directory,
        headline(story),
        facts(story),
        made,
        _RELOAD if watched and story.running else None,
    )


def render(
    title: str,
    headline: str,
    facts: Sequence[tuple[str, str]],
    made: Sequence[Section],
    reload: int | None = None,
) -> str:
    """A page as HTML.

    title: what the run is called.
    headline: the sentence at the top.
    facts: short facts with their titles.
    made: the sections.
    reload: after how many seconds the page reads itself again; None for a page that does not.
    """
    import jinja2
    from markupsafe import Markup

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    own, plotly = _asset("page.js"), plotly_script()
    titles = {block.id: block.title for section in made for block in section.blocks}
    return environment.from_string(_asset("page.html.j2")).render(
        title=title,
        headline=headline,
        facts=facts,
        sections=made,
        questions=[(question, block, titles[block]) for question, block in sections.QUESTIONS if block in titles],
        reload=reload,
        style=Markup(_asset("page.css")),
        plotly=Markup(plotly),
        script=Markup(own),
        hashes=Markup(" ".join(f"'{_hash(script)}'" for script in (plotly, own))),
        drawings=Markup(embedded(_drawings(made))),
    )


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
