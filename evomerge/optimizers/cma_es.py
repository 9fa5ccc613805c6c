"""CMA-ES (Hansen 2016, arXiv:1604.00772) by pycma, on genes scaled by their steps.

pycma draws from a private generator, so a replay of what was told proposes the same genomes bit for bit. When its own
criteria say that it has stalled, it starts again from the best candidate told, with twice the population.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomerge.config import OptimizerConfig
from evomerge.optimizers import Problem, box
from evomerge.optimizers.ranking import Incumbent
from evomerge.pareto import Scores
from evomerge.quiet import quiet
from evomerge.spaces import Genome

_MARGIN = 0.02  # of the box: a start on a bound would leave half of every first generation on it


class CmaEs:
    """One CMA-ES over all objectives, ranked by `Problem.ranking`."""

    def __init__(self, config: OptimizerConfig, problem: Problem) -> None:
        assert config.population is not None
        self._config, self._problem = config, problem
        self._low, self._high = box(problem.genes)
        self._scale = np.array([gene.step for gene in problem.genes])
        self._population, self._restarts = config.population, 0
        self._best = Incumbent(problem.start)
        self._pending: list[tuple[Any, list[NDArray[np.float64]]]] = []
        self._strategy = self._start(problem.start)

    def _start(self, start: Genome) -> Any:
        with quiet():
            import cma

        margin = _MARGIN * (self._high - self._low)
        inside = np.clip(start, self._low + margin, self._high - margin)
        options = {
            "bounds": [self._low / self._scale, self._high / self._scale],
            "popsize": self._population,
            "CMA_diagonal": self._config.covariance == "diagonal",
            "CMA_mirrors": 0,
            "seed": np.nan,
            "randn": _PrivateNormals(self._problem.seed, self._restarts),
            "verbose": -9,
            # accuracies are quantized, so plateaus are ordinary and no reason to stop
            "tolfun": 0,
            "tolfunhist": 0,
            "tolflatfitness": 10**6,
            "tolstagnation": 10**6,
            "tolx": 1e-2,
        }
        with quiet():
            return cma.CMAEvolutionStrategy(inside / self._scale, 1.0, options)

    def ask(self) -> Genome:
        if self._config.restarts and self._strategy.stop():
            self._restart()
        solutions = self._strategy.ask()
        self._pending.append((self._strategy, solutions))
        genomes: Genome = np.clip(np.stack(solutions) * self._scale, self._low, self._high)
        return genomes

    def _restart(self) -> None:
        self._restarts += 1
        self._population *= 2
        self._strategy = self._start(self._best.genome)

    def tell(self, genomes: Genome, scores: Scores) -> None:
        strategy, solutions = self._pending.pop(0)
        self._best.offer(genomes, self._problem.ranking.means(scores))
        if strategy is self._strategy:  # else a restart has replaced it, and what it would learn is lost anyway
            with quiet():
                strategy.tell(solutions, self._problem.ranking.losses(scores).tolist())
        self._problem.ranking.observe(scores)


class _PrivateNormals:
    """The `randn` that pycma calls, drawing from a generator of its own."""

    def __init__(self, seed: int, restart: int) -> None:
        self._generator = np.random.RandomState(np.random.SeedSequence([seed, restart]).generate_state(4))

    def __call__(self, *shape: int) -> Any:
        return self._generator.randn(*shape)
