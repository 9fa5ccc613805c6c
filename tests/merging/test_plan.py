"""A plan says of every tensor of the output which tensors it is made of, and by which parameters."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evomerge.errors import InputError
from evomerge.layers import layer_index
from evomerge.merging.methods import METHODS
from evomerge.merging.methods.base import Method
from evomerge.merging.plan import make_plan, unread_parameters
from evomerge.recipe import FilteredValue, Recipe, Slice, Source

PARTS = ("self_attn.q_proj.weight", "mlp.up_proj.weight")
EVERY_METHOD = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)

counts = st.integers(1, 6)
numbers = st.floats(-2, 2)
gradients = st.lists(numbers, min_size=1, max_size=5)


def tensors(count: int) -> list[str]:
    """The names of a model with this many layers."""
    layers = [f"model.layers.{layer}.{part}" for layer in range(count) for part in PARTS]
    return ["model.embed_tokens.weight", *layers, "model.norm.weight", "lm_head.weight"]


def merged(weights: Sequence[Any]) -> Recipe:
    """A linear merge of models a, b, ... with a weight each."""
    sources = [Source(model=name, parameters={"weight": weight}) for name, weight in zip("abcd", weights, strict=False)]
    return Recipe(merge_method="linear", models=tuple(sources))


def sliced(parts: Sequence[tuple[int, int]], **changes: Any) -> Recipe:
    """A linear merge of runs of layers of a with the first layers of b."""
    slices = []
    for start, end in parts:
        sources = [
            Source(model="a", layer_range=(start, end), parameters={"weight": 1.0}),
            Source(model="b", layer_range=(0, end - start), parameters={"weight": 2.0}),
        ]
        slices.append(Slice(sources=tuple(sources)))
    return Recipe(merge_method="linear", slices=tuple(slices), **changes)


@st.composite
def runs(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]]]:
    """How many layers the models have, and runs of these."""
    count = draw(counts)
    run = st.tuples(st.integers(0, count - 1), st.integers(1, count)).filter(lambda pair: pair[0] < pair[1])
    return count, draw(st.lists(run, min_size=1, max_size=4))


@given(st.data(), counts)
def test_whole_models_give_every_tensor_once_in_the_order_of_the_names(data: st.DataObject, count: int) -> None:
    names = data.draw(st.permutations(tensors(count)))
    plan = make_plan(merged([0.5, 0.25]), names)
    assert [tensor.name for tensor in plan.tensors] == names
    for tensor in plan.tensors:
        assert tensor.models == ("a", "b")
        assert tensor.sources == (tensor.name, tensor.name)
        assert tensor.per_model == ({"weight": 0.5}, {"weight": 0.25})
    assert plan.layers == tuple({"a": layer, "b": layer} for layer in range(count))
    assert plan.keeps_layers


@given(runs())
def test_slices_give_every_tensor_of_the_output_once_from_the_layers_that_they_name(
    given_runs: tuple[int, list[tuple[int, int]]],
) -> None:
    count, parts = given_runs
    taken = [(start + offset, offset) for start, end in parts for offset in range(end - start)]
    plan = make_plan(sliced(parts), tensors(count))
    names = [tensor.name for tensor in plan.tensors]
    assert sorted(names) == sorted(tensors(len(taken)))
    assert plan.layers == tuple({"a": of_a, "b": of_b} for of_a, of_b in taken)
    for tensor in plan.tensors:
        layer = layer_index(tensor.name)
        if layer is None:
            assert tensor.sources == (tensor.name, tensor.name)
        else:
            expected = [tensor.name.replace(f".{layer}.", f".{source}.") for source in taken[layer]]
            assert list(tensor.sources) == expected
    assert plan.keeps_layers == all(of_a == of_b == i for i, (of_a, of_b) in enumerate(taken))


@given(counts, gradients)
def test_a_gradient_is_interpolated_over_the_layers_and_ends_at_its_ends(count: int, values: list[float]) -> None:
    plan = make_plan(merged([values, 1.0]), tensors(count))
    ends = np.linspace(0, 1, len(values))
    for tensor in plan.tensors:
        layer = layer_index(tensor.name)
        t = 0.0 if layer is None else layer / (count - 1) if count > 1 else 1.0
        assert tensor.per_model[0]["weight"] == pytest.approx(np.interp(t, ends, values), abs=1e-12)
        assert tensor.per_model[1]["weight"] == 1.0


@given(runs(), gradients)
def test_a_gradient_starts_anew_in_every_slice_and_outer_tensors_have_its_first_value(
    given_runs: tuple[int, list[tuple[int, int]]], values: list[float]
) -> None:
    count, parts = given_runs
    recipe = sliced(parts)
    assert recipe.slices is not None
    slices = []
    for part in recipe.slices:
        sources = tuple(source.model_copy(update={"parameters": {}}) for source in part.sources)
        slices.append(part.model_copy(update={"sources": sources}))
    recipe = recipe.model_copy(update={"slices": tuple(slices), "parameters": {"weight": values}})
    lengths = [end - start for start, end in parts]
    places = [offset / (length - 1) if length > 1 else 1.0 for length in lengths for offset in range(length)]
    for tensor in make_plan(recipe, tensors(count)).tensors:
        layer = layer_index(tensor.name)
        wanted = np.interp(0.0 if layer is None else places[layer], np.linspace(0, 1, len(values)), values)
        assert [each["weight"] for each in tensor.per_model] == pytest.approx([wanted, wanted], abs=1e-12)


filters = st.sampled_from(["self_attn", "mlp", "layers.0.", "embed", "weight", "norm", "nowhere", "*"])


@given(st.lists(st.tuples(filters, numbers), max_size=5), numbers)
def test_the_first_filter_that_matches_decides(conditions: list[tuple[str, float]], otherwise: float) -> None:
    setting = [FilteredValue(filter=text, value=value) for text, value in conditions]
    plan = make_plan(merged([[*setting, FilteredValue(value=otherwise)], 1.0]), tensors(3))
    for tensor in plan.tensors:
        matching = [value for text, value in conditions if text == "*" or text in tensor.name]
        assert tensor.per_model[0]["weight"] == [*matching, otherwise][0]


def test_a_models_own_filter_reads_the_name_of_its_tensor_and_a_shared_one_that_of_the_outputs() -> None:
    own = [FilteredValue(filter="layers.2.", value=0.25), FilteredValue(value=1.0)]
    shared = [FilteredValue(filter="layers.0.", value=False), FilteredValue(value=True)]
    source = Source(model="a", layer_range=(2, 4), parameters={"weight": own})
    recipe = Recipe(merge_method="linear", slices=(Slice(sources=(source,)),), parameters={"normalize": shared})
    for tensor in make_plan(recipe, tensors(4)).tensors:
        first = layer_index(tensor.name) == 0
        assert tensor.per_model[0]["weight"] == (0.25 if first else 1.0)
        assert tensor.shared["normalize"] is not first


@pytest.mark.parametrize("given_at", ["source", "slice", "recipe"])
def test_a_source_goes_before_its_slice_and_a_slice_before_the_recipe(given_at: str) -> None:
    levels = ("source", "slice", "recipe")
    blocks: dict[str, dict[str, Any]] = {
        level: {"weight": float(index)} if index >= levels.index(given_at) else {} for index, level in enumerate(levels)
    }
    source = Source(model="a", layer_range=(0, 2), parameters=blocks["source"])
    slices = (Slice(sources=(source,), parameters=blocks["slice"]),)
    recipe = Recipe(merge_method="linear", slices=slices, parameters=blocks["recipe"])
    plan = make_plan(recipe, tensors(2))
    assert {tensor.per_model[0]["weight"] for tensor in plan.tensors} == {float(levels.index(given_at))}


def test_embeddings_are_the_first_slices_and_norm_and_head_the_last() -> None:
    slices = [Slice(sources=(Source(model=name, layer_range=(0, 2), parameters={"weight": 1.0}),)) for name in "abc"]
    plan = make_plan(Recipe(merge_method="linear", slices=tuple(slices)), tensors(2))
    models = {tensor.name: tensor.models[0] for tensor in plan.tensors if layer_index(tensor.name) is None}
    assert models == {"model.embed_tokens.weight": "a", "model.norm.weight": "c", "lm_head.weight": "c"}


@given(st.permutations("abcd"))
def test_a_base_is_set_apart_and_the_others_keep_their_positions(order: list[str]) -> None:
    sources = tuple(Source(model=name, parameters={"weight": 1.0}) for name in order)
    recipe = Recipe(merge_method="task_arithmetic", base_model="a", models=sources)
    for tensor in make_plan(recipe, tensors(2)).tensors:
        assert (tensor.base, tensor.base_source) == ("a", tensor.name)
        assert tensor.models == tuple(name for name in order if name != "a")
        assert tensor.positions == (0, 1, 2)


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        (sliced([(1, 4)]), r"slices\[0\] takes layers \[1, 4\) of a, which has 3; use a layer_range within \[0, 3\]"),
        (merged([1.0, "much"]), "weight of b for .* is 'much'; expected a number"),
        (Recipe(merge_method="linear", models=(Source(model="a"),)), "weight of a is missing for"),
        (Recipe(merge_method="linear", models=(Source(model="a"),) * 2), "the model a is given twice"),
        (Recipe(merge_method="ties", models=(Source(model="a"),)), "merge_method ties needs a base_model; add one"),
        (Recipe(merge_method="tiez", models=(Source(model="a"),)), "no known merge method; did you mean 'ties'"),
    ],
)
def test_what_cannot_be_merged_is_refused_in_a_sentence(recipe: Recipe, says: str) -> None:
    with pytest.raises(InputError, match=says):
        make_plan(recipe, tensors(3))


def test_whole_models_of_unequal_depth_are_refused() -> None:
    with pytest.raises(InputError, match="b has 2 layers, but a has 3"):
        make_plan(merged([1.0, 1.0]), tensors(3), tables={"b": tensors(2)})


def blocks(method: Method, of_source: dict[str, Any], shared: dict[str, Any]) -> Recipe:
    source = Source(model="a", layer_range=(0, 1), parameters=of_source)
    part = Slice(sources=(source,), parameters=shared)
    return Recipe(merge_method=method.name, slices=(part,), parameters=shared)


@EVERY_METHOD
def test_parameters_that_a_method_reads_where_they_stand_are_not_told(method: Method) -> None:
    own = {known.name: 1.0 for known in method.per_model}
    recipe = blocks(method, own, own | {known.name: 1.0 for known in method.shared})
    assert list(unread_parameters(recipe)) == []


@EVERY_METHOD
def test_every_other_parameter_is_told_with_its_key(method: Method) -> None:
    shared = [known.name for known in method.shared]
    recipe = blocks(method, dict.fromkeys([*shared, "unheard_of"], 1.0), {"unheard_of": 1.0})
    source = "slices[0].sources[0].parameters"
    told = [sentence.partition(" is ignored")[0] for sentence in unread_parameters(recipe)]
    keys = ["parameters.unheard_of", "slices[0].parameters.unheard_of"]
    assert told == [*keys, *(f"{source}.{name}" for name in (*shared, "unheard_of"))]


def test_a_misspelled_parameter_is_told_with_the_closest() -> None:
    source = Source(model="a", parameters={"wieght": 1.0})
    [sentence] = unread_parameters(Recipe(merge_method="linear", models=(source,)))
    assert sentence.startswith("models[0].parameters.wieght is ignored")
    assert sentence.endswith("did you mean 'weight'?")
