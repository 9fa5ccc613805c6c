"""Failures: why candidates have no scores, counted by kind of reason."""

import re
from collections import Counter
from collections.abc import Iterable

from evomerge.candidate import Evaluation

_DOTTED = re.compile(r"[\w-]+(?:\.[\w-]+)+")
_NUMBER = re.compile(r"(?<![A-Za-z_\d])\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")
_ENDS = ("weight", "bias")  # of most names of tensors; other such names contain the number of a layer


def counted(evaluations: Iterable[Evaluation]) -> dict[str, int]:
    """How often each reason of failure occurs, the commonest first.

    Reasons that differ only in numbers and in names of tensors count as the same reason (`kind`).
    """
    counts = Counter(kind(evaluation.error or "no reason given") for evaluation in evaluations if evaluation.failed)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def kind(reason: str) -> str:
    """A reason with an ellipsis in place of every number and every name of a tensor."""
    return _NUMBER.sub("…", _DOTTED.sub(_without_tensor, reason))


def _without_tensor(match: re.Match[str]) -> str:
    parts = match[0].split(".")
    return "…" if parts[-1] in _ENDS or any(segment.isdecimal() for segment in parts) else match[0]
