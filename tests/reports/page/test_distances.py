"""Distances are those that numpy finds between checkpoints."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import evomerge
from evomerge.recipe import single
from evomerge.reports.page import distances as module
from evomerge.reports.page.distances import Distances, distances
from evomerge.runs import directory as runs
from tests.reports.page.conftest import Run


def measured(directory: Path) -> Distances:
    run = runs.read(directory)
    best = run.results.best()
    assert best is not None
    found = distances(best.candidate.recipe, run.config, run.prepared.models)
    assert isinstance(found, Distances)
    return found


def test_distances_are_those_between_the_checkpoints(finished: Path, tmp_path: Path) -> None:
    run = runs.read(finished)
    best = run.results.best()
    assert best is not None
    recipe = best.candidate.recipe.model_copy(update={"dtype": run.config.evaluation.dtype})
    with pytest.warns(UserWarning, match="license"):
        evomerge.merge(recipe, tmp_path / "merged")
    folders = {"base": run.config.base, **run.config.models, "merge": str(tmp_path / "merged")}
    tensors = {name: load_file(Path(folder) / "model.safetensors") for name, folder in folders.items()}

    def far(one: str, other: str, part: str = "") -> float:
        names = [name for name in tensors["base"] if part in name]
        square = sum(np.square((tensors[one][n] - tensors[other][n]).double().numpy()).sum() for n in names)
        norm = sum(np.square(tensors["base"][n].double().numpy()).sum() for n in names)
        return float(np.sqrt(square / norm))

    found = measured(finished)
    for name in ("base", "first", "second"):
        assert found.whole[name] == pytest.approx(far("merge", name))
        for place in ("0", "3"):
            index = found.places.index(place)
            assert found.merged[name][index] == pytest.approx(far("merge", name, f"layers.{place}."))
    assert found.whole_parents["first"] == pytest.approx(far("first", "base"))


def test_a_model_is_at_no_distance_from_itself(finished: Path) -> None:
    run = runs.read(finished)
    found = distances(single(run.config.models["first"]), run.config, run.prepared.models)
    assert isinstance(found, Distances)
    assert set(found.merged["first"]) == {0.0}
    assert found.merged["base"] == pytest.approx(found.parents["first"])


def test_other_layers_and_large_models_get_a_sentence(
    tiny_run: Run, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = runs.read(tiny_run(space={"kind": "data_flow", "form": "repeat"}))
    longer = [record.candidate.recipe for record in run.archive.records() if layers(record.candidate.recipe) > 4]
    found = distances(longer[0], run.config, run.prepared.models)
    assert isinstance(found, str)
    assert "other layers" in found
    monkeypatch.setattr(module, "MOST_PARAMETERS", 1000)
    run = runs.read(finished)
    sentence = distances(single(run.config.base), run.config, run.prepared.models)
    assert isinstance(sentence, str)
    assert "million parameters" in sentence
    assert torch.is_grad_enabled()


def layers(recipe: object) -> int:
    return sum(part.length for part in getattr(recipe, "slices", None) or ())
