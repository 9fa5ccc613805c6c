"""Where the best is not on the front, the page and the command say so, and why."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from evomerge.archive.archive import Archive, Record
from evomerge.files import SEARCH_FILE
from evomerge.reports import views
from evomerge.reports.page import sections
from evomerge.runs import directory as runs
from tests.commands import evomerge
from tests.reports.page.conftest import story


@pytest.fixture
def chosen(zoo_run: Path, tmp_path: Path) -> Callable[[str], Path]:
    """The run on the zoo, in which a candidate is the best on selection items."""

    def write(identity: str) -> Path:
        old, directory = runs.read(zoo_run), tmp_path / "chosen"
        directory.mkdir()
        (directory / SEARCH_FILE).write_text(old.config.to_yaml())
        archive = Archive(directory, old.config, old.prepared.space.genes)
        for study in old.config.splits:
            for record in old.archive.records(study):
                best = study == "selection" and record.candidate.id == identity
                archive.record(record.candidate, (perfect(record) if best else record).evaluation, study)
        return directory

    return write


def perfect(record: Record) -> Record:
    scores = dict.fromkeys(record.evaluation.scores or {}, 1.0)
    return replace(record, evaluation=replace(record.evaluation, scores=scores))


def notes(directory: Path) -> tuple[str, ...]:
    blocks = {block.id: block for section in sections.sections(story(directory)) for block in section.blocks}
    return blocks["front"].notes


def test_a_best_that_is_not_on_the_front_is_explained(zoo_run: Path, chosen: Callable[[str], Path]) -> None:
    results = runs.read(zoo_run).results
    front = {record.candidate.id for record in results.front()}
    reported = [candidate for candidate in results.reported() if candidate.kind == "search"]
    name = next(candidate.id for candidate in reported if candidate.id not in front)
    directory = chosen(name)
    best = runs.read(directory).results.best()
    assert best is not None
    assert best.candidate.id == name
    said = (
        f"The best, {name}, is not on the front: the front is made by search items, and the best was chosen by "
        f"selection items, among the {len(reported)} candidates that were scored on them."
    )
    assert said in evomerge("front", directory).splitlines()
    assert said in notes(directory)


def test_a_best_on_the_front_needs_no_word(zoo_run: Path, chosen: Callable[[str], Path]) -> None:
    leader = next(
        record.candidate.id for record in runs.read(zoo_run).results.front() if record.candidate.kind == "search"
    )
    directory = chosen(leader)
    assert views.off_front(runs.read(directory).results) is None
    assert "The best, " not in evomerge("front", directory)
    assert not any("The best, " in note for note in notes(directory))
