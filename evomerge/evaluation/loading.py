"""lm-eval's task objects, loaded from checked files, and the objectives checked against them.

Templates are rendered in a sandbox. Metrics that would be fetched as code are refused. Exceptions of lm-eval become
InputError.
"""

import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from evomerge.config.base import Split
from evomerge.config.documents import shown
from evomerge.config.scoring import (
    ConstraintConfig,
    EvaluationConfig,
    ItemsConfig,
    ObjectiveConfig,
    ReportConfig,
    TasksConfig,
)
from evomerge.config.search import SearchConfig
from evomerge.errors import EvomergeError, InputError, choices
from evomerge.evaluation.items import Division, both_splits
from evomerge.evaluation.rendering import selection_split
from evomerge.evaluation.tasks import TaskFile, TaskGroup, absolute_data_files, find_tasks, local_files
from evomerge.quiet import quiet

LIKELIHOODS = ("loglikelihood", "multiple_choice", "loglikelihood_rolling")
OUTPUT_TYPES = (*LIKELIHOODS, "generate_until")
_DRAWING = {"do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p"}  # without effect on greedy texts
_GREEDY = {"until", "max_gen_toks", "repetition_penalty", *_DRAWING}
_OWN = {
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "max_length",
    "max_new_tokens",
    "transformers_version",
    "use_cache",
}


@dataclass(frozen=True, slots=True)
class Target:
    """What an objective names: one of lm-eval's tasks, or the tasks of a group.

    name: the name that the objective gives.
    tasks: lm-eval's.
    by_size: by metric that a group reports, True where tasks count by their number of items and False where all count
        alike; None for a single task.
    """

    name: str
    tasks: tuple[Any, ...]
    by_size: Mapping[str, bool] | None = None

    def filters(self) -> list[str]:
        """The names of the filters that every task has, in the order of the first task."""
        first, *others = ([ensemble.name for ensemble in task._filters] for task in self.tasks)
        return [name for name in first if all(name in other for other in others)]

    def by_item(self, metric: str, sizes: Sequence[int]) -> bool:
        """Whether a metric is the mean over all items of the tasks.

        metric: its name.
        sizes: how many items each task has.
        """
        from lm_eval.api.metrics import mean

        alike = self.by_size is None or self.by_size[metric] or len(set(sizes)) == 1
        return alike and all(task.aggregation()[metric] is mean for task in self.tasks)

    def goals(self) -> dict[str, bool]:
        """The metrics that can be objectives, and for each whether higher is better."""
        first, *others = (task.higher_is_better() for task in self.tasks)
        shared = {metric: goal for metric, goal in first.items() if all(metric in other for other in others)}
        return (
            shared if self.by_size is None else {metric: shared[metric] for metric in self.by_size if metric in shared}
        )


Metric = TypeVar("Metric", ObjectiveConfig, ConstraintConfig)


def check_metrics(config: SearchConfig, targets: Mapping[str, Target]) -> SearchConfig:
    """The config with the goals of its objectives and constraints filled in.

    config: the search's.
    targets: its tasks, by the names in the config.
    Raises InputError for a metric, filter or argument of generation that a task does not have, and for goals and
    filters that contradict each other.
    """
    _check_generation(config.evaluation)
    config = _with_only_metrics(config, targets)
    objectives = tuple(
        _with_goal(f"objectives[{index}]", objective, targets[objective.task]) if objective.task else objective
        for index, objective in enumerate(config.objectives)
    )
    goals = {objective.name: objective.goal for objective in objectives}
    own = {score.name: score for score in config.own}
    constraints = [
        constraint.model_copy(update={"goal": constraint.goal or own[constraint.name].goal})
        if constraint.name in own
        else _with_goal(f"constraints[{index}]", constraint, targets[constraint.task])
        for index, constraint in enumerate(config.constraints)
    ]
    for index, metric in enumerate(config.report):
        if metric.task:
            _check_metric(f"report[{index}]", metric, targets[metric.task])
    for index, constraint in enumerate(constraints):
        if goals.setdefault(constraint.name, constraint.goal) != constraint.goal:
            raise InputError(
                f"constraints[{index}].goal is {constraint.goal}, but elsewhere {constraint.name} has goal "
                f"{goals[constraint.name]}; give both the same."
            )
    _check_filters({"objectives": objectives, "constraints": constraints, "report": config.report}, targets)
    return config.model_copy(update={"objectives": objectives, "constraints": tuple(constraints)})


def _with_only_metrics(config: SearchConfig, targets: Mapping[str, Target]) -> SearchConfig:
    """The config with the task's metric wherever none is written and the task has only one, which is not accuracy."""
    content = config.model_dump(mode="json", by_alias=True)
    chosen = False
    for key in ("objectives", "constraints", "report"):
        for metric, written in zip(getattr(config, key), content[key], strict=True):
            other = "metric" in metric.model_fields_set or metric.task not in targets  # also names of own scores
            only = None if other else _only(targets[metric.task])
            if only is not None:
                written["metric"], chosen = only, True
    return SearchConfig.model_validate(content) if chosen else config


def _only(target: Target) -> str | None:
    """The metric of a task that has a single one, unless that is the default."""
    goals = list(target.goals())
    return goals[0] if len(goals) == 1 and goals != ["acc"] else None


def _check_filters(
    metrics: Mapping[str, Sequence[ObjectiveConfig | ConstraintConfig | ReportConfig]], targets: Mapping[str, Target]
) -> None:
    """Raises InputError where two metrics mean the same filter, but only one of them names it.

    metrics: by their key in the config.
    """
    seen: dict[tuple[str, str, str], tuple[str, str]] = {}
    listed = [(f"{key}[{index}]", metric) for key, block in metrics.items() for index, metric in enumerate(block)]
    for where, metric in listed:
        if metric.task not in targets:
            continue
        first = targets[metric.task].filters()[0]
        other, name = seen.setdefault((metric.task, metric.metric, metric.filter or first), (where, metric.name))
        if name != metric.name:
            raise InputError(
                f"{where}.filter is {shown(metric.filter)}, and that of {other} is another way to say it: '{first}' "
                f"is the first filter of task '{metric.task}', which is taken where none is named; write both alike."
            )


def _with_goal(where: str, wanted: Metric, target: Target) -> Metric:
    """An objective or constraint with its goal: the user's, or else the one that the task gives the metric."""
    _check_metric(where, wanted, target)
    goal = wanted.goal or ("maximize" if target.goals()[wanted.metric] else "minimize")
    return wanted.model_copy(update={"goal": goal})


def _check_metric(where: str, wanted: ObjectiveConfig | ConstraintConfig | ReportConfig, target: Target) -> None:
    """Raises InputError for a metric or a filter that the task does not have.

    where: the metric's key path.
    """
    goals = target.goals()
    if goals and wanted.metric not in goals and "metric" not in wanted.model_fields_set:
        raise InputError(
            f"{where}.metric is missing, and task '{wanted.task}' does not report acc; choose one of its metrics: "
            f"{', '.join(goals)}."
        )
    if wanted.metric not in goals:
        raise InputError(
            f"{where}.metric is '{wanted.metric}', which task '{wanted.task}' does not report; "
            f"{choices(wanted.metric, goals)}."
        )
    if not all(callable(task.aggregation().get(wanted.metric)) for task in target.tasks):
        raise InputError(
            f"{where}.metric is '{wanted.metric}', to which task '{wanted.task}' gives no aggregation that lm-eval "
            "knows; correct metric_list in the task's file."
        )
    filters = target.filters()
    if not filters:
        raise InputError(
            f"{where}.task is '{wanted.task}', whose tasks have no filter in common; correct their filter_list."
        )
    if wanted.filter is not None and wanted.filter not in filters:
        raise InputError(
            f"{where}.filter is '{wanted.filter}', which task '{wanted.task}' lacks; {choices(wanted.filter, filters)}."
        )


def without_items(config: SearchConfig, targets: Mapping[str, Target], division: Division) -> str | None:
    """The name of the first metric that is not a mean over items, so that a subset of them says little about it.

    None where all metrics are such means.

    config: the search's.
    targets: its tasks.
    division: the division of their items.
    """
    for metric in config.measured:
        if metric.task and not targets[metric.task].by_item(metric.metric, _sizes(targets[metric.task], division)):
            return metric.name
    return None


def fewest_items(config: SearchConfig, targets: Mapping[str, Target], division: Division) -> int:
    """The number of search items of the metric that is measured on the fewest; 0 where there are only costs.

    config: the search's.
    targets: its tasks.
    division: the division of their items.
    """
    tasks = [metric.task for metric in config.measured if metric.task]
    return min((sum(_sizes(targets[task], division)) for task in tasks), default=0)


def _sizes(target: Target, division: Division) -> list[int]:
    """How many search items each task of a target has."""
    return [len(division.of(task, "search")) for task in target.tasks]


def _check_generation(evaluation: EvaluationConfig) -> None:
    """Raises InputError for an argument that transformers' `generate` does not have. Every candidate would fail."""
    if evaluation.generation_kwargs:
        from transformers import GenerationConfig

        arguments = {"until", "max_gen_toks", *GenerationConfig().to_dict()}  # type: ignore[no-untyped-call]
        for name in evaluation.generation_kwargs:
            if name not in arguments:
                raise InputError(
                    f"evaluation.generation_kwargs.{name} is no argument of generation; {choices(name, arguments)}."
                )


def check_greedy(targets: Mapping[str, Target], folder: Path) -> None:
    """Checks that vLLM can write the texts: there are some, all are greedy, and vLLM has all their arguments.

    targets: the tasks of the search.
    folder: the base model's; its generation_config.json may set arguments too.
    Raises InputError where vLLM cannot write the texts.
    """
    from lm_eval.models.utils import normalize_gen_kwargs
    from transformers import GenerationConfig

    tasks = [task for task in distinct_tasks(targets) if task.OUTPUT_TYPE == "generate_until"]
    if not tasks:
        raise InputError("evaluation.backend is vllm, but no task has texts written (generate_until); use hf.")
    for task in tasks:
        arguments = normalize_gen_kwargs(dict(task.config.generation_kwargs or {}))
        if arguments["do_sample"]:
            raise InputError(
                f"evaluation.backend is vllm, which writes greedily only, but task '{task.config.task}' draws its "
                "texts; set evaluation.generation_kwargs to {do_sample: false, temperature: 0}, or use hf."
            )
        _refuse_arguments(set(arguments) - _GREEDY, f"task '{task.config.task}'")
    if (folder / "generation_config.json").is_file():
        own = GenerationConfig.from_pretrained(str(folder)).to_diff_dict()
        given = {name for name, value in own.items() if value not in (None, False) and not name.startswith("_")}
        _refuse_arguments(given - _GREEDY - _OWN, f"{folder / 'generation_config.json'}")


def _refuse_arguments(names: Iterable[str], where: str) -> None:
    for name in sorted(names):
        raise InputError(
            f"evaluation.backend is vllm, to which {name}, set by {where}, cannot be handed on; remove it, or use hf."
        )


def exam_warnings(targets: Mapping[str, Target]) -> tuple[str, ...]:
    """A warning per objective whose search items are those of a public benchmark's published scores.

    That is where lm-eval evaluates a single split, and its data is not a local file.
    """
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
    """The task or group of each objective, by the name that the objective gives. Each task is loaded once.

    objectives: objectives and constraints.
    tasks: where tasks lie, and which may run code.
    evaluation: the settings that override those of the tasks.
    Raises InputError for a task that is missing, cannot be loaded, or runs code that is not allowed.
    """
    files = find_tasks([objective.task for objective in objectives], tasks)
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
        for name, file in files.items()
    }


def forked(targets: Mapping[str, Target]) -> dict[str, Target]:
    """Copies of the targets for one split. Tasks share their documents; what preparing a split changes is copied."""
    forks = {id(task): _fork(task) for task in distinct_tasks(targets)}
    return {
        name: replace(target, tasks=tuple(forks[id(task)] for task in target.tasks)) for name, target in targets.items()
    }


def _fork(task: Any) -> Any:
    own = copy(task)
    for name in ("sampler", "fewshot_cfg"):
        if hasattr(task, name):
            setattr(own, name, copy(getattr(task, name)))
    return own


def only_reported(config: SearchConfig, targets: Mapping[str, Target]) -> list[Any]:
    """The tasks that the config only reports, so that the search does not see them.

    config: the search's.
    targets: its tasks, by the names in the config.
    """
    searched = distinct_tasks(of_metrics(config.measured, targets))
    return [task for task in distinct_tasks(targets) if task not in searched]


def of_metrics(metrics: Iterable[ObjectiveConfig], targets: Mapping[str, Target]) -> dict[str, Target]:
    """The targets that metrics name, in the order of the metrics; costs and scores of the user's own name none."""
    return {metric.task: targets[metric.task] for metric in metrics if metric.task}


def distinct_tasks(targets: Mapping[str, Target]) -> list[Any]:
    """Every task of the targets once, in their order."""
    return list({id(task): task for target in targets.values() for task in target.tasks}.values())


def _load(file: TaskFile, tasks: TasksConfig, evaluation: EvaluationConfig) -> Any:
    with quiet():
        from lm_eval.tasks import TaskManager
        from lm_eval.tasks._yaml_loader import load_yaml

        _prepare_templates()
        content: dict[str, Any] = {}
        try:
            content = {**load_yaml(file.path), **file.overrides, "task": file.name}
            content = absolute_data_files(content, file.path.parent, tasks.data_root)
            _refuse_downloaded_metrics(content, file, tasks)
            content.pop("tag", None)
            if evaluation.num_fewshot is not None and content.get("num_fewshot") != 0:  # a task's own 0 stays
                content["num_fewshot"] = evaluation.num_fewshot
            task = TaskManager(include_defaults=False).load([content])["tasks"][file.name]
            if evaluation.generation_kwargs and task.OUTPUT_TYPE == "generate_until":
                task.set_config(key="generation_kwargs", value=dict(evaluation.generation_kwargs), update=True)
        except EvomergeError:
            raise
        except Exception as error:
            broken = _broken_line(content)
            if broken is not None:
                raise InputError(broken) from None
            raise InputError(f"{file.path}: {_unloadable(file.name, error)}.") from None
    own = selection_split(task)
    if own is not None and own not in task.dataset:
        raise InputError(
            f"{file.path}: metadata.selection_split of task '{file.name}' is '{own}', which its data does not have; "
            f"{choices(own, map(str, task.dataset))}."
        )
    if task.OUTPUT_TYPE not in OUTPUT_TYPES:
        raise InputError(f"{file.path}: output_type {task.OUTPUT_TYPE} of task '{file.name}' is not supported.")
    return task


def _broken_line(content: Mapping[str, Any]) -> str | None:
    """A sentence about the first line of a task's JSON Lines files that is no JSON object; None where all lines are."""
    for file in local_files(content):
        if not file.endswith(".jsonl") or not Path(file).is_file():
            continue
        for number, line in enumerate(Path(file).read_text(encoding="utf-8", errors="replace").split("\n"), 1):
            try:
                found = json.loads(line) if line.strip() else {}
            except ValueError as error:
                return f"{file}, line {number}: not valid JSON ({error}); each line holds one object."
            if not isinstance(found, dict):
                return f"{file}, line {number}: expected an object with the task's fields, got {shown(found)}."
    return None


def _unloadable(name: str, error: Exception) -> str:
    """Why lm-eval cannot load a task, and what to do. While it loads a task, lm-eval looks at the first document."""
    if "corresponds to no data" in str(error) or (isinstance(error, IndexError) and "size 0" in str(error)):
        return f"task '{name}' has no documents in a split that it names; fill its data, or name another split"
    if isinstance(error, IndexError):
        return (
            f"task '{name}' has a first document that cannot be asked ({error}): its answer is none of its options, "
            "one of these is empty, or there are no documents; correct the task's file or its data"
        )
    return f"lm-eval cannot load task '{name}' ({cause(error)}); correct the file"


def _prepare_templates() -> None:
    """Makes lm-eval render its templates in a sandbox, since a plain template can call anything.

    Each template is then compiled once, instead of once per item and candidate.
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
    """Raises InputError for a metric that lm-eval does not have, unless the task may run code.

    The evaluate library would fetch such a metric by its name, as a script, and run it.
    """
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


def documents(task: Any, items: ItemsConfig, split: Split) -> list[int]:
    """The numbers of the documents that a split of a task holds, in a search that has no other task.

    task: lm-eval's.
    items: how many items each split gets.
    split: the split.
    """
    return Division([task], items).of(task, split)


def cause(error: BaseException) -> str:
    """What went wrong in lm-eval, as a phrase. For an unknown key in a task's file, it names the closest known key."""
    from lm_eval.api.task import TaskConfig

    error = error.__cause__ or error
    text = " ".join(str(error).split()).rstrip(".")
    unknown = re.search(r"unexpected keyword argument '(\w+)'", text)
    if unknown is not None:
        return f"{unknown[1]} is not a known key; {choices(unknown[1], (key.name for key in fields(TaskConfig)))}"
    return f"{type(error).__name__}: {text if len(text) <= 200 else text[:197] + '...'}".removesuffix(": ")
