"""Waiting for what other processes do; only one that hangs may fail a test, never one that is slow."""

import time
from collections.abc import Callable

PATIENCE = 300.0  # seconds


def wait_until(holds: Callable[[], bool], said: Callable[[], object] = lambda: "", pause: float = 0.05) -> None:
    """Returns once `holds` does; `said` describes what was seen instead."""
    deadline = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < deadline, said()
        time.sleep(pause)
