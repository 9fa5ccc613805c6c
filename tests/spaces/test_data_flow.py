from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evomerge.config.spaces import DataFlowConfig, HybridConfig, ParameterSpaceConfig
from evomerge.errors import InputError
from evomerge.recipe import Provenance, Recipe
from evomerge.spaces import at, canonical
from evomerge.spaces.data_flow import DataFlowSpace, limited
from evomerge.spaces.forms import FORMS, distances
from evomerge.spaces.hybrid import HybridSpace
from evomerge.spaces.layer_path import Hop
from evomerge.spaces.parameter import ParameterSpace
from evomerge.spaces.paths import PathGenes, Step
from tests.contracts.space import SpaceContract
from tests.spaces.test_parameter import TENSORS

LAYERS = 6
MODELS = {"math": "path/math", "lang": "path/lang"}


def flow(**settings: object) -> DataFlowSpace:
    config = DataFlowConfig.model_validate({"kind": "data_flow"} | settings)
    return DataFlowSpace(config, "path/base", MODELS, LAYERS, "llama")


def hybrid(**path: object) -> HybridSpace:
    config = HybridConfig.model_validate({"kind": "hybrid", "parameter": {"layer_granularity": 2}, "path": path})
    parameter = ParameterSpace(config.parameter, "path/base", MODELS, TENSORS, 7)
    return HybridSpace(config, parameter, "path/base", MODELS, LAYERS)


def hops(recipe: Recipe) -> list[tuple[str, int]]:
    """(model, layer) of every layer of a path's recipe; for merged layers the model is `merge`."""
    found = []
    for part in recipe.slices or ():
        start, end = part.sources[0].layer_range or (0, 0)
        name = part.sources[0].model.removeprefix("path/") if len(part.sources) == 1 else "merge"
        found += [(name, layer) for layer in range(start, end)]
    return found


class TestPaths(SpaceContract):
    space = flow(scale={"low": 0.5, "high": 1.5}, embeddings="free", head="free", sources=["math", "lang", "base"])
    tensors = TENSORS


class TestLimitedPaths(SpaceContract):
    space = flow(
        pinned={"model": "lang", "first": 1, "last": 2}, granularity=2, max_layers=8, max_repeats=1, max_distance=2
    )
    tensors = TENSORS


class TestSlots(SpaceContract):
    space = flow(form="slots", repeats=3, pinned={"model": "base"}, scale={"low": 0.5, "high": 1.5, "step": 0.1})
    tensors = TENSORS


class TestStreamScales(SpaceContract):
    space = flow(form="slots", scale={"low": 0.5, "high": 1.5}, scaling="stream")
    tensors = TENSORS


class TestSkips(SpaceContract):
    space = flow(form="skip")
    tensors = TENSORS


class TestRepeats(SpaceContract):
    space = flow(form="repeat", pinned={"model": "math"})
    tensors = TENSORS


class TestLayersSideBySide(SpaceContract):
    space = flow(form="parallel", pinned={"model": "math"})
    tensors = TENSORS


class TestLoops(SpaceContract):
    space = flow(form="looped", sources=["lang"], repeats=4)
    tensors = TENSORS


class TestReorders(SpaceContract):
    space = flow(form="reorder", pinned={"model": "math"}, sources=["math"])
    tensors = TENSORS


class TestGrafts(SpaceContract):
    space = flow(form="graft", head="free")
    tensors = TENSORS


class TestUpscaling(SpaceContract):
    space = flow(form="upscale")
    tensors = TENSORS


class TestInterleaving(SpaceContract):
    space = flow(form="interleave", pinned={"model": "lang"})
    tensors = TENSORS


class TestHybrid(SpaceContract):
    space = hybrid(sources=["lang", "base"], first=1, last=1)
    tensors = TENSORS


class TestHybridOfTheMergeAlone(SpaceContract):
    space = hybrid(granularity=2, max_layers=12)
    tensors = TENSORS


def random_recipes(space: DataFlowSpace | HybridSpace, count: int = 60) -> list[Recipe]:
    random = np.random.default_rng(0)
    return [space.decode(at(space.genes, random.random(len(space.genes)))) for _ in range(count)]


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("model", ["math", "lang"])
def test_forms_with_pinned_ends_always_keep_them(form, model):
    space = flow(form=form, pinned={"model": model, "first": 2, "last": 1}, repeats=2)
    for recipe in random_recipes(space):
        found = hops(recipe)
        assert found[:2] == [(model, 0), (model, 1)]
        assert found[-1] == (model, 5)


def test_limits_hold_for_every_genome():
    space = flow(max_layers=7, max_repeats=2, max_distance=1)
    for recipe in random_recipes(space):
        found = hops(recipe)
        assert 1 <= len(found) <= 7
        assert max(Counter(found).values()) <= 2
        assert all(gap <= 1 for gap in distances([Hop(*hop) for hop in found]))


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 5)), max_size=12), st.integers(1, 8), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_limits_leave_out_layers_but_neither_add_nor_reorder_any(path, most, distance):
    first, last = [Hop("a", 0)], [Hop("a", 5)]
    kept = limited([Hop(*hop) for hop in path], first, last, most + 2, 2, distance)
    assert kept[0] == first[0]
    assert kept[-1] == last[0]
    rest = iter([Hop(*hop) for hop in path])
    assert all(hop in rest for hop in kept[1:-1])


@pytest.mark.parametrize("form", ["path", "slots"])
def test_a_model_is_a_path_like_any_other(form):
    space = flow(form=form, scale={"low": 0.5, "high": 1.5}, embeddings="free", head="free")
    recipe = space.decode(space.encode({"lang": 1.0}))
    assert hops(recipe) == [("lang", layer) for layer in range(LAYERS)]
    assert len(recipe.slices or ()) == 1


def only(space: DataFlowSpace, **values: float | str) -> list[tuple[str, int]]:
    """The hops of the start with some genes changed."""
    return hops(changed(space, **values))


def changed(space: DataFlowSpace, **values: float | str) -> Recipe:
    """The recipe of the start with some genes changed."""
    genome = [
        float(gene.choices.index(str(values[gene.name])))
        if gene.choices and gene.name in values
        else float(values.get(gene.name, gene.start))
        for gene in space.genes
    ]
    return space.decode(genome)


def layers(model: str, *numbers: int) -> list[tuple[str, int]]:
    return [(model, number) for number in numbers]


def test_families_build_what_they_are_named_after():
    assert only(flow(form="skip"), model="lang", skip_from=2, skip_layers=3) == layers("lang", 0, 1, 5)
    again = only(flow(form="repeat"), model="math", repeat_from=2, repeat_layers=2, repeat_times=2)
    assert again == layers("math", 0, 1, 2, 3, 2, 3, 2, 3, 4, 5)
    graft = flow(form="graft")
    numbers = {"host": "math", "donor": "lang", "graft_from": 2, "graft_layers": 2}
    replaced = layers("math", 0, 1) + layers("lang", 2, 3) + layers("math", 4, 5)
    assert only(graft, **numbers, graft_mode="replace") == replaced
    inserted = layers("math", 0, 1, 2, 3) + layers("lang", 2, 3) + layers("math", 4, 5)
    assert only(graft, **numbers, graft_mode="insert") == inserted
    solar = only(flow(form="upscale"), lower="math", upper="math", lower_until=4, upper_from=2)
    assert solar == layers("math", 0, 1, 2, 3, 2, 3, 4, 5)
    goliath = only(flow(form="interleave"), first="math", run_layers=4, overlap_layers=2)
    assert goliath == layers("math", 0, 1, 2, 3) + layers("lang", 2, 3, 4, 5)
    order = flow(form="reorder", granularity=2, sources=["lang"])
    turned = {gene.name: 1.0 - gene.start for gene in order.genes if gene.kind == "place"}
    assert only(order, **turned) == layers("lang", 4, 5, 2, 3, 0, 1)


def test_a_run_of_layers_works_side_by_side_once_or_several_times():
    once = changed(flow(form="parallel"), model="lang", parallel_from=1, parallel_layers=3)
    assert hops(once) == layers("lang", 0, 1, 2, 3, 4, 5)
    assert once.evomerge.parallel == ((1, 4),)
    looped = flow(form="looped", repeats=3)
    thrice = changed(looped, model="math", looped_from=2, looped_layers=2, looped_times=3)
    assert hops(thrice) == layers("math", 0, 1, 2, 3, 2, 3, 2, 3, 4, 5)
    assert thrice.evomerge.parallel == ((2, 4), (4, 6), (6, 8))
    assert len({one.content_id() for one in (once, thrice, thrice.model_copy(update={"evomerge": Provenance()}))}) == 3


def test_a_layer_that_is_alone_in_its_block_runs_as_any_other():
    whole = changed(flow(form="skip"), model="lang", skip_layers=0)
    assert changed(flow(form="parallel"), model="lang", parallel_layers=1) == whole
    assert changed(flow(form="parallel"), model="lang", parallel_from=5, parallel_layers=4) == whole
    again = changed(flow(form="looped"), model="lang", looped_from=3, looped_layers=1, looped_times=2)
    assert hops(again) == layers("lang", 0, 1, 2, 3, 3, 4, 5)
    assert again.evomerge.parallel == ()


def test_layers_that_a_limit_leaves_out_are_missing_in_their_block():
    cut = changed(flow(form="looped", max_layers=5), model="lang", looped_from=1, looped_layers=3, looped_times=2)
    assert hops(cut) == layers("lang", 0, 1, 2, 3, 1)
    assert cut.evomerge.parallel == ((1, 4),)
    once = changed(flow(form="looped", max_repeats=1), model="lang", looped_from=1, looped_layers=3, looped_times=2)
    assert hops(once) == layers("lang", 0, 1, 2, 3, 4, 5)
    assert once.evomerge.parallel == ((1, 4),)


def test_random_paths_go_forward_more_often_than_not():
    space = flow()
    random = np.random.default_rng(1)
    gaps = [gap for _ in range(50) for gap in distances(space.path(space.draw(random)).hops)]
    assert np.mean(np.array(gaps) == 0) > 0.6
    uniform = [gap for recipe in random_recipes(space) for gap in distances([Hop(*hop) for hop in hops(recipe)])]
    assert np.mean(np.array(uniform) == 0) < 0.3


def test_paths_are_read_and_written_back():
    space = flow(scale={"low": 0.5, "high": 1.5})
    places = PathGenes(space.genes)
    steps = [Step(3, 0.75), Step(3, 1.25), Step(9)]
    written = places.write(steps, space.encode({}))
    assert places.read(written) == steps
    assert np.array_equal(written, canonical(space.genes, written))
    assert [hop.scale for hop in space.path(written).hops] == [0.75, 1.25, 1.0]


def test_a_hybrid_whose_path_is_the_merge_s_own_is_the_merge():
    space = hybrid(sources=["lang"])
    parameter = ParameterSpace(ParameterSpaceConfig(layer_granularity=2), "path/base", MODELS, TENSORS, 7)
    assert space.decode(space.encode({"math": 0.5})) == parameter.decode(parameter.encode({"math": 0.5}))


def weights(recipe: Recipe, index: int) -> list[object]:
    sources: Sequence[object] = (recipe.slices or ())[index].sources
    return [source.parameters.get("weight") for source in sources]  # type: ignore[attr-defined]


def test_a_hybrid_repeats_merged_layers_and_takes_a_model_s_own():
    space = hybrid(sources=["lang"])
    start = space.encode({"math": 0.5})
    places = PathGenes(space.genes)
    genome = places.write([Step(2), Step(3), Step(3), Step(LAYERS + 5)], start)  # merge:1, merge:2 twice, lang:4
    recipe = space.decode(genome)
    ranges = [part.sources[0].layer_range for part in recipe.slices or ()]
    assert ranges == [(0, 0), (1, 2), (2, 3), (2, 3), (4, 5), (6, 6)]
    assert weights(recipe, 2) == [None, 0.5, 0.0]
    assert weights(recipe, 4) == [None, 1.0]
    assert [source.model for source in (recipe.slices or ())[4].sources] == ["path/base", "path/lang"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sources": ["lang", "mth"]}, r"space\.sources\[1\] is 'mth'; did you mean 'math'\?"),
        ({"sources": ["lang", "lang"]}, r"space\.sources\[1\] is lang again"),
        ({"pinned": {"model": "lng"}}, r"space\.pinned\.model is 'lng'; did you mean 'lang'\?"),
        ({"pinned": {"model": "lang", "first": 3, "last": 3}}, "keeps 3 \\+ 3 layers, but the models have 6"),
        ({"pinned": {"model": "lang", "first": 2, "last": 2}, "max_layers": 4}, "max_layers is 4, but space.pinned"),
        ({"embeddings": "lange"}, r"space\.embeddings is 'lange'; did you mean 'lang'\?"),
        ({"granularity": 7}, r"space\.granularity is 7, but only 6 layers are searched"),
    ],
)
def test_paths_that_cannot_be_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        flow(**settings)


def test_scales_where_none_fold_are_refused():
    config = DataFlowConfig.model_validate({"kind": "data_flow", "scale": {"low": 0.5, "high": 1.5}})
    with pytest.raises(InputError, match=r"space\.scale: a gemma2 model cannot take scales"):
        DataFlowSpace(config, "base", MODELS, LAYERS, "gemma2")
