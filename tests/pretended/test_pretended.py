"""Runs what is claimed of a pretended accelerator in a process of its own: torch cannot have one and forget it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY


def hold(place: Path, *more: str) -> None:
    """Asserts that there are claims, and that all of them hold."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"--basetemp={place}", *more]
    ran = subprocess.run(
        [*command, "tests/pretended/claims.py"],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]


def test_all_that_is_claimed_of_an_accelerator_holds(tmp_path: Path) -> None:
    hold(tmp_path / "claims")


@pytest.mark.exhaustive
def test_it_holds_for_every_method_on_one_device_too(tmp_path: Path) -> None:
    hold(tmp_path / "claims", "-m", "exhaustive")
