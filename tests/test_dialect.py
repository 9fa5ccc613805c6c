"""mergekit's dialect in every form in which people write it: mergekit reads the same in the original as in ours."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from mergekit import merge_methods
from mergekit.config import MergeConfiguration

from evomerge import recipe as recipes
from evomerge.dialect import plain
from evomerge.errors import InputError
from evomerge.recipe import Recipe

few = settings(max_examples=80, deadline=None, derandomize=True)
names = st.sampled_from(["a", "owner/name", "./folder", "/models/b.c"])
revisions = st.sampled_from(["main", "v1.0", "3f2a"])
foreign = st.sampled_from(["name", "allow_negative_weights", "wieght", "model_name", "x"])


@st.composite
def parts(draw: st.DrawFn) -> Any:
    """A model or an adapter inside a reference: text with or without a revision, or a mapping."""
    path, revision = draw(names), draw(st.none() | revisions)
    if draw(st.booleans()):
        return f"{path}@{revision}" if revision else path
    return {"path": path} | draw(st.sampled_from([{}, {"revision": revision}]))


@st.composite
def references(draw: st.DrawFn) -> Any:
    """A model reference in every form."""
    if draw(st.booleans()):
        text = [part for part in (draw(parts()), draw(st.none() | parts())) if isinstance(part, str)]
        return "+".join(text) or draw(names)
    optional = {"lora": st.none() | parts(), "override_architecture": st.none()}
    return draw(st.fixed_dictionaries({"model": parts()}, optional=optional))


numbers = st.sampled_from([0, 1, 0.5, "1e-1", [0, 1], [0.5], {"value": 1, "filter": None}, [{"value": [1, 2]}]])
parameters = st.none() | st.dictionaries(st.sampled_from(["weight", "density"]), numbers, max_size=2)
token_sources = (
    references()
    | st.just({"kind": "zero"})
    | st.fixed_dictionaries({"kind": st.just("model_token"), "model": references(), "token_id": st.integers(0, 9)})
)
tokenizers = st.fixed_dictionaries(
    {},
    optional={
        "source": st.sampled_from(["union", "base"]) | references(),
        "tokens": st.none()
        | st.dictionaries(st.sampled_from(["<x>", "1"]), st.fixed_dictionaries({"source": token_sources}), max_size=2),
        "pad_to_multiple_of": st.sampled_from([None, 8]),
    },
)
dtypes = st.sampled_from([None, "float32", "bfloat16", "float16"])
models = st.lists(st.fixed_dictionaries({"model": references(), "parameters": parameters}), min_size=1, max_size=3)
sources = st.fixed_dictionaries(
    {"model": references(), "layer_range": st.sampled_from([[0, 2], [1.0, 3.0], ["2", "4"]]), "parameters": parameters}
)
slices = st.lists(
    st.fixed_dictionaries(
        {"sources": st.lists(sources, min_size=1, max_size=2), "parameters": parameters},
        optional={"base_model": st.none() | references()},
    ),
    min_size=1,
    max_size=2,
)
forms = st.fixed_dictionaries({"models": models}, optional={"slices": st.sampled_from([None, []])}) | (
    st.fixed_dictionaries({"slices": slices}, optional={"models": st.sampled_from([None, []])})
)


@st.composite
def documents(draw: st.DrawFn) -> dict[str, Any]:
    """A recipe with references in every form, and with keys that have nothing behind them."""
    optional: dict[str, st.SearchStrategy[Any]] = {
        "base_model": st.none() | references(),
        "modules": st.sampled_from([None, {}]),
        "parameters": parameters,
        "dtype": dtypes,
        "out_dtype": dtypes,
        "chat_template": st.none() | st.just("auto"),
        "evomerge": st.none(),
    }
    vocabulary = st.sampled_from([None, "tokenizer", "tokenizer_source"])
    document = draw(forms) | {"merge_method": "linear"} | draw(st.fixed_dictionaries({}, optional=optional))
    if chosen := draw(vocabulary):
        document[chosen] = draw(st.none() | (tokenizers if chosen == "tokenizer" else references()))
    return document


def blocks(value: Any, path: str = "") -> list[tuple[str, dict[str, Any]]]:
    """Every mapping of a recipe whose keys mergekit knows by name, with its key path."""
    if isinstance(value, list):
        return [found for index, item in enumerate(value) for found in blocks(item, f"{path}[{index}]")]
    if not isinstance(value, dict):
        return []
    any_name = path.endswith((".parameters", ".tokens")) or path in ("parameters", "modules")
    inner = [found for key, item in value.items() for found in blocks(item, f"{path}.{key}".removeprefix("."))]
    return inner if any_name else [(path, value), *inner]


def filled(value: Any) -> Any:
    """What a dumped configuration says: without keys that have nothing behind them."""
    if isinstance(value, dict):
        return {key: found for key, item in value.items() if (found := filled(item)) not in (None, {}, [])}
    return [filled(item) for item in value] if isinstance(value, list) else value


def by_mergekit(document: Any) -> Any:
    return filled(MergeConfiguration.model_validate(document).model_dump(mode="json"))


def read(document: Any, told: list[str] | None = None) -> Recipe:
    return Recipe.model_validate(plain(document, (told if told is not None else []).append))


@few
@given(document=documents())
def test_mergekit_reads_the_same_in_a_recipe_as_in_what_is_read_of_it_here(document: Any) -> None:
    told: list[str] = []
    ours = yaml.safe_load(read(document, told).to_yaml())
    assert by_mergekit(ours) == by_mergekit(document)
    assert not told


@few
@given(document=documents(), key=foreign, data=st.data())
def test_a_key_that_mergekit_ignores_is_ignored_at_every_level_and_named(document: Any, key: str, data: Any) -> None:
    document = json.loads(json.dumps(document))  # strategies may give one object twice
    before, theirs = read(document), by_mergekit(document)
    path, block = data.draw(st.sampled_from(blocks(document)))
    block[key] = data.draw(st.sampled_from([1, None, "x", [1], {"y": 2}]))
    told: list[str] = []
    assert read(document, told) == before
    assert by_mergekit(document) == theirs
    assert len(told) == 1
    assert told[0].startswith(f"{path}.{key} is ignored, as mergekit ignores it".removeprefix("."))


@few
@given(document=documents())
def test_what_has_been_read_is_read_again_as_it_is(document: Any) -> None:
    once = plain(document, lambda _: None)
    assert plain(once, pytest.fail) == once


def test_a_weight_of_residuals_is_ignored_as_mergekit_does_though_it_knows_the_key() -> None:
    document = {"merge_method": "passthrough", "slices": [{"sources": [{"model": "a", "layer_range": [0, 1]}]}]}
    told: list[str] = []
    assert read({**document, "slices": [document["slices"][0] | {"residual_weight": 0.5}]}, told) == read(document)
    assert told == ["slices[0].residual_weight is ignored, as mergekit ignores it."]


@pytest.mark.parametrize("layer_range", [[0, 6], [1, 2], "all", None])
def test_a_layer_range_under_models_is_ignored_with_the_reason(layer_range: Any) -> None:
    document = {"merge_method": "linear", "models": [{"model": "a", "layer_range": layer_range}]}
    told: list[str] = []
    assert read(document, told) == recipes.Recipe(merge_method="linear", models=(recipes.Source(model="a"),))
    assert told == ["models[0].layer_range is ignored, since models are merged whole; slices take layers."]
    assert by_mergekit(document) == {"merge_method": "linear", "models": [{"model": "a"}]}


@pytest.mark.parametrize(
    ("key", "hint"),
    [("paramters", "parameters"), ("base", "base_model"), ("DTYPE", "dtype"), ("merge-method", "merge_method")],
)
def test_a_misspelled_key_gets_the_closest_known_one(key: str, hint: str) -> None:
    told: list[str] = []
    read({"merge_method": "linear", "models": [{"model": "a"}], key: "x"}, told)
    assert told == [f"{key} is ignored, as mergekit ignores it; did you mean '{hint}'?"]


def test_keys_of_our_own_block_are_no_one_else_s(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("{merge_method: linear, models: [{model: a}], evomerge: {sed: 3}}")
    with pytest.raises(InputError, match=r"recipe.yaml: evomerge.sed is not a known key; did you mean 'seed'"):
        recipes.load(path, pytest.fail)


def test_torch_s_names_of_dtypes_are_read_as_mergekit_reads_them() -> None:
    document = {"merge_method": "linear", "models": [{"model": "a"}], "dtype": "torch.bfloat16", "out_dtype": ""}
    found = read(document)
    assert (found.dtype, found.out_dtype) == ("bfloat16", None)


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    monkeypatch.chdir(tmp_path)
    return lambda name: (tmp_path / name).mkdir()


def test_the_revision_of_a_folder_is_ignored_as_by_mergekit(in_folder: Callable[[str], None]) -> None:
    for name in ("model", "lora", "odd@name", "with+plus"):
        in_folder(name)
    told: list[str] = []

    def reference(value: Any) -> str:
        return str(read({"merge_method": "linear", "models": [{"model": value}]}, told).references[0])

    assert reference("model@v1+lora@v2") == "model+lora"
    assert reference({"model": {"path": "model", "revision": "v1"}, "lora": "away@v2"}) == "model+away@v2"
    assert told == [
        "models[0].model: the revision v1 is ignored, since model is a folder.",
        "models[0].model: the revision v2 is ignored, since lora is a folder.",
        "models[0].model.model: the revision v1 is ignored, since model is a folder.",
    ]
    assert reference("odd@name") == "odd@name"
    assert reference("with+plus") == "with+plus"
    assert len(told) == 3


def test_a_post_step_becomes_part_of_the_method_s_name_which_mergekit_refuses(tmp_path: Path) -> None:
    """A key of its own would be ignored there."""
    sources = [{"model": "a", "parameters": {"weight": 1.0}}, {"model": "b", "parameters": {"weight": 1.0}}]
    document = {"merge_method": "task_arithmetic", "base_model": "base", "models": sources}
    with_key = document | {"post": {"aim": {"omega": 0.3}}}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(with_key))
    recipe = recipes.load(path, pytest.fail)
    assert (recipe.merge_method, recipe.parameters) == ("task_arithmetic+aim", {"omega": 0.3})
    exported = yaml.safe_load(recipe.to_yaml())
    assert recipes.Recipe.model_validate(plain(exported, pytest.fail)) == recipe
    theirs = MergeConfiguration.model_validate(exported)
    with pytest.raises(Exception, match="aim"):
        merge_methods.get(theirs.merge_method)


@pytest.mark.parametrize("post", [{"aim": {"alpha": 1}}, {"ties": {}}, ["aim"], {}])
def test_other_post_steps_are_refused(post: Any) -> None:
    with pytest.raises(InputError, match=r"^post is .*; expected \{aim: \{omega: NUMBER\}\}\.$"):
        plain({"merge_method": "ties", "post": post}, pytest.fail)
