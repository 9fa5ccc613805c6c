"""An archive that is read straight from its file says what Optuna says of it."""

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from evomerge.archive import kept
from evomerge.archive.archive import Archive, studies
from evomerge.candidate import Candidate, Evaluation
from evomerge.config.search import SearchConfig
from evomerge.errors import InputError
from evomerge.files import DATABASE
from evomerge.recipe import single
from evomerge.runs import reading
from evomerge.spaces import Gene, categorical
from tests.conftest import REPOSITORY
from tests.searches import small_search

OLD = REPOSITORY / "tests" / "data" / "format_1" / "run"


def content(archive: Archive, config: SearchConfig) -> list[Any]:
    """All that an archive says of its records. Candidates of the two kinds are equal only in their parts."""
    return [
        (study, *parts(record.candidate), record.evaluation, record.arrival)
        for study in studies(config)
        for record in archive.records(study)
    ]


def parts(candidate: Candidate) -> tuple[Any, ...]:
    place = candidate.id, candidate.kind, candidate.generation, candidate.index
    return *place, candidate.recipe.model_dump(), candidate.genome


def both(directory: Path, config: SearchConfig, genes: Any = ()) -> tuple[Archive, Archive]:
    return Archive(directory, config, genes), Archive(directory, config, genes, reading=True)


def test_a_run_reads_the_same_both_ways(tmp_path: Path) -> None:
    shutil.copytree(OLD, tmp_path / "run")
    config = reading.read_config(tmp_path / "run")
    slow, quick = both(tmp_path / "run", config)
    assert content(slow, config) == content(quick, config) != []
    assert (slow.format, slow.recorded_versions()) == (quick.format, quick.recorded_versions())
    assert [slow.genes(r.candidate) for r in slow.records()] == [quick.genes(r.candidate) for r in quick.records()]


def test_choices_whole_numbers_infinities_and_failures_read_the_same_both_ways(tmp_path: Path) -> None:
    config = SearchConfig.model_validate(small_search())
    genes = [
        categorical("method", "method", "all", ("ties", "linear", "slerp"), "ties"),
        Gene("count", "count", "all", 0.0, 9.0, 0.0, 1.0, integer=True),
        Gene("weight", "weight", "all", 0.0, 1.5, 0.5, 0.1),
    ]
    written = Archive(tmp_path, config, genes)
    names = [objective.name for objective in config.objectives]
    for index, scores in enumerate([[0.5, float("inf")], [float("-inf"), 0.1], None]):
        candidate = Candidate(f"g0000-0{index}", "search", 0, index, single("zoo:math"), (2.0 - index, 7.0, 0.125))
        values = None if scores is None else dict(zip(names, scores, strict=True))
        error = "broken" if scores is None else None
        written.record(candidate, Evaluation(scores=values, error=error, items=4), "search")
    slow, quick = both(tmp_path, config, genes)
    assert content(slow, config) == content(quick, config)
    assert len(quick.records()) == 3


def test_tables_of_another_schema_are_left_to_optuna(tmp_path: Path) -> None:
    shutil.copytree(OLD, tmp_path / "run")
    file = tmp_path / "run" / DATABASE
    assert kept.read(file) is not None
    with closing(sqlite3.connect(file)) as database, database:
        database.execute("UPDATE alembic_version SET version_num = 'v9.0.0.a'")
    assert kept.read(file) is None
    with pytest.raises(InputError, match="cannot be read"):
        reading.results(tmp_path / "run")


def test_the_schema_is_the_one_that_optuna_makes(tmp_path: Path) -> None:
    config = SearchConfig.model_validate(small_search())
    Archive(tmp_path, config, ())
    found = kept.read(tmp_path / DATABASE)
    assert found is not None
    assert set(found.studies) == set(studies(config))
