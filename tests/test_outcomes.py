"""Outcomes keep what the statistics need in a few bytes an item, through the archive and back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.archive.archive import Archive
from evomerge.candidate import Candidate, Evaluation
from evomerge.config import files
from evomerge.outcomes import Outcomes
from evomerge.recipe import single

bits = st.lists(st.sampled_from([0.0, 1.0, 0, 1, True, False]), max_size=40)
numbers = st.lists(st.floats(-1e4, 1e4, width=16), max_size=40)


@given(bits, st.none() | numbers)
def test_right_and_wrong_come_back_exactly(values, margins):
    outcomes = Outcomes.from_json(Outcomes.of(values, margins).to_json())
    assert outcomes == Outcomes.of(values, margins)
    assert outcomes.values.tolist() == [float(value) for value in values]
    assert (None if margins is None else margins) == (None if outcomes.margins is None else outcomes.margins.tolist())


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40))
def test_other_values_come_back_to_seven_digits_and_margins_to_three(values):
    outcomes = Outcomes.of(values, values)
    np.testing.assert_allclose(outcomes.values, values, rtol=1e-7, atol=1e-40)
    np.testing.assert_allclose(outcomes.margins, np.clip(values, -65504, 65504), rtol=1e-3, atol=1e-7)


def test_a_thousand_items_take_a_bit_each_and_two_bytes_for_a_margin():
    values = np.random.default_rng(0).integers(0, 2, 1000)
    assert len(str(Outcomes.of(values).to_json())) < 250
    assert len(str(Outcomes.of(values, values).to_json())) < 3000


def test_the_archive_gives_back_what_was_recorded(search_file, tmp_path):
    settings = files.load(search_file())
    goals = tuple(each.model_copy(update={"goal": "maximize"}) for each in settings.objectives)
    settings = settings.model_copy(update={"objectives": goals})
    evaluation = Evaluation(
        scores={"base_qa": 0.5, "cross_math_b": 0.25},
        outcomes={"base_qa": Outcomes.of([1, 0], [0.5, -2]), "cross_math_b": Outcomes.of([0.5, 0.0])},
        items=4,
        fingerprint="0" * 16,
        seconds=0.5,
        truncated=3,
    )
    candidate = Candidate("base", "control", -1, 0, single("zoo:base"))
    Archive(tmp_path, settings, ()).record(candidate, evaluation, "search")
    found = Archive(tmp_path, settings, ()).find("base", "search")
    assert found is not None
    assert found.evaluation == evaluation
    assert found.evaluation.outcomes["base_qa"].margins == pytest.approx([0.5, -2])


@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_the_places_of_a_subset_come_back(chosen):
    outcomes = Outcomes.of([1.0] * sum(chosen), None, chosen)
    assert Outcomes.from_json(outcomes.to_json()) == outcomes
    assert outcomes.places.tolist() == [place for place, here in enumerate(chosen) if here]
