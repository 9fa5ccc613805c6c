"""A choice among the candidates that means none of them is refused in one sentence."""

from pathlib import Path
from typing import Any

import pytest

from tests.bad_input import Refuses

EXPORTS: dict[str, tuple[Any, ...]] = {
    "of an unknown candidate": (("--candidate", "unifrom"), "--candidate unifrom", "did you mean 'uniform'?"),
    "by an unknown objective": (("--prefer", "base_q=1"), "--prefer base_q=1", "did you mean 'base_qa'?"),
    "by a word": (("--prefer", "base_qa=much"), "--prefer base_qa=much: the weight 'much' is no number"),
    "by nothing": (("--prefer", "base_qa=0"), "--prefer: every weight is 0"),
    "by less than nothing": (("--prefer", "base_qa=-1"), "--prefer base_qa=-1: use a weight of at least 0"),
    "without a weight": (("--prefer", "base_qa"), "expected OBJECTIVE=WEIGHT"),
    "in two ways": (("--candidate", "base", "--prefer", "base_qa=1"), "--candidate base and --prefer base_qa=1"),
    "to a folder": (("-o", "run"), "run: is a folder; give -o the name of a file"),
    "below a file": (("-o", "run/search.yaml/recipe.yaml"), "cannot be written", "choose another -o"),
}


@pytest.mark.parametrize("claim", EXPORTS)
def test_an_export_is_refused(claim: str, run_directory: Path, refuses: Refuses) -> None:
    options, *fragments = EXPORTS[claim]
    refuses("export", run_directory, *options, says=tuple(fragments))
