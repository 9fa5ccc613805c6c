"""Pareto mathematics on arrays of scores, shape (n, objectives), larger is better. moocore does the work."""

import moocore
import numpy as np
from numpy.typing import NDArray

ScoreArray = NDArray[np.float64]


def front_mask(scores: ScoreArray) -> NDArray[np.bool_]:
    """True for rows that no other row dominates, shape (n,). Equal rows do not dominate each other. Rows with NaN are
    False."""
    valid = ~np.isnan(scores).any(axis=1)
    mask = np.zeros(len(scores), dtype=bool)
    if valid.any():
        mask[valid] = moocore.is_nondominated(scores[valid], maximise=True, keep_weakly=True)
    return mask


def ranks(scores: ScoreArray) -> NDArray[np.int64]:
    """The non-domination rank of each row, 0 for the front (Deb et al. 2002); shape (n,). No score may be NaN."""
    return np.asarray(moocore.pareto_rank(scores, maximise=True), dtype=np.int64)


def hypervolume(scores: ScoreArray, reference: NDArray[np.float64]) -> float:
    """The volume that rows dominate; 0 for no rows.

    scores: shape (n, objectives).
    reference: the point above which the volume counts, shape (objectives,).
    """
    if not len(scores):
        return 0.0
    return float(moocore.hypervolume(scores, ref=reference, maximise=True))


def exclusive_gains(scores: ScoreArray, front: ScoreArray, reference: NDArray[np.float64]) -> NDArray[np.float64]:
    """For each row, the hypervolume that it adds to the front and all other rows, shape (n,); 0 for dominated rows.

    scores: shape (n, objectives).
    front: the scores of a front, shape (m, objectives).
    reference: the point above which the volume counts, shape (objectives,).
    """
    together = np.vstack([front, scores])
    total = hypervolume(together, reference)
    gains = np.zeros(len(scores))
    for index in np.flatnonzero(front_mask(together)[len(front) :]):
        gains[index] = total - hypervolume(np.delete(together, len(front) + index, axis=0), reference)
    return gains
