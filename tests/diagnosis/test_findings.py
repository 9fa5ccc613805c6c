"""A sentence stands where its limit is passed, and nowhere else."""

from dataclasses import replace

import pytest

from evomerge.diagnosis.activations import LayerSimilarity
from evomerge.diagnosis.findings import sentences
from evomerge.diagnosis.weights import Differences, Relation, WeightDiagnosis

ONE = Differences(distance=(0.1,), whole=0.1, mean=0.001, large=0.0)
PAIR = Relation(("one", "other"), cosine=(0.1,), whole=0.1, conflicts=(0.4,), all_conflicts=0.4)
USUAL = WeightDiagnosis(("0",), {"one": ONE}, (PAIR,))
LAYERS = {"one": LayerSimilarity((0.5, 0.97), 10)}


def said(diagnosis: WeightDiagnosis, layers: dict[str, LayerSimilarity] | None = None, *methods: str) -> str:
    return " ".join(sentences(diagnosis, layers, set(methods)))


def test_nothing_is_said_of_usual_fine_tunes() -> None:
    assert sentences(USUAL, LAYERS, {"dare_ties"}) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"whole": 0.0}, "one has the weights of the base"),
        ({"whole": 1.4}, "probably no fine-tune of this base"),
        ({"whole": 0.3}, "far for a fine-tune"),
        ({"large": 0.2}, "20.0% of the weights of one differ by more than 0.03"),
    ],
)
def test_models_are_warned_of(change: dict[str, float], words: str) -> None:
    changed = replace(USUAL, models={"one": replace(ONE, **change)})
    (only,) = sentences(changed, None, {"dare_ties"})
    assert words in only


def test_large_changes_matter_to_dare_alone() -> None:
    changed = replace(USUAL, models={"one": replace(ONE, large=0.2)})
    assert sentences(changed, None, {"ties", "linear"}) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"whole": -0.3}, "one and other cancel: the cosine of their changes is -0.30"),
        ({"whole": 0.9}, "change nearly the same"),
        ({"all_conflicts": 0.7}, "70% of the signs are opposite"),
    ],
)
def test_pairs_are_warned_of(change: dict[str, float], words: str) -> None:
    (only,) = sentences(replace(USUAL, relations=(replace(PAIR, **change),)), None, set())
    assert words in only


def test_layers_that_do_little_are_named() -> None:
    assert "Layers 1, 3 of one hardly change" in said(USUAL, {"one": LayerSimilarity((0.5, 0.99, 0.9, 0.985), 10)})
