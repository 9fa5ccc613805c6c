"""Optuna's samplers: the tree-structured Parzen estimator, a Gaussian process, NSGA-II and NSGA-III.

A study in memory holds what was told. Every candidate is drawn by a sampler of its own, seeded by the candidate's
number, so a replay of the told scores proposes the same genomes bit for bit. Every gene is drawn for every candidate,
also where it does not count.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evomerge.config.running import OptimizerConfig
from evomerge.optimizers.base import Problem
from evomerge.optimizers.pareto import ScoreArray
from evomerge.optimizers.pending import Pending
from evomerge.optimizers.ranking import weighted_means
from evomerge.quiet import quiet
from evomerge.randomness import counter_rng
from evomerge.spaces import Gene, Genome, canonical

_MOST_BROKEN = 1e6  # by how much limits can be broken; beyond it all candidates are equally bad


def tpe(config: OptimizerConfig, problem: Problem) -> "Sampled":
    """A multivariate tree-structured Parzen estimator (Bergstra et al. 2011; Falkner et al. 2018, arXiv:1807.01774) by
    Optuna: densities of good and of other candidates, whose ratio says what to try."""
    return Sampled(config, problem, lambda samplers, seed: samplers.TPESampler(multivariate=True, seed=seed))


def gp(config: OptimizerConfig, problem: Problem) -> "Sampled":
    """A Gaussian process by Optuna (GPSampler), which tries where an improvement is most expected."""
    return Sampled(config, problem, lambda samplers, seed: samplers.GPSampler(seed=seed), assumes_failures=True)


def nsga_ii(config: OptimizerConfig, problem: Problem) -> "Sampled":
    """NSGA-II (Deb et al. 2002) by Optuna: crossover and mutation, selection by rank and crowding distance."""
    size = config.population
    return Sampled(config, problem, lambda samplers, seed: samplers.NSGAIISampler(population_size=size, seed=seed))


def nsga_iii(config: OptimizerConfig, problem: Problem) -> "Sampled":
    """NSGA-III (Deb and Jain 2014) by Optuna: crossover and mutation, selection by rank and reference points."""
    size = config.population
    return Sampled(config, problem, lambda samplers, seed: samplers.NSGAIIISampler(population_size=size, seed=seed))


class Sampled:
    """A study of Optuna's. Its objectives are those of the search with `ranking: elite`, else their weighted mean."""

    def __init__(
        self,
        config: OptimizerConfig,
        problem: Problem,
        sampler: Callable[[Any, int], Any],
        assumes_failures: bool = False,
    ) -> None:
        """sampler: makes a sampler of `optuna.samplers` and a seed.
        assumes_failures: whether failed candidates are told to have the worst scores so far. It is for a sampler that
            looks at scored candidates alone, and would try again what has just failed.
        """
        assert config.population is not None
        self._population, self._problem, self._sampler = config.population, problem, sampler
        self._assumes_failures = assumes_failures
        self._pending: Pending[Any] = Pending()
        self._asked = 0
        self._worst: NDArray[np.float64] | None = None
        objectives = len(problem.ranking.weights) if problem.ranking.elite else 1
        with quiet():
            import optuna
        with quiet():  # once more, since Optuna sets its own level of logging when it is imported
            self._optuna: Any = optuna
            self._distributions = {gene.name: self._distribution(gene) for gene in problem.genes}
            self._study: Any = optuna.create_study(
                directions=["maximize"] * objectives, sampler=self._sampler_of("known")
            )
            if problem.known is not None:
                self._tell_known(*problem.known)
            self._study.enqueue_trial(self._parameters(problem.start))

    def _distribution(self, gene: Gene) -> Any:
        kinds = self._optuna.distributions
        if gene.choices:
            return kinds.CategoricalDistribution(tuple(range(len(gene.choices))))
        if gene.integer:
            return kinds.IntDistribution(int(gene.low), int(gene.high))
        return kinds.FloatDistribution(gene.low, gene.high)

    def _sampler_of(self, purpose: str, generation: int = 0, index: int = 0) -> Any:
        """A new sampler, which draws by these numbers alone. What it learns from is in the study."""
        random = counter_rng(self._problem.seed, "samplers", purpose, generation, index)
        return self._sampler(self._optuna.samplers, int(random.integers(2**31)))

    def _parameters(self, genome: Genome) -> dict[str, float | int]:
        values = canonical(self._problem.genes, genome).tolist()
        return {
            gene.name: value if gene.domain == "continuous" else int(value)
            for gene, value in zip(self._problem.genes, values, strict=True)
        }

    def _tell_known(self, genomes: Genome, scores: ScoreArray) -> None:
        """Tells the known genomes as candidates, since NSGA finds parents only among what was asked for."""
        for index, (genome, told) in enumerate(zip(genomes, self._told(scores), strict=True)):
            if np.isfinite(told).all():
                self._study.sampler = self._sampler_of("known", 0, index)
                self._study.enqueue_trial(self._parameters(genome))
                self._finish(self._study.ask(self._distributions), told, limited=self._limited(scores))

    def ask(self) -> Genome:
        """The next generation (see `Optimizer`)."""
        with quiet():
            trials = [self._ask(index) for index in range(self._population)]
        self._asked += 1
        names = [gene.name for gene in self._problem.genes]
        drawn = np.array([[trial.params[name] for name in names] for trial in trials], dtype=np.float64)
        genomes = canonical(self._problem.genes, drawn)
        self._pending.add(genomes, trials)
        return genomes

    def _ask(self, index: int) -> Any:
        self._study.sampler = self._sampler_of("ask", self._asked, index)
        return self._study.ask(self._distributions)

    def tell(self, genomes: Genome, scores: ScoreArray) -> None:
        """Takes scores in any order (see `Optimizer`)."""
        with quiet():
            for trial, told in zip(self._pending.take(genomes), self._told(scores), strict=True):
                self._finish(trial, told, self._limited(scores))
        self._problem.ranking.observe(scores)

    def _limited(self, scores: ScoreArray) -> bool:
        return bool(scores.shape[1] > len(self._problem.ranking.weights))

    def _told(self, scores: ScoreArray) -> NDArray[np.float64]:
        """What the study is told of each row: its values, and last the negated amount by which limits are broken."""
        weights = self._problem.ranking.weights
        values, broken = scores[:, : len(weights)], scores[:, len(weights) :].sum(axis=1, keepdims=True)
        if not self._problem.ranking.elite:
            values = weighted_means(values, weights)[:, np.newaxis]
        return np.hstack([values, -np.minimum(broken, _MOST_BROKEN)])

    def _finish(self, trial: Any, told: NDArray[np.float64], limited: bool) -> None:
        """Tells the study of one candidate. A failed one has no values, and ranks behind all that have."""
        if np.isfinite(told).all():
            self._worst = told if self._worst is None else np.minimum(self._worst, told)
        elif self._assumes_failures and self._worst is not None:
            told = self._worst
        else:
            self._study.tell(trial, state=self._optuna.trial.TrialState.PRUNED)
            return
        if limited:
            trial.set_constraint("limits", -told[-1])
        self._study.tell(trial, told[:-1].tolist())
