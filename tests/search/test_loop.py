"""The loop with pretended workers: order, kills, failures and budgets must not show in the archive."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

from evomerge.archive.archive import Archive
from evomerge.candidate import Candidate
from evomerge.config.files import load
from evomerge.config.search import SearchConfig
from evomerge.errors import InputError, WorkFailed
from evomerge.events import unheard
from evomerge.export import choice
from evomerge.search.best import front_of, reported
from evomerge.search.criteria import criteria_of
from evomerge.search.loop import Search
from evomerge.search.preparation import Prepared, prepare
from evomerge.search.results import Results
from tests import commands
from tests.fakes import FakePool, Killed
from tests.searches import WriteSearch


def quality(candidate: Candidate) -> tuple[float, float]:
    """Two scores of a genome between 0 and 1; controls without one score low."""
    if candidate.genome is None:
        return 0.1, 0.1
    genome = np.array(candidate.genome)
    return float(np.exp(-((genome - 0.8) ** 2).mean())), float(np.exp(-((genome - 0.3) ** 2).mean()))


def some_fail(candidate: Candidate) -> tuple[float, float] | str:
    return "out of memory" if candidate.kind == "search" and candidate.index == 2 else quality(candidate)


@pytest.fixture
def prepared(search_file: WriteSearch) -> Prepared:
    optimizer = {"evaluations": 15, "population": 6, "lag": 1}
    space = {"density": {"fixed": 1.0}}
    return prepare(load(search_file(optimizer=optimizer, space=space, controls={"random_search": True})))


def names(config: SearchConfig) -> list[str]:
    return [metric.name for metric in config.measured]


def run(prepared: Prepared, directory: Path, scorer: Any = some_fail, **pool: Any) -> tuple[Archive, FakePool]:
    directory.mkdir(exist_ok=True)
    archive = Archive(directory, prepared.config, prepared.space.genes)
    fake = FakePool(names(prepared.config), scorer, **pool)
    Search(prepared.config, prepared.space, archive, fake, unheard).run()
    return archive, fake


def content(archive: Archive, prepared: Prepared) -> tuple[Any, Any]:
    return commands.candidates(archive, prepared.config), commands.front(archive, prepared.config)


def with_budget(prepared: Prepared, evaluations: int) -> Prepared:
    optimizer = prepared.config.optimizer.model_copy(update={"evaluations": evaluations})
    config = prepared.config.model_copy(update={"optimizer": optimizer})
    return Prepared(config, prepared.space, prepared.models)


@pytest.mark.parametrize(("size", "seed"), [(2, 1), (3, 2), (16, 3)])
def test_the_archive_depends_neither_on_the_number_of_workers_nor_on_who_finishes_first(
    prepared: Prepared, tmp_path: Path, size: int, seed: int
) -> None:
    alone, _ = run(prepared, tmp_path / "alone")
    together, _ = run(prepared, tmp_path / "together", size=size, seed=seed)
    assert content(together, prepared) == content(alone, prepared)


def divided(prepared: Prepared, shards: int) -> Prepared:
    workers = prepared.config.workers.model_copy(update={"shards": shards})
    return Prepared(prepared.config.model_copy(update={"workers": workers}), prepared.space, prepared.models)


@pytest.mark.parametrize(("size", "seed", "fails_at"), [(1, 1, 0), (3, 2, 1), (16, 3, 2)])
def test_the_archive_does_not_depend_on_how_workers_share_the_shards_of_candidates(
    prepared: Prepared, tmp_path: Path, size: int, seed: int, fails_at: int
) -> None:
    whole, _ = run(prepared, tmp_path / "whole")
    shared, pool = run(divided(prepared, 3), tmp_path / "shared", size=size, seed=seed, fails_at=fails_at)
    assert content(shared, prepared) == content(whole, prepared)
    fine = Counter(name for name, what in pool.evaluated if what.startswith("search, shard"))
    assert {count for name, count in fine.items() if not name.endswith("-02")} == {3}


def test_a_shared_search_killed_anywhere_resumes_to_the_archive_of_one_that_shared_nothing(
    prepared: Prepared, tmp_path: Path
) -> None:
    expected = content(run(prepared, tmp_path / "whole")[0], prepared)
    shared, directory = divided(with_budget(prepared, 15), 3), tmp_path / "killed"
    directory.mkdir()
    for attempt in range(100):
        archive = Archive(directory, shared.config, shared.space.genes)
        pool = FakePool(names(shared.config), some_fail, size=4, seed=attempt, dies_after=9 + attempt)
        try:
            Search(shared.config, shared.space, archive, pool, unheard).run()
        except Killed:
            continue
        break
    assert attempt > 2
    assert content(archive, prepared) == expected


@pytest.mark.slow
def test_killed_at_any_moment_it_resumes_to_the_same_archive_and_repeats_no_finished_evaluation(
    prepared: Prepared, tmp_path: Path
) -> None:
    whole, undisturbed = run(prepared, tmp_path / "whole")
    expected = content(whole, prepared)
    total = len(undisturbed.evaluated)
    for kill in (1, total // 3, total - 2):
        directory = tmp_path / f"killed-{kill}"
        evaluated: list[Any] = []
        for attempt in range(total):
            directory.mkdir(exist_ok=True)
            archive = Archive(directory, prepared.config, prepared.space.genes)
            pool = FakePool(names(prepared.config), some_fail, size=3, seed=attempt, dies_after=kill)
            try:
                Search(prepared.config, prepared.space, archive, pool, unheard).run()
            except Killed:
                evaluated += pool.evaluated
                continue
            evaluated += pool.evaluated
            break
        assert content(archive, prepared) == expected
        assert max(Counter(evaluated).values()) == 1


ASYNCHRONOUS: list[dict[str, Any]] = [
    {"name": "cma_es", "population": 4, "evaluations": 26},
    {"name": "group_evolution", "stages": [{"genes": ["weight"], "evaluations": 10}, {"genes": ["weight"]}]},
]


@pytest.mark.parametrize("optimizer", ASYNCHRONOUS, ids=["cma_es", "stages"])
def test_an_asynchronous_search_is_a_function_of_the_recorded_order_through_any_kill(
    search_file: WriteSearch, tmp_path: Path, optimizer: dict[str, Any]
) -> None:
    changes = {"evaluations": 20, "schedule": "async"} | optimizer
    prepared = prepare(load(search_file(optimizer=changes, space={"density": {"fixed": 1.0}})))
    evaluated: list[Any] = []
    for attempt in range(100):
        archive = Archive(tmp_path, prepared.config, prepared.space.genes)
        pool = FakePool(names(prepared.config), some_fail, size=3, seed=attempt, dies_after=7)
        try:
            Search(prepared.config, prepared.space, archive, pool, unheard).run()
        except Killed:
            evaluated += pool.evaluated
            continue
        evaluated += pool.evaluated
        break
    assert max(Counter(evaluated).values()) == 1
    order = [record.candidate.id for record in archive.arrivals()]
    assert len(order) == prepared.config.budget
    assert order != sorted(order)
    controls = ["base", "parent-math", "parent-lang", "uniform"]
    same, _ = run(prepared, tmp_path / "same", size=3, order=[*controls, *order])
    assert content(same, prepared) == content(archive, prepared)
    other, _ = run(prepared, tmp_path / "other", size=3, seed=9)
    assert content(other, prepared) != content(archive, prepared)
    again, pool = run(prepared, tmp_path / "same")
    assert not pool.evaluated
    assert content(again, prepared) == content(archive, prepared)


def test_an_asynchronous_archive_whose_order_has_a_hole_is_not_continued(
    search_file: WriteSearch, tmp_path: Path
) -> None:
    prepared = prepare(load(search_file(optimizer={"name": "random_search", "evaluations": 6, "schedule": "async"})))
    archive, _ = run(prepared, tmp_path / "run", scorer=quality)
    archive._records["search"].pop(archive.arrivals()[2].candidate.id)
    search = Search(prepared.config, prepared.space, archive, FakePool([], quality), unheard)
    with pytest.raises(WorkFailed, match="is recorded as arrival 3, which the search does not come to again"):
        search.run()


def test_an_extended_search_is_the_search_that_had_the_larger_budget_from_the_start(
    prepared: Prepared, tmp_path: Path
) -> None:
    longer = with_budget(prepared, 26)
    expected, _ = run(longer, tmp_path / "long")
    run(prepared, tmp_path / "extended")
    extended, pool = run(longer, tmp_path / "extended")
    found, wanted = content(extended, longer)[0], content(expected, longer)[0]
    for row, other in zip(found, wanted, strict=True):  # the best of the shorter search have held-out scores as well
        kept = {key: other.pop(key) for key in ("heldout", "heldout_mean", "heldout_missing")}
        assert kept["heldout"] in (None, row.pop("heldout"))
        assert kept["heldout_mean"] in (None, row.pop("heldout_mean"))
        assert kept["heldout_missing"] is not None or row["heldout_missing"] is None
        del row["heldout_missing"]
    assert found == wanted
    assert len([1 for name, split in pool.evaluated if split == "search"]) == 2 * (26 - 15)


def test_the_budget_is_kept_to_the_candidate_even_within_a_generation(prepared: Prepared, tmp_path: Path) -> None:
    archive, _ = run(prepared, tmp_path / "run", size=4)
    kinds = Counter(row["kind"] for row in commands.candidates(archive, prepared.config))
    assert kinds == {"search": 15, "control": 4 + 15}


@pytest.fixture
def with_choices(search_file: WriteSearch) -> Prepared:
    space = {"method": ["ties", "slerp", "karcher"], "participate": True, "layer_granularity": 6}
    return prepare(load(search_file(optimizer={"evaluations": 30, "population": 8}, space=space)))


def test_choices_are_parameters_by_name_and_only_what_counts_is_one(with_choices: Prepared, tmp_path: Path) -> None:
    archive, _ = run(with_choices, tmp_path / "run", scorer=quality)
    study = optuna.load_study(study_name="search", storage=f"sqlite:///{tmp_path / 'run' / 'archive.db'}")
    trials = [trial for trial in study.trials if trial.params]
    assert {trial.params["method"] for trial in trials} == {"ties", "slerp", "karcher"}
    for trial in trials:
        kinds = {name.split(":")[0] for name in trial.params}
        own = {"ties": {"weight", "density"}, "slerp": {"from", "to", "slerp.t"}, "karcher": {"karcher.max_iter"}}
        assert kinds - {"method", "take"} <= own[trial.params["method"]]
    genes = with_choices.space.genes
    again = Archive(tmp_path / "run", with_choices.config, genes)
    assert [r.candidate.genome for r in again.records()] == [r.candidate.genome for r in archive.records()]


def test_a_search_over_choices_killed_midway_resumes_to_the_same_archive(
    with_choices: Prepared, tmp_path: Path
) -> None:
    whole, _ = run(with_choices, tmp_path / "whole", scorer=quality)
    with pytest.raises(Killed):
        run(with_choices, tmp_path / "killed", scorer=quality, size=3, dies_after=19)
    resumed, _ = run(with_choices, tmp_path / "killed", scorer=quality, size=2)
    assert content(resumed, with_choices) == content(whole, with_choices)


def test_a_greedy_soup_starts_with_the_best_parent_and_ends_when_every_model_was_tried(
    search_file: WriteSearch, tmp_path: Path
) -> None:
    space = {"method": "linear", "participate": True, "weight": {"fixed": 1}, "normalize": True}
    soup = prepare(load(search_file(optimizer={"name": "greedy_soup", "evaluations": 50}, space=space)))

    def lang_alone(candidate: Candidate) -> tuple[float, float]:
        return (0.9, 0.9) if {*candidate.recipe.references} == {"zoo:lang"} else (0.4, 0.5)

    archive, _ = run(soup, tmp_path / "run", scorer=lang_alone, size=3)
    searched = [record.candidate for record in archive.records() if record.candidate.kind == "search"]
    assert [{*candidate.recipe.references} for candidate in searched] == [{"zoo:lang"}, {"zoo:math", "zoo:lang"}]
    status = commands.status(archive, soup.config)
    assert (status["state"], status["evaluations"], status["budget"]) == ("finished", 2, 2)
    assert status["best"]["id"] == "g0000-00"
    _, again = run(soup, tmp_path / "run", scorer=lang_alone)
    assert not again.evaluated


def test_failures_are_recorded_with_their_reason_and_never_win(prepared: Prepared, tmp_path: Path) -> None:
    archive, _ = run(prepared, tmp_path / "run")
    failed = [row for row in commands.candidates(archive, prepared.config) if row["state"] == "failed"]
    assert [row["id"] for row in failed] == ["g0000-02", "g0001-02", "g0002-02"]
    assert all(row["error"] == "out of memory" and row["scores"] is None for row in failed)
    front = {row["id"] for row in commands.front(archive, prepared.config)}
    assert not front & {row["id"] for row in failed}


def test_a_search_in_which_no_control_can_be_scored_stops_with_a_sentence(prepared: Prepared, tmp_path: Path) -> None:
    with pytest.raises(WorkFailed, match=r"no control could be evaluated.*broken disk"):
        run(prepared, tmp_path / "run", scorer=lambda candidate: "broken disk")


def test_the_search_starts_at_the_best_essential_control(prepared: Prepared, tmp_path: Path) -> None:
    def lang_is_best(candidate: Candidate) -> tuple[float, float]:
        return (0.9, 0.9) if candidate.id == "parent-lang" else (0.1, 0.1)

    archive, _ = run(prepared, tmp_path / "run", scorer=lang_is_best)
    first = np.array([row["genome"] for row in commands.candidates(archive, prepared.config) if row["generation"] == 0])
    lang = prepared.space.encode({"lang": 1.0})
    math = prepared.space.encode({"math": 1.0})
    assert np.abs(first.mean(axis=0) - lang).mean() < np.abs(first.mean(axis=0) - math).mean()


def test_an_archive_with_other_genomes_than_the_optimizer_proposes_is_not_continued(
    prepared: Prepared, tmp_path: Path
) -> None:
    run(with_budget(prepared, 6), tmp_path / "run")
    other = prepared.config.model_copy(update={"seed": 5})
    archive = Archive(tmp_path / "run", prepared.config, prepared.space.genes)
    pool = FakePool(names(other), quality)
    with pytest.raises(WorkFailed, match="recorded with another genome"):
        Search(other, prepared.space, archive, pool, unheard).run()


def test_held_out_scores_are_known_for_all_controls_the_best_and_the_front(prepared: Prepared, tmp_path: Path) -> None:
    archive, _ = run(prepared, tmp_path / "run")
    records, criteria = archive.records(), criteria_of(archive, prepared.config)
    best = Results(archive, prepared.config).best()
    assert best is not None
    expected = {record.candidate.id for record in front_of(records, criteria)} | {best.candidate.id}
    expected |= {"base", "parent-math", "parent-lang", "uniform"}
    known = {record.candidate.id for record in archive.records("heldout")}
    assert expected <= known == {candidate.id for candidate in reported(records, criteria)}


# Constraints and selection items


def three_scores(candidate: Candidate) -> tuple[float, float, float]:
    """Two objectives that conflict, and a guard that most genomes break; the first parent is good at all but one."""
    if candidate.genome is None:
        return {"parent-math": (0.6, 0.1, 0.9), "parent-lang": (0.1, 0.6, 0.5)}.get(candidate.id, (0.2, 0.2, 0.2))
    first, second = quality(candidate)
    return first, second, float(np.mean(candidate.genome))


def constrained(search_file: WriteSearch, *constraints: dict[str, Any], **items: int) -> Prepared:
    optimizer = {"name": "cma_es", "evaluations": 16, "population": 4}
    space = {"density": {"fixed": 1.0}}
    return prepare(
        load(
            search_file(
                optimizer=optimizer,
                space=space,
                constraints=[{"task": "lang_b", "retain": 0.8, **constraint} for constraint in constraints],
                items={"search": 24, "heldout": 24, **items},
            )
        )
    )


@pytest.mark.parametrize("selection", [None, 12])
def test_no_candidate_that_breaks_a_constraint_is_on_the_front_or_the_best_or_reported(
    search_file: WriteSearch, tmp_path: Path, selection: int | None
) -> None:
    items = {} if selection is None else {"selection": selection}
    prepared = constrained(search_file, {}, {"task": "base_qa", "retain": 0.9, "of": "base"}, **items)
    archive, _ = run(prepared, tmp_path / "run", scorer=three_scores)
    rows = commands.candidates(archive, prepared.config)
    broken = {row["id"] for row in rows if row["scores"]["lang_b"] < 0.8 * 0.9 or row["scores"]["base_qa"] < 0.9 * 0.2}
    assert {row["id"] for row in rows if not row["feasible"]} == broken
    assert 0 < len([name for name in broken if name.startswith("g")]) < 16
    front = [row["id"] for row in commands.front(archive, prepared.config)]
    assert front
    assert broken.isdisjoint(front)
    best = Results(archive, prepared.config).best()
    assert best is not None
    assert best.candidate.id not in broken
    essential = {"base", "parent-math", "parent-lang", "uniform"}
    assert broken.isdisjoint({record.candidate.id for record in archive.records("heldout")} - essential)


def test_constraints_that_cannot_be_met_leave_no_best_and_no_front_and_the_search_still_ends(
    search_file: WriteSearch, tmp_path: Path
) -> None:
    prepared = constrained(search_file, {"retain": 1.0}, {"task": "base_qa", "retain": 1.0}, {"task": "cross_math_b"})

    def each_parent_alone(candidate: Candidate) -> tuple[float, float, float]:
        return three_scores(candidate) if candidate.genome is None else (0.5, 0.1, 0.1)

    archive, _ = run(prepared, tmp_path / "run", scorer=each_parent_alone)
    assert Results(archive, prepared.config).best() is None
    assert commands.front(archive, prepared.config) == []
    status = commands.status(archive, prepared.config)
    assert (status["state"], status["best"], status["infeasible"]) == ("finished", None, 4 + 16)
    with pytest.raises(WorkFailed, match=r"no candidate keeps to the constraints.*lang_b at least 0\.9 \(of parent-m"):
        choice.choose(Results(archive, prepared.config), None, ())
    with pytest.raises(InputError, match=r"--candidate g0000-00 breaks a constraint \(lang_b at least 0\.9"):
        choice.choose(Results(archive, prepared.config), "g0000-00", ())


def test_a_search_for_what_keeps_to_a_constraint_gets_there(search_file: WriteSearch, tmp_path: Path) -> None:
    prepared = constrained(search_file, {"retain": 0.95})

    def more_is_worse_but_allowed(candidate: Candidate) -> tuple[float, float, float]:
        if candidate.genome is None:
            return 0.5, 0.5, 0.9 if candidate.id.startswith("parent") else 0.2
        size = float(np.mean(candidate.genome))
        return -size, -size, size

    archive, _ = run(prepared, tmp_path / "run", scorer=more_is_worse_but_allowed)
    searched = [row for row in commands.candidates(archive, prepared.config) if row["kind"] == "search"]
    early, late = ([row["scores"]["lang_b"] for row in part] for part in (searched[:4], searched[-4:]))
    assert np.mean(late) > np.mean(early)


def test_a_parent_that_a_constraint_needs_and_that_fails_stops_the_search_with_a_sentence(
    search_file: WriteSearch, tmp_path: Path
) -> None:
    prepared = constrained(search_file, {"of": "lang"})

    def lang_fails(candidate: Candidate) -> tuple[float, float, float] | str:
        return "out of memory" if candidate.id == "parent-lang" else three_scores(candidate)

    with pytest.raises(WorkFailed, match=r"constraints\[0\].*parent-lang could not be evaluated \(out of memory\)"):
        run(prepared, tmp_path / "run", scorer=lang_fails)


def test_selection_items_choose_the_best_among_what_the_search_items_put_on_the_front(
    search_file: WriteSearch, tmp_path: Path
) -> None:
    prepared = constrained(search_file, {"retain": 0.2}, selection=12)

    def reversed_there(candidate: Candidate, split: str) -> tuple[float, float, float]:
        scores = three_scores(candidate)
        return (1 - scores[0], 1 - scores[1], scores[2]) if split == "selection" else scores

    archive, pool = run(prepared, tmp_path / "run", scorer=reversed_there)
    best = Results(archive, prepared.config).best()
    assert best is not None
    front = [row for row in commands.front(archive, prepared.config) if row["kind"] == "search"]
    assert len(front) > 1
    chosen = max(front, key=lambda row: row["selection"]["base_qa"] + row["selection"]["cross_math_b"])
    assert best.candidate.id == chosen["id"]
    assert best.candidate.id != front[0]["id"]
    splits = [split for _, split in pool.evaluated]
    assert splits == sorted(splits, key=("search", "selection", "heldout").index)


def test_killed_anywhere_with_constraints_and_selection_items_it_resumes_to_the_same_archive(
    search_file: WriteSearch, tmp_path: Path
) -> None:
    prepared = constrained(search_file, {"retain": 0.2}, {"task": "base_qa", "of": "base"}, selection=12)
    whole, undisturbed = run(prepared, tmp_path / "whole", scorer=three_scores)
    for kill in (2, len(undisturbed.evaluated) - 3):
        with pytest.raises(Killed):
            run(prepared, tmp_path / f"{kill}", scorer=three_scores, size=3, seed=kill, dies_after=kill)
        resumed, _ = run(prepared, tmp_path / f"{kill}", scorer=three_scores, size=2)
        assert content(resumed, prepared) == content(whole, prepared)
        for split in prepared.config.splits:
            assert [each.candidate for each in resumed.records(split)] == [
                each.candidate for each in whole.records(split)
            ]
