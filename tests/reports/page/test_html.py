"""The page as text: whole, small enough, and nothing in it comes from elsewhere."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.reports.page import sections
from evomerge.reports.page.blocks import Block, Section, Table, Text
from evomerge.reports.page.figures import plotly_script
from evomerge.reports.page.html import embedded, page, render
from evomerge.reports.page.story import Story
from tests.reports.page.conftest import story

MOST = 6_000_000
VOID = {"meta", "link", "br", "img", "input", "hr"}
HOSTILE = '</script><img src=x onerror="alert(1)">&amp;{{ 7 * 7 }}'


class Parsed(HTMLParser):
    """A page's elements, ids and text; fails where elements are not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        (self.scripts if self.open[-1:] == ["script"] else self.text).append(data)

    def ids(self) -> list[str]:
        return [identity for _, attributes in self.elements if (identity := attributes.get("id"))]


@pytest.fixture(scope="module")
def made(zoo_page: Path) -> str:
    return zoo_page.read_text()


def test_the_page_parses_and_holds_every_section(made: str) -> None:
    parsed = Parsed(made)
    identities = parsed.ids()
    assert len(identities) == len(set(identities))
    for _, names in sections.QUESTIONS:
        assert set(names) <= set(identities)
    links = [attributes["href"] for tag, attributes in parsed.elements if tag == "a"]
    assert links
    assert all(link and link.startswith("#") and link[1:] in identities for link in links)


def test_the_page_is_small_and_names_nothing_outside_of_itself(made: str) -> None:
    assert len(made.encode()) < MOST
    assert made.count(plotly_script()) == 1
    own = made.replace(plotly_script(), "")
    assert not re.findall(r"https?://|//[a-z]+\.[a-z]+/", own)
    for _, attributes in Parsed(made).elements:
        assert not {"src", "srcset", "data", "action"} & attributes.keys()
        assert not any(name.startswith("on") for name in attributes)


def test_every_figure_has_a_place_and_data(made: str, zoo_sections: list[Section]) -> None:
    parsed = Parsed(made)
    (content,) = re.findall(r'<script type="application/json" id="drawings">(.*?)</script>', made, re.DOTALL)
    drawn = json.loads(content)
    assert set(drawn) == set(sections.drawings(zoo_sections))
    assert {f"figure-{name}" for name in drawn} <= set(parsed.ids())


def test_what_comes_from_outside_stays_text() -> None:
    table = Table((HOSTILE, "b"), ((HOSTILE, "b"),))
    block = Block("verdict", HOSTILE, HOSTILE, None, (table,), (HOSTILE,), (Text(HOSTILE, HOSTILE),), {HOSTILE: table})
    made = render(HOSTILE, HOSTILE, [(HOSTILE, HOSTILE)], [Section("summary", HOSTILE, (block,))])
    parsed = Parsed(made)
    assert not [tag for tag, _ in parsed.elements if tag == "img"]
    text = "".join(parsed.text)
    assert text.count(HOSTILE) >= 14
    assert "49" not in text


@given(st.recursive(st.text() | st.integers() | st.none(), lambda inner: st.lists(inner, max_size=3), max_leaves=5))
def test_embedded_data_ends_no_script(content: object) -> None:
    text = embedded(content)
    assert json.loads(text) == content
    assert not set("<>&") & set(text)


def test_only_a_page_of_a_running_search_reads_itself_again(finished: Path) -> None:
    running = Story(story(finished).run, True, "run")
    assert 'http-equiv="refresh"' in page(running, watched=True)
    assert 'http-equiv="refresh"' not in page(running)
