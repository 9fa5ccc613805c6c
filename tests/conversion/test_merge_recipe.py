"""A recipe becomes a search that starts at its numbers as far as a space can say it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from evomerge.config.files import load
from evomerge.conversion.convert import Converted, convert
from evomerge.conversion.options import Options
from evomerge.merging.methods import METHODS
from evomerge.recipe import Recipe
from evomerge.recipe import load as load_recipe
from evomerge.search.preparation import prepare
from tests.bad_input import Refuses
from tests.searches import EVALS

TASKS = Options(tasks=("base_qa", "math_a:acc"), task_paths=(str(EVALS),))


def converted(document: Any, folder: Path, options: Options = TASKS) -> tuple[dict[str, Any], Converted]:
    """The content of the search file of a recipe, and the conversion."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(document))
    made = convert(path, folder, options)
    return yaml.safe_load(made.text), made


def two_models(method: str, **parameters: Any) -> dict[str, Any]:
    models = [{"model": f"zoo:{name}", "parameters": dict(parameters)} for name in ("math", "lang")]
    return {"merge_method": method, "base_model": "zoo:base", "models": models}


def started(document: Any, folder: Path) -> Recipe:
    """The recipe at which the search of a recipe starts."""
    _, made = converted(document, folder)
    path = folder / "search.yaml"
    path.write_text(made.text)
    space = prepare(load(path, ["optimizer.name=cma_es"])).space
    return space.decode(np.array([gene.start for gene in space.genes]))


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "dare_ties", "della"])
def test_a_search_starts_at_numbers_that_are_the_same_everywhere(method: str, tmp_path: Path) -> None:
    own = {"weight": 0.7} | ({"density": 0.5} if METHODS[method].takes("density") else {})
    recipe = started({**two_models(method, **own), "parameters": {"lambda": 0.8, "normalize": True}}, tmp_path)
    assert (recipe.merge_method, recipe.base_model) == (method, "zoo:base")
    assert recipe.parameters["lambda"] == 0.8
    assert recipe.parameters["normalize"] is True
    for slice_ in recipe.slices or ():
        for source in slice_.sources[1:]:
            for name, value in own.items():
                found: Any = source.parameters[name]
                found = found if isinstance(found, list) else [found]
                assert {getattr(item, "value", item) for item in found} == {value}


def test_slices_and_filters_become_groups_and_what_differs_starts_at_its_mean(tmp_path: Path) -> None:
    def source(name: str, layers: list[int], **parameters: Any) -> dict[str, Any]:
        return {"model": f"zoo:{name}", "layer_range": layers, "parameters": parameters}

    halves = [[0, 2], [2, 6]]
    weight = [{"filter": "mlp", "value": 0.2}, {"value": 1.0}]
    slices = [
        {"sources": [source("base", layers), source("math", layers, weight=weight), source("lang", layers, weight=0.6)]}
        for layers in halves
    ]
    search, made = converted({"merge_method": "ties", "base_model": "zoo:base", "slices": slices}, tmp_path)
    assert search["space"]["layer_groups"] == ["0-1", "2-5"]
    assert search["space"]["filters"] == ["mlp"]
    assert search["space"]["weight"]["start"] == 0.6
    assert len(made.lost) == 1
    assert "weight has one start, 0.6" in made.lost[0]


def test_parameters_of_one_method_start_where_they_are(tmp_path: Path) -> None:
    document = {
        "merge_method": "slerp",
        "base_model": "zoo:base",
        "models": [{"model": "zoo:base"}, {"model": "zoo:math"}],
        "parameters": {"t": 0.25},
        "dtype": "float32",
    }
    search, made = converted(document, tmp_path)
    assert search["space"] == {"method": "slerp", "parameters": {"slerp": {"t": {"start": 0.25}}}}
    assert search["evaluation"] == {"dtype": "float32"}
    assert made.lost == []


def test_an_average_starts_at_the_shares_of_its_weights(tmp_path: Path) -> None:
    document = two_models("linear", weight=3)
    document.pop("base_model")
    search, made = converted(document, tmp_path)
    assert (search["base"], search["models"]) == ("zoo:math", {"lang": "zoo:lang"})
    assert (search["space"]["method"], search["space"]["weight"]["start"]) == ("task_arithmetic", 0.5)
    assert "zoo:math was taken" in made.text


def test_layers_in_an_order_become_a_search_for_orders(tmp_path: Path) -> None:
    ranges = [("math", [0, 4]), ("lang", [2, 6])]
    slices = [{"sources": [{"model": f"zoo:{name}", "layer_range": layers}]} for name, layers in ranges]
    search, made = converted({"merge_method": "passthrough", "slices": slices}, tmp_path)
    assert search["space"] == {
        "kind": "data_flow",
        "form": "path",
        "sources": ["base", "lang"],
        "granularity": 2,
        "max_layers": 8,
    }
    assert "base 0-3, lang 2-5" in made.lost[0]


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_recipe_of_every_method_becomes_a_search(method: str, tmp_path: Path) -> None:
    row = METHODS[method]
    document = two_models(method)
    document["models"] = document["models"][: row.most or 2]
    for model in document["models"]:
        model["parameters"] = {each.name: 0.5 for each in row.per_model}
    document["parameters"] = {each.name: each.kind(each.default or 0) for each in row.shared}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(document))
    load_recipe(path, pytest.fail)
    search, made = converted(document, tmp_path)
    assert made.config.base == "zoo:base"
    assert search["space"].get("method", method) == method


def test_what_only_a_recipe_can_have_is_said(tmp_path: Path) -> None:
    document = two_models("task_arithmetic", weight=1) | {"tokenizer_source": "union", "chat_template": "chatml"}
    _, made = converted(document, tmp_path)
    assert ["tokenizer" in made.lost[0], "chat_template" in made.lost[1]] == [True, True]
    beside = two_models("task_arithmetic", weight=1) | {"evomerge": {"parallel": [[1, 3]]}}
    assert "space.form parallel or looped" in converted(beside, tmp_path)[1].lost[-1]


def test_what_a_recipe_does_not_say_is_asked_for(tmp_path: Path, refuses: Refuses) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(two_models("ties", weight=1)))
    refuses("convert", path, says=(f"{path}: a recipe names no tasks", "give --task TASK"))
    refuses("convert", path, "--task", "a:b:c:d", says=("--task is 'a:b:c:d'; write TASK, TASK:METRIC or",))
    refuses("check", path, says=(f"{path}: this is a merge recipe", f"`evomerge convert {path}`"))
    karcher = two_models("karcher")
    karcher.pop("base_model")
    path.write_text(yaml.safe_dump(karcher))
    refuses("convert", path, "--task", "a", says=(f"{path}: the recipe names no base_model", "--base"))
    path.write_text(yaml.safe_dump(two_models("ties", weight=1) | {"merge_method": "tie"}))
    refuses("convert", path, "--task", "a", says=(f"{path}: merge_method is 'tie'", "did you mean 'ties'?"))
