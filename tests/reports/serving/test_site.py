"""Runs are drawn when they have changed, are only read, and are sentences where they cannot be shown."""

import re
from pathlib import Path

import pytest

from evomerge.events import unheard
from evomerge.files import DATABASE, SEARCH_FILE
from evomerge.reports.serving import site as serving
from evomerge.reports.serving.site import Site
from evomerge.runs import directory as runs
from evomerge.runs.lock import run_lock


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def change(directory: Path) -> None:
    log = directory / "log.jsonl"
    log.write_text(log.read_text() + "\n")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Counts what is drawn of runs."""
    seen: list[str] = []
    monkeypatch.setattr(serving, "_line", lambda directory: seen.append("line") or {"broken": "none"})
    monkeypatch.setattr(Site, "_page", lambda _, directory: serving.Shown.of(seen.append("page") or "text"))
    return seen


def test_a_run_is_drawn_again_only_where_it_has_changed(run_directory: Path, drawn: list[str]) -> None:
    clock = Clock()
    site = Site([run_directory], 10.0, clock=clock)
    site.run(1)
    clock.now += 11
    site.run(1)
    assert drawn == ["page"]
    change(run_directory)
    site.run(1)
    assert drawn == ["page", "page"]
    clock.now += 9
    change(run_directory)
    site.run(1)
    assert drawn == ["page", "page"]
    clock.now += 2
    site.run(1)
    assert drawn == ["page"] * 3
    clock.now += 11
    with run_lock(run_directory):
        site.run(1)
    assert drawn == ["page"] * 4


def test_a_page_that_took_long_is_not_drawn_again_soon(run_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, seen = Clock(), []

    def slow(_: Site, directory: Path) -> serving.Shown:
        clock.now += 20
        seen.append(directory)
        return serving.Shown.of("text")

    monkeypatch.setattr(Site, "_page", slow)
    site = Site([run_directory], 1.0, clock=clock)
    for _ in range(3):
        site.run(1)
        clock.now += 30
        change(run_directory)
    assert len(seen) == 1
    clock.now += 30
    site.run(1)
    assert len(seen) == 2


def test_runs_are_only_read(finished: Path) -> None:
    before = {path: path.read_bytes() for path in finished.iterdir() if path.is_file()}
    site = Site([finished], 1.0)
    site.index()
    site.run(1)
    assert {path: path.read_bytes() for path in finished.iterdir() if path.is_file()} == before


def test_a_line_says_where_a_run_stands_and_what_must_be_beaten(finished: Path) -> None:
    results = runs.read(finished).results
    best = results.best()
    text = Site([finished], 1.0).index().text
    assert best is not None
    assert best.evaluation.scores is not None
    for said in ("finished", best.candidate.id, "parent-", "uniform", "6 of 6", *best.evaluation.scores):
        assert said in text, said
    assert '<a href="/runs/1">' in text


def test_what_cannot_be_shown_is_a_sentence_and_the_rest_is_shown(finished: Path, tmp_path: Path) -> None:
    empty, damaged, strange, begun = (tmp_path / name for name in ("empty", "damaged", "strange", "begun"))
    for folder in (empty, damaged, strange, begun):
        folder.mkdir()
    for folder in (damaged, begun):
        (folder / SEARCH_FILE).write_text((finished / SEARCH_FILE).read_text())
    (damaged / DATABASE).write_text("no database" * 1000)
    (strange / SEARCH_FILE).write_text("- a list")
    site = Site([empty, finished, damaged, tmp_path / "nowhere", strange, begun], 1.0)
    rows = re.findall(r"<tr><td>.*?</tr>", site.index().text, re.DOTALL)
    assert [("colspan" in row) for row in rows] == [True, False, True, True, True, True]
    told = ("no run directory", "finished", "cannot be read", "no such run", "a list", "nothing has been")
    for row, said in zip(rows, told, strict=True):
        assert said in row
    for number in (1, 3, 4, 5, 6):
        shown = site.run(number)
        assert shown is not None
        assert re.search(r"<h1>.+\.</h1>", shown.text)
    whole = site.run(2)
    assert whole is not None
    assert 'id="verdict"' in whole.text
    assert site.run(0) is None
    assert site.run(7) is None


def test_what_failed_is_tried_again_though_nothing_has_changed(
    run_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    site = Site([run_directory], 10.0, clock=clock)
    with monkeypatch.context() as patched:
        patched.setattr(serving.reading, "results", lambda _: 1 / 0)
        assert "ZeroDivisionError" in site.index().text
    assert "ZeroDivisionError" in site.index().text
    clock.now += 1000
    assert "ZeroDivisionError" not in site.index().text


def test_the_tag_changes_with_the_page(run_directory: Path) -> None:
    clock = Clock()
    site = Site([run_directory], 1.0, clock=clock)
    first = site.run(1)
    clock.now += 1000
    assert site.run(1) == first
    runs.ablate(run_directory, (), None, unheard)
    clock.now += 1000
    second = site.run(1)
    assert first is not None
    assert second is not None
    assert second.tag != first.tag


def test_hostile_names_are_text(run_directory: Path) -> None:
    hostile = run_directory.parent / '<img src=x onerror="alert(1)">'
    run_directory.rename(hostile)
    text = Site([hostile, hostile / "missing"], 1.0).index().text
    assert "<img" not in text
    assert "&lt;img" in text
