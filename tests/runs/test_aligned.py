"""A search aligns models that were trained apart: its copies are made once, searched, shown and exported."""

import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml

from evomerge import zoo
from evomerge.alignment import align
from evomerge.alignment.align import NOTES
from evomerge.config.search import SearchConfig
from evomerge.events import Event, ModelAligned, Warned, WorkersReady
from evomerge.export.names import without_paths
from evomerge.files import ALIGNED
from evomerge.merging.sources.models import models_of
from evomerge.recipe import load
from evomerge.runs import directory as runs
from tests.bad_input import Refuses
from tests.commands import content, evomerge
from tests.models import shuffled
from tests.searches import WriteSearch, small_search
from tests.stopping import Stop


@pytest.fixture
def apart(tiny_models: dict[str, Path], tmp_path: Path) -> Path:
    """A fine-tune whose places are in a random order."""
    return shuffled(tiny_models["second"], tmp_path / "apart", seed=1)


def weights_of(directory: Path) -> list[Any]:
    """The fingerprints and scores of a run, whatever its models are called."""
    return [(row["id"], row["fingerprint"], row["scores"], row["heldout"]) for row in content(directory)[0]]


def files(folder: Path) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in sorted(folder.rglob("*")) if file.is_file()}


def test_a_shuffled_fine_tune_is_searched_as_the_fine_tune_itself(
    search: WriteSearch, apart: Path, finished: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    evomerge("run", search({"models.second": str(apart), "align.second": "weights"}), "--output", directory)
    assert weights_of(directory) == weights_of(finished)
    notes = json.loads((directory / ALIGNED / "second" / NOTES).read_text())
    assert notes["after"] < 0.7 * notes["before"]
    told = f"aligned with {runs.read(directory).config.base} by weights: distance {notes['before']:.3f} to"
    assert told in evomerge("status", directory)
    assert told in json.loads(evomerge("status", directory, "--json"))["aligned"]["second"]
    evomerge("report", directory, "-o", tmp_path / "page.html")
    assert told in (tmp_path / "page.html").read_text()


def test_activations_are_compared_on_what_statistics_are_measured_on(search_file: WriteSearch, tmp_path: Path) -> None:
    copy, directory = shuffled(zoo.path("lang"), tmp_path / "copy", seed=3), tmp_path / "run"

    def stop(event: Event) -> None:
        if isinstance(event, WorkersReady):
            raise Stop

    asked = {"models": {"math": "zoo:math", "lang": str(copy)}, "align": {"lang": "activations"}}
    with pytest.raises(Stop):
        runs.start(search_file(**asked, statistics={"items": 12}), directory, (), None, stop)
    notes = json.loads((directory / ALIGNED / "lang" / NOTES).read_text())
    assert notes["after"] < 0.5 < notes["before"]
    assert notes["barriers"][1]["middle"] < notes["barriers"][0]["middle"]


def test_a_run_that_was_killed_goes_on_with_the_copies_that_it_has_wherever_it_lies(
    search: WriteSearch, apart: Path, finished: Path, tmp_path: Path
) -> None:
    path, cut = search({"models.second": str(apart), "align": {"second": "weights"}}), tmp_path / "cut"
    with mock.patch.object(align, "_keep_seen", side_effect=Stop), pytest.raises(Stop):  # while it is written
        runs.start(path, cut, (), None, lambda _: None)
    assert not list((cut / ALIGNED).glob("*/*"))
    (cut / ALIGNED).mkdir(exist_ok=True)
    (cut / ALIGNED / ".second-killed").mkdir()

    told: list[Event] = []

    def stop_at(kind: type[Event]) -> Any:
        def listen(event: Event) -> None:
            told.append(event)
            if isinstance(event, kind):
                raise Stop

        return listen

    with pytest.raises(Stop):  # before there is a search file
        runs.start(path, cut, (), None, stop_at(ModelAligned))
    kept = files(cut / ALIGNED)
    with pytest.raises(Stop):  # before the first candidate
        runs.start(path, cut, (), None, stop_at(WorkersReady))
    assert sum(isinstance(event, ModelAligned) for event in told) == 2
    assert not any(isinstance(event, Warned) for event in told)
    moved = cut.rename(tmp_path / "moved")
    runs.start(path, moved, (), None, lambda _: None, again=True)
    assert weights_of(moved) == weights_of(finished)
    assert list(files(moved / ALIGNED).values()) == list(kept.values())
    assert sorted(file.name for file in (moved / ALIGNED).iterdir()) == ["second"]
    assert runs.read(moved).archive.aligned["second"].model == str(apart)


def test_a_copy_of_another_model_is_made_again(
    search: WriteSearch, tiny_models: dict[str, Path], apart: Path, tmp_path: Path
) -> None:
    path, directory = search({"models.second": str(apart), "align": "weights"}), tmp_path / "run"

    def stop(event: Event) -> None:
        if isinstance(event, ModelAligned) and event.model == "second":
            raise Stop

    with pytest.raises(Stop):
        runs.start(path, directory, (), None, stop)
    before = files(directory / ALIGNED)
    shutil.rmtree(apart)
    shuffled(tiny_models["third"], apart, seed=2)
    warned: list[str] = []
    with pytest.raises(Stop):
        runs.start(path, directory, (), None, lambda event: (_collect(event, warned), stop(event))[1])
    changed = {file.parent.name for file, time in files(directory / ALIGNED).items() if before.get(file) != time}
    assert changed == {"second"}
    assert [message.split(" no nearer")[0] for message in warned] == ["alignment brought first"]


def _collect(event: Event, warned: list[str]) -> None:
    if isinstance(event, Warned):
        warned.append(event.message)


def test_an_exported_recipe_names_the_copy_and_merges_to_what_was_scored(
    search: WriteSearch, apart: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], refuses: Refuses
) -> None:
    path, directory, recipe = search({"models.second": str(apart)}), tmp_path / "run", tmp_path / "recipe.yaml"
    evomerge("run", path, "--output", directory, "--set", "align={second: weights}")
    copy = (directory / ALIGNED / "second").resolve()
    assert models_of(runs.read(directory).config)[str(apart)].folder == copy  # as workers find it, wherever they are
    best = next(row for row in content(directory)[0] if row["id"] == "uniform")
    capfd.readouterr()
    evomerge("export", directory, "--candidate", "uniform", "-o", recipe)
    assert f"the recipe needs {copy}, which is {apart}, aligned" in capfd.readouterr().err
    exported = yaml.safe_load(recipe.read_text())
    assert str(copy) in {source["model"] for source in exported["models"]}
    assert str(apart) not in exported["evomerge"].get("aliases", {}).values()
    assert best["fingerprint"] in evomerge("merge", recipe, tmp_path / "merged")
    card = (tmp_path / "merged" / "README.md").read_text()
    assert "- `second`, which is apart, aligned with base by weights: distance" in card
    assert str(tmp_path) not in card
    assert yaml.safe_load(card.split("---")[1])["base_model"] == ["first", "apart"]
    assert without_paths(f"{apart} and {copy}", load(recipe)) == "apart and second"
    copy.rename(tmp_path / "gone")
    refuses("merge", recipe, tmp_path / "again", says=("bring it along", f"evomerge align {apart} {copy} --to"))
    refuses("export", directory, "-o", recipe, says=("search.yaml: align.second.folder: ", "no such model folder"))


def test_check_says_what_will_be_made(search: WriteSearch, apart: Path) -> None:
    path = search({"models.second": str(apart), "align": {"second": "weights"}})
    document = json.loads(evomerge("check", path, "--json"))
    size = (apart / "model.safetensors").stat().st_size / 2**30
    assert document["align"] == {"second": "weights"}
    assert document["gib_of_aligned_copies"] == {"second": pytest.approx(size, abs=1e-3)}
    assert "align: second weights" in evomerge("check", path)
    assert not (path.parent / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"align": {"secnd": "weights"}}, ("align.secnd is no model; did you mean 'second'?",)),
        ({"align": {"second": "wieghts"}}, ('align.second is "wieghts"', "did you mean 'weights'?")),
        ({"align": "activation"}, ('align is "activation"', "did you mean 'activations'?")),
        (
            {"align": {"second": {"folder": "nowhere", "by": "weights"}}},
            ("align.second.folder: ", "no such model folder"),
        ),
        ({"models.second": "zoo:math", "align": {"second": "weights"}}, ("align.second: zoo:math: has another shape",)),
    ],
)
def test_what_cannot_be_aligned_is_refused_before_anything_is_written(
    changes: dict[str, Any], says: tuple[str, ...], search: WriteSearch, refuses: Refuses, tmp_path: Path
) -> None:
    refuses("run", search(changes), "--output", tmp_path / "run", says=says)


def test_activations_need_something_to_compare_them_on(
    search: WriteSearch, apart: Path, refuses: Refuses, tmp_path: Path
) -> None:
    (tmp_path / "texts.txt").write_text("\n")
    path = search({"models.second": str(apart), "align": "activations", "statistics.texts": "texts.txt"})
    refuses("run", path, "--output", tmp_path / "run", says=(f"{path}: statistics.texts: ", "has no text of at least"))


def test_statistics_of_a_model_that_is_yet_to_be_aligned_are_refused(
    search: WriteSearch, apart: Path, refuses: Refuses, tmp_path: Path
) -> None:
    path = search({"models.second": str(apart), "align": {"second": "weights"}})
    refuses("measure", path, "--kind", "fisher", "-o", tmp_path / "out", says=("align.second stands for a model",))


def test_a_way_alone_is_that_of_every_model_and_what_is_not_aligned_has_the_digest_that_it_had() -> None:
    plain, short = SearchConfig(**small_search()), SearchConfig(**small_search(align="weights"))
    whole = SearchConfig(**small_search(align={"math": "weights", "lang": {"by": "weights", "folder": "/anywhere"}}))
    assert plain.digest() == SearchConfig(**small_search(align={})).digest() != short.digest() == whole.digest()
    assert short.digest() != SearchConfig(**small_search(align="activations")).digest()
