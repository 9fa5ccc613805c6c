"""Subsets: a generation is first scored on a few of the search items, and only its promising candidates on all.

All candidates of a generation are scored on the same new subset, so that they can be compared. A candidate's score on
all items is estimated: it is the score of the best earlier candidates on all items, plus the candidate's mean lead over
them on the items of the subset (the difference estimator: Cochran 1977, section 7.2). Candidates whose estimate would
make them the best, or put them on the front, are scored on all search items. Of the other candidates, the optimizer is
told the estimates.

Subsets grow where the two halves of their items rank the candidates differently, and shrink where the halves agree. All
this depends only on the evaluations, in the order of the generations.
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
_FEWEST = 10  # items of an objective in a subset
_WHOLE = 0.5  # from this share of the items on, subsets cost more than they save
_AGREE, _DISAGREE = 0.5, 0.2  # rank correlations of the halves above and below which subsets shrink and grow
_SHRINK, _GROW = 0.87, 1.25
_COMPARED = 8  # candidates that a rank correlation needs at least
_REFERENCES = 8
_FRONT_SHARE = 0.05  # of a search's candidates: with many objectives, nearly all may seem to be on the front


class Subsets:
    """Chooses the subsets of a search's generations, and the candidates that are then scored on all items."""

    def __init__(self, criteria: Criteria, evaluations: Sequence[Evaluation]) -> None:
        """Takes the first evaluations to compare with.

        criteria: those of the search items.
        evaluations: evaluations on all search items; at least one has scores.
        """
        self._criteria = criteria
        self._evaluated: list[Evaluation] = []
        self.learn(evaluations)
        counts = [outcomes.count for outcomes in self._evaluated[0].outcomes.values()]
        self._least = min(1.0, _FEWEST / min(counts))
        self._share = max(_START, self._least)
        self._screened = self._promoted = 0
        self._halves: list[tuple[float, float]] = []

    def draw(self, number: int) -> Subset | None:
        """The subset for the generation of this number; None where the generation is scored on all items at once."""
        return Subset(number, round(self._share, 4)) if self._share < _WHOLE else None

    def learn(self, evaluations: Sequence[Evaluation]) -> None:
        """Takes more evaluations on all search items to compare with."""
        self._evaluated += [evaluation for evaluation in evaluations if not evaluation.failed]

    def settle(self, evaluations: Sequence[Evaluation]) -> list[Evaluation | None]:
        """For each evaluation on a subset, its estimate on all search items; None where the candidate must be scored on
        all of them."""
        references = self._references()
        estimates = [self._estimate(evaluation, references) for evaluation in evaluations]
        chosen = self._worth_all(estimates)
        return [None if index in chosen else estimate for index, estimate in enumerate(estimates)]

    def halves(self, evaluations: Sequence[Evaluation]) -> list[tuple[float, float]]:
        """For each evaluation, the two weighted means that it gets by either half of its items. Failures are left
        out."""
        references = self._references()
        parts = [
            self._criteria.means(
                [self._estimate(evaluation, references, slice(start, None, 2)) for evaluation in evaluations]
            )
            for start in (0, 1)
        ]
        return [pair for pair in zip(*parts, strict=True) if np.isfinite(pair).all()]

    def adapt(self, halves: Sequence[tuple[float, float]]) -> None:
        """Makes the next subsets larger or smaller, once enough candidates have been compared.

        halves: those of a generation (`halves`).
        """
        self._halves += halves
        if len(self._halves) < _COMPARED:
            return
        agreement = _rank_correlation(np.array(self._halves))
        factor = _SHRINK if agreement > _AGREE else _GROW if agreement < _DISAGREE else 1.0
        self._share = float(np.clip(self._share * factor, self._least, max(_WHOLE, self._least)))
        self._halves.clear()

    def _references(self) -> dict[str, NDArray[np.float64]]:
        """The mean outcome of the best evaluated candidates on each search item, by objective; shape (items,)."""
        means = self._criteria.means(self._evaluated)
        best = [self._evaluated[index] for index in np.argsort(-np.array(means), kind="stable")[:_REFERENCES]]
        return {
            name: np.mean([evaluation.outcomes[name].values for evaluation in best], axis=0)
            for name in best[0].outcomes
        }

    def _estimate(
        self, evaluation: Evaluation, references: dict[str, NDArray[np.float64]], items: slice = slice(None)
    ) -> Evaluation:
        """An evaluation with its scores on all search items estimated. Costs stay as they are.

        evaluation: one on a subset.
        references: see `_references`.
        items: those of its items that the estimate uses.
        """
        if evaluation.scores is None:
            return evaluation
        scores = dict(evaluation.scores)
        for name, outcomes in evaluation.outcomes.items():
            lead = outcomes.values[items] - references[name][outcomes.places[items]]
            scores[name] = float(references[name].mean() + lead.mean())
        return replace(evaluation, scores=scores)

    def _worth_all(self, estimates: Sequence[Evaluation]) -> set[int]:
        """The numbers of the estimates that would beat the best candidate. Estimates that would be on the front are
        among them as far as `_FRONT_SHARE` allows."""
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
    """Spearman's rank correlation of pairs, shape (n, 2); 0 where all values of one side are equal."""
    from scipy.stats import spearmanr

    if (pairs == pairs[0]).all(axis=0).any():
        return 0.0
    return float(spearmanr(pairs[:, 0], pairs[:, 1]).statistic)
