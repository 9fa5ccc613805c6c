"""Watching: now and then the best candidate so far is scored on selection items, and a search whose score there has
stopped rising ends. Search items cannot tell this: candidates that fit them ever better need not be better.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from evomerge.candidate import Candidate, Evaluation
from evomerge.optimizers.ranking import weighted_means
from evomerge.search.criteria import Criteria

_CHECKS = 4  # within the candidates after which a search ends


@dataclass
class Watch:
    """Follows the best candidate of a search.

    criteria: those of the search items.
    stop_after: the search ends when the score on selection items has not risen for so many candidates.
    leader: the best candidate so far on search items; None while there is none.
    over: whether the search should end.
    """

    criteria: Criteria
    stop_after: int
    leader: Candidate | None = None
    over: bool = field(init=False, default=False)
    _mean: float = field(init=False, default=-np.inf)
    _seen: int = field(init=False, default=0)
    _checked: int = field(init=False, default=-1)
    _scored: str | None = field(init=False, default=None)
    _best: float = field(init=False, default=-np.inf)
    _risen: int = field(init=False, default=0)

    def learn(self, candidates: Sequence[Candidate], evaluations: Sequence[Evaluation], counted: bool = True) -> None:
        """Takes candidates that have been scored on all search items.

        candidates: in their order.
        evaluations: theirs; estimates from a subset are passed over.
        counted: whether they bring the end nearer.
        """
        self._seen += len(candidates) * counted
        means = weighted_means(self.criteria.eligible(evaluations), self.criteria.weights)
        for candidate, evaluation, mean in zip(candidates, evaluations, means, strict=True):
            if evaluation.subset is None and mean > self._mean:
                self.leader, self._mean = candidate, float(mean)

    def due(self) -> Candidate | None:
        """The candidate that must be scored on selection items now; None where there is none."""
        check = self._seen * _CHECKS // self.stop_after
        if self.leader is None or check == self._checked:
            return None
        self._checked = check
        self.over = self._seen - self._risen >= self.stop_after
        if self.over or self.leader.id == self._scored:
            return None
        self._scored = self.leader.id
        return self.leader

    def receive(self, evaluation: Evaluation) -> None:
        """Takes the score of that candidate on selection items."""
        mean = self.criteria.means([evaluation])[0]
        if mean > self._best:
            self._best, self._risen = mean, self._seen
        self.over = self._seen - self._risen >= self.stop_after
