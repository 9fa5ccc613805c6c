"""lm-eval's task objects, loaded from checked files, and the objectives checked against them.

Templates are rendered in a sandbox, metrics that would be fetched as code are refused, and lm-eval's exceptions become
ours.
"""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from evomerge.config.base import Split
from evomerge.config.documents import shown
from evomerge.config.scoring import ConstraintConfig, EvaluationConfig, ItemsConfig, ObjectiveConfig, TasksConfig
from evomerge.config.search import SearchConfig
from evomerge.errors import EvomergeError, InputError, choices
from evomerge.evaluation.items import Division, both_splits
from evomerge.evaluation.tasks import TaskFile, TaskGroup, absolute_data_files, find_tasks
from evomerge.quiet import quiet

LIKELIHOODS = ("loglikelihood", "multiple_choice", "loglikelihood_rolling")
OUTPUT_TYPES = (*LIKELIHOODS, "generate_until")
_DRAWING = {"do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p"}  # which mean nothing to greedy texts
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

    def by_item(self, metric: str, sizes: Sequence[int]) -> bool:
        """Whether a metric is the mean over the items of its tasks, of which there are so many in each."""
        from lm_eval.api.metrics import mean

        alike = self.by_size is None or self.by_size[metric] or len(set(sizes)) == 1
        return alike and all(task.aggregation()[metric] is mean for task in self.tasks)

    def goals(self) -> dict[str, bool]:
        """The metrics that can be objectives, and whether higher is better."""
        first, *others = (task.higher_is_better() for task in self.tasks)
        shared = {metric: goal for metric, goal in first.items() if all(metric in other for other in others)}
        return (
            shared if self.by_size is None else {metric: shared[metric] for metric in self.by_size if metric in shared}
        )


Metric = TypeVar("Metric", ObjectiveConfig, ConstraintConfig)


def check_metrics(config: SearchConfig, targets: Mapping[str, Target]) -> SearchConfig:
    """The config with the goals of its objectives and constraints filled in, after every task, metric and item count
    has been checked."""
    _check_generation(config.evaluation)
    objectives = tuple(
        each if each.cost is not None else _with_goal(f"objectives[{index}]", each, targets[each.task])
        for index, each in enumerate(config.objectives)
    )
    goals = {objective.name: objective.goal for objective in objectives}
    constraints = [
        _with_goal(f"constraints[{index}]", each, targets[each.task]) for index, each in enumerate(config.constraints)
    ]
    for index, each in enumerate(constraints):
        if goals.setdefault(each.name, each.goal) != each.goal:
            raise InputError(
                f"constraints[{index}].goal is {each.goal}, but elsewhere {each.name} has goal {goals[each.name]}; "
                "give both the same."
            )
    _check_filters([*objectives, *constraints], len(objectives), targets)
    return config.model_copy(update={"objectives": objectives, "constraints": tuple(constraints)})


def _check_filters(
    metrics: Sequence[ObjectiveConfig | ConstraintConfig], objectives: int, targets: Mapping[str, Target]
) -> None:
    """Raises InputError where one metric names the filter that another means without a name.

    objectives: how many of the metrics are objectives, the first ones; the others are constraints.
    """
    seen: dict[tuple[str, str, str], tuple[str, str]] = {}
    for index, each in enumerate(metrics):
        if isinstance(each, ObjectiveConfig) and each.cost is not None:
            continue
        first = targets[each.task].filters()[0]
        where = f"objectives[{index}]" if index < objectives else f"constraints[{index - objectives}]"
        other, name = seen.setdefault((each.task, each.metric, each.filter or first), (where, each.name))
        if name != each.name:
            raise InputError(
                f"{where}.filter is {shown(each.filter)}, and that of {other} is another way to say it: '{first}' "
                f"is the first filter of task '{each.task}', which is taken where none is named; write both alike."
            )


def _with_goal(where: str, wanted: Metric, target: Target) -> Metric:
    """An objective or constraint with its goal, by what the task says of the metric where the user does not."""
    goals = target.goals()
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
    goal = wanted.goal or ("maximize" if goals[wanted.metric] else "minimize")
    return wanted.model_copy(update={"goal": goal})


def without_items(config: SearchConfig, targets: Mapping[str, Target], division: Division) -> str | None:
    """The first metric that a search measures which is no mean over items, so that a part of them says little of it;
    None where there is none."""
    for each in config.measured:
        if each.cost is None and not targets[each.task].by_item(each.metric, _sizes(targets[each.task], division)):
            return each.name
    return None


def fewest_items(config: SearchConfig, targets: Mapping[str, Target], division: Division) -> int:
    """On how many search items the metric with the fewest is measured; 0 where there are only costs."""
    tasks = [each.task for each in config.measured if each.cost is None]
    return min((sum(_sizes(targets[task], division)) for task in tasks), default=0)


def _sizes(target: Target, division: Division) -> list[int]:
    """How many search items each task of a target has."""
    return [len(division.of(task, "search")) for task in target.tasks]


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


def check_greedy(targets: Mapping[str, Target], folder: Path) -> None:
    """Raises InputError unless there are texts to be written, all of them greedily and with arguments that transformers
    and vLLM both have. folder: the base's, whose generation_config.json transformers obeys."""
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


def forked(targets: Mapping[str, Target]) -> dict[str, Target]:
    """The same targets for one split: tasks share their documents, and what preparing a split changes is their own."""
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
            raise InputError(f"{file.path}: {_unloadable(file.name, error)}.") from None
    if task.OUTPUT_TYPE not in OUTPUT_TYPES:
        raise InputError(f"{file.path}: output_type {task.OUTPUT_TYPE} of task '{file.name}' is not supported.")
    return task


def _unloadable(name: str, error: Exception) -> str:
    """Why lm-eval cannot load a task, and what to do. It looks at the first document while it loads it."""
    if "corresponds to no data" in str(error) or (isinstance(error, IndexError) and "size 0" in str(error)):
        return f"task '{name}' has no documents in a split that it names; fill its data, or name another split"
    if isinstance(error, IndexError):
        return (
            f"task '{name}' has a first document that cannot be asked ({error}): its answer is none of its options, "
            "one of these is empty, or there are no documents; correct the task's file or its data"
        )
    return f"lm-eval cannot load task '{name}' ({cause(error)}); correct the file"


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


def documents(task: Any, items: ItemsConfig, split: Split) -> list[int]:
    """The numbers of the documents that a split of a task holds, where a search has no other task."""
    return Division([task], items).of(task, split)


def cause(error: BaseException) -> str:
    """What went wrong in lm-eval, in a phrase; for a key of a task's file that it does not know, the closest one."""
    from lm_eval.api.task import TaskConfig

    error = error.__cause__ or error
    text = " ".join(str(error).split()).rstrip(".")
    unknown = re.search(r"unexpected keyword argument '(\w+)'", text)
    if unknown is not None:
        return f"{unknown[1]} is not a known key; {choices(unknown[1], (key.name for key in fields(TaskConfig)))}"
    return f"{type(error).__name__}: {text if len(text) <= 200 else text[:197] + '...'}".removesuffix(": ")
