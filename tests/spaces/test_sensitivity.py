"""The sensitivity of a space is what finite differences of the plan's parameters are, gene by gene."""

from typing import Any

import numpy as np
import pytest

from evomerge.config.search import SearchConfig
from evomerge.merging.plan import make_plan
from evomerge.spaces import Genome, SearchSpace, active, at
from evomerge.spaces.data_flow import make as make_data_flow
from evomerge.spaces.hybrid import make as make_hybrid
from evomerge.spaces.parameter import make as make_parameter
from evomerge.spaces.sensitivity import sensitivity

LAYER = ("self_attn.q_proj.weight", "self_attn.o_proj.weight", "mlp.down_proj.weight", "input_layernorm.weight")
TENSORS = (
    "model.embed_tokens.weight",
    *(f"model.layers.{layer}.{part}" for layer in range(4) for part in LAYER),
    "model.norm.weight",
    "lm_head.weight",
)
MODELS = {"math": "path/math", "lang": "path/lang"}
SCALED = {"kind": "data_flow", "scale": {"low": 0.5, "high": 1.5}}
MERGED = {"method": "task_arithmetic", "density": {"fixed": 1.0}}
SPACES: dict[str, dict[str, Any]] = {
    "groups and filters": {"layer_granularity": 2, "filters": ["self_attn", "mlp"]},
    "lambda": {"lambda": {"low": 0.5, "high": 1.5}, "layer_granularity": 2},
    "tensors": {"layer_granularity": "tensor"},
    "tensors in groups with filters": {"tensor_weights": True, "layer_groups": ["0-2", "3"], "filters": ["mlp"]},
    "linear": {"method": "linear", "layer_granularity": 4},
    "della": {"method": "della", "layer_granularity": 2, "density": {"low": 0.1, "high": 0.9, "start": 0.5}},
    "an arc": {"method": "slerp", "layer_granularity": 2, "filters": ["mlp"]},
    "nuslerp": {"method": "nuslerp", "tensor_weights": True},
    "methods and participants": {"method": ["ties", "task_arithmetic", "slerp", "karcher"], "participate": True},
    "hybrid": {"kind": "hybrid", "parameter": MERGED | {"layer_granularity": 2}, "path": {"max_layers": 6}},
    "hybrid with models and one weight": {"kind": "hybrid", "parameter": MERGED, "path": {"sources": ["lang", "base"]}},
    "hybrid by tensor": {
        "kind": "hybrid",
        "parameter": MERGED | {"tensor_weights": True},
        "path": {"sources": ["math"]},
    },
    "hybrid with lambda": {
        "kind": "hybrid",
        "parameter": MERGED | {"lambda": {"low": 0.5, "high": 1.5}},
        "path": {"sources": ["math"]},
    },
    **{
        f"{form} scaled by {scaling}": SCALED | {"form": form, "scaling": scaling, "max_layers": 7}
        for form in ("path", "slots")
        for scaling in ("mlp", "stream")
    },
    "slots of two layers": SCALED | {"form": "slots", "granularity": 2},
}


def make_space(kind: str) -> SearchSpace:
    document = {"base": "base", "models": MODELS, "objectives": [{"task": "t"}], "space": SPACES[kind]}
    config = SearchConfig.model_validate(document)
    made = {"parameter": make_parameter, "hybrid": make_hybrid, "data_flow": make_data_flow}[config.space.kind]
    return made(config, TENSORS, "llama")  # type: ignore[no-any-return, operator]


def parameters(space: SearchSpace, genome: Genome) -> dict[tuple[str, str | None, str], float]:
    """The numbers of a plan by tensor, model and name, as far as its method has derivatives by them."""
    plan = make_plan(space.decode(genome), TENSORS)
    values: dict[tuple[str, str | None, str], float] = {}
    for merge in plan.tensors:
        owners = [*zip(merge.models, merge.per_model, strict=True), (None, merge.shared)]
        values |= {
            (merge.name, model, name): float(own[name])
            for model, own in owners
            for name in plan.method.slopes
            if name in own
        }
    return values


def differences(space: SearchSpace, genome: Genome, step: float = 1e-4) -> dict[tuple[Any, int], float]:
    """The derivative of each number by each gene that counts, where it is not 0."""
    found = {}
    for index in np.flatnonzero(active(space.genes, genome)):
        if space.genes[index].domain == "continuous":
            moved = np.zeros(len(genome))
            moved[index] = step
            above, below = parameters(space, genome + moved), parameters(space, genome - moved)
            for place in above.keys() & below.keys():
                if abs(above[place] - below[place]) > 1e-9:
                    found[place, int(index)] = (above[place] - below[place]) / (2 * step)
    return found


def drawn(space: SearchSpace, seed: int) -> Genome:
    """A random genome whose numbers keep away from their bounds."""
    random = np.random.default_rng(seed)
    inside = space.draw(random) if seed % 2 else at(space.genes, random.random(len(space.genes)))
    middle = at(space.genes, random.uniform(0.05, 0.95, len(inside)))
    return np.where([gene.domain == "continuous" for gene in space.genes], middle, inside)


@pytest.mark.parametrize("kind", SPACES)
def test_it_is_what_finite_differences_are_gene_by_gene(kind: str) -> None:
    space, moved = make_space(kind), 0
    for seed in range(4):
        genome = drawn(space, seed)
        found, expected = sensitivity(space, genome, TENSORS), differences(space, genome)
        rates = {(place, index): rate for place, follows in found.rates.items() for index, rate in follows}
        assert rates.keys() == expected.keys()
        assert all(rate == pytest.approx(expected[key], rel=1e-5, abs=1e-6) for key, rate in rates.items())
        assert np.flatnonzero(found.moves).tolist() == sorted({index for _, index in expected})
        assert set(found.wanted) == {place[2] for place, _ in expected}
        moved += len(expected)
    assert moved > 0


@pytest.mark.parametrize("kind", SPACES)
def test_where_it_does_not_bend_it_is_the_same_at_another_genome_with_the_same_choices(kind: str) -> None:
    space, bends = make_space(kind), False
    for seed in range(4):
        genome = drawn(space, seed)
        other = np.where([gene.domain == "continuous" for gene in space.genes], drawn(space, seed + 10), genome)
        here, there = sensitivity(space, genome, TENSORS), sensitivity(space, other, TENSORS)
        bends |= here.bends
        assert here.bends or here.rates == there.rates
    assert bends == (SPACES[kind].get("kind") == "data_flow")


def test_the_slope_by_a_gene_is_the_sum_over_the_parameters_that_follow_it() -> None:
    space, random = make_space("groups and filters"), np.random.default_rng(0)
    genome = drawn(space, 1)
    found = sensitivity(space, genome, TENSORS)
    slopes = {place: float(random.normal()) for place in found.rates}
    direction = random.normal(size=len(genome)) * 1e-4
    above, below = parameters(space, genome + direction), parameters(space, genome - direction)
    change = sum(slope * (above[place] - below[place]) / 2 for place, slope in slopes.items())
    assert change == pytest.approx(float(found.by_gene(slopes) @ direction))
    assert found.by_gene({("nowhere", None, "weight"): 1.0}).tolist() == [0.0] * len(genome)


def test_genes_that_are_not_asked_for_do_not_move() -> None:
    space = make_space("lambda")
    allowed = np.array([gene.kind == "lambda" for gene in space.genes])
    found = sensitivity(space, drawn(space, 1), TENSORS, allowed)
    assert found.moves.tolist() == allowed.tolist()
    assert found.wanted == ("lambda",)
