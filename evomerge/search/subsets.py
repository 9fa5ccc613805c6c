"""Subsets: a generation is scored on a few of the search items, and on all of them only who may be worth it.

The candidates of a generation share one fresh subset, so that they are compared on the same items. What they score
there, set off against what the best known candidates scored on the same items, estimates what they would score on all
(the difference estimator: Cochran 1977, section 7.2). Whoever may by that be the best, or on the front, is scored on
all search items; the others are told to the optimizer by their estimates. A subset grows where the ranks of its two
halves disagree, and shrinks where they agree. Everything follows from the evaluations, in the order of the generations.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from evomerge.candidate import Evaluation, Subset
from evomerge.optimizers.pareto import front_mask
from evomerge.optimizers.ranking import weighted_means
from evomerge.search.criteria import Criteria

_START = 0.1
_FEWEST = 10  # items of an objective
_WHOLE = 0.5  # from this share on, screening costs more than it saves
_AGREE, _DISAGREE = 0.5, 0.2  # rank correlations of the halves
_SHRINK, _GROW = 0.87, 1.25
_COMPARED = 8  # candidates that a rank correlation takes at least
_REFERENCES = 8
_FRONT_SHARE = 0.05  # of a search's candidates; on a front of many objectives nearly all may seem to belong


class Subsets:
    """The subsets of a search's generations, and who outgrows them."""

    def __init__(self, criteria: Criteria, evaluations: Sequence[Evaluation]) -> None:
        """known: evaluations on all search items, at least one of them with scores."""
        self._criteria = criteria
        self._evaluated: list[Evaluation] = []
        self.learn(evaluations)
        counts = [outcomes.count for outcomes in self._evaluated[0].outcomes.values()]
        self._least = min(1.0, _FEWEST / min(counts))
        self._share = max(_START, self._least)
        self._screened = self._promoted = 0
        self._halves: list[tuple[float, float]] = []

    def draw(self, number: int) -> Subset | None:
        """A subset for the generation of this number; None where it is to be scored on all items."""
        return Subset(number, round(self._share, 4)) if self._share < _WHOLE else None

    def learn(self, evaluations: Sequence[Evaluation]) -> None:
        """Takes evaluations on all search items for comparison."""
        self._evaluated += [evaluation for evaluation in evaluations if not evaluation.failed]

    def settle(self, evaluations: Sequence[Evaluation]) -> list[Evaluation | None]:
        """For each evaluation on a subset an estimate of what it would be on all search items, or None where that has
        to be found out."""
        references = self._references()
        estimates = [self._estimate(evaluation, references) for evaluation in evaluations]
        chosen = self._worth_all(estimates)
        return [None if index in chosen else estimate for index, estimate in enumerate(estimates)]

    def halves(self, evaluations: Sequence[Evaluation]) -> list[tuple[float, float]]:
        """The weighted means that the two halves of its items give each evaluation; failed ones are left out."""
        references = self._references()
        parts = [
            self._criteria.means(
                [self._estimate(evaluation, references, slice(start, None, 2)) for evaluation in evaluations]
            )
            for start in (0, 1)
        ]
        return [pair for pair in zip(*parts, strict=True) if np.isfinite(pair).all()]

    def adapt(self, halves: Sequence[tuple[float, float]]) -> None:
        """Lets the next subsets grow or shrink, once there are enough candidates to tell."""
        self._halves += halves
        if len(self._halves) < _COMPARED:
            return
        agreement = _rank_correlation(np.array(self._halves))
        factor = _SHRINK if agreement > _AGREE else _GROW if agreement < _DISAGREE else 1.0
        self._share = float(np.clip(self._share * factor, self._least, max(_WHOLE, self._least)))
        self._halves.clear()

    def _references(self) -> dict[str, NDArray[np.float64]]:
        """By objective what the best known candidates made of each search item, on average."""
        means = self._criteria.means(self._evaluated)
        best = [self._evaluated[index] for index in np.argsort(-np.array(means), kind="stable")[:_REFERENCES]]
        return {
            name: np.mean([evaluation.outcomes[name].values for evaluation in best], axis=0)
            for name in best[0].outcomes
        }

    def _estimate(
        self, evaluation: Evaluation, references: dict[str, NDArray[np.float64]], items: slice = slice(None)
    ) -> Evaluation:
        """An evaluation with estimated scores, by the items of its own that the slice leaves. Costs are as they are."""
        if evaluation.scores is None:
            return evaluation
        scores = dict(evaluation.scores)
        for name, outcomes in evaluation.outcomes.items():
            lead = outcomes.values[items] - references[name][outcomes.places[items]]
            scores[name] = float(references[name].mean() + lead.mean())
        return replace(evaluation, scores=scores)

    def _worth_all(self, estimates: Sequence[Evaluation]) -> set[int]:
        """The estimates that would beat the best, and as far as there is room those that would be on the front."""
        rows = self._criteria.eligible([*self._evaluated, *estimates])
        earlier, means = np.split(weighted_means(rows, self._criteria.weights), [len(self._evaluated)])
        best, on_front = earlier.max(), front_mask(rows)[len(self._evaluated) :]
        self._screened += len(estimates)
        chosen = set()
        for index in sorted(range(len(estimates)), key=lambda index: -means[index]):
            room = self._promoted < _FRONT_SHARE * self._screened
            if means[index] > best or (on_front[index] and room):
                chosen.add(index)
                self._promoted += 1
        return chosen


def _rank_correlation(pairs: NDArray[np.float64]) -> float:
    """Spearman's, of pairs of shape (n, 2); 0 where all of one side are equal."""
    from scipy.stats import spearmanr

    if (pairs == pairs[0]).all(axis=0).any():
        return 0.0
    return float(spearmanr(pairs[:, 0], pairs[:, 1]).statistic)
