"""CatCMA with margin (Hamano et al. 2025, arXiv:2504.07884) by cmaes: real, whole and categorical genes at once.

A Gaussian over numbers and a categorical distribution over choices are learned together. At first a candidate differs
from the start in only a few choices, however many there are: a path in which every gate is a coin flip is no model.
cmaes draws from a generator of its own, so a replay of the told scores proposes the same genomes bit for bit.
"""

from typing import Any

import numpy as np

from evomerge.config.running import OptimizerConfig
from evomerge.optimizers.base import Problem
from evomerge.optimizers.in_generations import InGenerations
from evomerge.optimizers.pareto import ScoreArray
from evomerge.quiet import quiet
from evomerge.spaces import Gene, Genome, canonical

_CHANGED = 4.0  # choices that differ from the start, on average, in the first generation
_MARGIN = 0.02  # share of the box between start and bounds; a start at a bound puts half of a generation on it


def make(config: OptimizerConfig, problem: Problem) -> InGenerations:
    """CatCMA, which is told whole generations.

    config: the search's optimizer settings, resolved.
    problem: what the optimizer starts from.
    """
    return InGenerations(CatCma(config, problem))


class CatCma:
    """One CatCMA with margin, ranked by `Problem.ranking`."""

    def __init__(self, config: OptimizerConfig, problem: Problem) -> None:
        assert config.population is not None
        self._problem = problem
        self._places = {
            domain: [index for index, gene in enumerate(problem.genes) if gene.domain == domain]
            for domain in ("continuous", "integer", "categorical")
        }
        self._pending: list[list[Any]] = []
        with quiet():
            import cmaes

            self._strategy: Any = cmaes.CatCMAwM(
                **self._numbers(),
                **self._choices(),
                population_size=config.population,
                seed=int(np.random.SeedSequence([problem.seed]).generate_state(1)[0]),
            )

    def _genes(self, domain: str) -> list[Gene]:
        return [self._problem.genes[index] for index in self._places[domain]]

    def _numbers(self) -> dict[str, Any]:
        real, whole = self._genes("continuous"), self._genes("integer")
        both = [*real, *whole]
        if not both:
            return {}
        low, high = np.array([gene.low for gene in both]), np.array([gene.high for gene in both])
        margin = np.where([not gene.integer for gene in both], _MARGIN * (high - low), 0.0)
        start = self._problem.start[self._places["continuous"] + self._places["integer"]]
        return {
            "x_space": [[gene.low, gene.high] for gene in real] or None,
            "z_space": [list(range(int(gene.low), int(gene.high) + 1)) for gene in whole] or None,
            "mean": np.clip(start, low + margin, high - margin),
            "cov": np.diag([gene.step**2 for gene in both]),
            "sigma": 1.0,
        }

    def _choices(self) -> dict[str, Any]:
        genes = self._genes("categorical")
        if not genes:
            return {}
        changed = min(0.5, _CHANGED / len(genes))
        chances = np.zeros((len(genes), max(len(gene.choices) for gene in genes)))
        for row, gene, start in zip(chances, genes, self._problem.start[self._places["categorical"]], strict=True):
            row[: len(gene.choices)] = changed / (len(gene.choices) - 1)
            row[int(start)] = 1.0 - changed
        return {"c_space": [len(gene.choices) for gene in genes], "cat_param": chances}

    def ask(self) -> Genome:
        """The next generation (see `Optimizer`)."""
        solutions = [self._strategy.ask() for _ in range(self._strategy.population_size)]
        self._pending.append(solutions)
        return canonical(self._problem.genes, np.stack([self._genome(solution) for solution in solutions]))

    def _genome(self, solution: Any) -> Genome:
        genome = np.zeros(len(self._problem.genes))
        for domain, values in (("continuous", solution.x), ("integer", solution.z)):
            if values is not None:
                genome[self._places[domain]] = values
        if solution.c is not None:
            genome[self._places["categorical"]] = solution.c.argmax(axis=1)
        return genome

    def tell(self, genomes: Genome, scores: ScoreArray) -> None:
        """Takes the scores of a whole generation (see `Optimizer`)."""
        losses = self._problem.ranking.losses(scores)
        with quiet():
            self._strategy.tell(list(zip(self._pending.pop(0), losses.tolist(), strict=True)))
        self._problem.ranking.observe(scores)
