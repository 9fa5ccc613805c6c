"""Ranking: one number per candidate of a generation, smaller is better, from scores on several objectives.

`elite` ranks by non-domination against the front of everything told so far, then by exclusive hypervolume gain, then by
the weighted mean (after Igel et al. 2007, with the archive's front in the place of the population's). `weighted_sum` is
the weighted mean alone. Failed candidates (NaN) come last.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from evomerge.pareto import Scores, exclusive_gains, front_mask, ranks
from evomerge.spaces import Genome

_EXACT_OBJECTIVES = 4  # beyond these, exact contributions cost seconds a generation; rank and mean decide alone


def weighted_means(scores: Scores, weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """The weighted mean of each row, -inf where it has NaN; shape (n,)."""
    means = np.asarray(scores @ weights / weights.sum(), dtype=np.float64)
    return np.where(np.isnan(means), -np.inf, means)


class Incumbent:
    """The best genome offered so far by weighted mean; of equals the latest."""

    def __init__(self, start: Genome) -> None:
        self.genome, self.mean = start, -np.inf

    def offer(self, genomes: Genome, means: NDArray[np.float64]) -> None:
        leader = int(np.argmax(means))
        if means[leader] >= self.mean and np.isfinite(means[leader]):
            self.genome, self.mean = np.array(genomes[leader]), float(means[leader])


@dataclass
class Ranking:
    """How scores become ranks. `elite` keeps the front of what it has been told."""

    weights: NDArray[np.float64]
    elite: bool
    _front: Scores = field(init=False)
    _seen: Scores = field(init=False)

    def __post_init__(self) -> None:
        self._front = np.empty((0, len(self.weights)))
        self._seen = np.empty((0, len(self.weights)))

    def means(self, scores: Scores) -> NDArray[np.float64]:
        return weighted_means(scores, self.weights)

    def observe(self, scores: Scores) -> None:
        """Takes told scores into the front."""
        valid = scores[~np.isnan(scores).any(axis=1)]
        self._seen = np.vstack([self._seen, valid])
        together = np.vstack([self._front, valid])
        self._front = np.unique(together[front_mask(together)], axis=0)

    def losses(self, scores: Scores) -> NDArray[np.float64]:
        """Values to minimize, shape (n,), all finite: rank order for elite, negated means for weighted sums."""
        means = self.means(scores)
        valid = np.isfinite(means)
        losses = np.full(len(scores), float(len(scores) + 1))
        if valid.any():
            losses[valid] = self._order(scores[valid], means[valid]) if self.elite else -means[valid]
        if not self.elite and valid.any():
            losses[~valid] = losses[valid].max() + 1.0
        return losses

    def _order(self, scores: Scores, means: NDArray[np.float64]) -> NDArray[np.float64]:
        """Position of each row after sorting by (rank, -gain, -mean); equal rows share a position."""
        rank = ranks(np.vstack([self._front, scores]))[len(self._front) :]
        gains = np.zeros(len(scores))
        if scores.shape[1] <= _EXACT_OBJECTIVES:
            gains = exclusive_gains(scores, self._front, self._reference(scores))
        keys = np.stack([rank, -gains, -means], axis=1)
        return np.unique(keys, axis=0, return_inverse=True)[1].ravel().astype(np.float64)

    def _reference(self, scores: Scores) -> NDArray[np.float64]:
        """The worst value seen of each objective, and a tenth of the range below it."""
        together = np.vstack([self._seen, scores])
        low, high = together.min(axis=0), together.max(axis=0)
        return np.asarray(low - 0.1 * np.maximum(high - low, 1e-9))
