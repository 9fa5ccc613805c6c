"""By how much the right option of a multiple-choice question leads over the best wrong one, for each of lm-eval's
accuracies.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Choices:
    """right: which options are. characters, bytes: how long each is."""

    right: NDArray[np.bool_]
    characters: NDArray[np.float64]
    bytes: NDArray[np.float64]

    def margins(self, likelihoods: Sequence[float]) -> dict[str, float]:
        """Metric to margin. likelihoods: each option's, and behind them, where the task asks for them, those without
        the question."""
        count = len(self.right)
        given = np.array(likelihoods[:count])
        scores = {"acc": given, "acc_norm": given / self.characters, "acc_bytes": given / self.bytes}
        if len(likelihoods) == 2 * count:
            scores["acc_mutual_info"] = given - np.array(likelihoods[count:])
        return {name: float(values[self.right].max() - values[~self.right].max()) for name, values in scores.items()}


def choices_of(task: Any, documents: Sequence[Sequence[Any]]) -> list[Choices] | None:
    """Each document's options; None for a task that has no such ones, whose metrics are its own code, or where all
    options of a document are right or all wrong."""
    if task.OUTPUT_TYPE != "multiple_choice" or callable(task.config.process_results):
        return None
    found = [_choices(task, instances[0].doc) for instances in documents]
    return found if all(0 < each.right.sum() < len(each.right) and each.characters.all() for each in found) else None


def _choices(task: Any, document: Any) -> Choices:
    options = task.doc_to_choice(document)
    gold = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
    right = {
        option if isinstance(option, int) else options.index(option) if option in options else -1
        for option in (gold if isinstance(gold, list) else [gold])
    }
    return Choices(
        right=np.array([number in right for number in range(len(options))]),
        characters=np.array([float(len(option)) for option in options]),
        bytes=np.array([float(len(option.encode())) for option in options]),
    )
