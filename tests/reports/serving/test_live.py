"""A page in a browser follows its run, and keeps what the reader has chosen."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evomerge.events import unheard
from evomerge.runs import directory as runs
from tests.commands import start
from tests.reports.page.test_browser import browser  # noqa: F401
from tests.reports.serving.test_web import printed_address

pytestmark = [pytest.mark.browser, pytest.mark.slow]

CHOSEN = """() => [...document.querySelectorAll('select[data-figure="front"]')].map(e => e.selectedIndex)"""
AXIS = "() => document.querySelector('#figure-front').layout.xaxis.title.text"
HIDDEN = "() => document.querySelector('#figure-front').data.map(trace => trace.visible)"
OPEN = "() => document.querySelector('#origin details').open"


@pytest.fixture
def address(run_directory: Path, tmp_path: Path) -> Iterator[str]:
    """The address of a server that shows a run, and a folder that is none."""
    printed = tmp_path / "out"
    arguments = ("serve", run_directory, tmp_path / "none", "--port", 0, "--every", 0.5)
    process = start(tmp_path / "err", *arguments, output=printed)
    try:
        yield printed_address(process, printed)
    finally:
        process.kill()
        process.wait()


def test_a_page_follows_its_run_and_keeps_what_was_chosen(
    address: str,
    run_directory: Path,
    browser: Any,  # noqa: F811
) -> None:
    page = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: message.type == "error" and wrong.append(message.text))
    origin = address.split("?")[0]
    page.on("request", lambda asked: asked.url.startswith((origin, "data:", "blob:")) or wrong.append(asked.url))
    page.goto(address, timeout=120_000)
    assert page.url == origin
    assert "no such run directory" in page.locator("#table").inner_text()
    page.get_by_role("link", name=str(run_directory), exact=True).click(timeout=120_000)
    page.wait_for_selector("#figure-front svg.main-svg", timeout=120_000)
    page.locator('select[data-figure="front"]').nth(0).select_option("2")
    page.locator('select[data-figure="front"]').nth(1).select_option("0")
    page.locator("#figure-front .legendtoggle").nth(0).click()
    page.wait_for_function("() => document.querySelector('#figure-front').data[0].visible === 'legendonly'")
    page.evaluate("document.querySelector('#origin details').open = true")
    page.evaluate("window.scrollTo(0, 1200)")
    page.evaluate("window.asBefore = true")
    before = [page.evaluate(asked) for asked in (CHOSEN, AXIS, HIDDEN, OPEN)]
    assert before[0] == [2, 0]
    assert page.locator("#figure-ablation").count() == 0

    runs.ablate(run_directory, (), None, unheard)  # as a search that goes on does, it adds to the archive

    page.wait_for_selector("#figure-ablation svg.main-svg", timeout=120_000)
    assert [page.evaluate(asked) for asked in (CHOSEN, AXIS, HIDDEN, OPEN)] == before
    assert page.evaluate("window.asBefore")  # the page was not loaded again
    assert page.evaluate("window.scrollY") == pytest.approx(1200, abs=2)
    assert page.locator("#connection").is_hidden()
    page.locator('select[data-figure="front"]').nth(0).select_option("0")
    assert page.evaluate(CHOSEN) == [0, 0]
    assert page.evaluate(AXIS) != before[1]
    assert wrong == []


def test_a_page_says_that_the_server_has_gone(finished: Path, tmp_path: Path, browser: Any) -> None:  # noqa: F811
    printed = tmp_path / "out"
    process = start(tmp_path / "err", "serve", finished, "--port", 0, "--every", 0.3, output=printed)
    try:
        page = browser.new_context().new_page()
        page.goto(printed_address(process, printed), timeout=120_000)
        assert page.locator("#connection").is_hidden()
    finally:
        process.kill()
        process.wait()
    page.wait_for_selector("#connection:not([hidden])", timeout=60_000)
    assert "does not answer" in page.locator("#connection").inner_text()
    assert "finished" in page.locator("#table").inner_text()
