"""The command writes the page, once or until the search has ended."""

from pathlib import Path

import pytest

from evomerge.reports.page import writing
from evomerge.runs.lock import run_lock
from tests.bad_input import Refuses
from tests.commands import evomerge


def test_the_command_writes_one_file(finished: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in finished.iterdir() if path.is_file()}
    said = evomerge("report", finished, "-o", tmp_path / "page.html")
    assert "page.html" in said
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    assert (tmp_path / "page.html").read_text().startswith("<!DOCTYPE html>")
    assert {path: path.read_bytes() for path in finished.iterdir() if path.is_file()} == before


def test_watching_ends_when_nobody_works_on_the_run_any_more(run_directory: Path, tmp_path: Path) -> None:
    output, waited, pages = tmp_path / "page.html", [], []
    held = run_lock(run_directory)
    held.__enter__()

    def wait(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 2:
            held.__exit__(None, None, None)

    for shown in writing.watch(run_directory, output, sleep=wait, pause=3.0):
        pages.append((shown.running, 'http-equiv="refresh"' in output.read_text()))
    assert pages == [(True, True), (True, True), (False, False)]
    assert len(waited) == 2
    assert min(waited) >= 3.0


@pytest.mark.parametrize(("output", "says"), [("missing/page.html", "does not exist"), (".", "is a folder")])
def test_a_file_that_cannot_be_written_is_refused(output: str, says: str, finished: Path, refuses: Refuses) -> None:
    refuses("report", finished, "-o", output, says=(says,))


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, refuses: Refuses) -> None:
    refuses("report", "nowhere", says=("no such run directory",))
