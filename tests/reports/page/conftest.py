"""Runs for reports: a finished one on the zoo, and copies of a small one in which things are missing or hostile."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from evomerge.archive.archive import Archive, Record
from evomerge.candidate import Study
from evomerge.config.search import SearchConfig
from evomerge.events import unheard
from evomerge.files import SEARCH_FILE
from evomerge.reports.page import sections
from evomerge.reports.page.blocks import Section
from evomerge.reports.page.html import page
from evomerge.reports.page.story import Story
from evomerge.runs import directory as runs
from tests.searches import put, small_search, tiny_search

Change = Callable[[Study, Record], Record | None]
Remake = Callable[..., Path]
Run = Callable[..., Path]


@pytest.fixture(scope="session")
def zoo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the zoo that has followed gradients, then evolved, with selection items and a constraint."""
    folder = tmp_path_factory.mktemp("zoo_run")
    search = small_search(
        optimizer={"evaluations": 26, "population": 8, "learning": {"steps": 12, "every": 6}},
        constraints=[{"task": "lang_b", "retain": 0.01, "of": "base"}],
        report=[{"task": "math_a_words"}],
    )
    (folder / "search.yaml").write_text(yaml.safe_dump(search))
    runs.start(folder / "search.yaml", folder / "run", (), None, unheard)
    return folder / "run"


@pytest.fixture(scope="session")
def zoo_story(zoo_run: Path) -> Story:
    """What the page of the run on the zoo is made of."""
    return story(zoo_run)


@pytest.fixture(scope="session")
def zoo_sections(zoo_story: Story) -> list[Section]:
    """The sections of that page."""
    return sections.sections(zoo_story)


@pytest.fixture(scope="session")
def zoo_page(zoo_run: Path) -> Path:
    """That page with the text of items, as a file."""
    file = zoo_run.parent / "report.html"
    file.write_text(page(story(zoo_run, with_items=True)))
    return file


@pytest.fixture
def tiny_run(tiny_models: dict[str, Path], tmp_path: Path) -> Run:
    """Runs the small search over the tiny models, with dotted keys changed."""

    def run(**changes: object) -> Path:
        search = tiny_search(tiny_models)
        for key, value in changes.items():
            put(search, key.replace("__", "."), value)
        (tmp_path / "changed.yaml").write_text(yaml.safe_dump(search))
        runs.start(tmp_path / "changed.yaml", tmp_path / "changed", (), None, unheard)
        return tmp_path / "changed"

    return run


@pytest.fixture
def remake(finished: Path, tmp_path: Path) -> Remake:
    """Writes the finished run anew: with another config, and with records that are changed or, for None, left out."""

    def write(change: Change, config: Callable[[SearchConfig], SearchConfig] = lambda config: config) -> Path:
        old = runs.read(finished)
        directory = tmp_path / "remade"
        directory.mkdir()
        made = config(old.config)
        (directory / SEARCH_FILE).write_text(made.to_yaml())
        archive = Archive(directory, made, old.prepared.space.genes)
        for study in made.splits:
            for record in old.archive.records(study):
                changed = change(study, record)
                if changed is not None:
                    archive.record(changed.candidate, changed.evaluation, study, changed.arrival)
        return directory

    return write


def story(directory: Path, with_items: bool = False) -> Story:
    """What a run's page is made of."""
    return Story(runs.read(directory), False, str(directory), with_items)


def renamed(record: Record, old: str, new: str) -> Record:
    """A record in which a metric has another name."""
    evaluation = record.evaluation
    scores = evaluation.scores and {new if name == old else name: value for name, value in evaluation.scores.items()}
    outcomes = {new if name == old else name: value for name, value in evaluation.outcomes.items()}
    return replace(record, evaluation=replace(evaluation, scores=scores, outcomes=outcomes))
