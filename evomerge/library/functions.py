"""Functions that a program hands over as scores, put into the form in which a search file names them."""

import builtins
import dis
import inspect
import textwrap
from collections.abc import Callable, Mapping
from pathlib import Path
from types import CodeType
from typing import Any

from evomerge.errors import InputError, naming


def named(document: dict[str, Any], folder: Path) -> None:
    """Puts the names of files and functions in the place of functions in a search's content, and allows them to run:
    whoever hands over a function wants that.

    document: the content, which is changed in place.
    folder: a folder for the sources of functions that stand in no file of their own.
    Raises InputError for a function whose source cannot go to the workers.
    """
    allowed: list[str] = []
    for key in ("objectives", "constraints", "report"):
        given = document.get(key)
        blocks: list[Any] = given if isinstance(given, list) else []
        for index, block in enumerate(blocks):
            if not isinstance(block, Mapping) or not callable(block.get("python")):
                continue
            function = block["python"]
            with naming(f"{key}[{index}].python"):
                blocks[index] = {**block, "python": _place(function, folder)}
            allowed.append(block.get("name") or function.__name__)
    if allowed:
        tasks = document.get("tasks")
        before = dict(tasks) if isinstance(tasks, Mapping) else {}
        document["tasks"] = {**before, "allow_code": [*(before.get("allow_code") or ()), *allowed]}


def _place(function: Callable[..., Any], folder: Path) -> str:
    """A function as FILE:NAME. A function of a program that is running, or of a notebook, gets a file of its own, since
    running the program again to find the function would start the search again."""
    name = getattr(function, "__name__", "")
    if not inspect.isfunction(function) or not name.isidentifier():
        raise InputError(f"{function!r} has no name by which workers could find it; write a function with def.")
    try:
        file, source = inspect.getsourcefile(function), textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        raise InputError(f"the source of {name} cannot be read; write it in a file, and name that.") from None
    if function.__module__ != "__main__" and function.__qualname__ == name and file and Path(file).is_file():
        return f"{Path(file).resolve()}:{name}"
    _check_alone(function)
    path = folder / f"{name}.py"
    number = 2
    while path.exists():  # another function of this name
        path, number = folder / f"{name}_{number}.py", number + 1
    path.write_text(f"from __future__ import annotations\n\n{source}", encoding="utf-8")  # whose names are not there
    return f"{path}:{name}"


def _check_alone(function: Any) -> None:
    """Raises InputError for a function that uses what stands outside of it, since only its own source goes along."""
    outside = _names_outside(function.__code__) - {*vars(builtins), function.__name__}
    for name in sorted({*outside, *function.__code__.co_freevars}):
        raise InputError(
            f"{function.__name__} uses {name}, which stands outside of it, and only its own source goes to the "
            "workers; import or define it within, or put both into a file and import the function from there."
        )


def _names_outside(code: CodeType) -> set[str]:
    """The global names that a function reads, those within it included."""
    names = {step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"}
    return names.union(*(_names_outside(inner) for inner in code.co_consts if isinstance(inner, CodeType)))
