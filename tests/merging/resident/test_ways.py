"""All ways of making a merge on a CPU leave one and the same fingerprint."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evomerge.merging.methods import order
from tests.merging.ways import COMPILED, EAGER, FEW, IN_PAIRS, RECIPES, Load, Way, loader, outcomes

COMPILER = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the compiler's own code
]


def cases() -> Iterator[Any]:
    for method in RECIPES:
        more = [] if method in FEW else [pytest.mark.exhaustive]
        compiled = [] if method == "dare_ties" else [pytest.mark.exhaustive]
        yield pytest.param(method, "float32", EAGER if method in FEW else IN_PAIRS, id=f"{method}-float32")
        yield pytest.param(method, "bfloat16", EAGER, id=f"{method}-bfloat16", marks=more)
        yield pytest.param(method, "float16", EAGER, id=f"{method}-float16", marks=pytest.mark.exhaustive)
        yield pytest.param(method, "bfloat16", COMPILED, id=f"{method}-compiled", marks=[*COMPILER, *compiled])


@pytest.fixture(scope="module")
def load(tiny_models, tmp_path_factory) -> Load:
    return loader(tiny_models, tmp_path_factory.mktemp("ways"))


@pytest.mark.parametrize(("method", "dtype", "ways"), [*cases()])
def test_fingerprints_are_equal_wherever_models_live_whatever_is_kept_of_them_and_by_whichever_code(
    method: str, dtype: str, ways: list[Way], load: Load
) -> None:
    found = outcomes(method, dtype, ways, load)
    assert len(set(found.values())) == 1, found


@pytest.mark.parametrize("method", ["ties", pytest.param("breadcrumbs_ties", marks=pytest.mark.exhaustive)])
def test_counted_magnitudes_leave_the_fingerprints_of_sorted_ones(
    method: str, load: Load, tiny_models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only long tensors are counted, unless a test says otherwise."""
    ways = [Way(sources="disk", fields="made", adapters="factors")]
    expected = list(outcomes(method, "bfloat16", ways, load).values())
    monkeypatch.setattr(order, "_SHORT", 0)
    monkeypatch.setattr(order, "_SORTED", 0)
    assert list(outcomes(method, "bfloat16", ways, loader(tiny_models, tmp_path)).values()) == expected
