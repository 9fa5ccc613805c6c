"""A newcomer's first minutes: a wheel in an environment of its own, the demo, and a search file that can run."""

import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import yaml

from evomerge import starting, zoo
from evomerge.config.files import load
from evomerge.errors import InputError
from evomerge.search.controls import count_controls
from tests.bad_input import Refuses
from tests.commands import evomerge
from tests.conftest import REPOSITORY
from tests.searches import EVALS

ASKED = ("--base", "zoo:base", "--model", "math=zoo:math", "--task", "base_qa", "--task-path", str(EVALS))
PACKED = ("evomerge", "evals", "search_spaces", "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel, built from a copy, since a build leaves files beside its sources."""
    copy, made = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in PACKED:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, copy / name)
    build = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "-w", str(made))
    subprocess.run([sys.executable, *build, str(copy)], check=True, timeout=300)
    (built,) = made.glob("*.whl")
    return built


@pytest.mark.slow
def test_an_installed_wheel_runs_the_demo_without_the_repository(wheel: Path, tmp_path: Path) -> None:
    folder = tmp_path / "environment"
    venv.create(folder, with_pip=False)
    site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    python = str(folder / "bin" / "python")
    shutil.unpack_archive(wheel, site, "zip")
    packages = Path(pytest.__file__).parents[1]
    (site / "shared.pth").write_text(f"{packages}\n")  # after the wheel, whose evomerge comes first
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [python, "-I", *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert run("-c", "import evomerge; print(evomerge.__file__)").startswith(str(site))
    printed = run("-m", "evomerge", "demo", "--smoke", "here")
    assert "Held-out items" in printed
    assert "(the one that was scored)" in printed
    made = {path.name for path in (tmp_path / "here").iterdir()}
    assert made >= {"report.html", "recipe.yaml", "merged", "archive.db"}
    assert str(REPOSITORY) not in (tmp_path / "here" / "search.yaml").read_text()


def test_the_folders_of_a_wheel_are_those_of_the_repository() -> None:
    assert zoo.shared("evals") == REPOSITORY / "evals"
    assert starting.demo_file(smoke=False) == REPOSITORY / "search_spaces" / "demo.yaml"
    assert starting.demo_file(smoke=True) == REPOSITORY / "search_spaces" / "smoke.yaml"


def test_a_written_search_passes_its_check_and_is_never_overwritten(tmp_path: Path, refuses: Refuses) -> None:
    written = tmp_path / "mine" / "search.yaml"
    evomerge("init", *ASKED, "--model", "zoo:lang", "--task", "math_a", "--budget", "40", "-o", written)
    document = yaml.safe_load(written.read_text())
    assert document["models"] == {"math": "zoo:math", "lang": "zoo:lang"}
    assert document["optimizer"]["evaluations"] == 40
    assert all(f"\n{key}:" in written.read_text() for key in ("items", "space", "controls", "optimizer", "workers"))
    assert "candidates: 40" in " ".join(evomerge("check", written).split())
    refuses("init", *ASKED, "-o", written, says=("exists already; choose another -o",))


@pytest.mark.parametrize("budget", [8, 60, 300, 2000])
def test_a_budget_has_room_for_its_genes_and_its_controls(budget: int, tmp_path: Path) -> None:
    text = starting.search_file(
        "zoo:base", ["a=zoo:math", "b=zoo:lang"], ["math_a"], [str(EVALS)], starting.parse_budget(str(budget)), tmp_path
    )
    (tmp_path / "search.yaml").write_text(text)
    config = load(tmp_path / "search.yaml")
    groups = -(-6 // config.space.model_dump()["layer_granularity"])
    assert groups == 1 or 4 * 2 * 2 * (groups + 2) <= budget
    assert count_controls(config) <= max(budget, 4)


@pytest.mark.parametrize(("kept", "items"), [(True, (200, 100, 400)), (False, (134, 66, 400))])
def test_selection_items_cost_no_search_items_where_tasks_keep_a_split_for_them(
    kept: bool, items: tuple[int, int, int], tmp_path: Path
) -> None:
    tasks = Path(shutil.copytree(EVALS, tmp_path / "evals"))
    if not kept:
        task = tasks / "math_a" / "math_a.yaml"
        task.write_text("\n".join(line for line in task.read_text().splitlines() if "selection" not in line))
    text = starting.search_file(
        "zoo:base", ["zoo:math"], ["base_qa", "math_a"], [str(tasks)], starting.parse_budget(None), tmp_path
    )
    found = yaml.safe_load(text)["items"]
    assert (found["search"], found["selection"], found["heldout"]) == items


def test_a_time_becomes_evaluations_and_the_file_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starting, "_seconds_per_candidate", lambda _prepared: 2.0)
    arguments = ("zoo:base", ["a=zoo:math", "b=zoo:lang"], ["math_a"], [str(EVALS)])
    document = {}
    for text in ("30m", "2h"):
        written = starting.search_file(*arguments, starting.parse_budget(text), tmp_path)
        document[text] = yaml.safe_load(written)
        (tmp_path / "search.yaml").write_text(written)
        config = load(tmp_path / "search.yaml")
        spent = 2.0 * (config.budget + count_controls(config))
        seconds = starting.parse_budget(text).seconds
        assert seconds is not None
        assert 0.75 * seconds < spent <= 0.8 * seconds
        assert "candidate takes about 2 s" in " ".join(written.replace("#", "").split())
    with pytest.raises(InputError, match="give at least 1m"):
        starting.search_file(*arguments, starting.parse_budget("20s"), tmp_path)


def test_the_time_of_a_candidate_is_measured(tmp_path: Path) -> None:
    text = starting.search_file(
        "zoo:base", ["zoo:math"], ["math_a"], [str(EVALS)], starting.parse_budget("1h"), tmp_path
    )
    assert 8 <= yaml.safe_load(text)["optimizer"]["evaluations"] < 3600 / 1e-3


@pytest.mark.parametrize(
    ("text", "seconds"), [("2h", 7200), ("90m", 5400), ("1h30m", 5400), ("45s", 45), ("1.5h", 5400), ("1d 2h", 93600)]
)
def test_times_are_read_as_people_write_them(text: str, seconds: float) -> None:
    assert starting.parse_budget(text).seconds == seconds


WRONG = {
    "a budget of nothing": (("--budget", "0"), "--budget is 0; use at least 8 candidates"),
    "a negative budget": (("--budget=-3",), "--budget is '-3'; use a number of candidates such as 300"),
    "a budget in another unit": (("--budget", "2 weeks"), "--budget is '2 weeks'", "a time such as 2h"),
    "an unknown task": (("--task", "math_aa"), "'math_aa'", "did you mean 'math_a'?"),
    "a metric that the task lacks": (("--task", "math_a:f1"), "'f1', which task 'math_a' does not report"),
    "a task with too many parts": (("--task", "a:b:c:d"), "--task is 'a:b:c:d'; expected TASK"),
    "an unknown model": (("--model", "x=zoo:mth"), "zoo:mth", "did you mean 'math'?"),
    "a model without reference": (("--model", "x="), "--model is 'x='; expected NAME=REFERENCE"),
    "a name given twice": (("--model", "math=zoo:lang"), "two models are called math"),
    "a name kept for controls": (("--model", "uniform=zoo:lang"), "models.uniform", "choose another"),
}


@pytest.mark.parametrize("claim", WRONG)
def test_what_makes_no_search_is_refused_and_writes_nothing(claim: str, tmp_path: Path, refuses: Refuses) -> None:
    options, *fragments = WRONG[claim]
    refuses("init", *ASKED, *options, "-o", tmp_path / "new.yaml", says=tuple(fragments))
    assert not (tmp_path / "new.yaml").exists()
