"""The main job through real processes on the zoo: killed, interrupted, spread over workers, exported, merged."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from evomerge.runs import directory as runs
from tests import commands
from tests.commands import content, evaluated, evomerge, start
from tests.conftest import REPOSITORY
from tests.searches import WriteSearch
from tests.waiting import PATIENCE, wait_until

pytestmark = pytest.mark.slow  # searches from end to end, in processes of their own

SMOKE = REPOSITORY / "search_spaces" / "smoke.yaml"


def on_search_items(directory: Path) -> list[dict[str, Any]]:
    """What `candidates --json` prints, without held-out scores: the best of a search that was extended keep theirs."""
    return [{key: row[key] for key in row if not key.startswith("heldout")} for row in content(directory)[0]]


def signal_after(process: "subprocess.Popen[str]", directory: Path, count: int, number: int) -> None:
    """Signals a running search once that many evaluations stand in its log."""

    def reached() -> bool:
        assert process.poll() is None, "it ended before it was signaled"
        return len(evaluated(directory)) >= count

    wait_until(reached, pause=0.02)
    os.kill(process.pid, number)


def listening(process: int) -> set[str]:
    """The addresses at which a process and its descendants accept connections."""
    root = psutil.Process(process)
    found = set()
    for each in (root, *root.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            found |= {socket.laddr.ip for socket in each.net_connections() if socket.status == psutil.CONN_LISTEN}
    assert found
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A smoke run of one in-process worker."""
    directory = tmp_path_factory.mktemp("runs") / "undisturbed"
    evomerge("run", SMOKE, "--output", directory)
    return directory


@pytest.mark.slow
def test_killed_three_times_a_search_resumes_to_the_archive_of_the_undisturbed_one(
    undisturbed: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "killed"
    verb: tuple[object, ...] = ("run", SMOKE, "--output", directory)
    for count in (2, 11, 23):
        process = start(tmp_path / "errors", *verb)
        signal_after(process, directory, count, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        verb = ("resume", directory)
        run = runs.read(directory)
        assert commands.status(run.archive, run.config)["state"] == "interrupted"
    evomerge(*verb)
    assert content(directory) == content(undisturbed)
    # a kill between the archive's write and the log's leaves an evaluation out of the log, but never puts one in twice
    assert max(Counter(evaluated(directory)).values()) == 1


@pytest.mark.ray
@pytest.mark.slow
def test_one_and_two_ray_workers_and_a_kill_among_them_give_the_archive_of_the_in_process_pool(
    undisturbed: Path, tmp_path: Path
) -> None:
    expected = content(undisturbed)
    directory = tmp_path / "two"
    process = start(tmp_path / "errors", "run", SMOKE, "--output", directory, "--workers", 2)
    signal_after(process, directory, 9, 0)
    assert listening(process.pid) <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    process.kill()
    process.wait()
    evomerge("resume", directory, "--workers", 1)
    assert content(directory) == expected
    assert max(Counter(evaluated(directory)).values()) == 1


@pytest.mark.slow
def test_interrupted_it_stops_cleanly_and_says_how_to_go_on(tmp_path: Path) -> None:
    directory = tmp_path / "interrupted"
    for number in (signal.SIGINT, signal.SIGTERM):
        verb = ("resume", directory) if directory.exists() else ("run", SMOKE, "--output", directory)
        process = start(tmp_path / "errors", *verb)
        signal_after(process, directory, len(evaluated(directory)) + 2, number)
        assert process.wait(PATIENCE) == 130
        assert f"evomerge resume {directory}" in (tmp_path / "errors").read_text()
    assert len(evaluated(directory)) == len(set(evaluated(directory)))


@pytest.mark.slow
def test_a_finished_search_reports_itself_finished_and_can_be_extended(undisturbed: Path, tmp_path: Path) -> None:
    status = json.loads(evomerge("status", undisturbed, "--json"))
    assert (status["state"], status["steps"], status["budget"]) == ("finished", 10, 24)
    assert 23 < status["equivalents"] < 25  # of which a candidate on selection items takes a half
    assert status["front_size"] == len(content(undisturbed)[1])
    longer = tmp_path / "longer"
    evomerge("run", SMOKE, "--output", longer, "--set", "optimizer.evaluations=30")
    extended = tmp_path / "extended"
    shutil.copytree(undisturbed, extended)
    evomerge("resume", extended, "--set", "optimizer.evaluations=30")
    assert on_search_items(extended) == on_search_items(longer)
    assert json.loads(evomerge("status", extended, "--json"))["budget"] == 30


def test_a_search_goes_on_where_models_live_elsewhere_and_leaves_the_same_archive(
    search_file: WriteSearch, tmp_path: Path
) -> None:
    elsewhere = ["evaluation.sources=disk", "evaluation.fields=made"]
    path = search_file(
        space={"method": "dare_ties"},
        items={"search": 4, "heldout": 4},
        evaluation={"sources": "device", "fields": "kept"},
        controls={"one_knob": False, "random_search": False},
    )
    for name, evaluations in (("whole", 8), ("parted", 4)):
        evomerge("run", path, "--output", tmp_path / name, "--set", f"optimizer.evaluations={evaluations}")
    before = runs.read(tmp_path / "parted").config
    changes = [part for key in (*elsewhere, "optimizer.evaluations=8") for part in ("--set", key)]
    evomerge("resume", tmp_path / "parted", *changes)
    after = runs.read(tmp_path / "parted").config
    assert (after.evaluation.sources, after.evaluation.fields) == ("disk", "made")
    assert after.digest() == before.digest()  # which names a search in a shared storage
    assert on_search_items(tmp_path / "parted") == on_search_items(tmp_path / "whole")


def test_what_was_scored_is_what_ships(undisturbed: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from evomerge.quiet import quiet

    best = json.loads(evomerge("status", undisturbed, "--json"))["best"]
    recipe, merged = tmp_path / "recipe.yaml", tmp_path / "merged"
    evomerge("export", undisturbed, "-o", recipe)
    assert best["fingerprint"] in evomerge("merge", recipe, merged)
    with quiet():
        AutoTokenizer.from_pretrained(merged)
        assert AutoModelForCausalLM.from_pretrained(merged).num_parameters() == 268992
    for target in (recipe, merged):
        row = json.loads(evomerge("evaluate", target, "--config", SMOKE, "--split", "heldout", "--json"))
        assert (row["scores"], row["fingerprint"]) == (best["heldout"], best["fingerprint"])


def test_every_row_of_candidates_holds_the_agreed_keys(undisturbed: Path) -> None:
    rows = json.loads(evomerge("candidates", undisturbed, "--json"))
    front = json.loads(evomerge("front", undisturbed, "--json"))
    assert (rows, front) == content(undisturbed)
    keys = {"id", "generation", "index", "kind", "genome", "scores", "state", "error", "items", "fingerprint"}
    assert all(keys <= set(row) for row in rows)
    assert all(keys | {"heldout"} <= set(row) and row["heldout"] for row in front)
    assert {row["kind"] for row in rows} == {"control", "search"}
    assert [row["id"] for row in rows[:4]] == ["base", "parent-math", "parent-lang", "uniform"]
    assert all(row["items"] == 80 for row in rows)


def test_a_search_warns_of_exams_and_once_of_prompts_longer_than_the_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from evomerge import zoo

    monkeypatch.setattr("evomerge.evaluation.loading._local", lambda _: False)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    torch.manual_seed(0)
    for name in ("base", "tune"):  # only the last four tokens of a prompt fit
        model = LlamaForCausalLM(LlamaConfig(vocab_size=79, max_position_embeddings=4, **shape))
        model.save_pretrained(tmp_path / name)
        for file in zoo.path("base").glob("tokenizer*"):
            shutil.copyfile(file, tmp_path / name / file.name)
    task = yaml.safe_load((REPOSITORY / "evals" / "base_qa" / "base_qa.yaml").read_text()) | {"task": "exam"}
    task["dataset_kwargs"]["data_files"] = {"test": str(REPOSITORY / "evals" / "base_qa" / "heldout.jsonl")}
    task |= {"validation_split": None, "test_split": "test", "metadata": {"version": 1}}
    (tmp_path / "exam.yaml").write_text(yaml.safe_dump(task))
    document = yaml.safe_load(SMOKE.read_text()) | {
        "objectives": [{"task": "exam"}],
        "base": "base",
        "models": {"tune": "tune"},
        "tasks": {"paths": ["exam.yaml"]},
        "optimizer": {"evaluations": 4, "population": 4},
    }
    search = tmp_path / "short.yaml"
    search.write_text(yaml.safe_dump(document))
    exam = "warning: objective exam: the search would choose by items of the test split of json"
    evomerge("check", search)
    assert f"evomerge: {exam}" in capfd.readouterr().err
    printed = evomerge("run", search, "--output", tmp_path / "run")
    assert exam in printed
    assert printed.count("warning: search items: ") == printed.count("warning: heldout items: ") == 1
    assert "prompts do not fit the model's context and lose their beginning" in printed
    run = runs.read(tmp_path / "run")
    assert {(r.evaluation.truncated, r.evaluation.error) for r in run.archive.records()} == {(40, None)}
    assert run.config.evaluation.prefix_sharing == "mask"  # decided once, for every worker and for a resumed search


def test_optuna_dashboard_reads_the_archive(undisturbed: Path) -> None:
    from optuna.storages import RDBStorage
    from optuna_dashboard import wsgi

    app = wsgi(RDBStorage(f"sqlite:///{undisturbed / 'archive.db'}"))

    def get(path: str) -> Any:
        environment = {"REQUEST_METHOD": "GET", "PATH_INFO": path, "QUERY_STRING": "", "SERVER_NAME": "localhost"}
        environment |= {"SERVER_PORT": "80", "wsgi.url_scheme": "http", "wsgi.errors": sys.stderr}
        return json.loads(b"".join(app(environment, lambda status, headers, *rest: None)))

    studies = {study["study_name"]: study["study_id"] for study in get("/api/studies")["study_summaries"]}
    assert set(studies) == {"search", "selection", "heldout"}
    study = get(f"/api/studies/{studies['search']}")
    searched = [trial for trial in study["trials"] if trial["params"]]
    assert len(study["trials"]) == len(searched) + 4  # the controls
    names = {param["name"] for param in searched[0]["params"]}
    assert names >= {"weight:math:model.embed_tokens.weight", "density:lang:head"}
    assert all(len(trial["values"]) == 2 for trial in searched)
    told = [{entry["key"]: entry["value"] for entry in trial["user_attrs"]} for trial in study["trials"]]
    assert sum("control" in row["kind"] for row in told) == 4  # to filter by, beside the id
    for trial, row in zip(study["trials"], told, strict=True):
        start, end = (datetime.fromisoformat(trial[f"datetime_{which}"]) for which in ("start", "complete"))
        assert (end - start).total_seconds() == pytest.approx(float(row["seconds"]), abs=1e-3)


def test_a_run_whose_constraints_nobody_meets_says_so_and_exports_nothing(
    search_file: WriteSearch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    low = {"task": "lang_b", "goal": "minimize", "retain": 1, "of": "math"}  # which knows no word of it
    high = {"task": "base_qa", "retain": 1, "of": "lang"}
    search = search_file(
        constraints=[low, high],
        optimizer={"evaluations": 3, "population": 4},
        items={"search": 40, "selection": 4, "heldout": 4},
    )
    evomerge("run", search, "--output", tmp_path / "run")
    says = "no candidate keeps to the constraints on search items: lang_b at most"
    assert says in capfd.readouterr().err
    assert not (tmp_path / "run" / "best.yaml").exists()
    assert json.loads(evomerge("front", tmp_path / "run", "--json")) == []
    status = json.loads(evomerge("status", tmp_path / "run", "--json"))
    assert (status["state"], status["best"], status["infeasible"]) == ("finished", None, 7)
    evomerge("export", tmp_path / "run", "-o", tmp_path / "recipe.yaml", status=1)
    assert says in capfd.readouterr().err
    assert not (tmp_path / "recipe.yaml").exists()
