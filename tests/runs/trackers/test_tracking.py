"""Trackers are told what a search finds, and never stop it."""

import glob
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import evomerge
from evomerge.config.search import SearchConfig
from evomerge.config.tables import TRACKERS, TrackerRow
from evomerge.errors import InputError
from evomerge.events import Evaluated, Event
from evomerge.runs.journal import OpenRun
from tests.searches import small_search
from tests.waiting import wait_until

BUDGET = {"evaluations": 8, "population": 4}


class Notes:
    """A tracker that keeps what it is told."""

    def __init__(self, run: OpenRun, fails_at: str | None = None) -> None:
        self.fails_at = fails_at
        self.rows: list[tuple[int, Mapping[str, float]]] = []
        self.files: list[str] = []
        self.config: Mapping[str, Any] = {}
        self.closed = False

    def settings(self, content: Mapping[str, Any]) -> None:
        self._maybe_fail("settings")
        self.config = content

    def numbers(self, step: int, values: Mapping[str, float]) -> None:
        self._maybe_fail("numbers")
        self.rows.append((step, values))

    def file(self, path: Path) -> None:
        self._maybe_fail("file")
        self.files.append(path.read_text(encoding="utf-8"))

    def close(self) -> None:
        self._maybe_fail("close")
        self.closed = True

    def _maybe_fail(self, what: str) -> None:
        if what == self.fails_at:
            raise OSError("the network is gone")


def noted(monkeypatch: pytest.MonkeyPatch, fails_at: str | None = None) -> list[Notes]:
    made: list[Notes] = []

    def make(run: OpenRun) -> Notes:
        made.append(Notes(run, fails_at))
        return made[-1]

    monkeypatch.setitem(TRACKERS, "notes", TrackerRow(make, "json", "notes"))
    return made


def test_a_tracker_is_told_scores_the_front_the_config_and_the_best_recipe(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = noted(monkeypatch)
    run = evomerge.search(small_search(optimizer=BUDGET, trackers=["notes"]), output=tmp_path / "run")
    (notes,) = made
    best = run.best
    assert best is not None
    assert notes.config["base"] == "zoo:base"
    assert notes.files == [(tmp_path / "run" / "best.yaml").read_text(encoding="utf-8")]
    assert notes.closed
    last = notes.rows[-1][1]
    assert last["front/size"] == len(run.front)
    assert last["front/hypervolume"] > 0
    assert {f"best_heldout/{name}": value for name, value in (best.heldout or {}).items()}.items() <= last.items()
    scored = [values["search/base_qa"] for _, values in notes.rows if "search/base_qa" in values]
    assert scored == run.candidates["search.base_qa"].tolist()
    assert [step for step, _ in notes.rows] == sorted(step for step, _ in notes.rows)


@pytest.mark.parametrize("fails_at", ["settings", "numbers", "file", "close"])
def test_a_tracker_that_fails_does_not_stop_the_search(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fails_at: str
) -> None:
    noted(monkeypatch, fails_at)
    with pytest.warns(UserWarning, match=r"notes failed \(OSError: the network is gone\) and is told nothing more"):
        run = evomerge.search(small_search(optimizer=BUDGET, trackers=["notes"]), output=tmp_path / "run")
    assert run.state == "finished"


def test_scores_of_quantized_weights_are_told_as_those_that_the_search_goes_by(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    made = noted(monkeypatch)
    search = small_search(optimizer=BUDGET, trackers=["notes"], evaluation={"quantize": "int8"})
    run = evomerge.search(search, output=tmp_path / "run")
    (notes,) = made
    scored = [(step, values["search/base_qa"]) for step, values in notes.rows if "search/base_qa" in values]
    screened = run._opened.archive.records("quantized")
    assert [score for _, score in scored] == [(record.evaluation.scores or {})["base_qa"] for record in screened]
    assert [step for step, _ in scored] == list(range(1, len(screened) + 1))
    assert notes.rows[-1][1]["front/size"] == len(run.front)


def test_the_log_says_why_a_search_stopped_though_a_tracker_fails_then(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    noted(monkeypatch, "close")

    def stop(event: Event) -> None:
        if isinstance(event, Evaluated) and event.candidate.kind == "search":
            raise evomerge.StopSearch

    search = small_search(optimizer=BUDGET, trackers=["notes"])
    run = evomerge.search(search, output=tmp_path / "run", callbacks=[stop])
    assert run.state == "interrupted"
    last = (tmp_path / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1]
    assert '"event": "stopped"' in last


def test_trackers_change_neither_the_archive_nor_who_may_resume_it() -> None:
    plain = SearchConfig.model_validate(small_search())
    tracked = SearchConfig.model_validate(small_search(trackers=["tensorboard"]))
    assert plain.digest() == tracked.digest()


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(TRACKERS, "notes", TrackerRow("nowhere:Notes", "no_such_package", "notes"))
    with pytest.raises(InputError, match=r"trackers\[0\] is notes, which is not installed; pip install"):
        evomerge.search(small_search(trackers=["notes"]), output=tmp_path / "run")
    with pytest.raises(InputError, match=r"trackers\[0\] is \"tensorbord\""):
        evomerge.search(small_search(trackers=["tensorbord"]), output=tmp_path / "run")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_reads_what_was_written_for_it(tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = evomerge.search(small_search(optimizer=BUDGET, trackers=["tensorboard"]), output=tmp_path / "run")
    events = reader.EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    shown = [event.value for event in events.Scalars("search/base_qa")]
    assert shown == pytest.approx(run.candidates["search.base_qa"].tolist())
    assert "best.yaml/text_summary" in events.Tags()["tensors"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_weights_and_biases_keeps_a_run_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    for name, value in (("WANDB_MODE", "offline"), ("WANDB_SILENT", "true"), ("WANDB_DIR", str(tmp_path))):
        monkeypatch.setenv(name, value)
    run = evomerge.search(small_search(optimizer=BUDGET, trackers=["wandb"]), output=tmp_path / "run")
    assert run.state == "finished"
    (kept,) = glob.glob(str(tmp_path / "run" / "wandb" / "offline-run-*" / "*.wandb"))
    told = (b"front/hypervolume", b"best_heldout/base_qa")
    wait_until(lambda: all(name in Path(kept).read_bytes() for name in told))  # W&B writes in a process of its own
