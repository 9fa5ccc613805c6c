"""Reading a search file: overrides are applied, the result is checked, and its paths are made absolute."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evomerge.config.documents import read_yaml, set_value, shown, validate
from evomerge.config.scoring import EvaluationConfig, ScoreConfig, StatisticsConfig
from evomerge.config.search import SearchConfig
from evomerge.errors import InputError, naming


def load(path: Path, overrides: Sequence[str] = ()) -> SearchConfig:
    """The config in a search file, with absolute paths.

    path: the YAML file.
    overrides: KEY.PATH=VALUE each (`documents.set_value`).
    Raises InputError, with the file and the key path, for the first problem.
    """
    return of_document(read(path), path, path.parent, overrides)


def read(path: Path) -> dict[str, Any]:
    """The content of a search file. Raises InputError for a file that is none."""
    document = read_yaml(path)
    _check_kind(document, path)
    return document


def of_document(
    document: dict[str, Any], where: Path | str, folder: Path, overrides: Sequence[str] = ()
) -> SearchConfig:
    """The config in the content of a search file, with absolute paths.

    document: the content; overrides change it.
    where: what opens an error's message.
    folder: what relative paths are relative to.
    overrides: KEY.PATH=VALUE each (`documents.set_value`).
    Raises InputError, with the key path, for the first problem.
    """
    for override in overrides:
        set_value(document, override)
    config = validate(SearchConfig, document, where)
    with naming(where):
        return _anchored(config, folder)


def _check_kind(document: Mapping[str, Any], path: Path) -> None:
    """Raises InputError for the files of other programs that can be converted."""
    kinds = {"genome": "a config of mergekit-evolve", "merge_method": "a merge recipe"}
    kind = next((what for key, what in kinds.items() if key in document and "objectives" not in document), None)
    if kind is not None:
        raise InputError(f"{path}: this is {kind}, not a search file; `evomerge convert {path}` makes one of it.")


def _anchored(config: SearchConfig, folder: Path) -> SearchConfig:
    """A copy of a config whose relative local paths are absolute."""
    paths = [_absolute(f"tasks.paths[{index}]", path, folder)[0] for index, path in enumerate(config.tasks.paths)]
    root = (
        str(Path.cwd())
        if config.tasks.data_root is None
        else _absolute("tasks.data_root", config.tasks.data_root, folder)[0]
    )
    config = config.with_own(lambda score: _anchored_score(score, folder))
    copies = {name: own.folder for name, own in config.align.items()}
    config = config.with_copies(
        {name: path and _absolute(f"align.{name}.folder", path, folder)[0] for name, path in copies.items()}
    )
    return config.model_copy(
        update={
            "base": _anchor("base", config.base, folder),
            "models": {name: _anchor(f"models.{name}", model, folder) for name, model in config.models.items()},
            "tasks": config.tasks.model_copy(update={"paths": tuple(paths), "data_root": root}),
            "evaluation": _anchored_interpreter(config.evaluation, folder),
            "statistics": _anchored_texts(config.statistics, folder),
        }
    )


def _anchored_score(score: ScoreConfig, folder: Path) -> dict[str, Any]:
    """The absolute paths of the files of a score of the user's own. A module lies in the folder, also where a link in
    its path would lead elsewhere; a path may lead anywhere."""
    written = score.python or ""
    place, _, function = written.rpartition(":")
    is_module = not place.endswith(".py")
    file = f"{place.replace('.', '/')}.py" if is_module else place
    path, _ = _absolute(f"python of {score.name}", file, folder)
    if is_module and not Path(path).is_relative_to(folder.resolve()):
        raise InputError(f"python is {written}, a link that leads out of {folder}; name the file by its path.")
    items = None if score.items is None else _absolute(f"items of {score.name}", score.items, folder)[0]
    return {"python": f"{path}:{function}", "items": items}


def _anchored_texts(statistics: StatisticsConfig, folder: Path) -> StatisticsConfig:
    texts = statistics.texts
    if isinstance(texts, str):
        return statistics.model_copy(update={"texts": _text_file("statistics.texts", texts, folder)})
    if texts is None:
        return statistics
    named = {name: _text_file(f"statistics.texts.{name}", file, folder) for name, file in texts.items()}
    return statistics.model_copy(update={"texts": named})


def _text_file(key: str, file: str, folder: Path) -> str:
    path, there = _absolute(key, file, folder)
    if not there or Path(path).is_dir():
        raise InputError(f"{key} is {file}, but there is no file {path}; correct it.")
    return path


def _anchored_interpreter(evaluation: EvaluationConfig, folder: Path) -> EvaluationConfig:
    """A copy with the absolute path of vLLM's interpreter. Links are not followed, since an environment's interpreter
    is a link."""
    python = evaluation.vllm.python
    if python is None:
        return evaluation
    path = os.path.abspath(folder / os.path.expanduser(python))
    return evaluation.model_copy(update={"vllm": evaluation.vllm.model_copy(update={"python": path})})


def _anchor(key: str, reference: str, folder: Path) -> str:
    """A model reference with absolute paths, for the model and its adapter separately; hub ids stay as they are."""
    if reference.startswith("zoo:") and "+" not in reference:
        return reference
    path, there = _absolute(key, reference, folder)
    model, plus, adapter = reference.partition("+")
    if plus and not there:
        return f"{_anchor(key, model, folder)}+{_anchor(key, adapter, folder)}"
    return path if there or reference.startswith((".", "/", "~")) else reference


def _absolute(key: str, path: str, folder: Path) -> tuple[str, bool]:
    """The absolute path of a path relative to a folder, and whether it exists."""
    try:
        absolute = (folder / Path(path).expanduser()).resolve()
        return str(absolute), absolute.exists()
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error).rstrip(".")
        raise InputError(f"{key} is {shown(path)}, which cannot be a path ({reason}); correct it.") from None
