"""Whatever is wrong, a process of its own says so in one sentence, ends with status 2, and leaves every file alone."""

import os
import shutil
from pathlib import Path

import pytest

from evomerge.runs.lock import run_lock
from tests.bad_input import check_process, without_tokenizer
from tests.searches import WriteSearch

pytestmark = pytest.mark.slow  # every case is a process of its own


def test_a_process_refuses_a_wrong_value(search: WriteSearch, tmp_path: Path) -> None:
    path = search({"space.density.high": 1.4})
    check_process("run", path, says=(f"{path}: space.density.high is 1.4; use a value in (0, 1].",), cwd=tmp_path)


def test_a_process_refuses_a_wrong_command(tmp_path: Path) -> None:
    check_process("run", says=("Missing argument 'SEARCH.yaml' (see `evomerge run --help`).",), cwd=tmp_path)


def test_a_process_refuses_a_base_without_tokenizer(
    tiny_models: dict[str, Path], search: WriteSearch, tmp_path: Path
) -> None:
    without_tokenizer(Path(shutil.copytree(tiny_models["base"], tmp_path / "base")))
    check_process("run", search({"base": "./base"}), says=("tokenizer cannot be loaded",), cwd=tmp_path)


def test_a_second_process_is_refused_by_the_lock(run_directory: Path, tmp_path: Path) -> None:
    with run_lock(run_directory):
        says = (f"{run_directory}: already in use by process {os.getpid()} on ",)
        check_process("resume", run_directory, says=says, cwd=tmp_path)
