"""Scripts use names that the package has, as they can be called: nobody runs all of them at every change."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY


def python_scripts() -> list[Path]:
    files = [path for path in (REPOSITORY / "scripts").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return [
        path for path in files if path.suffix == ".py" or path.read_bytes()[:40].startswith(b"#!/usr/bin/env python")
    ]


@pytest.mark.parametrize("path", python_scripts(), ids=lambda path: path.name)
def test_every_name_that_a_script_imports_from_the_package_exists(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "evomerge":
            module = importlib.import_module(str(node.module))
            for alias in node.names:
                found = hasattr(module, alias.name)
                assert found or importlib.import_module(f"{node.module}.{alias.name}"), alias.name


@pytest.mark.parametrize("path", python_scripts(), ids=lambda path: path.name)
def test_what_a_script_imports_from_the_package_takes_the_arguments_that_it_gives(path: Path) -> None:
    tree = ast.parse(path.read_text())
    imported = {
        alias.asname or alias.name: getattr(importlib.import_module(str(node.module)), alias.name, None)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "evomerge"
        for alias in node.names
    }
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.func.id not in imported:
            continue
        if any(isinstance(given, ast.Starred) for given in call.args) or any(not word.arg for word in call.keywords):
            continue
        called = imported[call.func.id]
        if not inspect.isroutine(called) and not inspect.isclass(called):
            continue
        signature = inspect.signature(called)
        try:
            signature.bind(*call.args, **{str(word.arg): word.value for word in call.keywords})
        except TypeError as error:
            pytest.fail(f"{path.name}, line {call.lineno}: {call.func.id}{signature}: {error}")
