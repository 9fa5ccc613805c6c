"""From recorded outcomes to what is said of a candidate."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest

from evomerge.archive.archive import Archive
from evomerge.candidate import Candidate, Evaluation
from evomerge.config.files import load
from evomerge.config.search import SearchConfig
from evomerge.evidence.comparison import against, retention
from evomerge.export import choice
from evomerge.outcomes import Outcomes
from evomerge.recipe import single
from evomerge.reports import views
from evomerge.search.results import Results
from tests.searches import WriteSearch

ITEMS = 200


@pytest.fixture
def config(search_file: WriteSearch) -> SearchConfig:
    loaded = load(search_file())
    objectives = tuple(each.model_copy(update={"goal": "maximize"}) for each in loaded.objectives)
    return loaded.model_copy(update={"objectives": objectives})


def evaluation(right: Mapping[str, int]) -> Evaluation:
    """That many right answers on each task, always to the same items."""
    outcomes = {name: Outcomes.of((np.arange(ITEMS) < count).tolist()) for name, count in right.items()}
    return Evaluation({name: count / ITEMS for name, count in right.items()}, outcomes=outcomes, fingerprint="f")


def recorded(config: SearchConfig, directory: Path, scores: Mapping[str, tuple[int, int]]) -> Archive:
    directory.mkdir(exist_ok=True)
    archive = Archive(directory, config, ())
    for index, (name, counts) in enumerate(scores.items()):
        kind, generation = ("search", 0) if name.startswith("g") else ("control", -1)
        candidate = Candidate(name, kind, generation, index, single("zoo:base"))
        for split in ("search", "heldout"):
            archive.record(candidate, evaluation(dict(zip(("base_qa", "cross_math_b"), counts, strict=True))), split)
    return archive


PARENTS = {"base": (100, 20), "parent-math": (60, 90), "parent-lang": (150, 30), "uniform": (120, 80)}


def test_a_winner_is_compared_with_the_best_parent_and_the_best_control_and_corrected_for_the_others(
    config: SearchConfig, tmp_path: Path
) -> None:
    archive = recorded(config, tmp_path / "run", {**PARENTS, "g0000-00": (150, 95), "g0000-01": (121, 81)})
    parent, control = against(Results(archive, config), ["g0000-00"])["g0000-00"]
    assert (parent.rival, control.rival) == ("parent-lang", "uniform")
    assert control.difference == pytest.approx((30 + 15) / 2 / ITEMS)
    assert control.interval[0] < control.difference < control.interval[1]
    task = control.objectives["base_qa"]
    assert (task.won, task.lost, task.test) == (30, 0, "mcnemar")
    assert task.p_value == pytest.approx(2 * 0.5**30)
    assert (control.looked_at, control.corrected) == (2, pytest.approx(2 * control.p_value))
    assert control.distinguishable


def test_export_warns_of_a_control_that_held_out_items_do_not_tell_from_the_winner(
    config: SearchConfig, tmp_path: Path
) -> None:
    archive = recorded(config, tmp_path / "run", {**PARENTS, "g0000-00": (150, 95), "g0000-01": (121, 81)})
    results = Results(archive, config)
    said = {name: choice.warnings(choice.choose(results, name, ()), results) for name in ("g0000-00", "g0000-01")}
    assert said["g0000-00"] == []
    (warning,) = said["g0000-01"]
    assert warning.startswith(
        "not distinguishable from uniform on held-out items: +0.005 in the mean (95 % interval +0.0"
    )
    assert warning.endswith("corrected for 2 candidates.")


def test_retention_is_of_what_each_parent_does_best_beside_the_base(config: SearchConfig, tmp_path: Path) -> None:
    archive = recorded(config, tmp_path / "run", {**PARENTS, "g0000-00": (120, 81)})
    rows = [(row.parent, row.metric, row.kept) for row in retention(Results(archive, config), "g0000-00")]
    assert sorted(rows) == [
        ("lang", "base_qa", pytest.approx(120 / 150)),
        ("math", "cross_math_b", pytest.approx(81 / 90)),
    ]
    assert views.evidence(Results(archive, config)).retention == retention(Results(archive, config), "g0000-00")


def test_of_a_score_that_should_be_small_the_parents_share_is_kept(config: SearchConfig, tmp_path: Path) -> None:
    objectives = tuple(each.model_copy(update={"goal": "minimize"}) for each in config.objectives)
    smaller = config.model_copy(update={"objectives": objectives})
    archive = recorded(smaller, tmp_path / "run", {**PARENTS, "g0000-00": (80, 21)})
    (math,) = [row for row in retention(Results(archive, smaller), "g0000-00") if row.parent == "math"]
    assert (math.metric, math.kept) == ("base_qa", pytest.approx(60 / 80))
    (parent, _) = against(Results(archive, smaller), ["g0000-00"])["g0000-00"]
    differences = {name: row.difference for name, row in parent.objectives.items()}
    assert parent.rival == "parent-math"
    assert differences == {"base_qa": pytest.approx(-20 / ITEMS), "cross_math_b": pytest.approx(69 / ITEMS)}


def test_of_a_parent_that_leads_on_nothing_what_it_does_least_badly_counts(
    config: SearchConfig, tmp_path: Path
) -> None:
    scores = {**PARENTS, "base": (190, 100), "g0000-00": (120, 81)}
    rows = retention(Results(recorded(config, tmp_path / "run", scores), config), "g0000-00")
    assert {row.parent: row.metric for row in rows} == {"math": "cross_math_b", "lang": "base_qa"}
