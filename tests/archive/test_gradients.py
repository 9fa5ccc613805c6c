"""Gradients in the archive: kept bit for bit, once each, in a table that only searches that learn have."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy

from evomerge.archive import archive as archives
from evomerge.archive.archive import Archive
from evomerge.archive.gradients import GradientRecord, Gradients, digest_of, rounded
from evomerge.config.search import SearchConfig
from evomerge.errors import WorkFailed
from evomerge.events import StorageRetried

GENES = 5


def config(name: str = "learned", **keys: Any) -> SearchConfig:
    document = {"base": "b", "models": {"m": "m"}, "objectives": [{"task": "t"}], "optimizer": {"name": name}}
    return SearchConfig.model_validate(document | keys)


def records(seed: int = 0) -> list[GradientRecord]:
    """Records of all kinds: steps before the first, several shards, failures, and numbers of every size."""
    random = np.random.default_rng(seed)
    made = []
    for step in (-2, -1, 1, 2, 3):
        for shard in range(2):
            slopes = rounded(random.normal(size=GENES) * 10.0 ** random.integers(-30, 30, GENES))
            losses = {"t": float(random.normal()), "ü:word_perplexity": float(random.random() * 1e-300)}
            digest = digest_of(random.random(GENES).tolist())
            made.append(GradientRecord(step, shard, digest, losses, slopes, f"{step:016d}", None, 0.25))
    return [*made, GradientRecord(4, 0, digest_of(()), {}, np.zeros(GENES), None, "out of memory: ¾", 0.0)]


def content(record: GradientRecord) -> tuple[Any, ...]:
    """All of a record, to the bit."""
    losses = {name: loss.hex() for name, loss in record.losses.items()}
    slopes = record.slopes.tobytes(), record.slopes.dtype, record.slopes.shape
    return record.step, record.shard, record.genome, losses, *slopes, record.fingerprint, record.error, record.seconds


def tables(folder: Path) -> list[str]:
    return sqlalchemy.inspect(sqlalchemy.create_engine(f"sqlite:///{folder / 'archive.db'}")).get_table_names()


def test_what_is_written_is_read_again_bit_for_bit_in_order(tmp_path: Path) -> None:
    archive, written = Archive(tmp_path, config(), ()), records()
    for record in reversed(written):
        archive.record_gradient(record)
    read = Archive(tmp_path, config(), ())
    assert [content(record) for record in read.gradients()] == [content(record) for record in written]
    assert [content(record) for record in archive.gradients()] == [content(record) for record in written]
    for record in written:
        found = read.find_gradient(record.step, record.shard)
        assert found is not None
        assert content(found) == content(record)
    assert read.find_gradient(9, 0) is None


def test_rounding_is_to_float32_and_rounds_nothing_twice() -> None:
    slopes = np.random.default_rng(1).normal(size=100)
    once = rounded(slopes)
    assert np.array_equal(once, slopes.astype(np.float32).astype(np.float64))
    assert np.array_equal(once, rounded(once))
    assert not np.array_equal(once, slopes)


def test_a_digest_tells_genomes_apart_that_differ_in_the_last_bit() -> None:
    genome = (0.1, 0.5)
    assert digest_of(genome) == digest_of(np.array(genome))
    assert digest_of(genome) != digest_of((float(np.nextafter(0.1, 1)), 0.5))


def test_two_runs_in_one_storage_keep_their_gradients_apart(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'shared.db'}"
    written = {prefix: records(seed) for seed, prefix in enumerate(("one/", "two/"))}
    for prefix, rows in written.items():
        archive = Archive(tmp_path, config(storage=storage), (), prefix)
        for record in rows:
            archive.record_gradient(record)
    for prefix, rows in written.items():
        read = Archive(tmp_path, config(storage=storage), (), prefix)
        assert [content(record) for record in read.gradients()] == [content(record) for record in rows]


def test_an_archive_that_learns_nothing_has_no_such_table_and_is_read_all_the_same(tmp_path: Path) -> None:
    archive = Archive(tmp_path, config("cma_es"), ())
    assert "evomerge_gradients" not in tables(tmp_path)
    assert archive.gradients() == []
    assert archive.find_gradient(1, 0) is None
    assert Archive(tmp_path, config("cma_es"), ()).gradients() == []


@pytest.mark.parametrize("first", ["name", "stage"])
def test_an_archive_that_learns_has_one(tmp_path: Path, first: str) -> None:
    stages = [{"name": "learned", "genes": ["weight"]}, {"genes": ["weight"]}]
    Archive(tmp_path, config() if first == "name" else config("cma_es", optimizer={"stages": stages}), ())
    assert "evomerge_gradients" in tables(tmp_path)


@pytest.mark.parametrize("lands", [False, True], ids=["refused", "only the answer was lost"])
def test_a_storage_that_is_briefly_away_is_waited_for_and_no_gradient_is_written_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lands: bool
) -> None:
    monkeypatch.setattr(archives, "_PAUSE", 0.001)
    add, calls = Gradients.add, Counter[tuple[int, int]]()

    def flaky(gradients: Gradients, record: GradientRecord) -> None:
        calls[record.step, record.shard] += 1
        if calls[record.step, record.shard] < 3 and record.step in (-1, 2):
            if lands:
                add(gradients, record)
            raise sqlalchemy.exc.OperationalError("INSERT", {}, Exception("server closed the connection"))
        add(gradients, record)

    monkeypatch.setattr(Gradients, "add", flaky)
    archive, written, heard = Archive(tmp_path, config(), ()), records(), []
    archive.listener = heard.append
    for record in written:
        archive.record_gradient(record)
    assert len([event for event in heard if isinstance(event, StorageRetried)]) == (4 if lands else 8)
    expected = [content(record) for record in written]
    assert [content(record) for record in archive.gradients()] == expected
    assert [content(record) for record in Archive(tmp_path, config(), ()).gradients()] == expected


def test_a_storage_that_stays_away_is_a_sentence_that_says_which_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archives, "_PAUSE", 0.001)
    monkeypatch.setattr(archives, "_PATIENCE", 0.02)

    def away(_gradients: Gradients, _record: GradientRecord) -> None:
        raise sqlalchemy.exc.OperationalError("INSERT", {}, Exception("could not connect"))

    monkeypatch.setattr(Gradients, "add", away)
    archive = Archive(tmp_path, config(), ())
    with pytest.raises(WorkFailed, match=r"refused step 3, shard 1 .*could not connect.*then resume"):
        archive.record_gradient(records()[9])


def test_a_second_writer_of_the_same_step_is_refused(tmp_path: Path) -> None:
    first, second = Archive(tmp_path, config(), ()), Archive(tmp_path, config(), ())
    first.record_gradient(records()[4])
    with pytest.raises(WorkFailed, match="refused step 1, shard 0"):
        second.record_gradient(records()[4])


def test_two_runs_may_make_the_table_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = sqlalchemy.create_engine(f"sqlite:///{tmp_path / 'shared.db'}")
    create = sqlalchemy.Table.create

    def late(table: sqlalchemy.Table, bind: Any, checkfirst: bool = True) -> None:
        create(table, bind)  # another run was faster
        create(table, bind, checkfirst=False)

    monkeypatch.setattr(sqlalchemy.Table, "create", late)
    assert Gradients(engine, "mine-", writing=True).all() == []


def test_a_table_that_cannot_be_made_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(table: sqlalchemy.Table, bind: Any, checkfirst: bool = True) -> None:
        raise sqlalchemy.exc.OperationalError("CREATE TABLE", {}, Exception("attempt to write a readonly database"))

    monkeypatch.setattr(sqlalchemy.Table, "create", refuse)
    engine = sqlalchemy.create_engine(f"sqlite:///{tmp_path / 'shared.db'}")
    with pytest.raises(sqlalchemy.exc.OperationalError, match="readonly"):
        Gradients(engine, "mine-", writing=True)
