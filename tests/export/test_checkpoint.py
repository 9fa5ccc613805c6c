"""What is no recipe is not merged, and a merge goes nowhere but to a new folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.bad_input import Refuses
from tests.searches import REMOVED, put


def measured_in(name: str) -> dict[str, Any]:
    """A change to a recipe, which then names statistics."""
    return {"evomerge": {"statistics": {"names": {"zoo:math": {"row_weights": name}}}}}


RECIPES: dict[str, tuple[Any, ...]] = {
    "an unknown key of our own": ({"evomerge.fingerprnt": "0"}, "evomerge.fingerprnt", "did you mean 'fingerprint'?"),
    "an unknown method": ({"merge_method": "linaer"}, "merge_method is 'linaer'", "did you mean 'linear'?"),
    "a method in capitals": ({"merge_method": "TIES"}, "merge_method is 'TIES'", "did you mean 'ties'?"),
    "no method": ({"merge_method": REMOVED}, "merge_method is required but missing"),
    "no models": ({"models": REMOVED}, "give exactly one of models and slices"),
    "a model that is not there": ({"models.0.model": "./nowhere"}, "./nowhere: no such model folder"),
    "a weight in words": ({"models.0.parameters.weight": "much"}, "weight of", "is 'much'; expected a number"),
    "no weight": ({"models.0.parameters": {}}, "weight of", "is missing"),
    "a weight that is not a number": (
        {"models.0.parameters.weight": float("nan")},
        "models[0].parameters.weight is NaN",
    ),
    "a weight in a block": (
        {"models.0.parameters.weight": {"filter": "mlp"}},
        "models[0].parameters.weight.value is required",
    ),
    "a method without its base": ({"merge_method": "ties"}, "merge_method ties needs a base_model"),
    "several modules": ({"modules": {"text": {}, "sight": {}}, "models": REMOVED}, "modules", "filter"),
    "modules that are none": ({"modules": ["text"], "models": REMOVED}, "modules is ['text']; expected {default:"),
    "two tokenizers": ({"tokenizer": {}, "tokenizer_source": "base"}, "give at most one of tokenizer_source and"),
    "a tokenizer that is not there": ({"tokenizer_source": "./nowhere"}, "./nowhere: no such model folder"),
    "a token with two sources": (
        {"tokenizer.tokens": {"x": {"source": {"kind": "model_token", "model": "a", "token": "b", "token_id": 1}}}},
        "tokenizer.tokens.x.source: give exactly one of token_id and token",
    ),
    "a template by no known name": ({"chat_template": "lama3"}, "chat_template is 'lama3'", "did you mean 'llama3'?"),
    "an unknown dtype": ({"dtype": "float61"}, "dtype is \"float61\"; did you mean 'float16'?"),
    "another name of a dtype": ({"dtype": "fp16"}, 'dtype is "fp16"', "valid names: bfloat16, float16, float32"),
    "a list of weights in one string": ({"models.0.parameters.weight": "[0, 1]"}, "is '[0, 1]'; expected a number"),
    "nothing behind a required key": ({"merge_method": None}, "merge_method is required but missing; add it"),
    "nothing behind a parameter": ({"parameters": {"weight": None}}, "parameters.weight is null"),
    "a path in place of a model": (
        {"base_model": {"path": "x"}},
        "base_model.model is required but missing; write the model below it ({model: {path: NAME}})",
    ),
    "a model of a mapping without path": (
        {"models.0.model": {"model": {"revision": "x"}}},
        "models[0].model.model.path is required but missing; add it",
    ),
    "a revision that YAML reads as a number": (
        {"models.0.model": {"model": {"path": "x", "revision": 3}}},
        "models[0].model.model.revision is 3; write it as text, in quotes",
    ),
    "another architecture": (
        {"models.0.model": {"model": "x", "override_architecture": "LlamaForCausalLM"}},
        "models[0].model.override_architecture is not supported, since the model's config.json says what it is",
    ),
    "statistics by a path": (
        measured_in("/tmp/row_weights-0123456789abcdef-0123456789abcdef"),
        "evomerge.statistics.names.zoo:math.row_weights: '/tmp/row_weights-",
        "names no statistics; write KIND-SUBJECT-DIGEST",
    ),
    "statistics in a folder above": (measured_in("../row_weights-0123456789abcdef-0123456789abcdef"), "no statistics"),
    "statistics by a pattern": (measured_in("**x/.."), "'**x/..' names no statistics"),
    "statistics of any name": (measured_in("row_weights-*"), "'row_weights-*' names no statistics"),
    "statistics without a name": (measured_in(""), "'' names no statistics"),
    "a model as a list": ({"base_model": ["x"]}, 'base_model is ["x"]'),
}


@pytest.fixture
def recipe(tiny_models: dict[str, Path], tmp_path: Path) -> Callable[..., Path]:
    """Writes a recipe of two models, with keys changed."""

    def write(changes: dict[str, Any] | None = None) -> Path:
        models = [{"model": str(tiny_models[name]), "parameters": {"weight": 1.0}} for name in ("first", "second")]
        content: dict[str, Any] = {"merge_method": "linear", "models": models}
        for key, value in (changes or {}).items():
            put(content, key, value)
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return path

    return write


@pytest.mark.parametrize("claim", RECIPES)
def test_a_wrong_recipe_is_not_merged(claim: str, recipe: Callable[..., Path], refuses: Refuses) -> None:
    changes, *fragments = RECIPES[claim]
    refuses("merge", recipe(changes), "merged", says=tuple(fragments))


def test_a_merge_goes_nowhere_but_to_a_new_folder(
    recipe: Callable[..., Path], tmp_path: Path, refuses: Refuses
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    refuses("merge", recipe(), "full", says=("full: exists and is not empty; choose a new folder",))
    refuses("merge", recipe(), "recipe.yaml", says=("recipe.yaml: exists",))
    refuses("merge", recipe(), "recipe.yaml/merged", says=("is a file; choose a path inside a folder",))
    refuses("merge", recipe(), "merged", "--device", "banana", says=("--device is 'banana'; valid names: auto, cpu",))
    refuses("merge", recipe(), "merged", "--max-shard-size", "5", says=("--max-shard-size is '5'; use a size such",))
    refuses("merge", "nowhere.yaml", "merged", says=("nowhere.yaml: no such file; check the path",))
