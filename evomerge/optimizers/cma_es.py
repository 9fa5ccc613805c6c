"""CMA-ES (Hansen 2016, arXiv:1604.00772) by pycma, on genes scaled by their steps, other than real ones relaxed.

pycma draws from a private generator, so a replay of what was told proposes the same genomes bit for bit. When its own
criteria say that it has stalled, it starts again from the best candidate told, with twice the population.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomerge.config import OptimizerConfig
from evomerge.optimizers import Problem
from evomerge.optimizers.ranking import Incumbent
from evomerge.optimizers.relaxation import Relaxation
from evomerge.pareto import Scores
from evomerge.quiet import quiet
from evomerge.spaces import Genome

_MARGIN = 0.02  # of the box: a start on a bound would leave half of every first generation on it


class CmaEs:
    """One CMA-ES over all objectives, ranked by `Problem.ranking`."""

    def __init__(self, config: OptimizerConfig, problem: Problem) -> None:
        assert config.population is not None
        self._config, self._problem = config, problem
        self._relaxed = Relaxation(problem.genes)
        self._population, self._restarts = config.population, 0
        self._best = Incumbent(problem.start)
        self._pending: list[tuple[Any, list[NDArray[np.float64]]]] = []
        self._strategy = self._start(problem.start)

    def _start(self, start: Genome) -> Any:
        with quiet():
            import cma

        low, high, scale = self._relaxed.low, self._relaxed.high, self._relaxed.scale
        margin = _MARGIN * (high - low)
        inside = np.clip(self._relaxed.points(start), low + margin, high - margin)
        options = {
            "bounds": [low / scale, high / scale],
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
            return cma.CMAEvolutionStrategy(inside / scale, 1.0, options)

    def ask(self) -> Genome:
        if self._config.restarts and self._strategy.stop():
            self._restart()
        solutions = self._strategy.ask()
        self._pending.append((self._strategy, solutions))
        return self._relaxed.genomes(np.stack(solutions) * self._relaxed.scale)

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
