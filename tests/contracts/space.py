"""What every search space must do."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evomerge.layers import layer_index, with_layer
from evomerge.merging.plan import make_plan
from evomerge.recipe import Recipe
from evomerge.spaces import SearchSpace, active, at, canonical


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

    def test_both_corners_of_the_box_decode(self) -> None:
        for corner in ("low", "high"):
            genome = [getattr(gene, corner) for gene in self.space.genes]
            assert isinstance(self.space.decode(genome), Recipe)

    def test_decoding_is_a_pure_function(self) -> None:
        genome = np.array([gene.start for gene in self.space.genes])
        before = genome.copy()
        assert self.space.decode(genome) == self.space.decode(genome)
        assert np.array_equal(genome, before)

    def test_a_genome_of_the_wrong_length_is_refused(self) -> None:
        with pytest.raises(ValueError, match="expected a genome of shape"):
            self.space.decode([0.0] * (len(self.space.genes) + 1))
