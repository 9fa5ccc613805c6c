"""Full disks and storages that are away: a sentence or a wait, nothing half-recorded, and the search goes on."""

import json
import sqlite3
from collections import Counter
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from sqlalchemy import event

from evomerge.archive import archive as archives
from evomerge.archive.archive import Archive
from evomerge.archive.trials import Trials
from evomerge.errors import WorkFailed
from evomerge.events import Finished
from evomerge.runs import journal as journal_module
from evomerge.search.loop import Search
from evomerge.search.preparation import Prepared, prepare_file
from tests import commands
from tests.fakes import FakePool
from tests.searches import WriteSearch

Event = tuple[str, dict[str, Any]]


@pytest.fixture
def prepared(search_file: WriteSearch) -> Prepared:
    optimizer = {"name": "random_search", "evaluations": 4, "population": 4}
    return prepare_file(search_file(optimizer=optimizer), ())


def search(prepared: Prepared, directory: Path, heard: list[Event] | None = None) -> tuple[Archive, FakePool]:
    directory.mkdir(exist_ok=True)
    archive = Archive(directory, prepared.config, prepared.space.genes)
    pool = FakePool([each.name for each in prepared.config.objectives], lambda candidate: (0.5, 0.5), size=2)
    listener = (heard if heard is not None else []).append
    Search(prepared.config, prepared.space, archive, pool, lambda event: listener((event.name, event.fields()))).run()
    return archive, pool


def test_a_full_disk_stops_the_search_with_a_sentence_and_resuming_repeats_nothing_finished(
    prepared: Prepared, tmp_path: Path
) -> None:
    expected, _ = search(prepared, tmp_path / "whole")
    pages = sqlite3.connect(tmp_path / "whole" / "archive.db").execute("PRAGMA page_count").fetchone()[0]

    def limit(connection: Any, _record: Any) -> None:
        connection.execute(f"PRAGMA max_page_count={pages - 2}")

    event.listen(sqlalchemy.engine.Engine, "connect", limit)
    try:
        with pytest.raises(WorkFailed, match=r"refused evaluation .*database or disk is full\); nothing was lost"):
            search(prepared, tmp_path / "full")
    finally:
        event.remove(sqlalchemy.engine.Engine, "connect", limit)
    kept = Archive(tmp_path / "full", prepared.config, prepared.space.genes)
    recorded = [(record.candidate.id, split) for split in ("search", "heldout") for record in kept.records(split)]
    resumed, pool = search(prepared, tmp_path / "full")
    assert len(recorded) > 0
    assert not set(recorded) & set(pool.evaluated)
    assert commands.candidates(resumed, prepared.config) == commands.candidates(expected, prepared.config)


@pytest.mark.parametrize("lands", [False, True], ids=["refused", "only the answer was lost"])
def test_a_storage_that_is_briefly_away_is_waited_for_and_no_evaluation_is_written_twice(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lands: bool
) -> None:
    monkeypatch.setattr(archives, "_PAUSE", 0.001)
    add, calls = Trials.add, Counter[str]()

    def flaky(trials: Trials, study: str, trial: Any) -> None:
        identity = f"{trial.user_attrs['id']} {study}"
        calls[identity] += 1
        if calls[identity] < 3 and identity in ("uniform search", "g0000-01 search", "base heldout"):
            if lands:
                add(trials, study, trial)
            raise sqlalchemy.exc.OperationalError("INSERT", {}, Exception("server closed the connection"))
        add(trials, study, trial)

    monkeypatch.setattr(Trials, "add", flaky)
    heard: list[Event] = []
    search(prepared, tmp_path / "run", heard)
    retried = [fields for name, fields in heard if name == "storage_retry"]
    assert {fields["id"] for fields in retried} == {"uniform", "g0000-01", "base"}
    assert len(retried) == (3 if lands else 6)
    for name in ("search", "heldout"):
        study = optuna.load_study(study_name=name, storage=f"sqlite:///{tmp_path / 'run' / 'archive.db'}")
        ids = [trial.user_attrs["id"] for trial in study.trials]
        assert len(ids) == len(set(ids))


def test_a_storage_that_stays_away_is_a_sentence(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "_PAUSE", 0.001)
    monkeypatch.setattr(archives, "_PATIENCE", 0.05)

    def away(_trials: Trials, _study: str, _trial: Any) -> None:
        raise sqlalchemy.exc.OperationalError("INSERT", {}, Exception("could not connect"))

    monkeypatch.setattr(Trials, "add", away)
    with pytest.raises(WorkFailed, match=r"refused evaluation .*could not connect.*restore the storage, then resume"):
        search(prepared, tmp_path / "run")


def test_a_log_without_room_is_a_sentence_and_half_a_line_is_cut_off(prepared: Prepared, tmp_path: Path) -> None:
    log = tmp_path / journal_module.LOG_FILE
    archive = Archive(tmp_path, prepared.config, prepared.space.genes)
    run = journal_module.OpenRun(tmp_path, prepared, archive)
    log.write_text('{"event": "started"}\n{"event": "evalu')
    journal_module.Journal(run)(Finished(0))
    assert [json.loads(line)["event"] for line in log.read_text().splitlines()] == ["started", "finished"]
    log.unlink()
    journal = journal_module.Journal(run)
    log.symlink_to("/dev/full")
    with pytest.raises(WorkFailed, match=r"log\.jsonl: cannot be written \(No space left on device\)"):
        journal(Finished(0))
