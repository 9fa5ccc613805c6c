"""The plan of a search, and its forecast, as `evomerge check` states them."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from evomerge.doctor import forecast as module
from evomerge.doctor.forecast import forecast
from evomerge.search.preparation import plan_of, prepare_file
from tests.commands import evomerge
from tests.conftest import REPOSITORY
from tests.sparse_models import make_sparse_search

SMOKE = REPOSITORY / "search_spaces" / "smoke.yaml"
LIGHT = ("breadcrumbs", "della", "sce", "localize_and_stitch", "model_stock", "karcher", "consensus", "ram")
_HANGS = 300  # seconds; `scripts/bench/check` has the figure


@pytest.mark.parametrize("size", ["8b", pytest.param("70b", marks=pytest.mark.slow)])
def test_the_plan_of_models_of_real_size_is_stated_before_anything_is_loaded(tmp_path: Path, size: str) -> None:
    path = tmp_path / "search.yaml"
    path.write_text(yaml.safe_dump(make_sparse_search(tmp_path / size, size)))
    started = time.monotonic()
    told = json.loads(evomerge("check", path, "--address", "auto", "--json"))
    assert time.monotonic() - started < _HANGS
    rows = {(row["sources"], row["fields"]): row for row in told["placements"]}
    weights = 2 * told["parameters"] / 2**30
    assert rows["device", "kept"]["gib_per_worker"] > 8 * weights * 0.85  # four models, a candidate, three fields
    assert weights < rows["host", "made"]["gib_per_worker"] < weights + 2
    if size == "8b":
        assert rows["host", "made"]["gib_per_worker"] <= 20
    for (sources, _), row in rows.items():
        assert row["gib_copied"] == pytest.approx(4 * weights if sources != "device" else 0, rel=0.01)
        assert row["gib_from_disk"] == pytest.approx(4 * weights if sources == "disk" else 0, rel=0.01)
        assert row["gib_merged"] >= 5 * weights * 0.99
        assert (row["gib_host"] > 4 * weights) == (sources == "host")
    assert told["tokens_read"] > 0


@pytest.mark.parametrize("method", ["ties", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in LIGHT)])
def test_methods_that_need_no_large_matrices_fit_small_cards_with_sources_on_the_host(
    tmp_path: Path, method: str
) -> None:
    """An 8B base and three fine-tunes. Thresholds depend on whole tensors, but are computed piece by piece."""
    path = tmp_path / "search.yaml"
    path.write_text(yaml.safe_dump(make_sparse_search(tmp_path / "8b", "8b")))
    told = json.loads(evomerge("check", path, "--address", "auto", "--json", "--set", f"space.method={method}"))
    rows = {(row["sources"], row["fields"]): row["gib_per_worker"] for row in told["placements"]}
    assert rows["host", "made"] <= 20
    assert rows["disk", "made"] <= 20


def test_a_forecast_follows_from_measured_speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a base that is scored whole, and of one of which only the first layers are."""
    prepared = prepare_file(SMOKE, ["workers.pool=local"])
    chosen = plan_of(prepared).chosen
    found = []
    for small in (module._SMALL, 0):
        monkeypatch.setattr(module, "_SMALL", small)
        told = forecast(prepared, chosen, hourly=3.6)
        assert told.merge == pytest.approx(chosen.moved / told.speeds.merges)
        assert told.price == pytest.approx(told.search / 1000)
        assert told.search > prepared.config.budget * (told.score + told.merge)
        found.append(told.score)
    assert 0.05 < found[1] / found[0] < 20  # noise of a busy machine, not a wrong unit


def test_a_price_needs_a_measurement(refuses: Callable[..., None]) -> None:
    refuses("check", SMOKE, "--hourly", "2.5", says=("--hourly needs seconds",))


def test_a_price_is_finite(refuses: Callable[..., None]) -> None:
    refuses("check", SMOKE, "--measure", "--hourly", "inf", says=("--hourly is inf; use a finite number",))
