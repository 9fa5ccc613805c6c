"""Runs what is claimed of a pretended accelerator in a process of its own: torch cannot have one and forget it."""

import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import REPOSITORY


def test_all_that_is_claimed_of_an_accelerator_holds(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        f"--basetemp={tmp_path / 'claims'}",
    ]
    ran = subprocess.run(
        [*command, "tests/pretended/claims.py"],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
