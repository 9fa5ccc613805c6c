"""One mean of objectives on unlike scales, in one place; accuracies keep their plain one."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from evomerge.candidate import Candidate, Evaluation
from evomerge.config.scoring import ObjectiveConfig
from evomerge.config.search import SearchConfig
from evomerge.optimizers.ranking import Ranking
from evomerge.recipe import single
from evomerge.search.criteria import Criteria, criteria_of, mean_of_scores
from tests.commands import evomerge
from tests.conftest import REPOSITORY
from tests.searches import WriteSearch, small_search

CONTROLS = ("base", "parent-math", "parent-lang", "uniform")
PERPLEXITY = {"task": "p", "metric": "word_perplexity", "goal": "minimize"}
ACC = {"task": "a", "goal": "maximize"}
OTHER = {"task": "b", "goal": "maximize", "weight": 3.0}


class Recorded:
    """As much of an archive as criteria read: the scores of candidates, the same on every split but for a shift."""

    def __init__(self, scores: Mapping[str, Mapping[str, float]], shifts: Mapping[str, float] | None = None) -> None:
        self._scores, self._shifts = scores, shifts or {}

    def find(self, name: str, split: str) -> Any:
        if name not in self._scores:
            return None
        scores = {key: value + self._shifts.get(split, 0.0) for key, value in self._scores[name].items()}
        record = type("Record", (), {})()
        record.candidate = Candidate(name, "control", -1, 0, single(name))
        record.evaluation = Evaluation(scores=scores)
        return record


def recorded(names: Sequence[str], rows: Sequence[Sequence[float]], shifts: Mapping[str, float] | None = None) -> Any:
    """An archive of the controls alone."""
    return Recorded({c: dict(zip(names, row, strict=True)) for c, row in zip(CONTROLS, rows, strict=True)}, shifts)


def config(*objectives: Mapping[str, Any]) -> SearchConfig:
    return SearchConfig.model_validate(small_search(objectives=list(objectives)))


units = st.integers(0, 1000).map(lambda number: number / 1000)
perplexities = st.floats(1.5, 1e5)


@given(st.lists(st.tuples(units, units), min_size=4, max_size=4), st.lists(st.tuples(units, units), min_size=1))
def test_accuracies_alone_keep_their_plain_mean_bit_for_bit(
    known: list[tuple[float, float]], found: list[tuple[float, float]]
) -> None:
    criteria = criteria_of(recorded(["a", "b"], known), config(ACC, OTHER))
    evaluations = [Evaluation(scores={"a": a, "b": b}) for a, b in found]
    assert criteria.mean_name == "mean"
    assert criteria.means(evaluations) == (np.array(found) @ np.array([1.0, 3.0]) / 4.0).tolist()
    assert np.array_equal(criteria.told(evaluations), np.array(found))


@given(
    st.lists(st.tuples(units, perplexities), min_size=4, max_size=4),
    st.lists(st.tuples(units, perplexities), min_size=2, max_size=12),
    st.integers(0, 9),
)
def test_the_scale_of_an_unbounded_objective_changes_no_ranking(
    known: list[tuple[float, float]], found: list[tuple[float, float]], power: int
) -> None:
    """Scaled by powers of two, so that nothing is rounded."""
    told = []
    for factor in (1.0, 2.0**power):
        archive = recorded(["a", "p:word_perplexity"], [(a, p * factor) for a, p in known])
        criteria = criteria_of(archive, config(ACC, PERPLEXITY))
        told.append(criteria.told([Evaluation(scores={"a": a, "p:word_perplexity": p * factor}) for a, p in found]))
        assert criteria.mean_name == "mean gain"
    assert np.array_equal(*told)
    for elite in (True, False):
        one, other = (Ranking(np.ones(2), elite=elite).losses(scores) for scores in told)
        assert np.array_equal(one, other)


def test_a_gain_is_the_distance_above_the_base_in_units_of_the_controls_range_and_weights_act_on_that() -> None:
    search = config({**ACC, "weight": 3.0}, PERPLEXITY)
    rows = [(0.2, 40.0), (0.6, 60.0), (0.4, 30.0), (0.5, 20.0)]
    archive = recorded(["a", "p:word_perplexity"], rows, {"heldout": 0.25})
    scored = Evaluation(scores={"a": 0.3, "p:word_perplexity": 30.0})
    assert criteria_of(archive, search).means([scored]) == pytest.approx([(3 * 0.1 / 0.4 + 10 / 40) / 4])
    base = Evaluation(scores={"a": 0.45, "p:word_perplexity": 40.25})
    assert criteria_of(archive, search, "heldout").means([base]) == pytest.approx([0.0])


def test_where_the_controls_are_nearly_alike_a_gain_is_measured_by_the_base_itself() -> None:
    rows = [(0.0, 50.0), (0.0, 50.001), (0.0, 50.0), (0.0, 49.999)]
    criteria = criteria_of(recorded(["a", "p:word_perplexity"], rows), config(ACC, PERPLEXITY))
    better = Evaluation(scores={"a": 0.1, "p:word_perplexity": 25.0})
    assert criteria.told([better])[0] == pytest.approx([0.1, 0.5])


@pytest.mark.parametrize(
    ("metric", "value", "mean"),
    [("acc", 0.5, 0.5), ("acc", 30.0, None), ("bleu", 0.5, None), ("perplexity", 0.9, None), ("f1", 1.0, 1.0)],
)
def test_one_model_has_a_mean_only_where_its_scores_are_on_one_scale(
    metric: str, value: float, mean: float | None
) -> None:
    objective = ObjectiveConfig(task="t", metric=metric, goal="maximize")
    assert mean_of_scores({objective.name: value}, [objective]) == mean


def test_criteria_without_controls_are_plain() -> None:
    search = config(ACC, PERPLEXITY)
    nothing: Any = Recorded({})
    assert criteria_of(nothing, search) == Criteria(search.objectives)


@pytest.fixture
def mixed(search_file: WriteSearch, tmp_path: Path) -> Path:
    """A search for accuracy and a low perplexity at once, over texts of the zoo's first language."""
    words = [(name, number) for name in ("tom", "ann", "bob", "eve") for number in ("one", "two", "three", "four")]
    rows = [{"text": f"<bos> Q copy {name} {number} = {name} {number} <eos>"} for name, number in words]
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "texts",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": "texts.jsonl"}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}],
    }
    (tmp_path / "texts" / "texts.yaml").write_text(yaml.safe_dump(task))
    evals = str(REPOSITORY / "evals")
    return search_file(
        tasks={"paths": [evals, str(tmp_path / "texts")]},
        objectives=[{"task": "lang_b"}, {"task": "texts", "metric": "word_perplexity"}],
        items={"search": 8, "heldout": 8},
        optimizer={"evaluations": 12, "population": 6},
    )


def test_every_report_has_the_same_mean_of_accuracy_and_perplexity(mixed: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    printed = evomerge("run", mixed, "--output", run)
    status = json.loads(evomerge("status", run, "--json"))
    rows = {row["id"]: row for row in json.loads(evomerge("candidates", run, "--json"))}
    best = status["best"]
    assert status["mean"] == "mean gain"
    assert "mean gain: how far the objectives lie above the base's" in printed
    assert rows["base"]["mean"] == pytest.approx(0.0)
    searched = [row["mean"] for row in rows.values() if row["kind"] == "search"]
    assert best["mean"] == rows[best["id"]]["mean"] == max(searched)
    known = [rows[name]["scores"] for name in CONTROLS]
    gains = []
    for name, sign in (("lang_b", 1), ("texts:word_perplexity", -1)):
        scores = [row[name] for row in known]
        gains.append(sign * (best["scores"][name] - scores[0]) / (max(scores) - min(scores)))
    assert best["mean"] == pytest.approx(sum(gains) / 2)
    front = {row["id"]: row["mean"] for row in json.loads(evomerge("front", run, "--json"))}
    assert front == {name: rows[name]["mean"] for name in front}
    assert list(front.values()) == sorted(front.values(), reverse=True)
    evidence = status["evidence"]["against"]
    assert all(row["untested"] == ["texts:word_perplexity"] for row in evidence)
    assert "without texts:word_perplexity, of which no item has a score" in printed
    evomerge("export", run, "-o", tmp_path / "recipe.yaml")
    evomerge("merge", tmp_path / "recipe.yaml", tmp_path / "merged")
    card = (tmp_path / "merged" / "README.md").read_text()
    for row in evidence:
        assert f"- {row['verdict']} " in card
        assert f"{row['difference']:+.3f} in the mean gain" in card
