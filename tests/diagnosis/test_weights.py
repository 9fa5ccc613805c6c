"""Distances, cosines and conflicts are those that NumPy finds, and hold what their definitions promise."""

from pathlib import Path

import numpy as np
import pytest

from evomerge.diagnosis.weights import LARGE, WeightDiagnosis, diagnose_weights
from evomerge.layers import place_of
from evomerge.merging.sources.models import find_models
from evomerge.merging.sources.weights import load_tensors

Vectors = dict[str, dict[str, np.ndarray]]


@pytest.fixture(scope="module")
def names(tiny_models: dict[str, Path]) -> dict[str, str]:
    return {str(tiny_models[name]): name for name in ("first", "second", "third")}


@pytest.fixture(scope="module")
def found(tiny_models: dict[str, Path], names: dict[str, str]) -> WeightDiagnosis:
    return diagnose_weights(find_models(str(tiny_models["base"]), names), names)


@pytest.fixture(scope="module")
def vectors(tiny_models: dict[str, Path]) -> Vectors:
    """By model the task vector of each tensor, and the base's tensors under `base`."""
    tensors = {name: load_tensors(folder) for name, folder in tiny_models.items()}
    base = {name: tensor.numpy().astype(np.float64) for name, tensor in tensors.pop("base").items()}
    moved = {
        model: {name: tensor.numpy().astype(np.float64) - base[name] for name, tensor in own.items()}
        for model, own in tensors.items()
    }
    return {"base": base, **moved}


def joined(vectors: Vectors, model: str, place: str | None = None) -> np.ndarray:
    names = sorted(name for name in vectors[model] if place is None or place_of(name) == place)
    return np.concatenate([vectors[model][name].ravel() for name in names])


def test_places_go_through_the_model(found: WeightDiagnosis) -> None:
    assert found.places == ("embeddings", "0", "1", "2", "3", "head")


@pytest.mark.parametrize("model", ["first", "second", "third"])
def test_distances_are_norms_of_task_vectors(found: WeightDiagnosis, vectors: Vectors, model: str) -> None:
    own = found.models[model]
    for place, distance in zip((*found.places, None), (*own.distance, own.whole), strict=True):
        wanted = np.linalg.norm(joined(vectors, model, place)) / np.linalg.norm(joined(vectors, "base", place))
        assert distance == pytest.approx(wanted, rel=1e-5)
    every = np.abs(joined(vectors, model))
    assert own.mean == pytest.approx(every.mean(), rel=1e-5)
    assert own.large == pytest.approx((every > LARGE).mean(), abs=1e-4)


def test_cosines_and_conflicts_are_those_of_every_pair(found: WeightDiagnosis, vectors: Vectors) -> None:
    assert [relation.models for relation in found.relations] == [
        ("first", "second"),
        ("first", "third"),
        ("second", "third"),
    ]
    for relation in found.relations:
        one, other = relation.models
        for place, cosine, conflicts in zip(
            (*found.places, None),
            (*relation.cosine, relation.whole),
            (*relation.conflicts, relation.all_conflicts),
            strict=True,
        ):
            a, b = joined(vectors, one, place), joined(vectors, other, place)
            assert cosine == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-5)
            opposite = both = 0
            for name in vectors[one]:
                if place is None or place_of(name) == place:
                    x, y = vectors[one][name].ravel(), vectors[other][name].ravel()
                    kept = [abs(v) >= np.sort(abs(v))[-max(1, round(0.2 * v.size))] for v in (x, y)]
                    shared = kept[0] & kept[1] & (x != 0) & (y != 0)
                    both += shared.sum()
                    opposite += (shared & (np.sign(x) != np.sign(y))).sum()
            assert conflicts == pytest.approx(opposite / both if both else 0.0, abs=0.02)


def test_a_model_beside_itself_and_beside_the_base(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    base, first = str(tiny_models["base"]), str(tiny_models["first"])
    twin = tmp_path / "twin"
    twin.symlink_to(tiny_models["first"])
    names = {first: "first", str(twin): "twin", base: "same"}
    found = diagnose_weights(find_models(base, names), names)
    alike, *with_base = found.relations
    assert alike.whole == pytest.approx(1.0)
    assert alike.all_conflicts == 0
    assert found.models["same"].whole == 0
    assert {relation.whole for relation in with_base} == {0.0}
