"""Failures: why candidates have no scores, counted by kinds of reasons."""

import re
from collections import Counter
from collections.abc import Iterable

from evomerge.candidate import Evaluation

_DOTTED = re.compile(r"[\w-]+(?:\.[\w-]+)+")
_NUMBER = re.compile(r"(?<![A-Za-z_\d])\d+(?:\.\d+)?(?:[eE][-+]?\d+)?")
_ENDS = ("weight", "bias")  # of names of tensors; so do most, and the others have the number of a layer in them


def counted(evaluations: Iterable[Evaluation]) -> dict[str, int]:
    """How often each reason occurs, the commonest first; those that differ only in numbers and names of tensors are
    one."""
    counts = Counter(kind(evaluation.error or "no reason given") for evaluation in evaluations if evaluation.failed)
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def kind(reason: str) -> str:
    """A reason with dots in the place of numbers and names of tensors."""
    return _NUMBER.sub("…", _DOTTED.sub(_without_tensor, reason))


def _without_tensor(match: re.Match[str]) -> str:
    parts = match[0].split(".")
    return "…" if parts[-1] in _ENDS or any(segment.isdecimal() for segment in parts) else match[0]
