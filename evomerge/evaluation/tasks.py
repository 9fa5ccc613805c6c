"""Finding tasks and dividing their items, without running code that nobody allowed.

A task is a YAML file of lm-eval's dialect in one of `tasks.paths`, or else one of those that lm-eval ships. Data files
named in it are relative to it. Files are read by a loader that treats `!function` as text, so that looking at a task
never runs it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from evomerge.config import ItemsConfig, TasksConfig
from evomerge.errors import InputError, choices
from evomerge.randomness import counter_rng


@dataclass(frozen=True, slots=True)
class TaskFile:
    """A task's YAML file; `code` names what it would execute, `builtin` tells whether lm-eval ships it."""

    name: str
    path: Path
    code: tuple[str, ...]
    builtin: bool


class _Loader(yaml.SafeLoader):
    """SafeLoader with `!function` as text. `code` gathers every one, because lm-eval's loader runs them as it meets
    them: in keys too, and in values that are overridden later.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.code: list[str] = []


def _function(loader: _Loader, node: yaml.Node) -> str:
    name = str(node.value)
    loader.code.append(f"!function {name}")
    return name


_Loader.add_constructor("!function", _function)


def find_tasks(names: Sequence[str], config: TasksConfig) -> dict[str, TaskFile]:
    """The file of every named task. Raises InputError for unknown names and for code that is not allowed."""
    known = dict(_task_files(config.paths))
    found = {}
    for index, name in enumerate(names):
        task = known.get(name) or _builtin(name)
        if task is None:
            raise InputError(
                f"objectives[{index}].task is '{name}', which is neither in tasks.paths nor a task of lm-eval; "
                f"{choices(name, known)}."
            )
        _refuse_code(task, config)
        found[name] = task
    return found


def _task_files(paths: Sequence[str]) -> Iterator[tuple[str, TaskFile]]:
    for index, text in enumerate(paths):
        folder = Path(text)
        if not folder.exists():
            raise InputError(
                f"tasks.paths[{index}] is {folder}, which does not exist; name a folder of task YAML files."
            )
        files = sorted(folder.rglob("*.yaml")) + sorted(folder.rglob("*.yml")) if folder.is_dir() else [folder]
        for file in files:
            content, code = _read(file)
            name = content.get("task")
            if isinstance(name, str):
                yield name, TaskFile(name, file, code, builtin=False)


def _read(file: Path, including: tuple[Path, ...] = ()) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The file's mapping (empty where it holds none) joined with its includes, and everything that they would execute.

    including: the files that led here.
    """
    if file.resolve() in including:
        raise InputError(f"{file}: includes itself by way of {including[-1]}; remove one of the includes.")
    try:
        loader = _Loader(file.read_text(encoding="utf-8"))
        content = loader.get_single_data()
    except OSError as error:
        where = f"{file} (included by {including[-1]})" if including else file
        raise InputError(f"{where}: cannot be read ({error.strerror}); correct its path or its rights.") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        line = getattr(getattr(error, "problem_mark", None), "line", 0) + 1
        raise InputError(f"{file}: not valid YAML at line {line}; correct it or move it out of tasks.paths.") from None
    if not isinstance(content, dict):
        return {}, tuple(loader.code)
    code = [key for key in ("class", "unsafe_code") if content.get(key)] + loader.code
    includes = content.get("include", [])
    merged: dict[str, Any] = {}
    for include in includes if isinstance(includes, list) else [includes]:
        included, included_code = _read(file.parent / str(include), (*including, file.resolve()))
        merged |= included
        code += included_code
    return merged | content, tuple(dict.fromkeys(code))


def _builtin(name: str) -> TaskFile | None:
    """A task that lm-eval ships, found by a text scan (its own index takes half a minute)."""
    spec = find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        return None
    pattern = re.compile(rb"^task:\s*[\"']?" + re.escape(name.encode()) + rb"[\"']?\s*$", re.MULTILINE)
    for file in sorted((Path(next(iter(spec.submodule_search_locations))) / "tasks").rglob("*.yaml")):
        if pattern.search(file.read_bytes()):
            return TaskFile(name, file, _read(file)[1], builtin=True)
    return None


def _refuse_code(task: TaskFile, config: TasksConfig) -> None:
    """Functions that come with an installed lm-eval are as trusted as lm-eval; anything else must be named."""
    code = [part for part in task.code if not (task.builtin and part.startswith("!function"))]
    if code and task.name not in config.allow_code:
        raise InputError(
            f"{task.path}: task '{task.name}' runs code ({code[0]}); read it, and if you trust it add '{task.name}' to "
            "tasks.allow_code."
        )


def absolute_data_files(content: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """A task's config with its relative data files made absolute and checked."""
    kwargs = content.get("dataset_kwargs")
    files = kwargs.get("data_files") if isinstance(kwargs, Mapping) else None
    if files is None:
        return dict(content)

    def absolute(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {split: absolute(file) for split, file in value.items()}
        if isinstance(value, list):
            return [absolute(file) for file in value]
        if "://" in str(value):
            return str(value)
        path = folder / str(value)
        if not path.exists():
            raise InputError(f"{folder}: data file {value} of task '{content.get('task')}' is missing; put it there.")
        if path.stat().st_size == 0:
            raise InputError(f"{folder}: data file {value} of task '{content.get('task')}' is empty; fill it.")
        return str(path)

    _check_splits(content, list(files) if isinstance(files, Mapping) else ["train"], folder)
    return {**content, "dataset_kwargs": {**dict(kwargs or {}), "data_files": absolute(files)}}


def _check_splits(content: Mapping[str, Any], splits: Sequence[str], folder: Path) -> None:
    """Raises InputError for a split that the task's data files do not have."""
    for key in ("training_split", "validation_split", "test_split", "fewshot_split"):
        named = content.get(key)
        if isinstance(named, str) and re.split(r"[\[+]", named)[0] not in splits:
            raise InputError(
                f"{folder}: {key} of task '{content.get('task')}' is '{named}', which data_files does not name; "
                f"{choices(named, splits)}."
            )


def divide(items: ItemsConfig, task: str, count: int) -> tuple[list[int], list[int]]:
    """Search and held-out item numbers of a task with one split, both sorted and disjoint."""
    order = counter_rng(items.seed, "items", task).permutation(count)
    for_search = items.search if items.search is not None else max(1, round(count * items.search_fraction))
    search, rest = order[:for_search], order[for_search:]
    heldout = rest if items.heldout is None else rest[: items.heldout]
    _check_count("search", items.search, len(search), task)
    _check_count("heldout", items.heldout, len(heldout), task)
    return np.sort(search).tolist(), np.sort(heldout).tolist()


def choose(items: ItemsConfig, split: str, task: str, count: int) -> list[int]:
    """Item numbers of one split of a task that has two."""
    wanted = items.search if split == "search" else items.heldout
    chosen = counter_rng(items.seed, "items", task, split).permutation(count)[:wanted]
    _check_count(split, wanted, len(chosen), task)
    return [int(number) for number in np.sort(chosen)]


def _check_count(key: str, wanted: int | None, found: int, task: str) -> None:
    if found == 0 or (wanted is not None and found < wanted):
        raise InputError(
            f"items.{key} asks for {wanted or 'some'} items, but task '{task}' has only {found} left for it; "
            "ask for fewer."
        )
