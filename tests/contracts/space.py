"""What every search space must do."""

from itertools import product

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from evomerge.layers import layer_index, with_layer
from evomerge.merging.plan import make_plan
from evomerge.spaces import SearchSpace, active, at, box, canonical

FEW = 8  # genes whose corners can all be tried
RANDOM = 150  # corners to try of more genes than that


def corners(genes: int) -> NDArray[np.bool_]:
    """Corners of a box, one a row: which genes are at their upper bound."""
    if genes <= FEW:
        return np.array(list(product((False, True), repeat=genes)))
    none, alone = np.zeros((1, genes), dtype=np.bool_), np.eye(genes, dtype=np.bool_)
    return np.concatenate([none, ~none, alone, ~alone, np.random.default_rng(0).random((RANDOM, genes)) < 0.5])


class SpaceContract:
    """To test a space: subclass, and make `space` and `tensors` (the names that its recipes are for)."""

    space: SearchSpace
    tensors: tuple[str, ...]

    def named(self, layers: int) -> list[str]:
        """The tensors of a model with so many layers."""
        inside = {with_layer(name, 0) for name in self.tensors if layer_index(name) is not None}
        outside = [name for name in self.tensors if layer_index(name) is None]
        return [*outside, *(with_layer(name, layer) for name in inside for layer in range(layers))]

    @settings(suppress_health_check=[HealthCheck.differing_executors], deadline=None, max_examples=20)
    @given(st.integers(0, 2**32 - 1))
    def test_what_it_draws_is_canonical(self, seed: int) -> None:
        drawn = self.space.draw(np.random.default_rng(seed))
        assert np.array_equal(drawn, canonical(self.space.genes, drawn))
        assert np.array_equal(drawn, self.space.draw(np.random.default_rng(seed)))

    def test_gene_names_are_unique_and_starts_lie_within_bounds(self) -> None:
        names = [gene.name for gene in self.space.genes]
        assert len(set(names)) == len(names)
        assert all(gene.low <= gene.start <= gene.high and gene.step > 0 for gene in self.space.genes)

    @settings(suppress_health_check=[HealthCheck.differing_executors], deadline=None)
    @given(st.integers(0, 2**32 - 1))
    def test_every_point_of_the_box_decodes_to_a_recipe_that_can_be_planned(self, seed: int) -> None:
        unit = np.random.default_rng(seed).random(len(self.space.genes))
        low = np.array([gene.low for gene in self.space.genes])
        high = np.array([gene.high for gene in self.space.genes])
        plan = make_plan(self.space.decode(low + (high - low) * unit), self.tensors)
        assert {tensor.name for tensor in plan.tensors} == set(self.named(len(plan.layers)))

    @settings(suppress_health_check=[HealthCheck.differing_executors], deadline=None, max_examples=50)
    @given(st.integers(0, 2**32 - 1))
    def test_genes_that_do_not_count_and_values_between_choices_change_nothing(self, seed: int) -> None:
        random, genes = np.random.default_rng(seed), self.space.genes
        written = canonical(genes, at(genes, random.random(len(genes))))
        other = np.where(active(genes, written), written, at(genes, random.random(len(genes))))
        whole = np.array([gene.domain != "continuous" for gene in genes])
        other = np.where(whole, other + random.uniform(-0.49, 0.49, len(genes)), other)
        assert self.space.decode(other) == self.space.decode(written)
        assert np.array_equal(canonical(genes, other), written)

    def test_conditions_are_on_choices_of_genes_that_come_before(self) -> None:
        seen: dict[str, tuple[str, ...]] = {}
        for gene in self.space.genes:
            for condition in gene.when:
                assert set(condition.choices) < set(seen[condition.gene]), "a condition that always holds is none"
            seen[gene.name] = gene.choices

    def test_corners_of_the_box_decode_to_recipes_that_can_be_planned(self) -> None:
        """All of them where there are few genes; else both ends, all but one gene at either, and many at random."""
        low, high = box(self.space.genes)
        for upper in corners(len(self.space.genes)):
            plan = make_plan(self.space.decode(np.where(upper, high, low)), self.tensors)
            assert {tensor.name for tensor in plan.tensors} == set(self.named(len(plan.layers)))

    def test_decoding_is_a_pure_function(self) -> None:
        genome = np.array([gene.start for gene in self.space.genes])
        before = genome.copy()
        assert self.space.decode(genome) == self.space.decode(genome)
        assert np.array_equal(genome, before)

    def test_a_genome_of_the_wrong_length_is_refused(self) -> None:
        with pytest.raises(ValueError, match="expected a genome of shape"):
            self.space.decode([0.0] * (len(self.space.genes) + 1))
