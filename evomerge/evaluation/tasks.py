"""Finds tasks and groups of tasks, and runs no code that the user has not allowed.

A task is a YAML file of lm-eval's dialect. It lies in one of `tasks.paths`, or lm-eval ships it. A group is such a file
too; it names tasks, tags and other groups. Data files named in a file are relative to it. Files are read by a loader
that treats `!function` as text, so that reading a task never runs its code.
"""

import functools
import glob
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from evomerge.config.scoring import TasksConfig
from evomerge.errors import InputError, choices


@dataclass(frozen=True, slots=True)
class TaskFile:
    """A task's YAML file.

    name: the task's.
    path: the file.
    code: what in it would run code, as text.
    builtin: whether lm-eval ships the task.
    overrides: settings that a group gives the task.
    """

    name: str
    path: Path
    code: tuple[str, ...]
    builtin: bool
    overrides: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TaskGroup:
    """Tasks that have a joint score.

    name: the group's.
    path: its YAML file.
    tasks: its tasks, those of groups and tags within it included.
    by_size: by metric that the group reports, True where tasks count by their number of items and False where all
        count alike.
    """

    name: str
    path: Path
    tasks: tuple[TaskFile, ...]
    by_size: Mapping[str, bool]


@dataclass(frozen=True, slots=True)
class _Entry:
    """What a name stands for: a task, a group or a tag.

    kind: `task`, `group` or `tag`.
    path: the file of a task or group.
    builtin: whether lm-eval ships it.
    members: the names of a tag's tasks.
    """

    kind: str
    path: Path
    builtin: bool
    members: tuple[str, ...] = ()


_GROUP_KEYS = {"group", "group_alias", "task", "aggregate_metric_list", "metadata", "tag", "include"}


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `!function` as text and gathers every occurrence in `code`.

    lm-eval's loader runs each function as soon as it meets it, also in keys, and in values that are overridden later.
    """

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.code: list[str] = []


def _function(loader: _Loader, node: yaml.Node) -> str:
    name = str(node.value)
    loader.code.append(f"!function {name}")
    return name


_Loader.add_constructor("!function", _function)


def find_tasks(names: Sequence[str], config: TasksConfig, keys: Sequence[str] = ()) -> dict[str, TaskFile | TaskGroup]:
    """The task or group of every name.

    names: the tasks that the objectives name, in their order; the empty name of a cost is skipped.
    config: where tasks lie, and which may run code.
    keys: where the search file names each; by default they are its objectives.
    Raises InputError for unknown names and for code that is not allowed.
    """
    entries = _own_entries(config.paths)
    by_name: dict[str, TaskFile | TaskGroup] = {}
    for index, name in enumerate(names):
        if not name:
            continue
        entry = _entry(name, entries)
        key = keys[index] if keys else f"objectives[{index}]"
        if entry is None:
            raise InputError(
                f"{key}.task is '{name}', which is neither in tasks.paths nor a task of lm-eval; "
                f"{choices(name, entries)}."
            )
        if entry.kind == "tag":
            raise InputError(
                f"{key}.task is '{name}', a tag on {len(entry.members)} tasks, which has no score of its "
                f"own; name a group, or one of its tasks: {choices(name, entry.members)}."
            )
        if entry.kind == "group":
            by_name[name] = _group(name, entry, entries, config)
        else:
            by_name[name] = _task(name, entry, config, {})
    return by_name


def _entry(name: str, entries: Mapping[str, _Entry]) -> _Entry | None:
    return entries.get(name) or builtin_entries().get(name)


def _task(name: str, entry: _Entry, config: TasksConfig, overrides: Mapping[str, Any]) -> TaskFile:
    code = (*_read(entry.path)[1], *_code_keys(overrides))
    task = TaskFile(name, entry.path, code, entry.builtin, overrides)
    _refuse_code(task, config)
    return task


def _group(name: str, entry: _Entry, entries: Mapping[str, _Entry], config: TasksConfig) -> TaskGroup:
    content = _read_group(name, entry.path)
    metrics = content.get("aggregate_metric_list") or []
    by_size = {
        str(metric.get("metric")): bool(metric.get("weight_by_size", True))
        for metric in (metrics if isinstance(metrics, list) else [metrics])
        if isinstance(metric, Mapping)
    }
    if not by_size:
        raise InputError(
            f"{entry.path}: group '{name}' has no aggregate_metric_list, so no score of its own; add one, or make "
            "objectives of its tasks."
        )
    return TaskGroup(name, entry.path, tuple(_members(content, entry.path, {}, entries, config, (name,))), by_size)


def _read_group(name: str, path: Path) -> dict[str, Any]:
    content, code = _read(path)
    if code:
        raise InputError(f"{path}: group '{name}' runs code ({code[0]}), which only tasks may; remove it.")
    return content


def _members(
    content: Mapping[str, Any],
    path: Path,
    overrides: Mapping[str, Any],
    entries: Mapping[str, _Entry],
    config: TasksConfig,
    within: tuple[str, ...],
) -> Iterator[TaskFile]:
    """The tasks of a group. They include the tasks of groups and tags within it.

    content: the group's file as a mapping.
    path: the file.
    overrides: settings from the groups around it.
    entries: what the files in tasks.paths define, by name.
    within: the names of the groups around it, and its own.
    """
    overrides = {**{key: value for key, value in content.items() if key not in _GROUP_KEYS}, **overrides}
    members = content.get("task")
    for member in members if isinstance(members, list) else [members]:
        own = dict(member) if isinstance(member, Mapping) else {"task": member}
        if isinstance(own.get("group"), str) and "task" in own:  # a group written out inside this one
            yield from _members(own, path, overrides, entries, config, within)
            continue
        name = own.pop("group", None) or own.pop("task", None)
        entry = _entry(str(name), entries)
        if entry is None:
            raise InputError(
                f"{path}: group '{within[0]}' names '{name}', which is neither in tasks.paths nor a task of lm-eval; "
                f"{choices(str(name), entries)}."
            )
        if name in within:
            raise InputError(f"{path}: group '{name}' contains itself; take it out of its own tasks.")
        if entry.kind == "group":
            inner = _read_group(str(name), entry.path)
            yield from _members(inner, entry.path, {**overrides, **own}, entries, config, (*within, str(name)))
        elif entry.kind == "tag":
            for task_name in entry.members:
                yield _task(
                    task_name, entries.get(task_name) or builtin_entries()[task_name], config, {**overrides, **own}
                )
        else:
            yield _task(str(name), entry, config, {**overrides, **own})


def _code_keys(content: Mapping[str, Any]) -> list[str]:
    """What in a task's config would run code: some keys, and the loader whose files are pickles."""
    pickles = ["dataset_path pandas, which opens pickles"] if content.get("dataset_path") == "pandas" else []
    return [*(key for key in ("class", "unsafe_code") if content.get(key)), *pickles]


def _own_entries(paths: Sequence[str]) -> dict[str, _Entry]:
    """What the YAML files in tasks.paths define, by name. Of two files with the same name the last counts."""
    entries: dict[str, _Entry] = {}
    tags: dict[str, list[str]] = {}
    for index, text in enumerate(paths):
        folder = Path(text)
        if not folder.exists():
            raise InputError(
                f"tasks.paths[{index}] is {folder}, which does not exist; name a folder of task YAML files."
            )
        files = sorted(folder.rglob("*.yaml")) + sorted(folder.rglob("*.yml")) if folder.is_dir() else [folder]
        for file in files:
            content, _ = _read(file)
            kind = "group" if isinstance(content.get("group"), str) else "task"
            name = content.get(kind)
            if isinstance(name, str):
                entries[name] = _Entry(kind, file, builtin=False)
                tag = content.get("tag") or []
                for tag_name in (tag if isinstance(tag, list) else [tag]) if kind == "task" else []:
                    tags.setdefault(str(tag_name), []).append(name)
    return {**_tag_entries(tags, builtin=False), **entries}


def _tag_entries(tags: Mapping[str, Sequence[str]], builtin: bool) -> dict[str, _Entry]:
    return {tag: _Entry("tag", Path(), builtin, tuple(sorted(names))) for tag, names in tags.items()}


_NAME = re.compile(rb"""^["']?(task|group|include)["']?:[ ]*["']?([^\s"'#\[]+)["']?\s*$""", re.MULTILINE)
_TAG = re.compile(
    rb"""^["']?tag["']?:[ ]*(?:["']?([^\s"'#\[]+)["']?[ ]*$|\n((?:[ ]*-[ ]*\S+[ ]*\n?)+))""", re.MULTILINE
)


@functools.cache
def builtin_entries() -> Mapping[str, _Entry]:
    """The tasks, groups and tags that lm-eval ships, by name.

    The texts of the files are scanned, which takes a second. lm-eval's own index parses every file, which takes half a
    minute.
    """
    spec = find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        return {}
    entries: dict[str, _Entry] = {}
    tags: dict[str, list[str]] = {}
    for file in sorted((Path(next(iter(spec.submodule_search_locations))) / "tasks").rglob("*.yaml")):
        names, own_tags = _scan(file)
        kind = "group" if "group" in names else "task"
        if kind in names and names[kind] not in entries:
            entries[names[kind]] = _Entry(kind, file, builtin=True)
            for tag in own_tags if kind == "task" else ():
                tags.setdefault(tag, []).append(names[kind])
    return {**_tag_entries(tags, builtin=True), **entries}


@functools.cache
def _scan(file: Path) -> tuple[Mapping[str, str], tuple[str, ...]]:
    """The values of `task` and `group` in a file where they are names, and its tags, or else those of its include."""
    try:
        text = file.read_bytes()
    except OSError:
        return {}, ()
    names = {key.decode(): value.decode(errors="replace") for key, value in _NAME.findall(text)}
    tags = tuple(
        line.strip(" -\"'")
        for single, several in _TAG.findall(text)
        for line in (single or several).decode(errors="replace").splitlines()
    )
    included = names.pop("include", None)
    if included is None:
        return names, tags
    inherited, more = _scan(file.parent / included)
    return {**inherited, **names}, tags or more


def _read(file: Path, including: tuple[Path, ...] = ()) -> tuple[dict[str, Any], tuple[str, ...]]:
    """A file's mapping merged with its includes, and everything in them that would run code.

    The mapping is empty where the file holds none.

    file: the YAML file.
    including: the files that include this one, the outermost first.
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
    code = [*_code_keys(content), *loader.code]
    includes = content.get("include", [])
    merged: dict[str, Any] = {}
    for include in includes if isinstance(includes, list) else [includes]:
        included, included_code = _read(file.parent / str(include), (*including, file.resolve()))
        merged |= included
        code += included_code
    return merged | content, tuple(dict.fromkeys(code))


def _refuse_code(task: TaskFile, config: TasksConfig) -> None:
    """Raises InputError for code that the user has not allowed. Functions of lm-eval's own tasks are always allowed."""
    code = [entry for entry in task.code if not (task.builtin and entry.startswith("!function"))]
    if code and task.name not in config.allow_code:
        raise InputError(
            f"{task.path}: task '{task.name}' runs code ({code[0]}); read it, and if you trust it add '{task.name}' to "
            "tasks.allow_code."
        )


def data_files(names: Sequence[str], config: TasksConfig) -> dict[Path, str]:
    """The local data files of tasks and groups, each with the name of a task that reads it.

    names: the tasks that the objectives name.
    config: where tasks and their data lie.
    Raises InputError as `find_tasks` does, and for a data file that is missing.
    """
    files = {}
    for target in find_tasks(names, config).values():
        for task in target.tasks if isinstance(target, TaskGroup) else [target]:
            content = {**_read(task.path)[0], **task.overrides, "task": task.name}
            for file in local_files(absolute_data_files(content, task.path.parent, config.data_root)):
                files[Path(file)] = task.name
    return files


def local_files(content: Mapping[str, Any]) -> list[str]:
    """The data files that a task's config names on this machine.

    content: the config, with absolute paths (`absolute_data_files`).
    """
    kwargs = content.get("dataset_kwargs") or {}
    return [file for file in _flat(kwargs.get("data_files", [])) if "://" not in file]


def _flat(files: Any) -> Iterator[str]:
    if isinstance(files, Mapping):
        files = list(files.values())
    for file in files if isinstance(files, list) else [files]:
        yield from _flat(file) if isinstance(file, list) else [str(file)]


def absolute_data_files(content: Mapping[str, Any], folder: Path, data_root: str | None = None) -> dict[str, Any]:
    """A task's config with absolute paths of its data files, and patterns replaced by the files that match.

    content: the task's config.
    folder: the folder of the task's YAML file, where data files are looked for first.
    data_root: the folder where they are looked for next; by default the working directory.
    Raises InputError for a data file that is missing or empty, and for a split that the data files do not have.
    """
    kwargs = content.get("dataset_kwargs")
    if not isinstance(kwargs, Mapping) or content.get("dataset_path", "json") not in _LOADERS:
        return dict(content)
    places = [folder, Path(data_root) if data_root is not None else Path.cwd()]
    made = dict(kwargs)
    if isinstance(kwargs.get("data_dir"), str):
        made["data_dir"] = _data_dir(content, str(kwargs["data_dir"]), places)
        places = [Path(made["data_dir"])]
    files = kwargs.get("data_files")
    if files is not None:
        _check_splits(content, list(files) if isinstance(files, Mapping) else ["train"], folder)
        made["data_files"] = _absolute(content, files, places)
    return {**content, "dataset_kwargs": made}


# the loaders of the datasets library that read plain files, and have no files of their own
_LOADERS = ("json", "csv", "parquet", "arrow", "text", "xml", "conll", "hdf5", "webdataset", "pandas")


def _data_dir(content: Mapping[str, Any], value: str, places: Sequence[Path]) -> str:
    data_folder = next((place / value for place in places if (place / value).is_dir()), None)
    if data_folder is None:
        raise InputError(f"{_missing(content, f'data_dir {value}', places)}; put it there.")
    return str(data_folder)


def _absolute(content: Mapping[str, Any], value: Any, places: Sequence[Path]) -> Any:
    """The files behind a value of data_files: a name or pattern, a list of them, or a mapping from splits to them."""
    if isinstance(value, Mapping):
        return {split: _absolute(content, files, places) for split, files in value.items()}
    if isinstance(value, list):
        return [file for entry in value for file in _several(_absolute(content, entry, places))]
    if "://" in str(value):
        return str(value)
    name = str(Path(str(value)).expanduser())
    paths = next((files for place in places if (files := _matches(place, name))), [])
    if not paths:
        kind = "no data file matches" if _is_pattern(name) else "data file"
        raise InputError(f"{_missing(content, f'{kind} {value}', places)}; put it there.")
    for path in paths:
        if path.stat().st_size == 0:
            raise InputError(f"{path.parent}: data file {path.name} of task '{content.get('task')}' is empty; fill it.")
    return [str(path) for path in paths] if _is_pattern(name) else str(paths[0])


def _several(files: Any) -> list[Any]:
    return files if isinstance(files, list) else [files]


def _is_pattern(name: str) -> bool:
    return glob.has_magic(name)


def _matches(place: Path, name: str) -> list[Path]:
    """The files of a name or pattern in a folder, sorted. A file whose name is the pattern itself is the only match."""
    if (place / name).is_file():
        return [place / name]
    matched = glob.glob(name, root_dir=place, recursive=True) if _is_pattern(name) else []
    return sorted(place / match for match in matched if (place / match).is_file())


def _missing(content: Mapping[str, Any], what: str, places: Sequence[Path]) -> str:
    """The beginning of a sentence about a file that is missing.

    what: the file, in a phrase.
    places: the folders where it was looked for; the first is the task's.
    """
    where = " and ".join(dict.fromkeys(map(str, places)))
    return f"{places[0]}: {what} of task '{content.get('task')}' is missing (looked for in {where})"


def _check_splits(content: Mapping[str, Any], splits: Sequence[str], folder: Path) -> None:
    """Raises InputError for a split that the task's data files do not have."""
    metadata = content.get("metadata")
    further = {"metadata.selection_split": metadata.get("selection_split")} if isinstance(metadata, Mapping) else {}
    keys = ("training_split", "validation_split", "test_split", "fewshot_split")
    for key, named in ({key: content.get(key) for key in keys} | further).items():
        if isinstance(named, str) and re.split(r"[\[+]", named)[0] not in splits:
            raise InputError(
                f"{folder}: {key} of task '{content.get('task')}' is '{named}', which data_files does not name; "
                f"{choices(named, splits)}."
            )
