"""Scripts use names that the package has: nobody runs all of them at every change."""

import ast
import importlib
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
