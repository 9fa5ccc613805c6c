"""Whatever is wrong with the input gets one sentence, exit status 2, and leaves every file as it was.

What the tests of that share, subject by subject. Each of their tables maps a claim to an input and to what the sentence
must say: the key path, what was given, what to do.
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

Spoil = Callable[[Path], object]
Refuses = Callable[..., None]

VLLM = {"backend": "vllm", "vllm": {"python": "nowhere/python"}}


def flow(**keys: Any) -> dict[str, Any]:
    """A change to a data-flow space."""
    return {"space": {"kind": "data_flow", **keys}}


def contents(folder: Path) -> dict[str, bytes | None]:
    """Every file and folder below one; a lock file's content names its last holder, so only its name counts."""
    found = sorted(folder.rglob("*"))
    return {str(path): path.read_bytes() if path.is_file() and path.name != ".lock" else None for path in found}


def check_sentence(status: object, out: str, err: str, says: tuple[str, ...]) -> None:
    assert (status, out) == (2, ""), err
    assert err.startswith("evomerge: "), err
    assert err.endswith("\n"), err
    assert len(err.splitlines()) == 1, err
    for fragment in says:
        assert fragment in err, err


def check_process(*arguments: object, says: tuple[str, ...], cwd: Path) -> None:
    """Calls evomerge in a process of its own, and checks the same."""
    before = contents(cwd)
    command = [sys.executable, "-c", "from evomerge.cli import main; main()", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=cwd)
    check_sentence(done.returncode, done.stdout, done.stderr, says)
    assert contents(cwd) == before


def without_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()
