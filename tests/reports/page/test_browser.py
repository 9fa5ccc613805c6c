"""The page in a browser: every figure is drawn, every drop-down works, nothing is fetched, no script fails."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from evomerge.config.search import SearchConfig
from evomerge.events import unheard
from evomerge.reports.page import sections
from evomerge.reports.page.blocks import Section
from evomerge.reports.page.html import page
from evomerge.reports.page.story import Story
from evomerge.runs import directory as runs
from evomerge.zoo import MODELS
from tests.reports.page.conftest import Remake, Run, renamed, story
from tests.searches import EVALS, small_search

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
pytestmark = [pytest.mark.browser, pytest.mark.slow]

HOSTILE = '<img src=x onerror="alert(1)"><b>bold</b>'
NAMES = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip("there is no Chromium on this machine")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield opened
        opened.close()


class Watched:
    """A page that was opened from a file, with all that went wrong on it."""

    def __init__(self, browser: Any, file: Path, width: int, scheme: str = "light") -> None:
        self.wrong: list[str] = []
        self.page = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
        self.page.on("pageerror", lambda error: self.wrong.append(f"script: {error}"))
        self.page.on("console", lambda message: message.type == "error" and self.wrong.append(message.text))
        self.page.on("dialog", lambda dialog: self.wrong.append(f"dialog: {dialog.message}"))
        self.page.on("request", self._asked)
        self.page.goto(file.as_uri())

    def _asked(self, request: Any) -> None:
        if not request.url.startswith(("file:", "data:", "blob:")):
            self.wrong.append(f"request: {request.url}")

    def figures(self) -> list[str]:
        found: list[str] = self.page.evaluate("[...document.querySelectorAll('.figure')].map(e => e.id)")
        return found


def written(directory: Path, folder: Path) -> Path:
    file = folder / "report.html"
    file.write_text(page(story(directory, with_items=True)))
    return file


def click_through(watched: Watched) -> int:
    """Chooses every option of every drop-down, and returns how many there were."""
    count = 0
    for name in watched.figures():
        selects = watched.page.locator(f'select[data-figure="{name.removeprefix("figure-")}"]')
        for number in range(selects.count()):
            select = selects.nth(number)
            for option in range(select.locator("option").count()):
                select.select_option(str(option))
                count += 1
                assert watched.page.locator(f"#{name} svg.main-svg").count() >= 1, name
    return count


@pytest.mark.parametrize("width", [1280, 390])
def test_every_figure_can_be_clicked_through(
    width: int, browser: Any, zoo_page: Path, zoo_sections: list[Section]
) -> None:
    watched = Watched(browser, zoo_page, width)
    expected = sections.drawings(zoo_sections)
    assert watched.figures() == [f"figure-{name}" for name in expected]
    for name in watched.figures():
        area = watched.page.locator(f"#{name} svg.main-svg").first.bounding_box()
        assert area["width"] > 0.75 * min(width, 1000), name
        assert area["height"] > 100, name
        watched.page.locator(f"#{name}").hover()
    options = sum(len(select.options) for drawing in expected.values() for select in drawing.selects)
    single = sum(len(select.options) == 1 for drawing in expected.values() for select in drawing.selects)
    assert click_through(watched) == options - single
    assert watched.page.evaluate("document.documentElement.scrollWidth") <= width
    assert watched.wrong == []


def test_a_drop_down_changes_what_is_drawn(browser: Any, zoo_page: Path, zoo_story: Story) -> None:
    watched = Watched(browser, zoo_page, 1280)
    drawn = "document.querySelector('#figure-front').layout.xaxis.title.text + '|' + "
    drawn += "JSON.stringify(document.querySelector('#figure-front').data.map(t => t.x))"
    before = watched.page.evaluate(drawn)
    watched.page.locator('select[data-figure="front"]').first.select_option("1")
    after = watched.page.evaluate(drawn)
    assert after.startswith(f"{zoo_story.objectives[1]}|")
    assert after != before


def test_a_cell_of_a_heat_map_says_what_it_is(browser: Any, zoo_page: Path, zoo_sections: list[Section]) -> None:
    watched = Watched(browser, zoo_page, 1280)
    text = watched.page.evaluate("document.querySelector('#figure-recipe').data[0].text")
    shown = sections.drawings(zoo_sections)["recipe"].figure["data"][0]
    assert text[0][1] == f"{shown['meta']['rows'][0]}, layer 0: {shown['z'][0][1]:.3f}"


def test_a_path_can_be_clicked_through(browser: Any, tiny_run: Run, tmp_path: Path) -> None:
    watched = Watched(browser, written(tiny_run(space={"kind": "data_flow"}), tmp_path), 390)
    assert "figure-path" in watched.figures()
    assert click_through(watched)
    assert watched.wrong == []


def test_dark_follows_the_system_and_paper_is_light(browser: Any, finished: Path, tmp_path: Path) -> None:
    file = written(finished, tmp_path)
    color = "getComputedStyle(document.body).backgroundColor"
    text = "document.querySelector('#figure-front').layout.font.color"
    dark = Watched(browser, file, 1280, "dark")
    assert dark.page.evaluate(color) == "rgb(20, 24, 30)"
    assert dark.page.evaluate(text) == "#e6eaf0"
    dark.page.emulate_media(color_scheme="light")
    assert dark.page.evaluate(color) == "rgb(255, 255, 255)"
    dark.page.wait_for_function(f"{text} === '#1d2530'")
    assert dark.page.pdf().startswith(b"%PDF")
    assert dark.wrong == []


def test_hostile_names_come_out_as_text(browser: Any, remake: Remake, tmp_path: Path) -> None:
    def rename(config: SearchConfig) -> SearchConfig:
        first, *others = config.objectives
        return config.model_copy(update={"objectives": (first.model_copy(update={"task": HOSTILE}), *others)})

    directory = remake(lambda study, record: renamed(record, "base_qa", HOSTILE), rename)
    file = tmp_path / "report.html"
    file.write_text(page(story(directory)))
    watched = Watched(browser, file, 1280)
    click_through(watched)
    assert watched.page.locator("img").count() == 0
    assert watched.page.evaluate("document.querySelectorAll('.figure svg [style*=bold]').length") == 0
    watched.page.locator('select[data-figure="front"]').first.select_option("0")
    assert watched.page.locator("#figure-front .xtitle").text_content() == HOSTILE
    assert HOSTILE in watched.page.locator("#verdict table").inner_text()
    assert watched.wrong == []


def test_hostile_folders_of_models_and_hostile_items_come_out_as_text(browser: Any, tmp_path: Path) -> None:
    markup = HOSTILE.replace("/", "")  # a folder's name has no slash
    model = shutil.copytree(MODELS / "math", tmp_path / markup)
    tasks = Path(shutil.copytree(EVALS, tmp_path / "evals"))
    search = small_search(
        models={"math": str(model), "lang": "zoo:lang"},
        tasks={"paths": [str(tasks)]},
        optimizer={"evaluations": 4, "population": 4},
    )
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(search))
    runs.start(tmp_path / "search.yaml", tmp_path / "run", (), None, unheard)
    for data in tasks.glob("*/*.jsonl"):  # after the run, so that scores are not those of markup
        rows = [json.loads(line) for line in data.read_text().splitlines()]
        data.write_text("".join(json.dumps(row | {"question": f"{row['question']} {HOSTILE}"}) + "\n" for row in rows))
    watched = Watched(browser, written(tmp_path / "run", tmp_path), 390)
    click_through(watched)
    assert watched.page.locator("img, b").count() == 0
    assert markup in watched.page.locator("#provenance").text_content()
    assert HOSTILE in watched.page.locator("#items").text_content()
    assert watched.wrong == []
