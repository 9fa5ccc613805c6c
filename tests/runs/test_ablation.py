"""An ablation is recorded beside the search, which it leaves as it was; it goes on where it was interrupted."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evomerge.archive.archive import Record
from evomerge.events import Evaluated, Event, unheard
from evomerge.runs import directory as runs
from evomerge.runs.journal import OpenRun
from evomerge.search.ablation import ARCHIVE
from tests.bad_input import Refuses
from tests.commands import content, evomerge, status


class Interrupted(Exception):
    pass


def ablate(directory: Path, most: int | None = None) -> list[tuple[str, str]]:
    """Ablates a run, up to a number of evaluations, and returns what was evaluated."""
    seen: list[tuple[str, str]] = []

    def listen(event: Event) -> None:
        if isinstance(event, Evaluated):
            seen.append((event.candidate.id, event.study))
            if len(seen) == most:
                raise Interrupted

    try:
        runs.ablate(directory, (), None, listen)
    except Interrupted:
        assert most is not None
    return seen


def recorded(directory: Path) -> dict[str, list[Record]]:
    """The records of a run's ablation, without how long they took."""
    run: OpenRun = runs.read(directory)
    beside = run.archive.beside(ARCHIVE)
    return {
        split: [replace(record, evaluation=replace(record.evaluation, seconds=0.0)) for record in beside.records(split)]
        for split in run.config.splits
    }


@pytest.fixture(scope="module")
def ablated(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("ablated") / "run"
    shutil.copytree(finished, directory)
    assert ablate(directory)
    return directory


def test_the_search_is_as_it_was(finished: Path, ablated: Path) -> None:
    assert content(ablated) == content(finished)
    before, after = runs.read(finished), runs.read(ablated)
    assert status(after.archive, after.config) == status(before.archive, before.config)
    assert after.config.digest() == before.config.digest()
    for name in ("search.yaml", "log.jsonl", "best.yaml"):
        assert (ablated / name).read_bytes() == (finished / name).read_bytes()
    resumed: list[str] = []
    runs.resume(ablated, (), None, lambda event: resumed.append(event.name))
    assert "evaluated" not in resumed


def test_what_is_recorded_is_not_scored_again(ablated: Path) -> None:
    assert ablate(ablated) == []


@pytest.mark.parametrize("most", [1, 4, 9])
def test_an_interrupted_ablation_goes_on_to_the_same_records(most: int, run_directory: Path, ablated: Path) -> None:
    first = ablate(run_directory, most)
    second = ablate(run_directory)
    assert len(first) == most
    assert second
    assert not set(first) & set(second)
    assert recorded(run_directory) == recorded(ablated)


def test_how_many_evaluations_are_left_is_told_before_the_first(run_directory: Path) -> None:
    told: list[int] = []
    runs.ablate(run_directory, (), None, unheard, lambda _, left: told.append(left))
    assert told == [sum(len(records) for records in recorded(run_directory).values())]
    runs.ablate(run_directory, (), None, unheard, lambda _, left: told.append(left))
    assert len(told) == 1


def test_settings_of_workers_are_not_kept(run_directory: Path) -> None:
    runs.ablate(run_directory, ["workers.shards=2"], None, unheard)
    assert runs.read(run_directory).config.workers.shards != 2
    assert recorded(run_directory)


def test_two_archives_beside_the_search_do_not_meet(ablated: Path) -> None:
    archive = runs.read(ablated).archive
    assert archive.has_beside(ARCHIVE)
    assert not archive.has_beside("other")
    assert not runs.read(ablated).archive.has_beside("other")


def test_the_command_shows_it_and_says_what_it_does(run_directory: Path, tmp_path: Path) -> None:
    said = evomerge("report", run_directory, "-o", tmp_path / "page.html", "--ablate")
    assert "evaluations on search and held-out items" in said
    assert "not counted as the search" in (tmp_path / "page.html").read_text()
    again = evomerge("report", run_directory, "-o", tmp_path / "page.html", "--ablate")
    assert "evaluations on" not in again


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--ablate", "--watch"), "give one of them"),
        (("--workers", 2), "--ablate"),
        (("--ablate", "-o", "nowhere/page.html"), "does not exist"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    options: tuple[Any, ...], says: str, finished: Path, refuses: Refuses
) -> None:
    refuses("report", finished, *options, says=(says,))
