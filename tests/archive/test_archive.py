"""An archive gives back what was recorded in it, in the order of the search, and belongs to one search alone."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from evomerge.archive.archive import Archive, Arrival, Record
from evomerge.candidate import Candidate, Evaluation, Study, Subset, failure
from evomerge.config.search import SearchConfig
from evomerge.errors import InputError
from evomerge.files import DATABASE
from evomerge.outcomes import Outcomes
from evomerge.recipe import linear, single
from evomerge.spaces import Condition, Gene, at, canonical, categorical
from evomerge.versions import FORMAT, versions
from tests.searches import put, small_search

GENES = (
    categorical("method", "method", "all", ("linear", "ties"), "ties"),
    Gene("weight:math", "weight", "all", -1.0, 2.0, 0.5, 0.1),
    Gene("max_iter", "karcher.max_iter", "all", 1.0, 20.0, 10.0, 4.0, integer=True),
    Gene("density", "density", "all", 0.0, 1.0, 0.7, 0.1, when=(Condition("method", ("ties",)),)),
)
STUDIES: tuple[Study, ...] = ("search", "subset", "selection", "heldout")
Changes = Mapping[str, Any]


def config(changes: Changes | None = None) -> SearchConfig:
    """A search with every study and a score that is no objective, with dotted keys changed."""
    document = small_search(
        items={"search": 8, "selection": 8, "heldout": 8},
        subsets=True,
        constraints=[{"task": "lang_b", "retain": 0.9}],
    )
    for key, value in (changes or {}).items():
        put(document, key, value)
    return SearchConfig.model_validate(document)


def opened(directory: Path, changes: Changes | None = None) -> Archive:
    return Archive(directory, config(changes), GENES)


def searched(generation: int, index: int, random: np.random.Generator) -> Candidate:
    genome = tuple(canonical(GENES, at(GENES, random.random(len(GENES)))).tolist())
    recipe = linear({"zoo:math": genome[1], "zoo:lang": 1 / 3})
    return Candidate(f"g{generation:04d}-{index:02d}", "search", generation, index, recipe, genome)


def scored(random: np.random.Generator, subset: Subset | None = None) -> Evaluation:
    """Right and wrong answers of one task and numbers of another, on all of 8 items or on every second."""
    count = 8 if subset is None else 4
    chosen = None if subset is None else [place % 2 == 0 for place in range(8)]
    return Evaluation(
        scores={"base_qa": random.random(), "cross_math_b": random.random(), "lang_b": random.random()},
        outcomes={
            "base_qa": Outcomes.of(random.integers(0, 2, count).tolist(), random.normal(size=count).tolist(), chosen),
            "cross_math_b": Outcomes.of(random.normal(size=count).tolist(), None, chosen),
        },
        items=2 * count,
        fingerprint=random.bytes(8).hex(),
        seconds=round(random.random(), 4),
        truncated=int(random.integers(0, 3)),
        subset=subset,
    )


def full(directory: Path) -> tuple[Archive, dict[Study, list[Record]]]:
    """An archive with evaluations of all sorts, recorded in no order, and all of them by study as they were given."""
    random = np.random.default_rng(7)
    controls = [Candidate(name, "control", -1, i, single(name)) for i, name in enumerate(("base", "parent-math"))]
    candidates = [searched(generation, index, random) for generation in range(3) for index in range(3)]
    given: dict[Study, list[Record]] = {
        "search": [Record(each, scored(random)) for each in (*controls, *candidates[:4])],
        "subset": [Record(each, scored(random, Subset(each.generation, 0.5))) for each in candidates[3:]],
        "selection": [Record(candidates[0], scored(random))],
        "heldout": [Record(each, scored(random)) for each in (controls[0], candidates[0])],
    }
    given["search"][1] = Record(controls[1], failure("cannot be read"))
    given["search"][3] = Record(candidates[1], failure("out of memory", "f00d"))
    given["search"][2] = replace(given["search"][2], arrival=Arrival(1, 2))
    given["search"][4] = replace(given["search"][4], arrival=Arrival(0, 2))
    archive = opened(directory)
    for study, records in given.items():
        for record in [records[i] for i in random.permutation(len(records))]:
            archive.record(record.candidate, record.evaluation, study, record.arrival)
    return archive, given


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Archive, dict[Study, list[Record]]]:
    directory = tmp_path_factory.mktemp("recorded")
    return directory, *full(directory)


def test_what_is_recorded_is_read_back_equal_by_this_archive_and_by_a_fresh_one(recorded: Any) -> None:
    directory, archive, given = recorded
    for reader in (archive, opened(directory)):
        for study in STUDIES:
            for record in given[study]:
                assert reader.find(record.candidate.id, study) == record
            assert len(reader.records(study)) == len(given[study])


def test_a_genome_keeps_every_bit(recorded: Any) -> None:
    directory, _, given = recorded
    fresh = opened(directory)
    for study in STUDIES:
        for record in given[study]:
            found = fresh.find(record.candidate.id, study)
            bits = [record.candidate.genome, found.candidate.genome if found else None]
            if record.candidate.genome is None:
                assert bits[1] is None
            else:
                assert np.array(bits[0]).tobytes() == np.array(bits[1]).tobytes()


def test_what_was_not_recorded_is_not_found(recorded: Any) -> None:
    directory, _, given = recorded
    only_screened = given["subset"][-1].candidate.id
    fresh = opened(directory)
    assert fresh.find(only_screened, "subset") is not None
    assert fresh.find(only_screened, "search") is None
    assert fresh.find("g0099-00", "subset") is None


def test_records_stand_in_the_order_of_the_search_whatever_the_order_of_recording(recorded: Any) -> None:
    directory, archive, given = recorded
    for reader in (archive, opened(directory)):
        for study in STUDIES:
            assert reader.records(study) == given[study]


def test_what_was_tried_is_every_candidate_once_and_on_all_items_where_there_is_that(recorded: Any) -> None:
    directory, archive, given = recorded
    whole = {record.candidate.id for record in given["search"]}
    only_screened = [record for record in given["subset"] if record.candidate.id not in whole]
    assert 0 < len(only_screened) < len(given["subset"])
    for reader in (archive, opened(directory)):
        assert reader.tried() == [*given["search"], *only_screened]


def test_arrivals_stand_in_the_order_in_which_they_came(recorded: Any) -> None:
    directory, archive, given = recorded
    for reader in (archive, opened(directory)):
        assert reader.arrivals() == [given["search"][4], given["search"][2]]


def test_genes_are_shown_by_name_and_only_those_that_count(recorded: Any) -> None:
    _, archive, given = recorded
    methods = set()
    for record in given["search"] + given["subset"]:
        shown, genome = archive.genes(record.candidate), record.candidate.genome
        if genome is None:
            assert shown is None
            continue
        methods.add(shown["method"])
        assert shown["method"] == GENES[0].choices[int(genome[0])]
        assert shown["weight:math"] == genome[1]
        assert isinstance(shown["max_iter"], int)
        assert ("density" in shown) == (shown["method"] == "ties")
    assert methods == {"linear", "ties"}


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("seed", 1, "seed is 1, but the archive was made with 0"),
        ("base", "zoo:math", "base is "),
        ("models.math", "zoo:base", "models.math is "),
        ("objectives.1.weight", 2.0, r"objectives\[1\]\.weight is 2(\.0)?, "),
        ("objectives", [{"task": "base_qa"}], "objectives is "),
        ("constraints.0.retain", 0.8, r"constraints\[0\]\.retain is 0\.8, "),
        ("items.heldout", 9, "items.heldout is 9, but the archive was made with 8"),
        ("space.layer_groups", ["0-5"], "space.layer_groups is "),
        ("optimizer.population", 9, "optimizer.population is 9, but the archive was made with 8"),
        ("evaluation.batch_size", 64, "evaluation.batch_size is 64, but the archive was made with 128"),
        ("tasks.allow_code", ["base_qa"], "tasks.allow_code is "),
    ],
)
def test_a_changed_config_is_refused_by_its_key(recorded: Any, key: str, value: Any, named: str) -> None:
    directory, _, _ = recorded
    with pytest.raises(InputError, match=named):
        opened(directory, {key: value})


FREE = {
    "workers.count": 3,
    "workers.attempts": 5,
    "optimizer.evaluations": 99,
    "tasks.data_root": "/elsewhere",
    "evaluation.sources": "disk",
    "evaluation.fields": "made",
}


@pytest.mark.parametrize("key", FREE)
def test_what_decides_no_score_may_be_changed(key: str, recorded: Any, tmp_path: Path) -> None:
    directory, archive, _ = recorded
    shutil.copyfile(directory / DATABASE, tmp_path / DATABASE)
    for changes in ({key: FREE[key]}, {}):
        assert opened(tmp_path, changes).tried() == archive.tried()


def test_an_archive_that_is_only_read_is_not_written_to(recorded: Any) -> None:
    directory, _, given = recorded
    database = directory / DATABASE
    before = database.read_bytes(), database.stat().st_mtime_ns
    reader = opened(directory)
    reader.check_resumable(directory)
    reader.check_sources({"base": "0123"})
    assert len(reader.tried()) == 11
    assert reader.find(given["search"][0].candidate.id, "search") is not None
    opened(directory, {"tasks.data_root": "/elsewhere"})
    assert (database.read_bytes(), database.stat().st_mtime_ns) == before
    assert sorted(path.name for path in directory.iterdir()) == [DATABASE]


def test_sources_and_seen_items_are_noted_once_and_kept(tmp_path: Path) -> None:
    archive = opened(tmp_path)
    assert archive.seen is None
    archive.record_sources({"base": "old", "models.math": "same"})
    archive.record_seen("first")
    for _ in range(2):
        archive = opened(tmp_path)
        assert archive.seen == "first"
        archive.check_sources({"base": "old", "models.math": "same", "models.lang": "new"})
        with pytest.raises(InputError, match=r"^base: the model's files have changed"):
            archive.check_sources({"base": "new", "models.math": "same"})
        archive.record_sources({"base": "new"})
        archive.record_seen("second")


def noted(directory: Path, **attributes: Any) -> Archive:
    """The archive with other attributes of the run."""
    study = optuna.load_study(study_name="search", storage=f"sqlite:///{directory / DATABASE}")
    for name, value in attributes.items():
        study.set_user_attr(name, value)
    return opened(directory)


def test_a_new_archive_has_the_versions_and_the_format_of_now_and_is_resumed_without_a_word(tmp_path: Path) -> None:
    for archive in (opened(tmp_path), opened(tmp_path)):
        assert archive.recorded_versions() == versions()
        assert archive.format == FORMAT
        assert archive.check_resumable(tmp_path) == []


def test_versions_that_have_changed_are_told_and_nothing_else_is(tmp_path: Path) -> None:
    opened(tmp_path)
    [warning] = noted(tmp_path, versions={**versions(), "torch": "0.0.1"}).check_resumable(tmp_path)
    assert f"(torch 0.0.1 to {versions()['torch']})" in warning


def test_a_later_format_is_not_read_and_an_earlier_one_is_read_but_not_resumed(tmp_path: Path) -> None:
    opened(tmp_path)
    earlier = noted(tmp_path, format=FORMAT - 1, versions={**versions(), "evomerge": "0.0.1"})
    assert earlier.format == FORMAT - 1
    with pytest.raises(InputError, match=r"resume it with evomerge 0\.0\.1 "):
        earlier.check_resumable(tmp_path)
    with pytest.raises(InputError, match=rf"has format {FORMAT + 1}, .* use evomerge 0\.0\.1, which made it"):
        noted(tmp_path, format=FORMAT + 1)


@pytest.mark.parametrize("name", ["a%2e%2eb", "50%", "a?b", "a#b", "a{x}b", "a b", "ü<b>'\""])
def test_an_archive_lies_in_its_directory_whatever_its_name(tmp_path: Path, name: str) -> None:
    directory = tmp_path / name
    directory.mkdir()
    _, given = full(directory)
    assert [file.name for file in tmp_path.iterdir()] == [name]
    assert (directory / DATABASE).exists()
    record = given["search"][0]
    assert opened(directory).find(record.candidate.id, "search") == record
