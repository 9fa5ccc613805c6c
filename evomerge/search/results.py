"""Results: what a search has found so far, judged by its criteria."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evomerge.archive.archive import Archive, Record, steering
from evomerge.archive.gradients import GradientRecord
from evomerge.candidate import Candidate, Study
from evomerge.config.search import SearchConfig
from evomerge.optimizers.make import FORWARD_PASSES, passes_for_outputs, passes_for_rows
from evomerge.search.best import best_of, best_searched, finalists, front_of, reported
from evomerge.search.controls import count_controls
from evomerge.search.criteria import Criteria, criteria_of
from evomerge.search.failures import counted


@dataclass(frozen=True, slots=True)
class Results:
    """The archive of a search, with the config that says how to judge it.

    archive: the search's; it grows while the search goes on.
    config: the search's, resolved.
    """

    archive: Archive
    config: SearchConfig

    def criteria(self, study: Study | None = None) -> Criteria:
        """What makes one candidate better than another, by the scores of base and parents in a study; by default in
        `study`."""
        return criteria_of(self.archive, self.config, study or self.study)

    @property
    def study(self) -> Study:
        """The study of the scores on all search items that choose the best and the front. Quantized scores do only
        until all finalists have others, and are never compared with others."""
        chosen = self.finalists()
        whole = chosen and all(self.archive.find(candidate.id, "search") for candidate in chosen)
        return "search" if whole or steering(self.config) == "search" else "quantized"

    def finalists(self) -> list[Candidate]:
        """The candidates that are scored again on search items, unquantized; none where nothing is quantized."""
        if steering(self.config) == "search":
            return []
        return finalists(self.archive.records("quantized"), self.criteria("quantized"))

    def records(self) -> list[Record]:
        """The evaluations on all search items that can be compared with each other, in the order of the search."""
        return self.archive.records(self.study)

    def judge(self, record: Record) -> Criteria:
        """The criteria for a record on search items, which may be quantized."""
        return self.criteria("search" if record.evaluation.quantize is None else "quantized")

    def best(self) -> Record | None:
        """The best search candidate, or while there is none the best control; None where no candidate keeps to the
        limits.

        It is chosen by scores on search items (see `records`). Where the config asks for selection items, it is chosen
        among the reported candidates by scores on selection items, once all reported candidates have these.
        """
        records, criteria = self.records(), self.criteria()
        contenders = self._contenders(criteria)
        if contenders is None:
            return best_searched(records, criteria)
        best = best_searched(contenders, self.criteria("selection"))
        return self.archive.find(best.candidate.id, self.study) if best is not None else None

    def _contenders(self, criteria: Criteria) -> list[Record] | None:
        """The records on selection items of the reported candidates that are feasible on search items.

        None where the config asks for no selection items, and until all reported candidates have such a record.
        """
        if not self.config.items.selection or self.study == "quantized":
            return None
        chosen = [self.archive.find(candidate.id, "selection") for candidate in self.reported()]
        scored = [record for record in chosen if record is not None]
        if not scored or len(scored) < len(chosen):
            return None
        feasible = {record.candidate.id for record in self.records() if criteria.feasible(record.evaluation)}
        return [record for record in scored if record.candidate.id in feasible]

    @property
    def equivalents(self) -> float:
        """What the search has cost so far, controls left out, in forward passes over all search items: an evaluation
        counts as the share of the items that it is scored on, and a step along gradients as three times that."""
        records = (
            self.archive.records(steering(self.config)),
            self.archive.records("subset") if self.config.subsets is True else [],
        )
        searched = [record.evaluation for study in records for record in study if record.candidate.kind == "search"]
        scored = sum(1.0 if evaluation.subset is None else evaluation.subset.share for evaluation in searched)
        return self.passes_for_rows + scored + passes(self.config, self.archive.gradients())

    @property
    def passes_for_rows(self) -> float:
        """What the weights of rows have cost, once they are learned, in forward passes over all search items."""
        return passes_for_rows(self.config) if self.archive.statistics else 0.0

    @property
    def steps(self) -> int:
        """How many steps along gradients have been taken."""
        return len({record.step for record in self.archive.gradients() if record.step > 0})

    @property
    def finished(self) -> bool:
        """Whether the search has come to its end, with the budget that it has now."""
        archive, config = self.archive, self.config
        if archive.ended is not None:
            return archive.ended == config.limit
        tried = archive.tried()
        searched = sum(record.candidate.kind == "search" for record in tried)
        if searched < config.budget or len(tried) - searched < count_controls(config):
            return False
        if self.study != "search":
            return False
        return all(archive.find(candidate.id, split) for split in config.splits[1:] for candidate in self.reported())

    @property
    def early(self) -> str:
        """Why the search has ended before its budget was spent; empty where it has not."""
        return self.archive.early if self.finished else ""

    def front(self) -> list[Record]:
        """The Pareto front on all search items, best mean first."""
        return front_of(self.records(), self.criteria())

    def reported(self) -> list[Candidate]:
        """The candidates that get selection and held-out scores. Those that were scored on selection items while the
        search went on are among them."""
        watched = self.archive.records("selection") if self.config.optimizer.stop_after is not None else []
        return reported(self.records(), self.criteria(), [record.candidate.id for record in watched])


_REASONS = 3  # of failure that a sentence names


def all_failed(results: Results) -> str | None:
    """A clause for a search whose candidates have all failed, with the commonest reasons; None for any other search."""
    searched = [record.evaluation for record in results.archive.tried() if record.candidate.kind == "search"]
    if not searched or not all(evaluation.failed for evaluation in searched):
        return None
    reasons = list(counted(searched).items())
    told = "; ".join(f"{count} x {reason.rstrip('.')}" for reason, count in reasons[:_REASONS])
    more = sum(count for _, count in reasons[_REASONS:])
    return f"all {len(searched)} candidates failed ({told}{f'; {more} for other reasons' if more else ''})"


def none_feasible(results: Results) -> str:
    """A sentence for a search in which no candidate keeps to the constraints: what they ask, and which candidate comes
    closest."""
    archive = results.archive
    selected = best_of(results.records(), results.criteria()) is not None
    # where some keep to the constraints on search items, none does on selection items
    split: Study = "selection" if selected else results.study
    criteria = results.criteria(split)
    asked = " and ".join(str(limit) for limit in criteria.limits)
    records = [record for record in archive.records(split) if not record.evaluation.failed]
    totals = criteria.violations([record.evaluation for record in records]).sum(axis=1)
    items = "search" if split == "quantized" else split
    closest = records[int(np.argmin(totals))]
    scores = closest.evaluation.scores or {}
    reached = ", ".join(f"{name} {scores[name]:.3f}" for name in dict.fromkeys(limit.name for limit in criteria.limits))
    return (
        f"no candidate keeps to the constraints on {items} items: {asked}; {closest.candidate.id} comes closest with "
        f"{reached}, so there is nothing to export; search longer, or ask for less."
    )


def passes(config: SearchConfig, gradients: Sequence[GradientRecord]) -> float:
    """What steps along gradients have cost, in forward passes over all search items. The first has waited for what is
    read before it.

    config: the search's.
    gradients: the records of the shards of some steps.
    """
    learning = config.optimizer.learning
    each = [FORWARD_PASSES * learning.share if record.step > 0 else 1.0 for record in gradients]
    first = any(record.step == 1 and record.shard == 0 for record in gradients)
    return sum(each) / learning.shards + first * passes_for_outputs(config)
