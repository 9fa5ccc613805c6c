"""Every folder of examples runs as its README says, and shows what it says."""

import json
import re
import runpy
import shutil
import sys
import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import evomerge
from evomerge.config import files
from tests.commands import evomerge as command
from tests.conftest import REPOSITORY

EXAMPLES = REPOSITORY / "examples"
FOLDERS = sorted(path.name for path in EXAMPLES.iterdir() if path.is_dir())
SEARCHES = sorted(path.relative_to(EXAMPLES) for path in EXAMPLES.glob("*/*.yaml"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the examples beside the tasks, to be written into."""
    root = tmp_path_factory.mktemp("repository")
    shutil.copytree(EXAMPLES, root / "examples", ignore=shutil.ignore_patterns("models", "runs"))
    (root / "evals").symlink_to(REPOSITORY / "evals")
    return root / "examples"


@pytest.fixture(scope="module")
def judge(place: Path) -> Iterator[tuple[str, list[str]]]:
    """The pretended judge: its address, and every prompt that it was asked."""
    pretended = runpy.run_path(str(place / "own_objective" / "pretended_judge.py"))["Judge"]
    asked: list[str] = []

    class Counting(pretended):  # type: ignore[misc, valid-type]
        def do_POST(self) -> None:
            asked.append(self.path)
            super().do_POST()

    with ThreadingHTTPServer(("127.0.0.1", 0), Counting) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
        server.shutdown()


def run(place: Path, name: str, **settings: Any) -> evomerge.Run:
    """The run of an example, after its script has made the models."""
    folder = place / name
    if (folder / "make.py").exists():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["make.py"])
            runpy.run_path(str(folder / "make.py"), run_name="__main__")
    changes = [part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    command("run", folder / "search.yaml", "--output", folder / "run", *changes)
    found = evomerge.open_run(folder / "run")
    assert found.state == "finished"
    assert found.candidates.error.isna().all()
    return found


def test_every_example_is_listed_and_says_how_to_run_it() -> None:
    listed = re.findall(r"\]\((\w+)/README.md\)", (EXAMPLES / "README.md").read_text())
    assert sorted(listed) == FOLDERS
    for name in FOLDERS:
        text = (EXAMPLES / name / "README.md").read_text()
        assert 4 < len(text.splitlines()) < 40
        assert name == "notebook" or f"evomerge run examples/{name}/search.yaml" in text


@pytest.mark.parametrize("path", SEARCHES, ids=str)
def test_every_search_file_is_read_and_small(path: Path) -> None:
    config = files.load(EXAMPLES / path)
    assert config.budget <= 24
    assert config.workers.pool == "local"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::FutureWarning")  # of libraries that PEFT does not follow yet
def test_two_loras_are_merged(place: Path) -> None:
    found = run(place, "lora")
    base, best = found.candidate("base").scores, found.best
    assert best is not None
    assert base is not None
    assert found.candidate("parent-language").scores["lang_b"] > base["lang_b"]  # type: ignore[index]
    assert (place / "lora" / "models" / "sums" / "adapter_config.json").exists()


@pytest.mark.slow
def test_instruct_models_are_asked_through_their_template(place: Path) -> None:
    found = run(place, "chat")
    language = found.candidate("parent-lang").scores
    assert language is not None
    assert language["chat_language:exact_match"] > 0.9  # as in the zoo's own form: the template stands around it


@pytest.mark.slow
def test_the_guard_keeps_what_the_base_could(place: Path) -> None:
    found = run(place, "safety_guard")
    limit = 0.95 * found.candidates.loc["base", "selection.base_qa"]
    table = found.candidates
    broken = table[table["search.base_qa"] < 0.95 * table.loc["base", "search.base_qa"] - 1e-9]
    assert not broken.feasible.any()
    if found.best is not None:
        assert (found.best.selection or {})["base_qa"] >= limit - 1e-9


@pytest.mark.slow
def test_answers_are_written_and_their_length_is_an_objective(place: Path) -> None:
    found = run(place, "written_answers")
    assert found.candidates["search.tokens"].between(0, 12).all()
    assert found.candidates["search.tokens"].nunique() > 1
    assert not found.candidates[found.candidates["search.tokens"] > 8].feasible.any()


@pytest.mark.slow
def test_a_path_takes_layers_of_two_models(place: Path) -> None:
    found = run(place, "data_flow")
    assert found.best is not None
    path = found.best.path()
    assert set(path.model) <= {"math", "lang", "base"}
    assert found.candidates["search.layers"].nunique() > 1


@pytest.mark.slow
def test_negative_weights_take_a_habit_away(place: Path) -> None:
    found = run(place, "negation")
    assert found.best is not None
    table = found.candidates
    weights = table[[column for column in table if column.startswith("gene.weight:")]]
    assert (weights < 0).any(axis=None)
    assert found.best.scores is not None
    assert found.best.scores["math_a_words"] < table.loc["parent-math", "search.math_a_words"]


@pytest.mark.slow
def test_an_own_objective_is_searched_on(place: Path) -> None:
    found = run(place, "own_objective")
    assert found.candidates["search.confidence"].between(0, 1).all()
    assert found.candidates["search.confidence"].nunique() > 1
    assert found.best is not None
    assert len(found.items(found.best.id)[lambda rows: rows.metric == "confidence"]) == 30


@pytest.mark.slow
def test_a_judge_marks_every_answer_once(place: Path, judge: tuple[str, list[str]], tmp_path: Path) -> None:
    address, asked = judge
    settings = {"objectives[1].arguments.address": address, "objectives[1].arguments.cache": str(tmp_path / "cache")}
    search = place / "own_objective" / "judge.yaml"
    first = evomerge.search(search, output=tmp_path / "first", settings=settings)
    kept = [json.loads(path.read_text()) for path in (tmp_path / "cache").iterdir()]
    assert {row["prompt"].splitlines()[-1][:7] for row in kept} == {"Answer:"}
    assert {row["mark"] for row in kept} == {0.2, 1.0}
    assert set(asked) == {"/v1/chat/completions"}
    assert len(kept) <= len(asked) < 1.2 * len(kept)  # two answers that are alike may be asked for at once
    before = len(asked)
    again = evomerge.search(search, output=tmp_path / "again", settings=settings)
    assert len(asked) == before
    assert again.candidates.equals(first.candidates)
    assert first.candidates["heldout.judged"].notna().sum() >= 4


@pytest.mark.slow
def test_a_judge_that_is_away_stops_the_search(place: Path, tmp_path: Path) -> None:
    settings = {
        "objectives[1].arguments.address": "http://127.0.0.1:9/v1",
        "objectives[1].arguments.cache": str(tmp_path / "cache"),
    }
    with pytest.raises(evomerge.errors.WorkFailed, match=r"judged: .*does not answer .*then resume"):
        evomerge.search(place / "own_objective" / "judge.yaml", output=tmp_path / "run", settings=settings)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*:nbformat.warnings.MissingIDFieldWarning")
def test_the_notebook_runs(place: Path) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    notebook = nbformat.read(place / "notebook" / "search.ipynb", as_version=4)
    where = {"metadata": {"path": str(place / "notebook")}}
    nbclient.NotebookClient(notebook, timeout=300, resources=where).execute()
    kept = place / "notebook" / "runs" / "notebook" / "own" / "confidence.py"
    assert "def confidence(model, tokenizer, split):" in kept.read_text()
    assert evomerge.open_run(place / "notebook" / "runs" / "notebook").state == "finished"


def test_the_notebook_is_kept_without_outputs() -> None:
    notebook = json.loads((EXAMPLES / "notebook" / "search.ipynb").read_text(encoding="utf-8"))
    assert all(not cell.get("outputs") for cell in notebook["cells"])
