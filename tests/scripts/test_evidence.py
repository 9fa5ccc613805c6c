"""The evidence of several seeds: margins are what the archives say, and no choice looks at held-out items."""

import json
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from evomerge import zoo
from evomerge.runs import directory as runs
from evomerge.zoo.training import RECORD
from tests.conftest import REPOSITORY

BENCH = REPOSITORY / "scripts" / "bench"


@pytest.fixture(scope="module")
def bench() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCH))
        return runpy.run_path(str(BENCH / "evidence"))


def row(search: float, heldout: float) -> SimpleNamespace:
    return SimpleNamespace(id="any", mean=search, heldout_mean=heldout, heldout={"cross_math_b": heldout})


def test_a_seed_s_rival_is_chosen_on_search_items_and_compared_on_held_out_items(bench: dict[str, Any]) -> None:
    first = {"uniform merge": row(0.5, 0.9), "random search": row(0.6, 0.4), "evolved best": row(0.9, 0.7)}
    second = {"uniform merge": row(0.5, 0.9), "random search": row(0.4, 0.8), "evolved best": row(0.9, 0.8)}
    found = bench["Evidence"]([first, second]).as_json()
    assert found["rivals"] == ["random search", "uniform merge"]
    assert found["margins"] == [0.3, -0.1]
    assert (found["margin_median"], found["margin_least"]) == (0.1, -0.1)
    assert (found["best_control_name"], found["margin"]) == ("uniform merge", -0.15)


@pytest.mark.slow
def test_another_zoo_s_evidence_is_that_of_its_runs_and_is_the_same_when_resumed(tmp_path: Path) -> None:
    shutil.copytree(zoo.MODELS, tmp_path / "zoos" / "7")
    (tmp_path / "zoos" / "7" / RECORD).touch()  # so it is not trained
    settings = ["items={search: 20, heldout: 20}", "workers.pool=local", "controls.one_knob=false"]
    settings += ['optimizer={"name": "group_evolution", "evaluations": 6}', "controls.per_model=false"]
    command = [sys.executable, BENCH / "evidence", "--zoo", "7", "--zoos", tmp_path / "zoos", "--seeds", "1", "2"]
    command += ["--equivalents", "6", "--output", tmp_path / "runs", *(f"--set={setting}" for setting in settings)]
    lines = []
    for _ in range(2):
        run = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert run.returncode == 0, run.stderr
        lines.append(json.loads(run.stdout))
    assert lines[0] == lines[1]
    assert (lines[0]["zoo"], lines[0]["equivalents"]) == (7, 6)
    for seed, evolved in zip((1, 2), lines[0]["evolved"], strict=True):
        results = runs.read(tmp_path / "runs" / "zoo-7" / "budget-6" / f"seed-{seed}").results
        best = results.best()
        assert best is not None
        heldout = results.archive.find(best.candidate.id, "heldout")
        assert heldout is not None
        assert evolved == pytest.approx(results.criteria("heldout").means([heldout.evaluation])[0], abs=1e-4)
