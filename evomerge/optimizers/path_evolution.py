"""Evolution of paths: children of the best paths so far, changed in ways that keep most of a path intact.

A child takes a segment from another model, or repeats, drops, inserts or moves some layers. Or it continues one path
with another path from the layer where the first one left off; the other path is a parent, or a random walk forward.
Some children are random walks as a whole, since a splice of two models is many small steps away from both. Where hops
have scales, a CMA-ES tunes those of the best path while it stays the best. Genes that do not belong to a path (a
merge's weights, the model that gives the embeddings) change one group at a time, as in `group_evolution`. Candidates
are compared by their weighted mean, whatever the ranking: a front of several objectives is full of paths whose only
merit is that they are short.
"""

from collections.abc import Set

import numpy as np
from numpy.typing import NDArray

from evomerge.config.running import OptimizerConfig
from evomerge.errors import InputError
from evomerge.optimizers.base import Problem
from evomerge.optimizers.cma_es import CmaEs
from evomerge.optimizers.group_evolution import change_group
from evomerge.optimizers.in_generations import InGenerations
from evomerge.optimizers.pareto import ScoreArray
from evomerge.randomness import counter_rng
from evomerge.spaces import Genome
from evomerge.spaces.paths import HOP, SCALE, PathGenes, Step, random_scale, random_steps

_PARENTS = 8
_NEW, _CROSSED, _ELSEWHERE, _MORE = 0.15, 0.4, 0.25, 0.6
_DRAWS = 20
_LASTED = 2  # generations that a path must have been the best before its scales are tuned
Path = list[Step]


def make(config: OptimizerConfig, problem: Problem) -> InGenerations:
    """The evolution of paths, which is told whole generations.

    config: the search's optimizer settings, resolved.
    problem: what the optimizer starts from.
    """
    return InGenerations(PathEvolution(config, problem))


def check(kinds: Set[str]) -> None:
    """Raises InputError for a space without hops.

    kinds: the kinds of genes in the space.
    """
    if HOP not in kinds:
        raise InputError(
            "optimizer.name is path_evolution, but the space has no hops; use it with space.form path or a hybrid."
        )


class PathEvolution:
    """A population of the best genomes told, from which each generation descends."""

    def __init__(self, config: OptimizerConfig, problem: Problem) -> None:
        assert config.population is not None
        self._config, self._problem, self._population = config, problem, config.population
        self._places = PathGenes(problem.genes)
        self._groups = [
            np.array([gene.group == group for gene in problem.genes])
            for group in dict.fromkeys(gene.group for gene in problem.genes if gene.kind not in (HOP, SCALE))
        ]
        self._parents = problem.start[None]
        self._scores: ScoreArray = np.empty((0, len(problem.ranking.weights)))
        self._seen: set[bytes] = set()
        self._generation = self._lasted = self._tuned = 0
        self._tuner: _ScaleTuner | None = None
        self._pending: list[_ScaleTuner | None] = []

    def ask(self) -> Genome:
        """The next generation (see `Optimizer`). The very first candidates are the start and other controls, so that
        children have something to beat."""
        tuner = self._current_tuner()
        tuned = list(tuner.ask()) if tuner is not None else []
        children = [self._child(index) for index in range(self._population - len(tuned))]
        if self._generation == 0:
            children = [*self._beginnings(), *children][: len(children)]
        self._seen |= {child.tobytes() for child in children}
        self._pending.append(tuner)
        self._generation += 1
        return np.stack([*tuned, *children])

    def _beginnings(self) -> list[Genome]:
        """The start, and the genomes of other controls."""
        controls = self._problem.known[0] if self._problem.known is not None else self._problem.start[None]
        others = [genome for genome in controls if not np.array_equal(genome, self._problem.start)]
        return [self._problem.start, *others]

    def _current_tuner(self) -> "_ScaleTuner | None":
        if self._tuner is None and self._lasted >= _LASTED and self._population >= 8:
            scales = self._places.scales_of(self._parents[0])
            if scales.any():
                self._tuned += 1
                seed = self._problem.seed + 104729 * self._tuned
                self._tuner = _ScaleTuner(self._config, self._problem, self._parents[0], scales, seed)
        return self._tuner

    def _child(self, index: int) -> Genome:
        """A child that has not been proposed before, if a few draws find one."""
        random = counter_rng(self._problem.seed, "path_evolution", self._generation, index)
        drawn = self._draw(random)
        for _ in range(_DRAWS):
            if drawn.tobytes() not in self._seen:
                break
            drawn = self._draw(random)
        return drawn

    def _draw(self, random: np.random.Generator) -> Genome:
        parent = self._parent(random)
        if self._groups and random.random() < _ELSEWHERE:
            group = self._groups[random.integers(len(self._groups))]
            return change_group(self._problem.genes, group, parent, random)
        if random.random() < _NEW:
            return self._places.write(random_steps(self._places, random), parent)
        path = self._places.read(parent)
        if random.random() < _CROSSED:
            walk = random.random() < 0.5
            other = random_steps(self._places, random) if walk else self._places.read(self._parent(random))
            first, second = (path, other) if random.random() < 0.5 else (other, path)
            path = crossed(self._places, first, second, random)
            if random.random() < 0.5:
                return self._places.write(path, parent)
        return self._places.write(mutated(self._places, path, random), parent)

    def _parent(self, random: np.random.Generator) -> Genome:
        """The better of two random parents; parents are in the order of their means, the best first."""
        return np.array(self._parents[min(random.integers(len(self._parents), size=2))])

    def tell(self, genomes: Genome, scores: ScoreArray) -> None:
        """Takes the scores of a whole generation (see `Optimizer`)."""
        tuner, ranking = self._pending.pop(0), self._problem.ranking
        count = 0
        if tuner is not None and tuner is self._tuner:  # else its path is no longer the best
            count = tuner.population
            tuner.tell(genomes[:count], scores[:count])
        self._survive(genomes, scores)
        ranking.observe(scores[count:])

    def _survive(self, genomes: Genome, scores: ScoreArray) -> None:
        """Keeps the best of parents and children, and counts how many generations the best path has lasted."""
        before = self._places.blocks_of(self._parents[0])
        scored = len(self._scores) > 0
        together = np.vstack([self._parents, genomes]) if scored else genomes
        told = np.vstack([self._scores, scores]) if scored else scores
        valid = np.isfinite(self._problem.ranking.means(told))
        if not valid.any():
            return
        together, told = together[valid], told[valid]
        _, first = np.unique(together, axis=0, return_index=True)
        means = self._problem.ranking.means(told)
        kept = sorted(first.tolist(), key=lambda row: -means[row])[:_PARENTS]
        self._parents, self._scores = together[kept], told[kept]
        if np.array_equal(before, self._places.blocks_of(self._parents[0])):
            self._lasted += 1
        else:
            self._lasted, self._tuner = 0, None


class _ScaleTuner:
    """CMA-ES on the scales of one path; all other genes stay."""

    def __init__(
        self, config: OptimizerConfig, problem: Problem, genome: Genome, scales: NDArray[np.bool_], seed: int
    ) -> None:
        self.population = (config.population or 8) // 2
        self._genome, self._scales = genome, scales
        genes = tuple(gene for gene, tuned in zip(problem.genes, scales, strict=True) if tuned)
        smaller = config.model_copy(update={"population": self.population, "covariance": "diagonal", "restarts": False})
        self._cma = CmaEs(smaller, Problem(genes, genome[scales], seed, problem.ranking))

    def ask(self) -> Genome:
        genomes = np.tile(self._genome, (self.population, 1))
        genomes[:, self._scales] = self._cma.ask()
        return genomes

    def tell(self, genomes: Genome, scores: ScoreArray) -> None:
        self._cma.tell(genomes[:, self._scales], scores)


def mutated(places: PathGenes, path: Path, random: np.random.Generator) -> Path:
    """A path after one random change or a few. The operators are drawn with the chances in `_OPERATORS`.

    places: the genes of the path.
    path: the path to change.
    random: where the numbers come from.
    """
    for _ in range(1 + random.poisson(_MORE)):
        if not path:
            path = [Step(int(random.integers(1, len(places.models))))]
        operators = _OPERATORS if places.scale is not None else _OPERATORS[:-1]
        chances = np.array([chance for _, chance in operators])
        operator = operators[random.choice(len(operators), p=chances / chances.sum())][0]
        path = operator(places, path, random)[: len(places)]
    return path


def crossed(places: PathGenes, path: Path, other: Path, random: np.random.Generator) -> Path:
    """The beginning of one path, continued with another path from the layer that would follow the cut.

    places: the genes of a path.
    path: gives the beginning.
    other: gives the rest.
    random: where the numbers come from.
    """
    if not path or not other:
        return path or other
    cut = int(random.integers(1, len(path) + 1))
    next_layer = places.following(path[cut - 1].block)
    joints = [index for index, step in enumerate(other) if places.layers[step.block] == next_layer]
    start = int(random.choice(joints)) if joints else min(cut, len(other))
    return [*path[:cut], *other[start:]]


def _segment(path: Path, random: np.random.Generator) -> tuple[int, int]:
    """The start and the end of a random segment, most often of one to four steps; the end is not in it."""
    start = int(random.integers(len(path)))
    return start, min(len(path), start + int(random.geometric(0.35)))


def _from_another_model(places: PathGenes, path: Path, random: np.random.Generator) -> Path:
    """The path with a segment, or with all steps up to its end or from its start on, taken from another model."""
    start, end = _segment(path, random)
    which = random.random()
    start, end = (0, end) if which < 0.25 else (start, len(path)) if which < 0.5 else (start, end)
    model = int(random.integers(places.model_count))
    changed = [Step(places.in_model(step.block, model), step.scale) for step in path[start:end]]
    return [*path[:start], *changed, *path[end:]]


def _repeated(places: PathGenes, path: Path, random: np.random.Generator) -> Path:
    start, end = _segment(path, random)
    return [*path[:end], *path[start:]]


def _dropped(places: PathGenes, path: Path, random: np.random.Generator) -> Path:
    start, end = _segment(path, random)
    return [*path[:start], *path[end:]] or path


def _inserted(places: PathGenes, path: Path, random: np.random.Generator) -> Path:
    """The path with one more step, to the layer that follows a random step, in a random model."""
    at = int(random.integers(len(path)))
    block = places.at_layer(places.following(path[at].block), int(random.integers(places.model_count)))
    return [*path[: at + 1], Step(block or path[at].block), *path[at + 1 :]]


def _moved(places: PathGenes, path: Path, random: np.random.Generator) -> Path:
    """The path with one step moved to the block before or after its own."""
    at = int(random.integers(len(path)))
    block = path[at].block + (1 if random.random() < 0.5 else -1)
    same = 1 <= block < len(places.models) and places.models[block] == places.models[path[at].block]
    return [*path[:at], Step(block if same else path[at].block, path[at].scale), *path[at + 1 :]]


def _rescaled(places: PathGenes, path: Path, random: np.random.Generator) -> Path:
    """The path with the scales of a few steps moved."""
    turned = random.random(len(path)) < max(0.2, 1 / len(path))
    return [
        Step(step.block, random_scale(places.scale, random, step.scale)) if turn else step
        for step, turn in zip(path, turned, strict=True)
    ]


_OPERATORS = (
    (_from_another_model, 0.28),
    (_repeated, 0.14),
    (_dropped, 0.16),
    (_inserted, 0.14),
    (_moved, 0.08),
    (_rescaled, 0.2),
)
