"""What a search has found: its best, its front and what is reported, from whatever scores there are."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.archive.archive import Record
from evomerge.candidate import Candidate, Evaluation, failure
from evomerge.config.search import SearchConfig
from evomerge.recipe import single
from evomerge.search.best import HELDOUT_FRONT, best_of, front_of
from evomerge.search.results import Results, all_failed, none_feasible
from tests.searches import small_search

CONTROLS = ("base", "parent-math", "parent-lang", "uniform")
ONE = [{"task": "base_qa"}]
TWO = [{"task": "base_qa"}, {"task": "cross_math_b"}]
KEPT = [{"task": "lang_b", "retain": 0.5, "of": "lang"}]


class Recorded:
    """As much of an archive as results read: records by split, in the order of the search."""

    def __init__(self, **splits: Sequence[Record]) -> None:
        self._splits = splits

    def records(self, split: str = "search") -> list[Record]:
        ordered = sorted(
            self._splits.get(split, ()), key=lambda each: (each.candidate.generation, each.candidate.index)
        )
        return list(ordered)

    def tried(self) -> list[Record]:
        return self.records()

    def find(self, name: str, split: str) -> Record | None:
        return next((each for each in self._splits.get(split, ()) if each.candidate.id == name), None)


def control(number: int, scores: Mapping[str, float] | None) -> Record:
    name = CONTROLS[number]
    return Record(Candidate(name, "control", -1, number, single(name)), outcome(scores, name))


def searched(number: int, scores: Mapping[str, float] | None, fingerprint: str = "") -> Record:
    """The candidate of this number, four to a generation; by default its weights are like no other's."""
    generation, index = divmod(number, 4)
    name = f"g{generation:04d}-{index:02d}"
    candidate = Candidate(name, "search", generation, index, single("zoo:math"), (float(number),))
    return Record(candidate, outcome(scores, fingerprint or name))


def outcome(scores: Mapping[str, float] | None, fingerprint: str) -> Evaluation:
    return failure("out of memory", fingerprint) if scores is None else Evaluation(scores, fingerprint=fingerprint)


def results(objectives: Sequence[Any], changes: Mapping[str, Any], **splits: Sequence[Record]) -> Results:
    archive: Any = Recorded(**splits)
    return Results(archive, SearchConfig.model_validate(small_search(objectives=list(objectives), **changes)))


def ids(records: Sequence[Record]) -> list[str]:
    return [record.candidate.id for record in records]


units = st.integers(0, 4).map(lambda number: number / 4)  # few values, so that there are ties
one_score = st.none() | st.builds(lambda a: {"base_qa": a}, units)
two_scores = st.none() | st.builds(lambda a, b: {"base_qa": a, "cross_math_b": b}, units, units)
guarded = st.none() | st.builds(lambda a, b, c: {"base_qa": a, "cross_math_b": b, "lang_b": c}, units, units, units)


def of_search(found: Sequence[Mapping[str, float] | None], known: Sequence[Mapping[str, float] | None]) -> list[Record]:
    """Controls and candidates with these scores."""
    return [*(control(i, each) for i, each in enumerate(known)), *(searched(i, each) for i, each in enumerate(found))]


@given(st.lists(one_score, min_size=1, max_size=9), st.lists(one_score, max_size=4))
def test_with_one_objective_the_front_is_all_that_score_highest_and_the_best_is_on_it_unless_a_control_is_better(
    found: list[dict[str, float] | None], known: list[dict[str, float] | None]
) -> None:
    records = of_search(found, known)
    judged = results(ONE, {}, search=records)
    scores = [each.evaluation.scores["base_qa"] for each in records if each.evaluation.scores is not None]
    best, front = judged.best(), judged.front()
    if not scores:
        assert (best, front) == (None, [])
        return
    assert best is not None
    assert best.evaluation.scores is not None
    top = [each for each in records if each.evaluation.scores == {"base_qa": max(scores)}]
    assert ids(front) == ids(top)
    assert (best in front) == (best.evaluation.scores["base_qa"] == max(scores))
    assert best.candidate.kind == ("search" if any(found) else "control")


def dominates(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    return all(one[name] >= other[name] for name in other) and dict(one) != dict(other)


@given(st.lists(two_scores, max_size=9), st.lists(two_scores, max_size=4))
def test_a_record_is_on_the_front_exactly_where_nothing_dominates_it(
    found: list[dict[str, float] | None], known: list[dict[str, float] | None]
) -> None:
    records = of_search(found, known)
    front = results(TWO, {}, search=records).front()
    scores = [each.evaluation.scores for each in records if each.evaluation.scores is not None]
    for record in records:
        mine = record.evaluation.scores
        assert (record in front) == (mine is not None and not any(dominates(other, mine) for other in scores))
    means = [sum(record.evaluation.scores.values()) for record in front if record.evaluation.scores]
    assert means == sorted(means, reverse=True)
    assert len(front) == len(set(ids(front)))


@given(st.lists(guarded, max_size=9), st.lists(guarded, min_size=4, max_size=4))
def test_what_breaks_a_limit_is_neither_best_nor_on_the_front(
    found: list[dict[str, float] | None], known: list[dict[str, float] | None]
) -> None:
    records = of_search(found, known)
    judged = results(TWO, {"constraints": KEPT}, search=records)
    parent = known[CONTROLS.index("parent-lang")]
    kept = [
        record
        for record in records
        if parent is not None
        and record.evaluation.scores is not None
        and record.evaluation.scores["lang_b"] >= 0.5 * parent["lang_b"]
    ]
    best, front = judged.best(), judged.front()
    assert set(ids(front)) <= set(ids(kept))
    assert (best is None) == (not kept) == (not front)
    assert best is None or best in kept


@given(st.lists(two_scores, max_size=9), st.lists(two_scores, max_size=4), st.randoms(use_true_random=False))
def test_of_equal_candidates_the_earliest_is_the_best_in_whatever_order_they_are_given(
    found: list[dict[str, float] | None], known: list[dict[str, float] | None], random: Any
) -> None:
    records = of_search(found, known)
    criteria = results(TWO, {}, search=records).criteria()
    shuffled = random.sample(records, len(records))
    best = best_of(shuffled, criteria)
    means = [sum(each.evaluation.scores.values()) if each.evaluation.scores else -np.inf for each in records]
    expected = None if max(means, default=-np.inf) == -np.inf else records[int(np.argmax(means))]
    assert best == expected
    assert front_of(shuffled, criteria) == front_of(records, criteria)


@given(st.lists(st.tuples(st.sampled_from("abc"), units), min_size=1, max_size=9))
def test_of_the_same_weights_the_front_has_the_earliest_alone(found: list[tuple[str, float]]) -> None:
    scores = dict(found)
    records = [searched(i, {"base_qa": scores[weights]}, weights) for i, (weights, _) in enumerate(found)]
    front = results(ONE, {}, search=records).front()
    top = [weights for weights in scores if scores[weights] == max(scores.values())]
    first = {weights: next(each for each in records if each.evaluation.fingerprint == weights) for weights in top}
    assert sorted(ids(front)) == sorted(ids(list(first.values())))


@given(st.lists(two_scores, max_size=9), st.lists(two_scores, max_size=4))
def test_what_is_reported_is_every_control_that_did_not_fail_the_best_and_the_front_in_the_order_of_the_search(
    found: list[dict[str, float] | None], known: list[dict[str, float] | None]
) -> None:
    records = of_search(found, known)
    judged = results(TWO, {}, search=records)
    best = judged.best()
    wanted = [record for record in records if record.candidate.kind == "control" and not record.evaluation.failed]
    wanted += judged.front() + ([best] if best is not None else [])
    assert [each.id for each in judged.reported()] == [name for name in ids(records) if name in ids(wanted)]


def test_a_long_front_is_reported_as_far_as_its_best_go() -> None:
    count = HELDOUT_FRONT + 9
    records = [searched(i, {"base_qa": i / count, "cross_math_b": 1 - (i / count) ** 2}) for i in range(count)]
    judged = results(TWO, {}, search=records)
    assert len(judged.front()) == count
    assert {each.id for each in judged.reported()} == set(ids(judged.front()[:HELDOUT_FRONT]))


SELECTION = {"items": {"search": 24, "selection": 24, "heldout": 24}}


@given(st.lists(two_scores, min_size=1, max_size=7), st.lists(units, min_size=9, max_size=9), st.data())
def test_selection_items_decide_among_the_reported_once_all_of_them_have_scores(
    found: list[dict[str, float] | None], values: list[float], data: st.DataObject
) -> None:
    known = [{"base_qa": 0.0, "cross_math_b": 0.0}] * 2
    records = of_search(found, known)
    without = results(TWO, {}, search=records)
    chosen = without.reported()
    selected = [
        Record(each, Evaluation({"base_qa": value, "cross_math_b": value}, fingerprint=each.id))
        for each, value in zip(chosen, values, strict=False)
    ]
    missing = data.draw(st.sampled_from(["none", "one", "all"]))
    present = {"none": selected, "one": selected[:-1], "all": []}[missing]
    best = results(TWO, SELECTION, search=records, selection=present).best()
    assert results(TWO, {}, search=records, selection=present).best() == without.best()
    if missing != "none":
        assert best == without.best()
        return
    contenders = [each for each in selected if each.candidate.kind == "search"] or selected
    top = max(contenders, key=lambda each: (each.evaluation.scores or {})["base_qa"])  # of several the first
    assert best == next(record for record in records if record.candidate.id == top.candidate.id)


def scores(quality: float, kept: float) -> dict[str, float]:
    return {"base_qa": quality, "cross_math_b": quality, "lang_b": kept}


def test_what_breaks_a_limit_on_search_items_or_on_selection_items_is_not_chosen_by_selection_items() -> None:
    changes = {"constraints": KEPT} | SELECTION
    known = [control(i, scores(0.1, 0.2 if i == 0 else 1.0)) for i in range(4)]
    first = scores(0.5, 1.0) | {"base_qa": 0.7}  # which the next does not dominate
    found = [searched(0, first), searched(1, scores(0.6, 0.9)), searched(2, scores(0.9, 0.1))]
    on_selection = [control(0, scores(0.9, 1.0)), *(control(i, scores(0.2, 1.0)) for i in (1, 2, 3))]
    without = results(TWO, changes, search=[*known, found[2]], selection=on_selection)
    assert [each.id for each in without.reported()] == list(CONTROLS)
    assert without.best() == known[1]  # the base breaks the limit on search items
    on_selection += [searched(0, scores(0.3, 1.0)), searched(1, scores(0.8, 0.2))]
    judged = results(TWO, changes, search=[*known, *found], selection=on_selection)
    assert [each.id for each in judged.reported()] == [*CONTROLS, "g0000-00", "g0000-01"]
    assert judged.best() == found[0]  # the other breaks it on selection items


def test_a_search_whose_candidates_all_failed_says_why_the_commonest_reason_first() -> None:
    reasons = ["out of memory", "no such tensor.", "out of memory", "a", "b", "c"]
    found = [replace(searched(i, None), evaluation=failure(reason)) for i, reason in enumerate(reasons)]
    told = all_failed(results(ONE, {}, search=[control(0, {"base_qa": 0.5}), *found]))
    assert told is not None
    assert told.startswith("all 6 candidates failed (2 x out of memory; 1 x ")
    assert told.endswith("; 2 for other reasons)")
    assert all_failed(results(ONE, {}, search=[*found, searched(9, {"base_qa": 0.0})])) is None
    assert all_failed(results(ONE, {}, search=[control(0, None)])) is None


def test_where_no_candidate_keeps_to_the_constraints_the_closest_is_named() -> None:
    strict = [{"task": "lang_b", "retain": 1.0, "of": "lang"}]
    known = [control(i, {"base_qa": 0.5, "lang_b": 0.25}) for i in (0, 1, 3)]
    parent = control(2, {"base_qa": 0.5, "lang_b": 0.9})
    found = [searched(i, {"base_qa": 0.5, "lang_b": value}) for i, value in enumerate((0.8, 0.1, 0.3, 0.2))]
    judged = results(ONE, {"constraints": strict}, search=[*known, parent, *found])
    assert judged.best() == parent
    cost = [*ONE, {"cost": "layers", "max": 4}]
    found = [searched(i, {"base_qa": 0.9, "layers": layers}) for i, layers in enumerate((6.0, 5.0, 7.0))]
    told = none_feasible(results(cost, {}, search=found))
    assert told.startswith("no candidate keeps to the constraints on search items: layers at most 4 (max); g0000-01 ")


@pytest.mark.parametrize("split", ["search", "heldout"])
def test_the_criteria_of_a_split_are_judged_by_the_parents_scores_on_it(split: Any) -> None:
    bound = {"search": 0.4, "heldout": 0.1}
    splits = {
        name: [control(i, {"base_qa": 0.5, "lang_b": 2 * value}) for i in range(4)] for name, value in bound.items()
    }
    [limit] = results(ONE, {"constraints": KEPT}, **splits).criteria(split).limits
    assert limit.bound == pytest.approx(bound[split])
