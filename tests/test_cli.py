import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from evomerge import cli
from evomerge.config.spaces import SpaceConfig
from evomerge.merging.methods import METHODS
from evomerge.spaces.parameter import ParameterSpace


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
        "evaluate",
        "check",
        "methods",
        "spaces",
    ):
        assert f"\n  {command} " in done.stdout


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
    asked = {name: {own.name: {} for own in method.own} for name, method in METHODS.items() if name != "nuslerp"}
    config = SpaceConfig.model_validate(
        {"method": list(asked), "participate": True, "parameters": asked, "lambda": {"low": 0.5}}
    )
    assert set(rows["parameter"]["options"]) == set(config.model_dump(by_alias=True))
    space = ParameterSpace(config, "b", {"x": "x", "y": "y"}, ("model.layers.0.mlp.weight",), 0)
    found = {gene.kind: gene for gene in space.genes}
    assert set(found) == {kind for kind in listed if not kind.startswith("nuslerp")}
    for kind, gene in found.items():
        assert listed[kind]["domain"] == gene.domain
        if gene.domain != "categorical":
            assert (listed[kind]["low"], listed[kind]["high"]) == (gene.low, gene.high)


def test_merge_and_evaluate_tell_what_they_ignore_of_a_recipe(
    tmp_path: Path, search_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
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
    assert "slerp.t: 0 to 1, one per group of tensors (space.parameters.slerp.t)" in shown(
        monkeypatch, capsys, "spaces"
    )
    listed = shown(monkeypatch, capsys, "methods")
    assert "della: 1 or more models" in listed
    assert "searched weight, density, on request lambda, della.epsilon" in listed
