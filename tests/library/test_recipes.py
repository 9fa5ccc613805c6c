"""What programs import: light, typed, and equal to the commands."""

import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import evomerge
from evomerge import recipe as recipes
from evomerge.errors import InputError
from tests.commands import evomerge as command


def test_importing_the_package_imports_nothing_heavy() -> None:
    """Nor does asking for the version, so that both take no time."""
    code = "import evomerge, sys; evomerge.__version__; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "transformers", "lm_eval", "ray", "pydantic"} & set(loaded)


def test_the_public_names_are_those_that_are_promised() -> None:
    names = ["Run", "StopSearch", "__version__", "load_recipe", "merge", "open_run", "search"]
    assert dir(evomerge) == sorted(names)
    assert all(hasattr(evomerge, name) for name in dir(evomerge))
    with pytest.raises(AttributeError, match="no attribute 'search_for_me'"):
        evomerge.search_for_me  # noqa: B018


def test_a_merge_by_a_program_is_that_of_the_command(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(recipes.linear({str(tiny_models["first"]): 1.0, str(tiny_models["second"]): 3.0}).to_yaml())
    with pytest.warns(UserWarning, match="is unknown"):
        fingerprint = evomerge.merge(evomerge.load_recipe(file), tmp_path / "ours")
    assert fingerprint in command("merge", file, tmp_path / "theirs")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()


def test_a_program_is_told_what_a_recipe_says_in_vain(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(recipes.single(str(tiny_models["first"])).to_yaml() + "\nname: mine\n")
    with pytest.warns(UserWarning, match="name is ignored"):
        evomerge.load_recipe(file)
    with pytest.raises(InputError, match="missing"):
        evomerge.load_recipe(tmp_path / "missing.yaml")


def test_the_version_is_printed_by_the_command_and_by_the_module() -> None:
    assert command("--version") == f"evomerge {version('evomerge')}\n"
    ran = subprocess.run([sys.executable, "-m", "evomerge", "--version"], capture_output=True, text=True, check=True)
    assert ran.stdout == f"evomerge {version('evomerge')}\n"


def test_shells_complete_the_names_of_commands() -> None:
    asked = {"_EVOMERGE_COMPLETE": "complete_bash", "COMP_WORDS": "evomerge sta", "COMP_CWORD": "1"}
    code = "from evomerge.cli import main; main()"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | asked)
    assert ran.stdout.split() == ["status"]
