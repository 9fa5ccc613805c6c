"""Margins: by how much the right option of a multiple-choice question leads the best wrong option, for each of
lm-eval's accuracies.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Choices:
    """The options of one question.

    right: whether each option is right, shape (options,).
    characters: the length of each option in characters, shape (options,).
    bytes: the length of each option in UTF-8 bytes, shape (options,).
    """

    right: NDArray[np.bool_]
    characters: NDArray[np.float64]
    bytes: NDArray[np.float64]

    def margins(self, likelihoods: Sequence[float]) -> dict[str, float]:
        """The margin by metric: the best right option's score less the best wrong option's.

        likelihoods: the log-likelihood of each option; behind these, where the task asks for them, the log-likelihoods
            of the options without the question.
        """
        count = len(self.right)
        given = np.array(likelihoods[:count])
        scores = {"acc": given, "acc_norm": given / self.characters, "acc_bytes": given / self.bytes}
        if len(likelihoods) == 2 * count:
            scores["acc_mutual_info"] = given - np.array(likelihoods[count:])
        return {name: float(values[self.right].max() - values[~self.right].max()) for name, values in scores.items()}


def choices_of(task: Any, documents: Sequence[Sequence[Any]]) -> list[Choices] | None:
    """The options of each document; None for a task to which margins do not apply.

    They do not apply where the task is not multiple choice, where its metrics are its own code, where an option is
    empty, and where all options of a document are right or all are wrong.

    task: lm-eval's.
    documents: the instances of each document.
    """
    if task.OUTPUT_TYPE != "multiple_choice" or callable(task.config.process_results):
        return None
    options = [choices_in(task, instances[0].doc) for instances in documents]
    return (
        options
        if all(0 < choices.right.sum() < len(choices.right) and choices.characters.all() for choices in options)
        else None
    )


def choices_in(task: Any, document: Any) -> Choices:
    """The options of one document of a multiple-choice task.

    task: lm-eval's.
    document: one of its documents.
    """
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
