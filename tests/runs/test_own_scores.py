"""Searches with scores of the user's own: allowed, kept, stopped, resumed, shown, submitted."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import evomerge
from evomerge.config import files
from evomerge.errors import InputError, WorkFailed
from evomerge.events import Evaluated, Event
from evomerge.files import TASKS
from evomerge.runs import cluster
from tests.bad_input import Refuses
from tests.commands import evomerge as command
from tests.own_scores import FLUENCY, OWN, own_search, write_files

SIZE = {"python": "my_scores:size", "goal": "minimize"}


def search(folder: Path, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    write_files(folder)
    path = folder / "search.yaml"
    path.write_text(yaml.safe_dump(own_search(objectives=[{"task": "base_qa"}, OWN, SIZE], **changes)))
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> evomerge.Run:
    folder = tmp_path_factory.mktemp("own")
    constraints = [{"task": "fluency", "retain": 0.5, "of": "base"}]
    return evomerge.search(search(folder / "mine", constraints=constraints), output=folder / "run")


def test_controls_and_candidates_have_own_scores_on_all_splits(run: evomerge.Run) -> None:
    table = run.candidates
    assert {"base", "parent-math", "parent-lang", "uniform"} <= set(table.index)
    assert table["search.fluency"].notna().all()
    assert table["search.size"].nunique() > 4
    assert run.best is not None
    assert set(run.best.heldout or {}) == {"base_qa", "fluency", "size"}
    assert set(run.best.selection or {}) == {"base_qa", "fluency", "size"}


def test_items_of_own_scores_enter_the_statistics_and_single_numbers_do_not(run: evomerge.Run) -> None:
    assert run.best is not None
    items = run.items(run.best.id, text=True)
    own = items[items.metric == "fluency"]
    assert own.value.mean() == pytest.approx((run.best.heldout or {})["fluency"], rel=1e-6)
    assert all("copy" in json.loads(question)["text"] for question in own.question)
    assert "size" not in set(items.metric)
    shown = " ".join(command("front", run.directory).split())
    assert "95 % interval" in shown
    assert "without size, of which no item has a score" in shown


def test_a_constraint_may_name_an_own_objective(run: evomerge.Run) -> None:
    config = run.config
    assert [metric.name for metric in config.measured] == ["base_qa", "fluency", "size"]
    limit = run.candidates.loc["base", "search.fluency"]
    for _, row in run.candidates[run.candidates.kind == "search"].iterrows():
        assert row.feasible == (row["search.fluency"] >= 1.5 * limit)  # log-likelihoods are below 0


def test_the_page_of_a_run_shows_own_scores_and_items(run: evomerge.Run, tmp_path: Path) -> None:
    page = run.report(tmp_path / "report.html", items=True).read_text()
    assert "fluency" in page
    assert run.best is not None
    run.best.export(tmp_path / "recipe.yaml")
    assert "fluency" in (tmp_path / "recipe.yaml").read_text()


def test_a_run_directory_keeps_what_it_was_scored_by_and_can_be_moved(run: evomerge.Run, tmp_path: Path) -> None:
    own = run.directory / "own"
    assert sorted(path.name for path in own.iterdir()) == ["fluency.jsonl", "fluency.py", "size.py"]
    assert (own / "fluency.py").read_text() == FLUENCY
    written = yaml.safe_load((run.directory / "search.yaml").read_text())
    assert written["objectives"][1]["python"] == "own/fluency.py:fluency"


def test_a_killed_search_goes_on_without_the_files_that_it_came_from(run: evomerge.Run, tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, Evaluated) and event.candidate.kind == "search":
            raise evomerge.StopSearch

    constraints = [{"task": "fluency", "retain": 0.5, "of": "base"}]
    path = search(tmp_path / "mine", constraints=constraints)
    stopped = evomerge.search(path, output=tmp_path / "run", callbacks=[stop])
    assert stopped.state == "interrupted"
    for name in ("my_scores.py", "items.jsonl"):
        (tmp_path / "mine" / name).unlink()
    (tmp_path / "run").rename(tmp_path / "moved")
    done = evomerge.open_run(tmp_path / "moved").resume()
    assert done.state == "finished"
    assert done.candidates.equals(run.candidates)


def test_another_function_is_another_search(run: evomerge.Run, tmp_path: Path, refuses: Refuses) -> None:
    constraints = [{"task": "fluency", "retain": 0.5, "of": "base"}]
    path = search(tmp_path / "mine", constraints=constraints)
    again = evomerge.search(path, output=run.directory)
    assert again.candidates.equals(run.candidates)
    (tmp_path / "mine" / "my_scores.py").write_text(FLUENCY.replace("-scale", "-2 * scale"))
    refuses("run", path, "--output", run.directory, says=("already holds another search (objectives[1].digest is",))


def test_a_copy_that_was_edited_is_not_gone_on_with(run: evomerge.Run, tmp_path: Path, refuses: Refuses) -> None:
    import shutil

    shutil.copytree(run.directory, tmp_path / "run")
    (tmp_path / "run" / "own" / "size.py").write_text(FLUENCY + "\n")
    changes = ("--set", "optimizer.evaluations=8")
    refuses("resume", tmp_path / "run", *changes, says=("objectives[2].digest is", "restore the files"))


def test_a_search_waits_for_what_did_not_answer(tmp_path: Path) -> None:
    path = search(tmp_path / "mine")
    source = f"""
from pathlib import Path

def fluency(model, tokenizer, split):
    count = Path({str(tmp_path / "count")!r})
    calls = int(count.read_text()) if count.exists() else 0
    count.write_text(str(calls + 1))
    if calls == 6:
        raise ConnectionError("the judge is away")
    return [float(len(item["text"]) * model.lm_head.weight.norm()) for item in split.items]

def size(model, tokenizer, split):
    return float(model.lm_head.weight.norm())
"""
    (tmp_path / "mine" / "my_scores.py").write_text(source)
    with pytest.raises(WorkFailed, match="the judge is away"):
        evomerge.search(path, output=tmp_path / "run")
    stopped = evomerge.open_run(tmp_path / "run")
    assert stopped.state == "interrupted"
    assert stopped.candidates.error.isna().all()
    done = stopped.resume()
    assert done.state == "finished"
    assert done.candidates.error.isna().all()


NO = {
    "code that nobody has allowed": (
        {"tasks": {"paths": []}},
        ("objectives[1].python is my_scores:fluency, which runs code", "add 'fluency' to tasks.allow_code"),
    ),
    "a module that is not there": (
        {"objectives": [{**OWN, "python": "my_score:fluency"}]},
        ("objectives[0].python: ", "my_score.py cannot be read", "put it beside the search file"),
    ),
    "a function that is not there": (
        {"objectives": [{**OWN, "python": "my_scores:fluancy", "name": "fluency"}]},
        ("objectives[0].python names fluancy, which", "did you mean 'fluency'?"),
    ),
    "no function": ({"objectives": [{"python": "my_scores"}]}, ("objectives[0].python", "write MODULE:FUNCTION")),
    "a way out of the folder": (
        {"objectives": [{"python": "..my_scores:fluency"}]},
        ("objectives[0].python", "write MODULE:FUNCTION"),
    ),
    "a task beside a function": (
        {"objectives": [{**OWN, "task": "base_qa"}]},
        ("objectives[0].python is my_scores:fluency, which belongs to no task",),
    ),
    "items of a task": (
        {"objectives": [{"task": "base_qa", "items": "x"}]},
        ("objectives[0].items is given", "python"),
    ),
    "two functions of one name": (
        {"objectives": [OWN], "constraints": [{**SIZE, "name": "fluency", "retain": 0.9}]},
        ("constraints[0] is another score with the name fluency",),
    ),
    "too few items": ({"items": {"search": 40}}, ("items.search asks for 40 items, but task", "'fluency'")),
    "a place that is not there": (
        {"objectives": [{**OWN, "items": "none.jsonl"}]},
        ("objectives[0].items: ", "none.jsonl"),
    ),
}


@pytest.mark.parametrize("claim", NO)
def test_mistakes_in_own_scores_get_one_sentence(claim: str, tmp_path: Path, refuses: Refuses) -> None:
    changes, says = NO[claim]
    write_files(tmp_path)
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(own_search(**changes)))
    refuses("check", tmp_path / "search.yaml", says=says)


@pytest.mark.parametrize(
    ("content", "says"),
    [('{"text": "copy"}\n[1]\n', "line 2: expected an object"), ("{\n", "line 1: not valid JSON"), ("\n", "is empty")],
)
def test_items_that_are_no_objects_get_one_sentence(content: str, says: str, tmp_path: Path, refuses: Refuses) -> None:
    path = search(tmp_path)
    (tmp_path / "items.jsonl").write_text(content)
    refuses("check", path, says=("items.jsonl", says))


def test_a_link_that_leads_out_of_the_folder_is_no_module(tmp_path: Path, refuses: Refuses) -> None:
    path = search(tmp_path / "mine")
    (tmp_path / "my_scores.py").write_text(FLUENCY)
    (tmp_path / "mine" / "my_scores.py").unlink()
    (tmp_path / "mine" / "my_scores.py").symlink_to(tmp_path / "my_scores.py")
    refuses("check", path, says=("python is my_scores:fluency, a link that leads out of",))


def test_a_job_carries_own_scores(tmp_path: Path) -> None:
    config = files.load(search(tmp_path / "mine"))
    (tmp_path / "job").mkdir()
    cluster.pack(config, str(tmp_path / "there"), tmp_path / "job")
    for name in ("my_scores.py", "items.jsonl"):
        (tmp_path / "mine" / name).unlink()
    (tmp_path / "there").mkdir()
    cluster.unpack(tmp_path / "job", tmp_path / "there", evomerge.__version__)
    done = evomerge.search(tmp_path / "job" / "search.yaml", output=tmp_path / "there")
    assert done.candidates["search.fluency"].notna().all()
    assert (tmp_path / "there" / TASKS).is_dir()
    with pytest.raises(InputError, match="cannot be read"):
        cluster.pack(config, str(tmp_path / "there"), tmp_path / "job")


@pytest.mark.slow
@pytest.mark.ray
def test_workers_on_ray_give_the_scores_of_this_process(run: evomerge.Run, tmp_path: Path) -> None:
    constraints = [{"task": "fluency", "retain": 0.5, "of": "base"}]
    path = search(tmp_path / "mine", constraints=constraints)
    changes = {"workers.pool": "ray", "workers.count": 1, "workers.shards": 2}
    elsewhere = evomerge.search(path, output=tmp_path / "run", settings=changes)
    assert elsewhere.candidates.equals(run.candidates)
