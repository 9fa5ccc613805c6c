"""An ablation puts parts of the winner back: alone, then all but some, and the weights of one model."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from evomerge.errors import InputError
from evomerge.runs import directory as runs
from evomerge.search.ablation import MOST_GROUPS, Ablation, grouped, plan
from evomerge.search.controls import UNIFORM, start_weights
from evomerge.spaces import Gene


@pytest.fixture(scope="module")
def planned(finished: Path) -> Ablation:
    run = runs.read(finished)
    return plan(run.results, run.prepared.space)


def differing(first: tuple[float, ...] | None, second: tuple[float, ...] | None) -> set[int]:
    assert first is not None
    assert second is not None
    return set(np.flatnonzero(np.array(first) != np.array(second)).tolist())


def test_the_groups_are_all_genes_that_differ_from_the_uniform_merge(planned: Ablation) -> None:
    config, space = planned.config, planned.space
    uniform = tuple(space.encode(start_weights(config, UNIFORM)).tolist())
    members = [gene for group in planned.groups for gene in group.genes]
    assert len(members) == len(set(members))
    assert set(members) == differing(planned.winner.genome, uniform)


def test_each_group_is_put_back_alone(planned: Ablation) -> None:
    for group, candidate in zip(planned.groups, planned.alone, strict=True):
        assert differing(planned.winner.genome, candidate.genome) == set(group.genes)
        assert candidate.recipe == planned.space.decode(np.array(candidate.genome))
        assert all(candidate.genome[gene] == planned.start[gene] for gene in group.genes)  # type: ignore[index]


def test_the_way_leads_from_the_uniform_merge_to_the_winner_group_by_group(planned: Ablation) -> None:
    order = list(reversed(range(len(planned.groups))))
    way = [*planned.toward(order), planned.winner]
    assert way[0].genome == tuple(planned.start.tolist())
    for number, before, after in zip(order, way, way[1:], strict=False):
        assert differing(before.genome, after.genome) == set(planned.groups[number].genes)
    assert way[-2] is planned.alone[order[-1]]  # not scored twice


def test_a_model_left_out_keeps_its_place_but_no_weight(planned: Ablation) -> None:
    assert set(planned.without) == {"first", "second"}
    for name, candidate in planned.without.items():
        mine, whole = candidate.recipe, planned.winner.recipe
        assert mine.fine_tunes == whole.fine_tunes
        for slice_, old in zip(mine.slices or (), whole.slices or (), strict=True):
            for source, before in zip(slice_.sources, old.sources, strict=True):
                left_out = source.model == planned.config.models[name]
                assert source.parameters == (before.parameters | {"weight": 0.0} if left_out else before.parameters)


def test_models_are_left_out_of_a_merge_with_a_post_step_too(planned: Ablation) -> None:
    recipe = planned.winner.recipe.model_copy(update={"merge_method": "dare_ties+aim"})
    changed = replace(planned, winner=replace(planned.winner, recipe=recipe))
    assert set(changed.without) == set(planned.without)


def test_every_recipe_has_an_id_of_its_own(planned: Ablation) -> None:
    made = [*planned.first, *planned.toward(range(len(planned.groups)))]
    recipes = {candidate.id: candidate.recipe.content_id() for candidate in made}
    assert len(set(recipes.values())) == len(recipes)


def gene(number: int, group: str) -> Gene:
    return Gene(f"weight:model:{number}", "weight", group, 0.0, 1.0, 0.5, 0.1)


@pytest.mark.parametrize("count", [1, 5, MOST_GROUPS, MOST_GROUPS + 1, 97])
def test_of_many_groups_neighbors_are_put_together(count: int) -> None:
    genes = [gene(number, f"layer_{number // 2}") for number in range(2 * count)]
    groups = grouped(genes, range(2 * count))
    assert len(groups) == min(count, MOST_GROUPS)
    assert [number for group in groups for number in group.genes] == list(range(2 * count))
    sizes = [len(group.genes) for group in groups]
    assert max(sizes) - min(sizes) <= 2
    assert groups[0].name.startswith("layer_0")


def test_genes_that_do_not_differ_are_in_no_group() -> None:
    assert grouped([gene(0, "a"), gene(1, "b"), gene(2, "b")], [1]) == grouped([gene(0, "x"), gene(1, "b")], [1])
    assert grouped([gene(0, "a")], []) == ()


def test_a_search_that_has_not_ended_is_refused(run_directory: Path) -> None:
    run = runs.read(run_directory)
    run.archive.record_end(-1.0)
    with pytest.raises(InputError, match="has ended"):
        plan(run.results, run.prepared.space)
