import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from evomerge import cli
from evomerge.config.spaces import ParameterSpaceConfig
from evomerge.merging.methods import METHODS
from evomerge.spaces.parameter import ParameterSpace
from tests.bad_input import Refuses
from tests.conftest import REPOSITORY
from tests.searches import WriteSearch


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['evomerge', '--help']\n"
        "from evomerge.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "heavy = {'torch', 'ray', 'lm_eval', 'optuna', 'transformers', 'cma', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr
    for command in (
        "run",
        "resume",
        "status",
        "front",
        "candidates",
        "export",
        "merge",
        "push",
        "evaluate",
        "check",
        "convert",
        "methods",
        "spaces",
    ):
        assert f"\n  {command} " in done.stdout


@pytest.mark.parametrize("command", ["status", "front", "candidates"])
def test_what_reads_a_run_opens_no_model_and_imports_no_large_library(command: str, tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "tests" / "data" / "format_1" / "run", tmp_path / "run")
    code = (
        f"import sys; sys.argv = ['evomerge', {command!r}, {str(tmp_path / 'run')!r}]\n"
        "from evomerge.cli import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert not stop.code\n"
        "heavy = {'torch', 'ray', 'lm_eval', 'transformers', 'datasets', 'cma', 'scipy', 'optuna', 'sqlalchemy'}\n"
        "heavy &= set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = run(code)
    assert done.returncode == 0, done.stderr
    assert "g0000-07" in done.stdout


def shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["evomerge", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code
    return capsys.readouterr().out


def test_spaces_lists_every_gene_that_a_space_of_all_methods_has_with_its_bounds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {row["kind"]: row for row in json.loads(shown(monkeypatch, capsys, "spaces", "--json"))}
    listed = {gene["kind"]: gene for gene in rows["parameter"]["genes"]}
    asked = {name: {own.name: {} for own in method.own} for name, method in METHODS.items()}
    config = ParameterSpaceConfig.model_validate(
        {"method": list(asked), "participate": True, "parameters": asked, "lambda": {"low": 0.5}}
    )
    assert set(rows["parameter"]["options"]) == set(config.model_dump(by_alias=True))
    space = ParameterSpace(config, "b", {"x": "x", "y": "y", "z": "z"}, ("model.layers.0.mlp.weight",), 0)
    found = {gene.kind: gene for gene in space.genes}
    assert set(found) == {kind for kind in listed if not kind.startswith("METHOD.")}
    for kind, gene in found.items():
        assert listed[kind]["domain"] == gene.domain
        if gene.domain != "categorical":
            assert (listed[kind]["low"], listed[kind]["high"]) == (gene.low, gene.high)


def test_merge_and_evaluate_tell_what_they_ignore_of_a_recipe(
    tmp_path: Path, search_file: WriteSearch, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe, search = tmp_path / "recipe.yaml", search_file(items={"search": 4, "heldout": 4})
    recipe.write_text(
        "{name: mine, merge_method: linear, models: [{model: 'zoo:math', parameters: {weight: 1, wieght: 2}}]}"
    )
    says = [
        f"evomerge: warning: {recipe}: name is ignored, as mergekit ignores it.",
        f"evomerge: warning: {recipe}: models[0].parameters.wieght is ignored, since merge_method linear has no such "
        "parameter; did you mean 'weight'?",
    ]
    for command in (("merge", str(recipe), str(tmp_path / "out")), ("evaluate", str(recipe), "--config", str(search))):
        monkeypatch.setattr(sys, "argv", ["evomerge", *command])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert not stopped.value.code
        told = capfd.readouterr().err.splitlines()
        assert [line for line in told if "ignored" in line] == says


def test_spaces_and_methods_speak_to_people_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    searched = rows_of(shown(monkeypatch, capsys, "spaces"))
    assert ["slerp.t", "0 to 1", "group of tensors", "space.parameters.slerp.t", "yes"] in searched
    listed = rows_of(shown(monkeypatch, capsys, "methods"))
    assert ["della", "1 or more", "weight, density, epsilon"] in [row[:3] for row in listed]
    assert "weight, density (lambda, epsilon)" in next(row for row in listed if row[0] == "della")


def rows_of(table: str) -> list[list[str]]:
    """The cells of each line of printed tables."""
    lines = [line for line in table.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


WRONG_OPTIONS: dict[str, tuple[Any, ...]] = {
    "a setting without value": (("--set", "optimizer.evaluations"), "expected KEY.PATH=VALUE, for example"),
    "a setting without key": (("--set", "=1"), "--set =1: expected KEY.PATH=VALUE"),
    "a setting of an unknown key": (("--set", "optimizer.evals=3"), "optimizer.evals", "did you mean 'evaluations'?"),
    "a setting beyond the end of a list": (("--set", "objectives[7].task=x"), "'7' is no index into a list of 2"),
    "a setting below a value": (("--set", "base.name=x"), "--set base.name=x: base is", "holds no keys to set"),
    "a setting that is no YAML": (("--set", "base=["), "--set base=[: the value is not valid YAML"),
    "a setting of the wrong type": (("--set", "seed=one"), 'seed is "one"; use a valid integer'),
    "a negative number of workers": (("--workers", "-1"), "--workers is -1; give the number of workers, or 0"),
    "a word for the number of workers": (("--workers", "many"), "--workers", "valid integer", "`evomerge run --help`"),
    "an unknown option": (("--outptu", "x"), "--outptu", "see `evomerge run --help`"),
    "a habit of mergekit": (("--lazy-unpickle",), "--lazy-unpickle is an option of another program; leave it out"),
    "an option without value": (("--set",), "--set", "requires an argument"),
    "one argument too many": (("more",), "more", "see `evomerge run --help`"),
}


@pytest.mark.parametrize("claim", WRONG_OPTIONS)
def test_a_wrong_option_is_refused(claim: str, search: WriteSearch, refuses: Refuses) -> None:
    options, *fragments = WRONG_OPTIONS[claim]
    refuses("run", search(), "--output", "new/run", *options, says=tuple(fragments))


def test_a_wrong_command_is_refused(refuses: Refuses) -> None:
    refuses("rnu", says=("rnu", "Did you mean 'run'?", "see `evomerge --help`"))
    refuses("run", says=("SEARCH.yaml", "see `evomerge run --help`"))
    refuses("evaluate", "zoo:math", says=("Missing option '--config'", "see `evomerge evaluate --help`"))


def test_what_cannot_be_scored_is_refused(tiny_models: dict[str, Path], search: WriteSearch, refuses: Refuses) -> None:
    path = search()
    refuses(
        "evaluate", tiny_models["first"], "--config", path, "--split", "test", says=("--split is 'test'; use search",)
    )
    refuses("evaluate", tiny_models["first"], "--config", "nowhere.yaml", says=("nowhere.yaml: no such file",))
    refuses("evaluate", "zoo:mth", "--config", path, says=("zoo:mth", "did you mean 'math'?"))
    refuses("evaluate", "./nowhere", "--config", path, says=("./nowhere: no such model folder",))
    refuses("evaluate", "nowhere.yaml", "--config", path, says=("nowhere.yaml: no such file",))
