import numpy as np
import pytest

from evomerge.config.base import GeneConfig
from evomerge.config.spaces import ParameterSpaceConfig
from evomerge.errors import InputError
from evomerge.merging.methods import METHODS
from evomerge.merging.plan import make_plan
from evomerge.recipe import Recipe
from evomerge.spaces import active
from evomerge.spaces.parameter import ParameterSpace
from tests.contracts.space import SpaceContract

LAYER = ("self_attn.q_proj.weight", "mlp.up_proj.weight", "input_layernorm.weight")
TENSORS = (
    "model.embed_tokens.weight",
    *(f"model.layers.{layer}.{part}" for layer in range(6) for part in LAYER),
    "model.norm.weight",
    "lm_head.weight",
)


def make_space(**settings: object) -> ParameterSpace:
    config = ParameterSpaceConfig.model_validate(settings)
    return ParameterSpace(config, "base", {"math": "path/math", "lang": "path/lang"}, TENSORS, seed=7)


class TestPlainSpace(SpaceContract):
    space = make_space()
    tensors = TENSORS


class TestGroupedSpaceWithFilters(SpaceContract):
    space = make_space(layer_granularity=2, filters=["self_attn", "mlp"], **{"lambda": {"low": 0.5, "high": 1.5}})
    tensors = TENSORS


class TestLinearSpace(SpaceContract):
    space = make_space(method="linear", layer_groups=["0-3", "4-5"], normalize=True)
    tensors = TENSORS


class TestDellaSpace(SpaceContract):
    space = make_space(method="della", layer_granularity=2, filters=["mlp"], density={"low": 0.01, "high": 1.0})
    tensors = TENSORS


class TestSpaceOnASphere(SpaceContract):
    space = make_space(method="nuslerp", layer_granularity=3)
    tensors = TENSORS


def parameters(space: ParameterSpace, genome: object) -> dict[str, dict[str, float]]:
    """Tensor name to the weights that each model has there."""
    plan = make_plan(space.decode(genome), TENSORS)  # type: ignore[arg-type]
    return {
        tensor.name: {model: values["weight"] for model, values in zip(tensor.models, tensor.per_model, strict=True)}
        for tensor in plan.tensors
    }


def test_each_gene_governs_exactly_the_tensors_of_its_group_and_model() -> None:
    space = make_space(layer_groups=["0-1", "2-4", "5"], filters=["self_attn"])
    start = np.zeros(len(space.genes))
    touched: dict[str, set[tuple[str, str]]] = {}
    for position, gene in enumerate(space.genes):
        if gene.kind == "weight":
            genome = start.copy()
            genome[position] = 1.25
            touched[gene.name] = {
                (tensor, model)
                for tensor, weights in parameters(space, genome).items()
                for model, weight in weights.items()
                if weight == 1.25
            }
    assert touched["weight:math:embeddings"] == {("model.embed_tokens.weight", "path/math")}
    assert touched["weight:lang:head"] == {("model.norm.weight", "path/lang"), ("lm_head.weight", "path/lang")}
    assert touched["weight:math:layers_0-1.self_attn"] == {
        (f"model.layers.{layer}.self_attn.q_proj.weight", "path/math") for layer in (0, 1)
    }
    assert touched["weight:lang:layer_5.rest"] == {
        (f"model.layers.5.{part}", "path/lang") for part in LAYER if "self_attn" not in part
    }
    everything = {(tensor, model) for tensor in TENSORS for model in ("path/math", "path/lang")}
    assert set().union(*touched.values()) == everything
    assert sum(map(len, touched.values())) == len(everything), "no tensor has two genes of one model"


def test_encode_gives_every_group_the_weight_of_its_model_and_leaves_densities_at_their_start() -> None:
    space = make_space(layer_granularity=3)
    genome = space.encode({"math": 1.0})
    weights = parameters(space, genome)
    assert all(weight == {"path/math": 1.0, "path/lang": 0.0} for weight in weights.values())
    assert all(value == 1.0 for gene, value in zip(space.genes, genome, strict=True) if gene.kind == "density")


def test_a_fixed_kind_of_gene_is_not_searched_but_still_in_the_recipe() -> None:
    space = make_space(density={"fixed": 0.5})
    assert {gene.kind for gene in space.genes} == {"weight"}
    plan = make_plan(space.decode([gene.start for gene in space.genes]), TENSORS)
    assert all(values["density"] == 0.5 for tensor in plan.tensors for values in tensor.per_model)


def test_negative_weights_are_searched_only_on_request() -> None:
    assert all(gene.low == 0 for gene in make_space().genes if gene.kind == "weight")
    asked = make_space(weight={"low": -0.5})
    genome = [-0.5 if gene.kind == "weight" else gene.start for gene in asked.genes]
    assert all(weight == {"path/math": -0.5, "path/lang": -0.5} for weight in parameters(asked, genome).values())


def test_values_outside_the_box_are_clipped_to_it() -> None:
    space = make_space()
    assert space.decode([99.0] * len(space.genes)) == space.decode([gene.high for gene in space.genes])


def test_the_recipe_carries_the_seed_of_its_masks_and_what_rescaling_means() -> None:
    recipe = make_space(rescale="l1").decode([gene.start for gene in make_space().genes])
    assert (recipe.evomerge.seed, recipe.evomerge.rescale) == (7, "l1")
    assert recipe.parameters["rescale"] is True


def test_lambda_is_a_gene_once_its_bounds_are_written() -> None:
    space = make_space(**{"lambda": {"low": 0.8}})
    gene = space.genes[-1]
    assert (gene.name, gene.low, gene.high) == ("lambda", 0.8, 1.5)
    genome = [gene.start for gene in space.genes[:-1]] + [1.3]
    assert space.decode(genome).parameters["lambda"] == 1.3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer_granularity": 4}, "does not divide the model's 6 layers"),
        ({"layer_groups": ["0-2", "4-5"]}, "starts at layer 3"),
        ({"layer_groups": ["0-2"]}, "cover all of them"),
        ({"layer_groups": ["0-2", "x"]}, "write one layer"),
        ({"filters": ["attention"]}, "no tensor name in the layers contains"),
        ({"weight": GeneConfig(low=0, high=1, step=0.1, fixed=1.0), "density": {"fixed": 1.0}}, "nothing to search"),
        ({"method": "dare_tie"}, "did you mean 'dare_ties'"),
        ({"method": ["ties", "dare_tie"]}, "did you mean 'dare_ties'"),
        ({"method": ["nuslerp", "ties"], "participate": True}, "nuslerp in space.method takes 2 models, so all"),
        ({"method": "slerp", "participate": True}, "of 2 models slerp leaves none out; set it to false"),
        ({"method": "model_stock", "participate": True}, "of 2 models model_stock leaves none out"),
        ({"parameters": {"slerp": {"t": None}}}, "space.parameters.slerp is for no method in space.method"),
        ({"method": "sce", "parameters": {"sce": {"topk": None}}}, r"sce\.topk cannot be searched; did you mean 'sel"),
        ({"method": "slerp", "parameters": {"slerp": {"t": {"low": 2}}}}, r"slerp\.t: low is 2; use a value below"),
        ({"method": "karcher", "parameters": {"karcher": {"max_iter": {"high": 2.5}}}}, "use a whole number"),
        ({"method": "model_stock", "parameters": {"model_stock": {"filter_wise": {"low": 0}}}}, "is a switch"),
        ({"method": "ram", "parameters": {"ram": {"epsilon": {"low": -1}}}}, "use a number of at least 0"),
        ({"method": "regmean", "parameters": {"regmean": {"alpha": {"high": 2}}}}, r"alpha\.high is 2; .* from 0 to 1"),
        ({"post": {"aim": {"omega": {"fixed": 1.5}}}}, r"space\.post\.aim\.omega\.fixed is 1\.5; .* from 0 to 1"),
    ],
)
def test_a_space_that_does_not_fit_the_model_says_what_to_change(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_space(**settings)


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.takes("weight")])
def test_every_method_with_a_weight_per_model_is_searched_over_weights_and_densities(method: str) -> None:
    space = make_space(method=method, **{"lambda": {"low": 0.5, "high": 1.5}})
    row, recipe = METHODS[method], space.decode([gene.start for gene in space.genes])
    expected = {"weight"}
    expected |= {name for name, taken in (("density", row.takes), ("lambda", row.shares)) if taken(name)}
    assert {gene.kind for gene in space.genes} == expected
    assert set(recipe.parameters) <= {parameter.name for parameter in row.shared}
    assert (recipe.base_model == "base") == row.uses_base


OWN = {
    "slerp": {"slerp.t"},
    "nearswap": {"nearswap.t"},
    "karcher": {"karcher.max_iter"},
    "model_stock": {"model_stock.filter_wise"},
    "sce": {"sce.select_topk"},
    "ram": {"ram.epsilon"},
    "ramplus_tl": {"ramplus_tl.r", "ramplus_tl.alpha", "ramplus_tl.epsilon"},
    "passthrough": {"passthrough.scale"},
    "iso": {"iso.alpha"},
    "ace": {"ace.alpha"},
    "arcee_fusion": set(),
}
ENDS = {"slerp": {"from", "to"}, "nearswap": {"from", "to"}, "arcee_fusion": {"from", "to"}, "passthrough": {"to"}}


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if not row.takes("weight")])
def test_a_method_without_weights_is_searched_over_its_own_parameters_and_its_two_ends(method: str) -> None:
    assert {gene.kind for gene in make_space(method=method).genes} == OWN[method] | ENDS.get(method, set())


def test_a_method_with_nothing_to_search_says_so() -> None:
    config = ParameterSpaceConfig.model_validate({"method": "arcee_fusion"})
    with pytest.raises(InputError, match="arcee_fusion, which has no parameters, so with 1 model there is nothing"):
        ParameterSpace(config, "base", {"math": "path/math"}, TENSORS, seed=7)


EVERY = [name for name in METHODS if name != "nuslerp"]


class TestEveryMethodWithParticipation(SpaceContract):
    space = make_space(
        method=EVERY,
        participate=True,
        layer_granularity=3,
        filters=["mlp"],
        parameters={"della": {"epsilon": None}, "breadcrumbs": {"gamma": {"high": 0.2}}},
        normalize="auto",
        **{"lambda": {"high": 2.0}},
    )
    tensors = TENSORS


class TestSlerp(SpaceContract):
    space = make_space(method="slerp", layer_granularity=2)
    tensors = TENSORS


class TestParticipation(SpaceContract):
    space = make_space(method="linear", participate=True, weight={"fixed": 1.0}, normalize=True)
    tensors = TENSORS


class TestModelStockOfSome(SpaceContract):
    space = make_space(method=["model_stock", "sce"], participate=True)
    tensors = TENSORS


def genome_of(space: ParameterSpace, **chosen: float | str) -> list[float]:
    """The space's start with some genes set, by name (`__` for a colon) and, where they are categorical, by choice."""
    named = {name.replace("__", ":"): value for name, value in chosen.items()}
    assert set(named) <= {gene.name for gene in space.genes}
    values = (named.get(gene.name, gene.start) for gene in space.genes)
    return [
        float(gene.choices.index(value) if isinstance(value, str) else value)
        for gene, value in zip(space.genes, values, strict=True)
    ]


def sources(recipe: Recipe) -> list[str]:
    assert recipe.slices is not None
    return [source.model for source in recipe.slices[0].sources]


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        (("base", "lang"), ["base", "path/lang"]),
        (("math", "lang"), ["path/math", "path/lang"]),
        (("math", "math"), ["base", "path/math"]),
    ],
)
def test_the_ends_of_slerp_are_genes(ends: tuple[str, str], expected: list[str]) -> None:
    space = make_space(method="slerp")
    recipe = space.decode(genome_of(space, **{"from": ends[0], "to": ends[1], "slerp.t__layers_0-5": 0.25}))
    assert recipe.base_model == expected[0]
    assert sources(recipe) == expected
    shared = {tensor.name: tensor.shared["t"] for tensor in make_plan(recipe, TENSORS).tensors}
    assert shared["model.layers.3.mlp.up_proj.weight"] == 0.25
    assert shared["lm_head.weight"] == shared["model.embed_tokens.weight"] == 0.5


def test_slerp_starts_at_the_control_that_it_is_started_from() -> None:
    space = make_space(method="slerp")
    for weights, ends, t in (
        ({"lang": 1.0}, ["base", "path/lang"], 1.0),
        ({"math": 0.5, "lang": 0.5}, ["path/math", "path/lang"], 0.5),
        ({}, ["base", "path/math"], 0.0),
    ):
        recipe = space.decode(space.encode(weights))
        assert sources(recipe) == ends
        assert {tensor.shared["t"] for tensor in make_plan(recipe, TENSORS).tensors} == {t}


def test_models_take_part_by_gene_and_never_fewer_than_the_method_needs() -> None:
    space = make_space(method=["linear", "karcher", "model_stock"], participate=True)
    both = ["path/math", "path/lang"]
    assert sources(space.decode(genome_of(space, method="karcher", take__math="out"))) == ["path/lang"]
    assert sources(space.decode(genome_of(space, method="linear", take__math="out", take__lang="out"))) == both[:1]
    assert sources(space.decode(space.encode({"lang": 1.0}))) == both[1:]
    assert sources(space.decode(space.encode({"math": 0.5, "lang": 0.5}))) == both


def test_the_first_models_join_where_fewer_take_part_than_the_method_needs() -> None:
    models = {"a": "path/a", "b": "path/b", "c": "path/c"}
    config = ParameterSpaceConfig.model_validate({"method": "model_stock", "participate": True})
    space = ParameterSpace(config, "base", models, TENSORS, seed=7)
    nobody = genome_of(space, take__a="out", take__b="out", take__c="out")
    assert sources(space.decode(nobody)) == ["base", "path/a", "path/b"]
    assert sources(space.decode(genome_of(space, take__a="out", take__b="out"))) == ["base", "path/a", "path/c"]


def test_weights_count_for_methods_with_weights_and_models_that_take_part() -> None:
    space = make_space(method=["ties", "linear", "sce"], participate=True)
    counted = {
        (method, take): {
            gene.kind
            for gene, counts in zip(
                space.genes,
                active(space.genes, np.array(genome_of(space, method=method, take__math=take, take__lang="out"))),
                strict=True,
            )
            if counts
        }
        - {"method", "take"}
        for method in ("ties", "linear", "sce")
        for take in ("in", "out")
    }
    assert counted == {
        ("ties", "in"): {"weight", "density"},
        ("linear", "in"): {"weight"},
        ("sce", "in"): {"sce.select_topk"},
        ("ties", "out"): set(),
        ("linear", "out"): set(),
        ("sce", "out"): {"sce.select_topk"},
    }


def test_methods_own_parameters_take_a_user_s_bounds_or_stay_fixed() -> None:
    space = make_space(method="slerp", parameters={"slerp": {"t": {"low": 0.6, "step": 0.05}}})
    assert {(gene.low, gene.high, gene.start, gene.step) for gene in space.genes if gene.kind == "slerp.t"} == {
        (0.6, 1.0, 0.6, 0.05)
    }
    fixed = make_space(method=["karcher", "linear"], parameters={"karcher": {"max_iter": {"fixed": 3}}})
    assert fixed.decode([0.0] * len(fixed.genes)).parameters == {"max_iter": 3}
    searched = make_space(method="model_stock")
    assert searched.decode([1.0]).parameters == {"filter_wise": True}


def test_the_names_and_order_of_a_plain_space_s_genes_are_those_that_archives_hold() -> None:
    space = make_space(layer_granularity=3, **{"lambda": {"low": 0.5}})
    groups = ("embeddings", "layers_0-2", "layers_3-5", "head")
    names = [f"{k}:{m}:{g}" for k in ("weight", "density") for g in groups for m in ("math", "lang")]
    assert [gene.name for gene in space.genes] == [*names, "lambda"]
    assert all(gene.domain == "continuous" and not gene.when for gene in space.genes)


def test_a_method_for_two_models_is_refused_for_one() -> None:
    config = ParameterSpaceConfig.model_validate({"method": "nuslerp"})
    with pytest.raises(
        InputError, match=r"^space\.method is nuslerp, which takes 2 models besides the base, .* lists 1"
    ):
        ParameterSpace(config, "base", {"a": "path/a"}, TENSORS, seed=7)


def of_three(**settings: object) -> ParameterSpace:
    config = ParameterSpaceConfig.model_validate(settings)
    return ParameterSpace(config, "base", {"a": "path/a", "b": "path/b", "c": "path/c"}, TENSORS, seed=7)


class TestPairs(SpaceContract):
    space = of_three(method=["nuslerp", "sce"], participate=True)
    tensors = TENSORS


def test_a_method_for_two_models_chooses_them_by_gene_among_more() -> None:
    space = of_three(method="nuslerp")
    pairs = {"a and b": "ab", "a and c": "ac", "b and c": "bc"}
    for pair, names in pairs.items():
        genome = genome_of(space, pair=pair)
        assert sources(space.decode(genome)) == ["base", *(f"path/{name}" for name in names)]
        counted = active(space.genes, np.array(genome))
        weighted = {
            gene.name.split(":")[1]
            for gene, counts in zip(space.genes, counted, strict=True)
            if counts and gene.kind == "weight"
        }
        assert weighted == set(names)
    near: list[tuple[dict[str, float], str]] = [({"c": 1.0}, "ac"), ({"b": 0.3, "c": 0.3}, "bc"), ({}, "ab")]
    for weights, names in [*near, (dict.fromkeys("abc", 0.3), "ab")]:
        assert sources(space.decode(space.encode(weights)))[1:] == [f"path/{name}" for name in names]


def test_who_takes_part_in_a_pair_is_not_asked_again() -> None:
    space = of_three(method=["linear", "nuslerp"], participate=True)
    assert {gene.kind for gene in space.genes} == {"method", "pair", "take", "weight"}
    out = {f"take__{name}": "out" for name in "abc"}
    assert sources(space.decode(genome_of(space, method="nuslerp", pair="b and c", **out)))[1:] == ["path/b", "path/c"]
    genome = np.array(genome_of(space, method="nuslerp"))
    counted = {gene.kind for gene, counts in zip(space.genes, active(space.genes, genome), strict=True) if counts}
    assert "take" not in counted


@pytest.mark.parametrize("density", [0.001, 0.05, 0.15, 0.5, 0.85, 0.9, 0.999, 1 - 1e-9])
def test_della_s_epsilon_is_as_much_of_its_default_as_the_density_allows(density: float) -> None:
    space = make_space(method="della", density={"low": 0.0001, "high": 1.0}, filters=["mlp"])
    genome = [density if gene.kind == "density" else gene.start for gene in space.genes]
    for tensor in make_plan(space.decode(genome), TENSORS).tensors:
        for values in tensor.per_model:
            assert 0 < values["density"] - values["epsilon"] <= values["density"] + values["epsilon"] < 1
            assert values["epsilon"] == pytest.approx(min(0.15, density, 1 - density), abs=2e-6)


# Weights of their own for tensors


class TestSpaceByTensor(SpaceContract):
    space = make_space(tensor_weights=True, layer_granularity=3, filters=["mlp"])
    tensors = TENSORS


class TestSpaceByTensorOfSeveralMethods(SpaceContract):
    space = make_space(layer_granularity="tensor", method=["ties", "slerp"], participate=True)
    tensors = TENSORS


BY_TENSOR: dict[str, dict[str, object]] = {
    "all in one": {},
    "groups": {"layer_groups": ["0-1", "2-4", "5"], "filters": ["self_attn"]},
    "densities": {"layer_granularity": 2, "density": {"low": 0.1}},
    "several methods": {"method": ["task_arithmetic", "ties", "slerp"], "participate": True, "layer_granularity": 3},
    "linear": {"method": "linear", "layer_granularity": 1},
}


@pytest.mark.parametrize("kind", BY_TENSOR)
def test_with_weights_by_tensor_controls_and_random_draws_are_the_same_merges(kind: str) -> None:
    coarse, fine = make_space(**BY_TENSOR[kind]), make_space(tensor_weights=True, **BY_TENSOR[kind])
    assert len(fine.genes) > len(coarse.genes)
    for weights in ({"math": 1.0}, {"math": 0.3, "lang": 1 / 3}, {}):
        plans = [make_plan(space.decode(space.encode(weights)), TENSORS) for space in (coarse, fine)]
        assert plans[0].tensors == plans[1].tensors
    for seed in range(5):
        drawn = [space.decode(space.draw(np.random.default_rng(seed))) for space in (coarse, fine)]
        assert make_plan(drawn[0], TENSORS).tensors == make_plan(drawn[1], TENSORS).tensors


@pytest.mark.parametrize("settings", [{"layer_granularity": "tensor"}, {"tensor_weights": True, "filters": ["mlp"]}])
def test_with_weights_by_tensor_every_tensor_reads_its_own_gene_of_each_model(settings: dict[str, object]) -> None:
    space = make_space(density={"fixed": 1.0}, **settings)
    genome = np.random.default_rng(2).uniform(0, 1.5, len(space.genes))
    written = {gene.name: value for gene, value in zip(space.genes, genome, strict=True)}
    assert len(written) == 2 * len(TENSORS)
    assert parameters(space, genome) == {
        tensor: {f"path/{model}": written[f"weight:{model}:{tensor}"] for model in ("math", "lang")}
        for tensor in TENSORS
    }


def test_tensors_whose_names_hold_another_s_name_still_read_their_own_gene() -> None:
    names = ("embed_tokens.weight", *(f"layers.{i}.{part}" for i in range(12) for part in LAYER), "norm.weight")
    names = (*names, *(f"layers.{i}.mlp_norm.weight" for i in range(12)))
    config = ParameterSpaceConfig.model_validate({"tensor_weights": True, "density": {"fixed": 1.0}})
    space = ParameterSpace(config, "base", {"math": "path/math"}, names, seed=7)
    genome = np.random.default_rng(2).uniform(0, 1.5, len(space.genes))
    written = {gene.name: value for gene, value in zip(space.genes, genome, strict=True)}
    for tensor in make_plan(space.decode(genome), names).tensors:
        assert tensor.per_model[0]["weight"] == written[f"weight:math:{tensor.name}"]


def test_tensors_of_granularity_tensor_are_groups_of_one_layer_with_weights_by_tensor() -> None:
    assert make_space(layer_granularity="tensor").genes == make_space(layer_granularity=1, tensor_weights=True).genes
    auto, never = make_space(tensor_weights="auto"), make_space(tensor_weights=False)
    assert auto.genes == never.genes == make_space().genes
