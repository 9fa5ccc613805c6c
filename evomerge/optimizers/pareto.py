"""Pareto maths on arrays: scores are (n, m), larger is better; no candidate object in here. moocore does the work."""

import moocore
import numpy as np
from numpy.typing import NDArray

ScoreArray = NDArray[np.float64]


def front_mask(scores: ScoreArray) -> NDArray[np.bool_]:
    """True for the rows that no other row dominates; of equal rows all are kept. Rows with NaN never are."""
    valid = ~np.isnan(scores).any(axis=1)
    mask = np.zeros(len(scores), dtype=bool)
    if valid.any():
        mask[valid] = moocore.is_nondominated(scores[valid], maximise=True, keep_weakly=True)
    return mask


def ranks(scores: ScoreArray) -> NDArray[np.int64]:
    """Non-domination rank of each row, 0 for the front (Deb et al. 2002). No NaN allowed."""
    return np.asarray(moocore.pareto_rank(scores, maximise=True), dtype=np.int64)


def hypervolume(scores: ScoreArray, reference: NDArray[np.float64]) -> float:
    """The volume that the rows dominate above the reference point; 0 for no rows."""
    if not len(scores):
        return 0.0
    return float(moocore.hypervolume(scores, ref=reference, maximise=True))


def exclusive_gains(scores: ScoreArray, front: ScoreArray, reference: NDArray[np.float64]) -> NDArray[np.float64]:
    """For each row, the hypervolume that it adds to `front` joined with the other rows; 0 for dominated ones."""
    together = np.vstack([front, scores])
    total = hypervolume(together, reference)
    gains = np.zeros(len(scores))
    for index in np.flatnonzero(front_mask(together)[len(front) :]):
        gains[index] = total - hypervolume(np.delete(together, len(front) + index, axis=0), reference)
    return gains
