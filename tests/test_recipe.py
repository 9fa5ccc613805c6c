"""Recipes as mergekit reads them, YAML without loss, and what is refused."""

from typing import Any

import pytest
import yaml
from hypothesis import example, given, reject, settings
from hypothesis import strategies as st
from mergekit.architecture import get_architecture_info
from mergekit.config import MergeConfiguration
from mergekit.merge import _model_out_config
from mergekit.options import MergeOptions
from mergekit.plan import MergePlanner

from evomerge import recipe as recipes
from evomerge.config.documents import validate
from evomerge.errors import InputError
from evomerge.merging.methods import METHODS
from evomerge.merging.plan import make_plan
from evomerge.merging.sources.weights import tensor_table
from evomerge.recipe import FilteredValue, Provenance, Recipe, Slice, Source

LAYERS = 4
LAYER_NAMES = [f"model.layers.{layer}.{part}.weight" for layer in range(LAYERS) for part in ("mlp.up_proj", "norm")]
NAMES = ["model.embed_tokens.weight", *LAYER_NAMES, "model.norm.weight", "lm_head.weight"]
EMBEDDINGS, NORM, HEAD = NAMES[0], NAMES[-2], NAMES[-1]

few = settings(max_examples=60, deadline=None, derandomize=True)


def settings_of(scalars: st.SearchStrategy[Any], lists: st.SearchStrategy[Any] | None = None) -> st.SearchStrategy[Any]:
    """A parameter in every form that a recipe may give it."""
    values = scalars | (st.lists(scalars, min_size=1, max_size=4) if lists is None else lists)
    filters = st.sampled_from([None, "*", "mlp", "self_attn", "norm", "embed_tokens", "lm_head", "layers.1.", "q_proj"])
    conditions = st.fixed_dictionaries({"value": values}, optional={"filter": filters})
    return values | conditions | st.lists(conditions, min_size=1, max_size=4)


numbers = st.integers(-2, 2) | st.floats(-2, 2) | st.sampled_from(["1e-1", "0.25", True])
shares = st.floats(0, 1) | st.sampled_from([0, 1, "5e-1"])
flags = st.booleans() | st.sampled_from([0, 1, "yes", "off"])
PER_MODEL = {
    "weight": settings_of(numbers),
    "density": settings_of(shares),
    "gamma": settings_of(shares),
    "epsilon": settings_of(st.floats(0, 0.1)),
    "scale": settings_of(numbers),
}
SHARED = {
    "normalize": settings_of(flags),
    "rescale": settings_of(flags),
    "lambda": settings_of(numbers),
    "int8_mask": settings_of(flags),
    "filter_wise": settings_of(flags),
    "max_iter": settings_of(st.sampled_from([0, 5, "7", 3.0]), st.just([4, 4])),
    "t": settings_of(numbers),
}
source_parameters = st.fixed_dictionaries({}, optional=PER_MODEL)
slice_parameters = st.fixed_dictionaries({}, optional=PER_MODEL | SHARED)
NOT_T = {name: values for name, values in SHARED.items() if name != "t"}
recipe_parameters = slice_parameters | st.fixed_dictionaries(
    {"weight": numbers, "t": numbers}, optional={**NOT_T, "density": PER_MODEL["density"]}
)


@st.composite
def documents(draw: st.DrawFn, base: str = "base", fine_tunes: tuple[str, ...] = ("a", "b", "c")) -> dict[str, Any]:
    """A recipe with every parameter at any level, over models of four layers."""
    method = draw(st.sampled_from(sorted(name for name, row in METHODS.items() if row.mergekit)))
    document: dict[str, Any] = {"merge_method": method, "parameters": draw(recipe_parameters)}
    row = METHODS[method]
    alone = not row.uses_base and row.most == 1
    if row.needs_base or (not alone and draw(st.booleans())):
        document["base_model"] = base

    count = draw(st.integers(row.least, row.most or len(fine_tunes)))  # per slice; mergekit fails where it differs

    def sources() -> list[dict[str, Any]]:
        chosen = draw(st.permutations(fine_tunes))[:count]
        return [{"model": model, "parameters": draw(source_parameters)} for model in chosen]

    if draw(st.booleans()):
        listed = row.needs_base or "base_model" in document or not row.most
        document["models"] = sources() + ([{"model": base}] if listed and draw(st.booleans()) else [])
        return document
    with_base = "base_model" in document or not row.most

    def layer_range(length: int) -> list[int]:
        start = draw(st.integers(0, LAYERS - length))
        return [start, start + length]

    document["slices"] = [
        {
            "sources": [
                source | {"layer_range": layer_range(length)} for source in [{"model": base}] * with_base + sources()
            ],
            "parameters": draw(slice_parameters),
        }
        for length in draw(st.lists(st.integers(1, LAYERS), min_size=1, max_size=3))
    ]
    return document


def resolved_by_mergekit(document: dict[str, Any]) -> dict[str, Any] | None:
    """Per tensor its models with their tensors and parameters, and the shared ones.

    None where a required parameter is missing.
    """
    config = MergeConfiguration.model_validate(document)
    options = MergeOptions(quiet=True)
    architecture = get_architecture_info(config, options)
    planner = MergePlanner(config, architecture, options, _model_out_config(config, architecture))
    try:
        planner._plan()
    except RuntimeError as error:
        if "Missing required parameter" in str(error):
            return None
        raise
    found = {}
    for weight, task in planner._tensors:
        found[weight.name] = (
            {str(model): dict(task.input_parameters[model]) for model in task.model_order},
            dict(task.parameters),
            {str(model): source.name for model, source in task.gather_tensors.weight_info.items()},
        )
    return found


def resolved_here(recipe: Recipe, names: list[str]) -> dict[str, Any] | None:
    try:
        plan = make_plan(recipe, names)
    except InputError as error:
        if "is missing for" in str(error):
            return None
        if "epsilon of" in str(error):
            reject()  # mergekit refuses these too, but only when it merges
        raise
    return {
        tensor.name: (
            list(zip(tensor.models, tensor.per_model, strict=True)),
            tensor.shared,
            dict(zip(tensor.models, tensor.sources, strict=True))
            | ({tensor.base: tensor.base_source} if tensor.base else {}),
        )
        for tensor in plan.tensors
    }


def recipe(**document: Any) -> Recipe:
    return validate(Recipe, document, "recipe.yaml")


def weights(recipe: Recipe) -> dict[str, list[float]]:
    """The weight of every model, tensor by tensor."""
    return {
        tensor.name: [values["weight"] for values in tensor.per_model] for tensor in make_plan(recipe, NAMES).tensors
    }


def one_model(weight: Any, **document: Any) -> Recipe:
    return recipe(merge_method="linear", models=[{"model": "a", "parameters": {"weight": weight}}], **document)


def layers(recipe: Recipe) -> list[float]:
    return [weights(recipe)[f"model.layers.{layer}.mlp.up_proj.weight"][0] for layer in range(LAYERS)]


# Beside mergekit


@few
@given(data=st.data())
def test_every_parameter_of_every_tensor_is_resolved_as_by_mergekit(data, tiny_models):
    paths = {name: str(folder) for name, folder in tiny_models.items()}
    document = data.draw(documents(paths["base"], (paths["first"], paths["second"], paths["third"])))
    ours = validate(Recipe, document, "recipe.yaml")
    theirs = resolved_by_mergekit(yaml.safe_load(ours.to_yaml()))
    here = resolved_here(ours, list(tensor_table(tiny_models["base"])))
    if theirs is None or here is None:
        assert theirs is here
        return
    assert here.keys() == theirs.keys()
    base = ours.base_model if METHODS[ours.merge_method].uses_base else None
    for name, (per_model, shared, sources) in here.items():
        their_models, their_shared, their_sources = theirs[name]
        assert sources == their_sources
        assert [model for model, _ in per_model] == [model for model in their_models if model != base]
        for model, values in per_model:
            unset = {"scale": 1.0}  # mergekit's default is no scale at all
            found = {key: their_models[model][key] for key in values}
            assert values == {key: unset.get(key) if value is None else value for key, value in found.items()}
        assert shared == {key: their_shared[key] for key in shared}


def test_a_recipe_from_mergekit_s_documentation_is_read_as_it_is_meant(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        """
models:
  - model: orca
    parameters:
      density: [1, 0.7, 0.1]  # density gradient
      weight: 1.0
  - model: platypus
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1]  # weight gradient
  - model: wizard
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: llama
parameters:
  normalize: true
  int8_mask: true
dtype: float16
"""
    )
    plan = {tensor.name: tensor for tensor in make_plan(recipes.load(path), NAMES).tensors}
    last = plan["model.layers.3.mlp.up_proj.weight"]
    assert last.models == ("orca", "platypus", "wizard")
    assert [values["density"] for values in last.per_model] == [0.1, 0.5, 0.33]
    assert [values["weight"] for values in last.per_model] == [1.0, 1.0, 0.5]
    assert [values["weight"] for values in plan[HEAD].per_model] == [1.0, 0.0, 0.0]
    assert last.shared == {"normalize": True, "rescale": False, "lambda": 1.0, "int8_mask": True}


# Resolution


def test_a_source_s_value_precedes_its_slice_s_which_precedes_the_recipe_s():
    def resolved(*levels: str) -> float:
        parameters = {level: {"weight": value} for level, value in (("source", 1), ("slice", 2), ("recipe", 3))}
        source = {"model": "a", "layer_range": [0, 4], "parameters": parameters["source"] if "source" in levels else {}}
        part = {"sources": [source], "parameters": parameters["slice"] if "slice" in levels else {}}
        top = parameters["recipe"] if "recipe" in levels else {}
        return weights(recipe(merge_method="linear", slices=[part], parameters=top))[HEAD][0]

    assert resolved("source", "slice", "recipe") == 1
    assert resolved("slice", "recipe") == 2
    assert resolved("recipe") == 3


def test_a_level_whose_filters_match_nothing_leaves_the_value_to_the_next():
    found = weights(
        one_model([{"filter": "mlp", "value": 1}, {"filter": "norm", "value": []}], parameters={"weight": 5})
    )
    assert found["model.layers.0.mlp.up_proj.weight"] == [1]
    assert found[NORM] == [5]
    assert found[EMBEDDINGS] == [5]


def test_the_first_filter_that_matches_wins():
    found = weights(one_model([{"filter": "layers.1.", "value": 1}, {"filter": "mlp", "value": 2}, {"value": 3}]))
    assert found["model.layers.1.mlp.up_proj.weight"] == [1]
    assert found["model.layers.2.mlp.up_proj.weight"] == [2]
    assert found["model.layers.2.norm.weight"] == [3]


@pytest.mark.parametrize("everything", [{"value": 7}, {"filter": None, "value": 7}, {"filter": "*", "value": 7}])
def test_no_filter_and_a_star_match_every_tensor(everything):
    assert set(map(tuple, weights(one_model([everything, {"filter": "mlp", "value": 1}])).values())) == {(7.0,)}
    assert set(map(tuple, weights(one_model(everything)).values())) == {(7.0,)}


def test_a_gradient_is_interpolated_over_the_layers_of_its_slice():
    assert layers(one_model([0, 3])) == pytest.approx([0, 1, 2, 3])
    assert layers(one_model([0, 2, 0])) == pytest.approx([0, 4 / 3, 4 / 3, 0])
    assert layers(one_model([{"filter": "mlp", "value": [1, 4]}, {"value": 0}])) == pytest.approx([1, 2, 3, 4])


def test_numbers_that_yaml_reads_as_text_are_numbers_in_gradients_too():
    """YAML 1.1 takes 1e-3 for a string."""
    assert layers(one_model(yaml.safe_load("[0, 3e-1]"))) == pytest.approx([0, 0.1, 0.2, 0.3])
    assert layers(one_model(yaml.safe_load("3e-1"))) == [0.3] * 4


@pytest.mark.parametrize(
    ("written", "read"),
    [("true", True), ("'false'", False), ("off", False), ("1", True), ("0", False), ("'no'", False)],
)
def test_truth_values_are_read_in_every_spelling(written, read):
    found = make_plan(one_model(1, parameters={"normalize": yaml.safe_load(written)}), NAMES)
    assert {tensor.shared["normalize"] for tensor in found.tensors} == {read}


def test_a_list_of_truth_values_is_stepped_through():
    found = make_plan(one_model(1, parameters={"normalize": [True, False]}), NAMES).tensors
    assert [tensor.shared["normalize"] for tensor in found if "mlp" in tensor.name] == [True, True, True, False]


def test_a_slice_of_one_layer_takes_the_end_of_a_gradient_and_the_rest_of_the_model_its_start():
    parts = [
        {"sources": [{"model": "a", "layer_range": [start, end], "parameters": {"weight": [start, end]}}]}
        for start, end in ((0, 1), (1, 4))
    ]
    found = recipe(merge_method="linear", slices=parts)
    assert layers(found) == [1, 1, 2.5, 4]
    assert weights(found)[EMBEDDINGS] == [0]
    assert weights(found)[NORM] == weights(found)[HEAD] == [1]


def test_embeddings_read_the_first_slice_norm_and_head_the_last():
    parts = [
        {"sources": [{"model": model, "layer_range": layer_range, "parameters": {"weight": weight}}]}
        for model, layer_range, weight in (("a", [0, 2], 1), ("b", [2, 3], 2), ("c", [3, 4], 3))
    ]
    found = recipe(merge_method="linear", slices=parts)
    models = {tensor.name: tensor.models for tensor in make_plan(found, NAMES).tensors}
    assert weights(found)[EMBEDDINGS] == [1]
    assert weights(found)[NORM] == weights(found)[HEAD] == [3]
    assert (models[EMBEDDINGS], models[NORM], models[HEAD]) == (("a",), ("c",), ("c",))


def test_the_base_takes_no_part_in_task_vectors_and_keeps_no_position():
    sources = [{"model": model, "parameters": {"weight": 1}} for model in ("a", "base", "b")]
    plan = make_plan(recipe(merge_method="dare_ties", base_model="base", models=sources), NAMES)
    assert {tensor.models for tensor in plan.tensors} == {("a", "b")}
    assert {tensor.positions for tensor in plan.tensors} == {(0, 1)}


def test_a_base_that_is_not_listed_takes_part_in_an_average_as_in_mergekit():
    unlisted = recipe(merge_method="linear", base_model="base", models=[{"model": "a"}], parameters={"weight": 1})
    assert {tensor.models for tensor in make_plan(unlisted, NAMES).tensors} == {("a", "base")}


def test_a_model_keeps_its_position_in_every_slice():
    """Its position selects its mask."""

    def part(start: int, *models: str) -> dict[str, Any]:
        sources = [{"model": model, "layer_range": [start, start + 2]} for model in ("base", *models)]
        return {"sources": sources, "parameters": {"weight": 1}}

    plan = make_plan(
        recipe(merge_method="dare_ties", base_model="base", slices=[part(0, "a", "b"), part(2, "b")]), NAMES
    )
    positions = {tensor.name: tensor.positions for tensor in plan.tensors}
    assert positions[EMBEDDINGS] == (0, 1)
    assert positions[HEAD] == (1,)


# YAML and identity


texts = st.text(
    st.characters(codec="utf-8", exclude_characters="\x85\u2028\u2029"), max_size=20
)  # PyYAML folds these line breaks
scores = st.none() | st.dictionaries(texts, st.none() | st.floats(0, 1), max_size=3)
provenances = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**63),
        "rescale": st.sampled_from(["density", "l1"]),
        "candidate": st.none() | texts,
        "fingerprint": st.none() | texts,
        "scores": scores,
        "heldout": scores,
        "aliases": st.dictionaries(texts, texts, max_size=3),
        "versions": st.dictionaries(texts, texts, max_size=3),
    },
)


model_tokens = st.fixed_dictionaries({"kind": st.just("model_token"), "model": st.sampled_from("abc")})
token_sources = st.sampled_from(["a", "base", {"kind": "zero"}]) | st.one_of(
    model_tokens.map(lambda token: token | {"token": "<x>"}), model_tokens.map(lambda token: token | {"token_id": 3})
)
tokens = st.fixed_dictionaries({"source": token_sources}, optional={"force": st.booleans()})
tokenizers = st.fixed_dictionaries(
    {},
    optional={
        "source": st.sampled_from(["union", "base", "a"]),
        "tokens": st.dictionaries(texts, tokens, max_size=2),
        "pad_to_multiple_of": st.none() | st.integers(1, 64),
    },
)
outputs = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([None, "float32", "bfloat16"]),
        "out_dtype": st.sampled_from([None, "float32", "bfloat16"]),
        "chat_template": st.sampled_from([None, "auto", "a", "{{ messages }}"]),
    },
)
vocabularies = (
    st.just({})
    | st.fixed_dictionaries({"tokenizer_source": st.sampled_from([None, "base", "union", "a"])})
    | st.fixed_dictionaries({"tokenizer": tokenizers})
)


@few
@given(document=documents(), provenance=provenances, output=outputs, vocabulary=vocabularies, names=st.data())
@example(
    document={"merge_method": "linear", "models": [{"model": "yes"}]},
    provenance={},
    output={},
    vocabulary={"tokenizer": {}},
    names=None,
)
def test_a_recipe_survives_yaml_without_loss(document, provenance, output, vocabulary, names, tmp_path_factory):
    written = validate(Recipe, document | {"evomerge": provenance} | output | vocabulary, "recipe.yaml")
    MergeConfiguration.model_validate(yaml.safe_load(written.to_yaml()))  # mergekit reads it too
    if names is not None:
        written = written.renamed({model: names.draw(texts) for model in "abc"})
    path = tmp_path_factory.getbasetemp() / "survivor.yaml"
    path.write_text(written.to_yaml(), encoding="utf-8")
    read = recipes.load(path)
    assert read == written
    assert read.model_dump_json() == written.model_dump_json()  # 1 has not become 1.0
    assert read.content_id() == written.content_id()
    assert read.to_yaml() == written.to_yaml()


def test_lists_of_numbers_stand_on_one_line():
    assert "weight: [0.0, 1.0]\n" in one_model([0.0, 1.0]).to_yaml()


@few
@given(document=documents(), provenance=provenances)
def test_the_content_id_leaves_out_scores_and_provenance(document, provenance):
    plain = validate(Recipe, document, "recipe.yaml")
    dressed = validate(Recipe, document | {"evomerge": provenance | {"seed": 0, "rescale": "l1"}}, "recipe.yaml")
    assert dressed.content_id() == plain.content_id()


def test_the_content_id_takes_in_all_that_decides_the_weights():
    plain = one_model(1.0)
    others = [
        one_model(1.5),
        one_model(1.0, dtype="bfloat16"),
        one_model(1.0, base_model="base"),
        one_model(1.0, parameters={"normalize": False}),
        one_model(1.0, evomerge={"seed": 1}),
        one_model(1.0, evomerge={"rescale": "density"}),
        one_model(1.0, evomerge={"parallel": [[1, 3]]}),
        one_model(1.0, evomerge={"parallel": [[1, 3], [3, 5]]}),
        plain.renamed({"a": "b"}),
        plain.model_copy(update={"merge_method": "ties"}),
    ]
    assert len({plain.content_id(), *(other.content_id() for other in others)}) == 11


@pytest.mark.parametrize(
    ("method", "left"),
    [("ties+rows", "ties"), ("ties+rows+aim", "ties+aim"), ("ties+aim", "ties+aim"), ("ties", "ties")],
)
def test_a_recipe_without_a_step_is_the_same_in_all_else(method, left):
    recipe = one_model(1.0).model_copy(update={"merge_method": method})
    assert recipe.without_step("rows") == recipe.model_copy(update={"merge_method": left})


@few
@given(document=documents(), vocabulary=vocabularies)
def test_renaming_there_and_back_gives_the_same_recipe(document, vocabulary):
    plain = validate(Recipe, document | vocabulary, "recipe.yaml")
    there = {name: f"/models/{name}" for name in ("base", "a", "b", "c")}
    back = {path: name for name, path in there.items()}
    moved = plain.renamed(there)
    assert set(moved.references) == {there[name] for name in plain.references}
    assert moved.fine_tunes == tuple(there[name] for name in plain.fine_tunes)
    assert moved.renamed(back) == plain
    assert '"a"' not in moved.model_dump_json()  # wherever a model is named
    assert plain.renamed({}) == plain


def test_renaming_takes_the_tokenizer_along():
    plain = one_model(1.0, base_model="base", tokenizer_source="base")
    assert plain.renamed({"base": "/models/base"}).tokenizer_source == "base"  # mergekit's word for the base
    named = one_model(1.0, base_model="zoo:base", tokenizer_source="zoo:base")
    moved = named.renamed({"zoo:base": "/models/base"})
    assert moved.tokenizer_source == "/models/base"
    assert validate(Recipe, yaml.safe_load(moved.to_yaml()), "recipe.yaml") == moved


def test_references_start_with_the_base_and_follow_the_order_of_appearance():
    found = recipe(merge_method="ties", base_model="z", models=[{"model": name} for name in ("c", "z", "a")])
    assert found.references == ("z", "c", "a")
    assert found.fine_tunes == ("c", "a")


def test_single_and_linear_recipes_average_whole_models():
    assert weights(recipes.single("a")) == {name: [1.0] for name in NAMES}
    assert weights(recipes.linear({"a": 0.25, "b": 0.75})) == {name: [0.25, 0.75] for name in NAMES}


# What is refused


MODULES = {
    "several modules": (
        {"modules": {"text_decoder": {"models": [{"model": "a"}]}, "vision_tower": {"models": [{"model": "b"}]}}},
        r"modules names 2 parts \(text_decoder, vision_tower\), .*write models without modules, .* with filters",
    ),
    "modules beside models": (
        {"modules": {"default": {"models": [{"model": "a"}]}}, "models": [{"model": "a"}]},
        "give exactly one of models, slices and modules",
    ),
    "a list of modules": ({"modules": [{"models": [{"model": "a"}]}]}, r"modules is \[.*expected \{default:"),
    "an empty module": (
        {"modules": {"default": {"parameters": {"weight": 1}}}},
        "exactly one of models and slices",
    ),
}


@pytest.mark.parametrize(("changes", "message"), MODULES.values(), ids=MODULES)
def test_modules_that_are_no_whole_model_are_refused(changes, message, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump({"merge_method": "linear", **changes}))
    with pytest.raises(InputError, match=f"recipe.yaml: .*{message}"):
        recipes.load(path)


def test_a_named_part_is_read_as_the_whole_and_said_so(tmp_path):
    path, told = tmp_path / "recipe.yaml", []
    models = [{"model": "a", "parameters": {"weight": 1.0}}]
    path.write_text(yaml.safe_dump({"merge_method": "linear", "modules": {"text_decoder": {"models": models}}}))
    assert recipes.load(path, told.append) == recipes.single("a")
    assert told == [
        f"{path}: modules.text_decoder is read as the recipe of the whole model; mergekit would write that part alone."
    ]


A = {"model": "a", "layer_range": [0, 4]}
REFUSED = {
    "both forms": ({"models": [{"model": "a"}], "slices": [{"sources": [A]}]}, "exactly one of models and slices"),
    "neither form": ({}, "exactly one of models and slices"),
    "a layer range under models": ({"models": [A]}, "take no layer_range"),
    "a slice without layers": ({"slices": [{"sources": [{"model": "a"}]}]}, r"slices\[0\].*layer_range"),
    "a slice without sources": ({"slices": [{"sources": []}]}, r"slices\[0\]\.sources"),
    "sources of different layers": (
        {"slices": [{"sources": [A, {"model": "b", "layer_range": [0, 3]}]}]},
        r"slices\[0\]: sources of one slice must have equally many layers, got \[0, 4\] and \[0, 3\]",
    ),
    "a slice that ends before it begins": (
        {"slices": [{"sources": [{"model": "a", "layer_range": [2, 1]}]}]},
        r"slices\[0\]: layer_range \[2, 1\] is no range",
    ),
    "a layer before the first": (
        {"slices": [{"sources": [{"model": "a", "layer_range": [-1, 2]}]}]},
        r"slices\[0\]: layer_range \[-1, 2\] is no range",
    ),
    "two tokenizers": (
        {"models": [{"model": "a"}], "tokenizer_source": "union", "tokenizer": {"source": "base"}},
        "give at most one of tokenizer_source and tokenizer",
    ),
    "a token named twice": (
        {
            "models": [{"model": "a"}],
            "tokenizer": {
                "tokens": {"<x>": {"source": {"kind": "model_token", "model": "a", "token": "b", "token_id": 3}}}
            },
        },
        r"tokenizer\.tokens\.<x>\.source: give exactly one of token_id and token",
    ),
    "a token forced without a source": (
        {"models": [{"model": "a"}], "tokenizer": {"tokens": {"<x>": {"force": True}}}},
        r"tokenizer\.tokens\.<x>: force needs a source",
    ),
    "padding to nothing": (
        {"models": [{"model": "a"}], "tokenizer": {"pad_to_multiple_of": 0}},
        r"tokenizer\.pad_to_multiple_of is 0",
    ),
    "a misspelled key of the tokenizer": (
        {"models": [{"model": "a"}], "tokenizer": {"pad_to_multiple": 8}},
        "did you mean 'pad_to_multiple_of'",
    ),
    "a misspelled key": ({"models": [{"model": "a", "parameter": {}}]}, "did you mean 'parameters'"),
    "an unknown dtype": ({"models": [{"model": "a"}], "dtype": "int8"}, 'dtype is "int8"'),
    "a block of one layer": (
        {"models": [{"model": "a"}], "evomerge": {"parallel": [[1, 2]]}},
        r"evomerge\.parallel: \[1, 2\] is no block here; write \[first, last \+ 1\] of at least 2 layers",
    ),
    "blocks that overlap": (
        {"models": [{"model": "a"}], "evomerge": {"parallel": [[1, 4], [3, 5]]}},
        r"evomerge\.parallel: \[3, 5\] is no block",
    ),
    "a block before the first layer": (
        {"models": [{"model": "a"}], "evomerge": {"parallel": [[-1, 2]]}},
        r"evomerge\.parallel: \[-1, 2\] is no block",
    ),
    "an infinite weight": ({"models": [{"model": "a", "parameters": {"weight": float("inf")}}]}, "finite"),
}


@pytest.mark.parametrize(("document", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_recipe_is_refused_with(document, message):
    with pytest.raises(InputError, match=rf"^recipe\.yaml: .*{message}"):
        recipe(merge_method="linear", **document)


def sliced(*ranges: tuple[int, int]) -> Recipe:
    parts = tuple(
        Slice(sources=(Source(model="a", layer_range=layer_range, parameters={"weight": 1.0}),))
        for layer_range in ranges
    )
    return Recipe(merge_method="linear", slices=parts)


def test_slices_repeat_drop_and_reorder_layers():
    plan = make_plan(sliced((2, 4), (0, 1), (3, 4)), NAMES)
    assert plan.layers == ({"a": 2}, {"a": 3}, {"a": 0}, {"a": 3})
    assert not plan.keeps_layers
    found = {tensor.name: tensor.sources for tensor in plan.tensors}
    assert found["model.layers.2.mlp.up_proj.weight"] == ("model.layers.0.mlp.up_proj.weight",)
    assert found["model.layers.3.norm.weight"] == ("model.layers.3.norm.weight",)
    assert found[EMBEDDINGS] == (EMBEDDINGS,)
    assert make_plan(sliced((0, 3), (3, 4)), NAMES).keeps_layers
    assert len(make_plan(sliced((0, 4), (1, 4), (0, 4)), NAMES).layers) == 11


def test_sources_of_one_slice_may_lie_anywhere_in_their_models():
    """Here even in a longer one, whose own layers are known from its own names."""
    longer = [f"model.layers.{layer}.norm.weight" for layer in range(9)]
    sources = tuple(
        Source(model=model, layer_range=(start, start + 2), parameters={"weight": 1.0})
        for model, start in (("a", 2), ("base", 0), ("b", 7))
    )
    slices = (Slice(sources=sources),)
    plan = make_plan(Recipe(merge_method="ties", base_model="base", slices=slices), NAMES, tables={"b": longer})
    assert plan.layers == ({"a": 2, "base": 0, "b": 7}, {"a": 3, "base": 1, "b": 8})
    second = next(tensor for tensor in plan.tensors if tensor.name == "model.layers.1.norm.weight")
    assert second.sources == ("model.layers.3.norm.weight", "model.layers.8.norm.weight")
    assert (second.base, second.base_source) == ("base", "model.layers.1.norm.weight")


def test_a_slice_may_set_another_base_apart():
    def part(base: str | None) -> Slice:
        sources = tuple(Source(model=model, layer_range=(0, 2)) for model in ("a", "base"))
        return Slice(sources=sources, base_model=base)

    recipe = Recipe(merge_method="slerp", base_model="base", slices=(part(None), part("a")), parameters={"t": 0.5})
    plan = {tensor.name: tensor for tensor in make_plan(recipe, NAMES).tensors}
    assert (plan[EMBEDDINGS].base, plan[EMBEDDINGS].models) == ("base", ("a",))
    assert (plan[HEAD].base, plan[HEAD].models) == ("a", ("base",))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            sliced((0, 2), (2, 5)),
            r"slices\[1\] takes layers \[2, 5\) of a, which has 4; use a layer_range within \[0, 4\]",
        ),
        (
            Recipe(merge_method="linear", models=(Source(model="a"), Source(model="long")), parameters={"weight": 1}),
            "long has 9 layers, but a has 4; models are merged whole, so write slices",
        ),
        (
            Recipe(
                merge_method="slerp",
                base_model="base",
                slices=(Slice(sources=(Source(model="a", layer_range=(0, 4)),)),),
                parameters={"t": 0.5},
            ),
            r"slices\[0\]: base_model base is none of its sources",
        ),
        (
            Recipe(merge_method="linear", models=(Source(model="a"), Source(model="a")), parameters={"weight": 1}),
            "the model a is given twice",
        ),
    ],
)
def test_layers_that_are_not_there_are_refused(recipe, message):
    tables = {"long": [f"model.layers.{layer}.norm.weight" for layer in range(9)]}
    with pytest.raises(InputError, match=rf"^my.yaml: {message}"):
        make_plan(recipe, NAMES, "my.yaml", tables)


def task_vectors(method: str = "ties", base: str | None = "base", **parameters: Any) -> Recipe:
    return Recipe(merge_method=method, base_model=base, models=(Source(model="a", parameters=parameters),))


def several(method: str, *models: str, **parameters: Any) -> Recipe:
    sources = tuple(Source(model=model) for model in models)
    return Recipe(merge_method=method, base_model="base", models=sources, parameters=parameters)


PLAN_ERRORS = {
    "a density above one": (
        task_vectors(weight=1.0, density=1.4),
        r"density of a for \S+ is 1.4; use a value in \[0, 1\]",
    ),
    "a negative density": (task_vectors(weight=1.0, density=[0.5, -0.5]), r"density of a for \S+ is -0.166667; use"),
    "an unknown method": (task_vectors("dare_tie"), "merge_method is 'dare_tie', no known merge method; .*'dare_ties'"),
    "a missing weight": (task_vectors(), "weight of a is missing for model.embed_tokens.weight; give it a value"),
    "a weight for some tensors only": (
        task_vectors(weight=[FilteredValue(filter="mlp", value=1.0), FilteredValue(filter="embed", value=1.0)]),
        "weight of a is missing for model.layers.0.norm.weight",
    ),
    "a missing base": (task_vectors(base=None, weight=1.0), "merge_method ties needs a base_model"),
    "nothing besides the base": (
        task_vectors(base="a", weight=1.0),
        "merge_method ties takes 1 or more models besides the base, but there are 0; add one",
    ),
    "too many for an arc": (
        several("slerp", "a", "b", t=0.5),
        "merge_method slerp takes 1 model besides the base, but there are 2; remove one",
    ),
    "too few for an angle between them": (
        several("model_stock", "a"),
        "merge_method model_stock takes 2 or more models besides the base, but there are 1; add one",
    ),
    "two models passed through": (
        several("passthrough", "a"),
        "merge_method passthrough takes 1 model counting a base_model, but there are 2; remove one",
    ),
    "a missing t": (several("slerp", "a"), "t for model.embed_tokens.weight is missing|t is missing"),
    "an epsilon that leads out of (0, 1)": (
        several("della", "a", weight=1.0, density=0.9),
        r"epsilon of a for \S+ is 0.15, which with density 0.9 leaves \(0, 1\); use one below 0.1",
    ),
    "part of an iteration": (
        several("karcher", "a", max_iter=2.5),
        r"max_iter for \S+ is '2.5'; expected a whole number",
    ),
    "a word for a weight": (task_vectors(weight="much"), r"weight of a for \S+ is 'much'; expected a number"),
    "an infinity spelled out": (task_vectors(weight="inf"), r"weight of a for \S+ is 'inf'; expected a number"),
    "a number for a flag": (
        task_vectors(weight=1.0).model_copy(update={"parameters": {"normalize": 2}}),
        r"normalize for \S+ is '2'; expected true or false",
    ),
}


@pytest.mark.parametrize(("recipe", "message"), PLAN_ERRORS.values(), ids=PLAN_ERRORS.keys())
def test_a_plan_is_refused_with(recipe, message):
    with pytest.raises(InputError, match=rf"^my.yaml: {message}"):
        make_plan(recipe, NAMES, "my.yaml")


def test_provenance_starts_with_mergekit_s_rescale():
    assert Provenance().rescale == "l1"
    assert one_model(1.0).evomerge.seed == 0
