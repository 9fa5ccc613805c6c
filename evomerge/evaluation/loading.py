"""lm-eval's task objects, loaded from checked files, and the objectives checked against them.

Templates are rendered in a sandbox, metrics that would be fetched as code are refused, and lm-eval's exceptions become
ours.
"""

import functools
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from evomerge.candidate import SPLITS
from evomerge.config import EvaluationConfig, ItemsConfig, ObjectiveConfig, SearchConfig, TasksConfig
from evomerge.errors import EvomergeError, InputError, choices
from evomerge.evaluation.items import choose, divide
from evomerge.evaluation.tasks import TaskFile, TaskGroup, absolute_data_files, find_tasks
from evomerge.quiet import quiet

LIKELIHOODS = ("loglikelihood", "multiple_choice", "loglikelihood_rolling")
OUTPUT_TYPES = (*LIKELIHOODS, "generate_until")


@dataclass(frozen=True, slots=True)
class Target:
    """What an objective names: one of lm-eval's tasks, or the tasks of a group. by_size: for the metrics that a group
    joins, whether a task counts by its number of items or all count alike; None for a single task.
    """

    name: str
    tasks: tuple[Any, ...]
    by_size: Mapping[str, bool] | None = None

    def filters(self) -> list[str]:
        """The names of the filters that every task has, in the first one's order."""
        first, *others = ([ensemble.name for ensemble in task._filters] for task in self.tasks)
        return [name for name in first if all(name in other for other in others)]

    def goals(self) -> dict[str, bool]:
        """The metrics that can be objectives, and whether higher is better."""
        first, *others = (task.higher_is_better() for task in self.tasks)
        shared = {metric: goal for metric, goal in first.items() if all(metric in other for other in others)}
        return (
            shared if self.by_size is None else {metric: shared[metric] for metric in self.by_size if metric in shared}
        )


def check_objectives(config: SearchConfig, targets: Mapping[str, Target]) -> tuple[ObjectiveConfig, ...]:
    """The objectives with their goals filled in, after every task, metric and item count has been checked."""
    _check_generation(config.evaluation)
    resolved = []
    for position, objective in enumerate(config.objectives):
        if objective.cost is not None:
            resolved.append(objective)
            continue
        target = targets[objective.task]
        goals = target.goals()
        if objective.metric not in goals:
            raise InputError(
                f"objectives[{position}].metric is '{objective.metric}', which task '{objective.task}' does not "
                f"report; {choices(objective.metric, goals)}."
            )
        if not all(callable(task.aggregation().get(objective.metric)) for task in target.tasks):
            raise InputError(
                f"objectives[{position}].metric is '{objective.metric}', to which task '{objective.task}' gives no "
                "aggregation that lm-eval knows; correct metric_list in the task's file."
            )
        filters = target.filters()
        if not filters:
            raise InputError(
                f"objectives[{position}].task is '{objective.task}', whose tasks have no filter in common; correct "
                "their filter_list."
            )
        if objective.filter is not None and objective.filter not in filters:
            raise InputError(
                f"objectives[{position}].filter is '{objective.filter}', which task '{objective.task}' lacks; "
                f"{choices(objective.filter, filters)}."
            )
        goal = objective.goal or ("maximize" if goals[objective.metric] else "minimize")
        resolved.append(objective.model_copy(update={"goal": goal}))
    for task in distinct_tasks(targets):
        for split in SPLITS:
            documents(task, config.items, split)
    return tuple(resolved)


def _check_generation(evaluation: EvaluationConfig) -> None:
    """Raises InputError for an argument that would reach transformers' `generate` and fail every candidate there."""
    if evaluation.generation_kwargs:
        from transformers import GenerationConfig

        known = {"until", "max_gen_toks", *GenerationConfig().to_dict()}  # type: ignore[no-untyped-call]
        for name in evaluation.generation_kwargs:
            if name not in known:
                raise InputError(
                    f"evaluation.generation_kwargs.{name} is no argument of generation; {choices(name, known)}."
                )


def exam_warnings(targets: Mapping[str, Target]) -> tuple[str, ...]:
    """A sentence per objective whose search items are those on which a public benchmark's published scores are
    computed: items of the one split that lm-eval evaluates, of data that is no local file."""
    warnings = []
    for target in targets.values():
        exams = [task for task in target.tasks if not both_splits(task) and not _local(task)]
        if exams:
            split = exams[0].config.test_split or exams[0].config.validation_split
            warnings.append(
                f"objective {target.name}: the search would choose by items of the {split} split of "
                f"{exams[0].config.dataset_path}, on which published scores are computed; search on other data, or do "
                "not report the result's score on that benchmark."
            )
    return tuple(warnings)


def _local(task: Any) -> bool:
    """Whether a task's items come from the user's own files or code."""
    path = task.config.dataset_path
    if not isinstance(path, str) or Path(path).exists():
        return True
    files = (task.config.dataset_kwargs or {}).get("data_files")
    names = files.values() if isinstance(files, Mapping) else files if isinstance(files, list) else [files]
    return files is not None and not any("://" in str(name) for name in names)


def load_targets(
    objectives: Iterable[ObjectiveConfig], tasks: TasksConfig, evaluation: EvaluationConfig
) -> dict[str, Target]:
    """The task or group of each objective, by the name that it has there. A task that several name is loaded once."""
    found = find_tasks([objective.task for objective in objectives], tasks)
    loaded: dict[str, Any] = {}

    def load(file: TaskFile) -> Any:
        key = f"{file.path}:{file.name}:{sorted(file.overrides.items(), key=str)}"
        if key not in loaded:
            loaded[key] = _load(file, tasks, evaluation)
        return loaded[key]

    return {
        name: Target(name, tuple(load(member) for member in file.tasks), file.by_size)
        if isinstance(file, TaskGroup)
        else Target(name, (load(file),))
        for name, file in found.items()
    }


def distinct_tasks(targets: Mapping[str, Target]) -> list[Any]:
    """Every task of the targets once, in their order."""
    return list({id(task): task for target in targets.values() for task in target.tasks}.values())


def _load(file: TaskFile, tasks: TasksConfig, evaluation: EvaluationConfig) -> Any:
    with quiet():
        from lm_eval.tasks import TaskManager
        from lm_eval.tasks._yaml_loader import load_yaml

        _prepare_templates()
        try:
            content = {**load_yaml(file.path), **file.overrides, "task": file.name}
            content = absolute_data_files(content, file.path.parent)
            _refuse_downloaded_metrics(content, file, tasks)
            content.pop("tag", None)
            if evaluation.num_fewshot is not None:
                content["num_fewshot"] = evaluation.num_fewshot
            task = TaskManager(include_defaults=False).load([content])["tasks"][file.name]
            if evaluation.generation_kwargs and task.OUTPUT_TYPE == "generate_until":
                task.set_config(key="generation_kwargs", value=dict(evaluation.generation_kwargs), update=True)
        except EvomergeError:
            raise
        except Exception as error:
            raise InputError(
                f"{file.path}: lm-eval cannot load task '{file.name}' ({cause(error)}); correct the file."
            ) from None
    if task.OUTPUT_TYPE not in OUTPUT_TYPES:
        raise InputError(f"{file.path}: output_type {task.OUTPUT_TYPE} of task '{file.name}' is not supported.")
    return task


def _prepare_templates() -> None:
    """Makes lm-eval render its templates in a sandbox, since a plain one can call anything, and compile each only once
    instead of once per item and candidate.
    """
    from jinja2.sandbox import SandboxedEnvironment
    from lm_eval import utils

    plain = utils.env
    if isinstance(plain, SandboxedEnvironment):
        return
    sandbox = SandboxedEnvironment(
        loader=plain.loader, undefined=plain.undefined, keep_trailing_newline=plain.keep_trailing_newline
    )
    sandbox.filters.update(plain.filters)
    sandbox.from_string = functools.lru_cache(1000)(sandbox.from_string)  # type: ignore[assignment,method-assign]
    utils.env = sandbox


def _refuse_downloaded_metrics(content: Mapping[str, Any], file: TaskFile, tasks: TasksConfig) -> None:
    """A metric that lm-eval does not know is a script, which the evaluate library fetches by that name and runs."""
    from lm_eval.api.metrics import mean  # noqa: F401 - fills the registry
    from lm_eval.api.registry import METRIC_REGISTRY

    shipped = file.builtin and "metric_list" not in file.overrides
    if shipped or file.name in tasks.allow_code or callable(content.get("process_results")):
        return
    for entry in content.get("metric_list") or ():
        metric = entry.get("metric")
        if isinstance(metric, str) and (entry.get("hf_evaluate") or metric not in METRIC_REGISTRY):
            raise InputError(
                f"{file.path}: metric '{metric}' is none of lm-eval's own, so it would be fetched and run as code; "
                f"if you trust it add '{file.name}' to tasks.allow_code, else {choices(metric, METRIC_REGISTRY)}."
            )


def both_splits(task: Any) -> bool:
    return bool(task.has_validation_docs() and task.has_test_docs())


def documents(task: Any, items: ItemsConfig, split: str) -> list[int]:
    """The numbers of the documents that a split of a task holds."""
    name = task.config.task
    if both_splits(task):
        documents = task.validation_docs() if split == "search" else task.test_docs()
        return choose(items, split, name, len(documents))
    search, heldout = divide(items, name, len(task.eval_docs))
    return search if split == "search" else heldout


def cause(error: BaseException) -> str:
    """What went wrong in lm-eval, in a phrase; for a key of a task's file that it does not know, the closest one."""
    from lm_eval.api.task import TaskConfig

    error = error.__cause__ or error
    text = " ".join(str(error).split()).rstrip(".")
    unknown = re.search(r"unexpected keyword argument '(\w+)'", text)
    if unknown is not None:
        return f"{unknown[1]} is not a known key; {choices(unknown[1], (key.name for key in fields(TaskConfig)))}"
    return f"{type(error).__name__}: {text if len(text) <= 200 else text[:197] + '...'}".removesuffix(": ")
