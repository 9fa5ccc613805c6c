"""Searches that follow gradients, with pretended workers: order, kills, failures and budgets must not show."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from evomerge.archive.archive import Archive
from evomerge.archive.gradients import digest_of
from evomerge.candidate import Candidate, Descent, Evaluation, Gradient, failure, is_learned
from evomerge.config.files import load
from evomerge.config.running import LearningConfig, OptimizerConfig
from evomerge.config.scoring import ConstraintConfig
from evomerge.config.search import SearchConfig
from evomerge.errors import WorkFailed
from evomerge.events import Event, Warned, unheard
from evomerge.merging.sources.tensor_files import TensorInfo
from evomerge.reports.page.course import costs
from evomerge.search.controls import essential_controls
from evomerge.search.criteria import criteria_of
from evomerge.search.learning import Multipliers, loss_limits, sources_of
from evomerge.search.loop import Search
from evomerge.search.preparation import Prepared, prepare, with_checkpointing
from evomerge.search.results import Results
from tests import commands
from tests.fakes import FakePool, Killed, Quadratics
from tests.searches import WriteSearch

LEARNING = {"steps": 6, "every": 2, "share": 0.5}
SPACE = {"density": {"fixed": 1.0}}
LEARNED_FIRST = {
    "evaluations": 20,
    "population": 4,
    "learning": LEARNING,
    "stages": [{"name": "learned", "genes": ["weight"]}, {"name": "group_evolution", "genes": ["weight"]}],
}
LEARNED_ALONE = {"name": "learned", "evaluations": 20, "learning": LEARNING}
AUTO = {"name": "auto", "evaluations": 40, "population": 4, "learning": LEARNING | {"steps": 10, "every": 3}}
SEARCHES = {"learned first": LEARNED_FIRST, "learned alone": LEARNED_ALONE, "auto": AUTO}
Content = tuple[Any, Any, list[Any]]


@pytest.fixture
def make(search_file: WriteSearch) -> Callable[..., Prepared]:
    """Prepares a search over the zoo that follows gradients."""

    def prepared(optimizer: dict[str, Any], **changes: Any) -> Prepared:
        return prepare(load(search_file(**{"optimizer": optimizer, "space": SPACE, **changes})))

    return prepared


def with_learning(optimizer: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return optimizer | {"learning": optimizer["learning"] | changes}


def with_optimizer(prepared: Prepared, **changes: Any) -> Prepared:
    """The same search with other settings of its optimizer, as a run with `--set` has them."""
    optimizer = prepared.config.optimizer.model_copy(update=changes)
    return replace(prepared, config=prepared.config.model_copy(update={"optimizer": optimizer}))


def references(prepared: Prepared) -> tuple[str, str]:
    math, lang = (prepared.config.models[name] for name in ("math", "lang"))
    return math, lang


def losses(prepared: Prepared, noise: float = 0.1) -> Quadratics:
    """Losses of two objectives, and of a third metric; the first wants math alone, the others want more of lang."""
    math, lang = references(prepared)
    wanted = {metric.name: {math: 0.2, lang: 0.9} for metric in prepared.config.measured}
    wanted[prepared.config.objectives[0].name] = {math: 1.0, lang: 0.1}
    return Quadratics(tuple(prepared.models.table), wanted, noise)


def rising(candidate: Candidate) -> tuple[float, float]:
    """Scores that rise along the path of the losses above; controls without a genome score less."""
    if candidate.genome is None:
        return 0.3, 0.31
    distance = float(((np.array(candidate.genome) - 0.55) ** 2).mean())
    return 0.9 - distance, 0.8 - distance


def names(config: SearchConfig) -> list[str]:
    return [metric.name for metric in config.measured]


def run(
    prepared: Prepared, directory: Path, scorer: Any = rising, follower: Any = None, heard: Any = None, **pool: Any
) -> tuple[Archive, FakePool]:
    directory.mkdir(exist_ok=True)
    archive = Archive(directory, prepared.config, prepared.space.genes)
    fake = FakePool(names(prepared.config), scorer, follower=follower or losses(prepared), **pool)
    listener = heard.append if heard is not None else unheard
    tensors = tuple(prepared.models.table)
    Search(prepared.config, prepared.space, archive, fake, listener, tensors).run()
    return archive, fake


def run_through_kills(prepared: Prepared, directory: Path, kill: int, **options: Any) -> tuple[Archive, list[Any]]:
    """Runs a search that is killed after so many jobs, again and again until it is through."""
    done: list[Any] = []
    for attempt in range(1000):
        directory.mkdir(exist_ok=True)
        archive = Archive(directory, prepared.config, prepared.space.genes)
        follower = options.get("follower") or losses(prepared)
        scorer = options.get("scorer", rising)
        pool = FakePool(names(prepared.config), scorer, 3, attempt, dies_after=kill, follower=follower)
        search = Search(prepared.config, prepared.space, archive, pool, unheard, tuple(prepared.models.table))
        try:
            search.run()
        except Killed:
            done += pool.evaluated
            continue
        return archive, done + pool.evaluated
    raise AssertionError("it does not come to an end")


def content(archive: Archive, prepared: Prepared) -> Content:
    """Everything that an archive has of a search but for times."""
    gradients = [
        (record.step, record.shard, record.genome, record.losses, record.slopes.tobytes(), record.error)
        for record in archive.gradients()
    ]
    rows = {split: [record.candidate for record in archive.records(split)] for split in prepared.config.splits}
    return commands.candidates(archive, prepared.config), rows, gradients


def ids(archive: Archive) -> list[str]:
    return [record.candidate.id for record in archive.records() if record.candidate.kind == "search"]


# Order and kills


@pytest.mark.parametrize(("kind", "shards"), [("learned first", 3), ("learned alone", 1), ("auto", 3), ("auto", 1)])
def test_the_archive_depends_neither_on_the_number_of_workers_nor_on_who_finishes_first(
    make: Callable[..., Prepared], tmp_path: Path, kind: str, shards: int
) -> None:
    prepared = make(with_learning(SEARCHES[kind], shards=shards), space=SPACE | {"tensor_weights": False})
    alone, _ = run(prepared, tmp_path / "alone")
    expected = content(alone, prepared)
    taken = 10 if kind == "auto" else 6
    assert len(expected[2]) == taken * shards
    for size, seed in [(2, 1), (5, 2), (16, 3)]:
        together, _ = run(prepared, tmp_path / f"{size}", size=size, seed=seed)
        assert content(together, prepared) == expected


def test_where_all_scores_are_equal_the_order_of_arrival_decides_nothing(
    make: Callable[..., Prepared], tmp_path: Path
) -> None:
    prepared = make(with_learning(LEARNED_FIRST, every=1, patience=9) | {"evaluations": 30})
    order_of_steps = ["base", "parent-math", "parent-lang", "uniform"]
    for step in (1, 3, 5):
        steps = [f"step-{number:04d}" for number in (step, step + 1)]
        order_of_steps += [*steps, f"l{step + 1:04d}", f"l{step:04d}"]  # the later candidate first
    found = []
    for order in ([], order_of_steps):
        archive, pool = run(prepared, tmp_path / f"{len(order)}", lambda _: (0.5, 0.5), size=4, order=order)
        if order:
            assert [name for name, _ in pool.evaluated[: len(order)]] == order
        found.append(content(archive, prepared))
    assert found[0] == found[1]


@pytest.mark.parametrize(("kind", "shards"), [("learned first", 3), ("auto", 1)])
def test_killed_at_any_moment_it_resumes_to_the_same_archive_and_repeats_no_finished_job(
    make: Callable[..., Prepared], tmp_path: Path, kind: str, shards: int
) -> None:
    prepared = make(with_learning(SEARCHES[kind], shards=shards), space=SPACE | {"tensor_weights": False})
    whole, undisturbed = run(prepared, tmp_path / "whole")
    expected, total = content(whole, prepared), len(undisturbed.evaluated)
    for kill in (3, total // 2 + 1, total - 1):
        resumed, done = run_through_kills(prepared, tmp_path / f"killed-{kill}", kill)
        assert content(resumed, prepared) == expected
        assert max(Counter(done).values()) == 1
        assert sorted(done) == sorted(undisturbed.evaluated)


def test_a_recorded_gradient_of_another_genome_is_refused(make: Callable[..., Prepared], tmp_path: Path) -> None:
    prepared = make(LEARNED_FIRST)
    archive, _ = run(prepared, tmp_path)
    records = archive._gradients._records
    records[3, 0] = replace(records[3, 0], genome=digest_of((1.0, 2.0)))
    search = Search(
        prepared.config, prepared.space, archive, FakePool([], rising), unheard, tuple(prepared.models.table)
    )
    with pytest.raises(WorkFailed, match=r"step-0003 is recorded with another genome than .*; resume with the version"):
        search.run()


# The path


def test_candidates_on_the_path_are_numbered_by_their_steps_and_generations_go_on_after_them(
    make: Callable[..., Prepared], tmp_path: Path
) -> None:
    prepared = make(with_learning(LEARNED_FIRST, steps=5))
    archive, _ = run(prepared, tmp_path)
    searched = [record.candidate for record in archive.records() if record.candidate.kind == "search"]
    on_path = [candidate for candidate in searched if is_learned(candidate)]
    assert [candidate.id for candidate in on_path] == ["l0002", "l0004", "l0005"]
    assert [candidate.generation for candidate in on_path] == [0, 1, 2]
    evolved = [candidate for candidate in searched if not is_learned(candidate)]
    assert evolved[0].id == "g0003-00"
    assert {candidate.generation for candidate in evolved} == set(range(3, 3 + len({c.generation for c in evolved})))


def test_following_gradients_lowers_the_losses_that_it_follows(make: Callable[..., Prepared], tmp_path: Path) -> None:
    prepared = make(with_learning(LEARNED_ALONE, steps=24, every=8) | {"evaluations": 60})
    archive, _ = run(prepared, tmp_path, follower=losses(prepared, noise=0.0))
    records = archive.gradients()
    first, last = (sum(record.losses.values()) for record in (records[0], records[-1]))
    best = 2 * (0.4**2)  # half the squared distance of what the two objectives want, for either model
    assert first - best > 4 * (last - best) > 0


@pytest.mark.parametrize("best", ["l0004", "parent-lang", "l0006"])
def test_evolution_starts_at_the_best_of_the_path_and_the_controls(
    make: Callable[..., Prepared], tmp_path: Path, best: str
) -> None:
    prepared = make(LEARNED_FIRST)
    archive, _ = run(prepared, tmp_path, lambda each: (0.9, 0.9) if each.id == best else (0.2, 0.2))
    at_start = archive.find("g0003-00", "search").candidate.genome
    leader = archive.find(best, "search").candidate
    expected = leader.genome if best != "parent-lang" else prepared.space.encode({"lang": 1.0})
    assert np.array_equal(at_start, expected)


def test_the_stage_ends_when_scores_have_not_risen_for_as_long_as_patience_says(
    make: Callable[..., Prepared], tmp_path: Path
) -> None:
    prepared = make(with_learning(LEARNED_FIRST, steps=30, every=1, share=0.1, patience=2) | {"evaluations": 60})
    heights = {"l0001": 0.4, "l0002": 0.6, "l0003": 0.5, "l0004": 0.6}

    def scores(candidate: Candidate) -> tuple[float, float]:
        height = heights.get(candidate.id, 0.3)
        return height, height

    archive, _ = run(prepared, tmp_path / "alone", scores)
    path = [name for name in ids(archive) if name.startswith("l")]
    assert path == ["l0001", "l0002", "l0003", "l0004", "l0005"], (
        "the fifth was on its way when the fourth was no better"
    )
    together, _ = run(prepared, tmp_path / "together", scores, size=16, seed=5)
    assert content(together, prepared) == content(archive, prepared)
    assert any(name.startswith("g") for name in ids(archive))
    assert commands.status(archive, prepared.config)["early"] == ""
    alone = make(with_learning(LEARNED_ALONE, steps=30, every=1, share=0.1, patience=2) | {"evaluations": 60})
    archive, _ = run(alone, tmp_path / "by itself", scores)
    early = commands.status(archive, alone.config)["early"]
    assert early == "search scores have not risen for 2 candidates along gradients"


# Failures


@pytest.mark.parametrize("fails", [1, 3])
def test_a_step_that_fails_ends_the_stage_and_the_search_goes_on_even_after_a_resume(
    make: Callable[..., Prepared], tmp_path: Path, fails: int
) -> None:
    prepared = make(with_learning(LEARNED_FIRST, shards=3))
    good = losses(prepared)

    def follower(candidate: Candidate, descent: Descent) -> Gradient | str:
        return "out of memory" if (descent.step, descent.shard) == (fails, 1) else good(candidate, descent)

    heard: list[Event] = []
    whole, undisturbed = run(prepared, tmp_path / "whole", follower=follower, heard=heard)
    assert max(record.step for record in whole.gradients()) == fails
    assert [record.error for record in whole.gradients()][-3:] == [None, "out of memory", None]
    warnings = [event.message for event in heard if isinstance(event, Warned) and "gradients" in event.message]
    assert warnings == [f"step {fails} failed (out of memory), so no more steps along gradients are taken."]
    assert any(name.startswith("g") for name in ids(whole))
    assert commands.status(whole, prepared.config)["state"] == "finished"
    for kill in (5, len(undisturbed.evaluated) - 1):
        resumed, done = run_through_kills(prepared, tmp_path / f"{kill}", kill, follower=follower)
        assert content(resumed, prepared) == content(whole, prepared)
        assert max(Counter(done).values()) == 1


def test_a_candidate_on_the_path_that_fails_is_recorded_and_never_leads(
    make: Callable[..., Prepared], tmp_path: Path
) -> None:
    prepared = make(LEARNED_FIRST)
    archive, _ = run(prepared, tmp_path, lambda each: "it broke" if each.id == "l0004" else rising(each))
    assert archive.find("l0004", "search").evaluation.error == "it broke"
    assert "l0006" in ids(archive)
    assert archive.find("g0003-00", "search").candidate.genome != archive.find("l0004", "search").candidate.genome


def test_a_search_whose_first_step_fails_and_that_only_follows_gradients_still_ends(
    make: Callable[..., Prepared], tmp_path: Path
) -> None:
    prepared = make(LEARNED_ALONE)
    archive, _ = run(prepared, tmp_path, follower=lambda *_: "no")
    assert ids(archive) == []
    status = commands.status(archive, prepared.config)
    assert (status["state"], status["early"]) == ("finished", "step 1 failed (no)")


# Budgets


def cost(archive: Archive, prepared: Prepared) -> float:
    """What a search has cost, in forward passes over all search items."""
    learning, items = prepared.config.optimizer.learning, prepared.config.items
    total = 0.0
    for record in archive.gradients():
        total += (1.0 if record.step < 0 else 3 * learning.share) / learning.shards
    total += len(ids(archive))
    reported = len(archive.records("heldout"))
    watched = len(archive.records("selection")) - reported if items.selection else 0
    return total + max(0, watched) * (items.selection or 0) / (items.search or 1)


@pytest.mark.parametrize("budget", [{"evaluations": 23}, {"equivalents": 23.5}, {"equivalents": 9.0}])
@pytest.mark.parametrize("shards", [1, 3])
def test_steps_and_candidates_together_keep_to_the_budget(
    make: Callable[..., Prepared], tmp_path: Path, budget: dict[str, float], shards: int
) -> None:
    prepared = make(with_learning(LEARNED_FIRST, shards=shards) | budget)
    archive, _ = run(prepared, tmp_path, size=4)
    limit = next(iter(budget.values()))
    population = prepared.config.optimizer.population
    assert limit <= cost(archive, prepared) < limit + population
    assert len(archive.gradients()) * 3 * 0.5 / shards <= 0.6 * limit


def test_gradients_alone_keep_to_the_budget(make: Callable[..., Prepared], tmp_path: Path) -> None:
    prepared = make(with_learning(LEARNED_ALONE, steps=50, patience=50) | {"evaluations": 17})
    archive, _ = run(prepared, tmp_path, size=4)
    assert 17 - 3 < cost(archive, prepared) <= 17 + 1


@pytest.mark.parametrize("budget", ["evaluations", "equivalents"])
def test_an_extended_search_keeps_what_it_had(make: Callable[..., Prepared], tmp_path: Path, budget: str) -> None:
    prepared = make(LEARNED_FIRST | {budget: 16})
    longer = with_optimizer(prepared, **{budget: 26})
    short, before = run(prepared, tmp_path / "extended")
    kept = content(short, prepared)
    assert commands.status(short, longer.config)["state"] == "interrupted"
    extended, pool = run(longer, tmp_path / "extended", size=3)
    expected, _ = run(longer, tmp_path / "long")
    assert not set(pool.evaluated) & set(before.evaluated)
    assert content(extended, longer)[2] == kept[2] == content(expected, longer)[2]
    assert ids(extended)[: len(ids(short))] == ids(short)
    assert [record.candidate for record in extended.records()] == [record.candidate for record in expected.records()]
    status = commands.status(extended, longer.config)
    assert (status["state"], status["early"]) == ("finished", "")


def test_a_search_ends_when_scores_on_selection_items_stop_rising(
    make: Callable[..., Prepared], tmp_path: Path
) -> None:
    optimizer = LEARNED_FIRST | {"evaluations": 200, "stop_after": 12}
    items = {"search": 24, "heldout": 24, "selection": 24}
    prepared = make(with_learning(optimizer, shards=3), items=items)

    def fits_ever_better(candidate: Candidate, split: str) -> tuple[float, float]:
        first, second = rising(candidate)
        if split == "selection" and candidate.generation > 4:
            return 0.4, 0.4
        return first, second

    whole, undisturbed = run(prepared, tmp_path / "whole", fits_ever_better)
    evolved = [name for name in ids(whole) if name.startswith("g")]
    assert 12 <= len(evolved) <= 60
    status = commands.status(whole, prepared.config)
    assert status["state"] == "finished"
    assert status["early"] == "scores on selection items have not risen for 12 candidates"
    assert "selection" in {split for name, split in undisturbed.evaluated if name.startswith("l")}
    expected = content(whole, prepared)
    for size in (2, 16):
        together, _ = run(prepared, tmp_path / f"{size}", fits_ever_better, size=size, seed=size)
        assert content(together, prepared) == expected
    for kill in (7, len(undisturbed.evaluated) // 2):
        resumed, done = run_through_kills(prepared, tmp_path / f"killed-{kill}", kill, scorer=fits_ever_better)
        assert content(resumed, prepared) == expected
        assert max(Counter(done).values()) == 1


# Constraints


def three_scores(candidate: Candidate) -> tuple[float, float, float]:
    good = {"parent-lang": (0.2, 0.5, 0.9), "parent-math": (0.6, 0.3, 0.2)}
    return good.get(candidate.id, (0.3, 0.3, 0.8))


def test_a_constraint_s_loss_is_brought_down_to_its_parent_s(make: Callable[..., Prepared], tmp_path: Path) -> None:
    """The objectives want what is bad for the constrained metric. Its loss ends near the limit instead of far above."""
    ends = {}
    for constraints in ([], [{"task": "lang_b", "retain": 0.9}]):
        optimizer = with_learning(LEARNED_ALONE, steps=120, every=60, share=0.25) | {"evaluations": 300}
        prepared = make(optimizer, constraints=constraints)
        math, lang = references(prepared)
        wanted = {metric.name: {math: 1.0, lang: 0.0} for metric in prepared.config.objectives}
        wanted["lang_b"] = {math: 0.0, lang: 1.0}
        follower = Quadratics(tuple(prepared.models.table), wanted)
        scorer = three_scores if constraints else lambda each: three_scores(each)[:2]
        archive, _ = run(prepared, tmp_path / f"{len(constraints)}", scorer, follower=follower)
        last = archive.find("l0120", "search").candidate
        descent = Descent(1, 1.0, 0, 1, (("lang_b", 1.0),), ())
        ends[len(constraints)] = follower(last, descent).losses["lang_b"]
        before = [record for record in archive.gradients() if record.step < 0]
        assert len(before) == len(constraints)
        assert [record.losses for record in before] == [{"lang_b": 0.0}] * len(constraints)
    assert ends[0] > 0.9
    assert ends[1] < -np.log(0.9) + 0.1


def test_the_multiplier_rises_while_a_loss_is_above_its_limit_and_falls_to_0_below() -> None:
    config = SearchConfig.model_validate(
        {
            "base": "b",
            "models": {"m": "m"},
            "objectives": [{"task": "t"}],
            "constraints": [{"task": "u", "retain": 0.5}],
        }
    )
    controls = essential_controls(config)
    limits = loss_limits(config, controls, [Evaluation({"t": 0.1, "u": 0.5})] * len(controls))
    multipliers = Multipliers(limits)
    multipliers.bound({"u": 1.0})
    path = []
    for loss in [3.0] * 5 + [0.0] * 30:
        multipliers.follow({"u": loss})
        path.append(multipliers.values["u"])
    assert path[:5] == sorted(path[:5])
    assert path[0] == pytest.approx(2 * (3.0 - 1.0 - np.log(2)))
    assert path[-1] == 0.0
    assert min(path) >= 0.0


@pytest.mark.parametrize("of", [None, "base", "second"])
def test_losses_are_limited_by_the_parents_that_scores_are_limited_by(tmp_path: Path, of: str | None) -> None:
    constraints = (ConstraintConfig(task="u", retain=0.8, of=of), ConstraintConfig(task="u", retain=0.9, of=of))
    config = SearchConfig.model_validate(
        {"base": "b", "models": {"first": "f", "second": "s"}, "objectives": [{"task": "t"}]}
    ).model_copy(update={"constraints": constraints})
    controls = essential_controls(config)
    scores = {"base": 0.9, "parent-first": 0.7, "parent-second": 0.5, "uniform": 0.95}
    evaluations = [Evaluation({"t": 0.1, "u": scores[each.id]}) for each in controls]
    [limit] = loss_limits(config, controls, evaluations)
    archive = Archive(tmp_path, config, ())
    for candidate, evaluation in zip(controls, evaluations, strict=True):
        archive.record(candidate, evaluation, "search")
    source = criteria_of(archive, config).limits[-1].source
    assert source.startswith(f"of {limit.parent.id}'s ")
    assert limit.slack == pytest.approx(-np.log(0.9))


# Layers that are compared


def test_models_that_beat_the_base_are_averaged_by_how_much_they_do() -> None:
    objectives = [{"task": "t"}, {"task": "u"}, {"task": "v", "goal": "minimize"}, {"cost": "parameters"}]
    config = SearchConfig.model_validate(
        {
            "base": "b",
            "models": {"first": "f", "second": "s"},
            "objectives": objectives,
            "optimizer": {"learning": {"loss": "activations"}},
        }
    )
    scores = {
        "base": {"t": 0.2, "u": 0.9, "v": 8.0},
        "parent-first": {"t": 0.5, "u": 0.9, "v": 9.0},
        "parent-second": {"t": 0.3, "u": 0.1, "v": 4.0},
        "uniform": {"t": 1.0, "u": 1.0, "v": 1.0},
    }
    controls = essential_controls(config)
    found = sources_of(config, controls, [Evaluation(scores[each.id]) for each in controls])
    assert {name: dict(own) for name, own in found} == {
        "t": pytest.approx({"f": 0.75, "s": 0.25}),
        "u": {"b": 1.0},
        "v": {"s": 1.0},
    }
    without = [
        failure("broken") if each.id in ("base", "parent-second") else Evaluation(scores[each.id]) for each in controls
    ]
    assert dict(sources_of(config, controls, without))["t"] == (("b", 1.0),)
    likelihood = config.model_copy(
        update={"optimizer": config.optimizer.model_copy(update={"learning": LearningConfig()})}
    )
    assert sources_of(likelihood, controls, []) == ()


def test_steps_that_compare_layers_name_the_sources_and_count_what_was_read_before(
    make: Callable[..., Prepared], tmp_path: Path
) -> None:
    prepared = make(with_learning(LEARNED_ALONE, loss="activations", shards=2))
    math, lang = references(prepared)
    follow, asked = losses(prepared), list[Descent]()

    def follower(candidate: Candidate, descent: Descent) -> Gradient:
        asked.append(descent)
        return follow(candidate, descent)

    def scores(candidate: Candidate) -> tuple[float, float]:
        return {"base": (0.1, 0.5), "parent-math": (0.4, 0.4), "parent-lang": (0.2, 0.6)}.get(candidate.id, (0.3, 0.3))

    archive, _ = run(prepared, tmp_path, scores, follower)
    first, second = (objective.name for objective in prepared.config.objectives)
    assert len(asked) == 12
    for descent in asked:
        assert descent.sources_by_name[first] == pytest.approx({math: 0.75, lang: 0.25})
        assert descent.sources_by_name[second] == {lang: 1.0}
    results = Results(archive, prepared.config)
    assert results.equivalents == pytest.approx(cost(archive, prepared) + 3)
    assert costs(results).searched.passes == pytest.approx(results.equivalents)
    unlike = make(with_learning(LEARNED_ALONE, loss="entropy"))
    archive, _ = run(unlike, tmp_path / "entropy", scores)
    assert Results(archive, unlike.config).equivalents == pytest.approx(cost(archive, unlike))


@pytest.mark.parametrize(
    ("settings", "width", "again"),
    [
        ({"name": "learned"}, 1 << 15, True),
        ({"name": "learned"}, 1 << 10, False),
        ({"name": "cma_es"}, 1 << 15, False),
        ({"name": "learned", "learning": {"checkpointing": False}}, 1 << 15, False),
        ({"name": "learned", "learning": {"checkpointing": True}}, 1 << 10, True),
    ],
)
def test_layers_are_computed_again_where_gradients_of_large_models_are_followed(settings, width, again):
    large = SimpleNamespace(table={"weight": TensorInfo(Path("model"), "BF16", (width, width), "weight")})
    resolved = with_checkpointing(OptimizerConfig.model_validate(settings), large)
    assert resolved.learning.checkpointing is again
