"""lm-eval's tasks on the resident model: the only module that imports lm_eval.

Requests are built and tokenized once; for each candidate only the model runs, and lm-eval's own filters, metrics and
aggregations turn its responses into scores. Its exceptions become ours here.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from evomerge.candidate import Split
from evomerge.config import EvaluationConfig, ItemsConfig, ObjectiveConfig, SearchConfig, TasksConfig
from evomerge.errors import CandidateFailed, EvomergeError, InputError, choices
from evomerge.evaluation.prepared import PreparedRequests, Request, Response
from evomerge.evaluation.tasks import TaskFile, absolute_data_files, choose, divide, find_tasks
from evomerge.quiet import quiet

LIKELIHOODS = ("loglikelihood", "multiple_choice", "loglikelihood_rolling")
FEWSHOT_SEED = 1234


@dataclass(frozen=True, slots=True)
class Scores:
    """scores: objective name to metric value. outcomes: objective name to one value per item. items: how many in
    all.
    """

    scores: Mapping[str, float]
    outcomes: Mapping[str, tuple[float, ...]]
    items: int


def check_objectives(config: SearchConfig) -> tuple[ObjectiveConfig, ...]:
    """The objectives with their goals filled in, after every task, metric and item count has been checked."""
    tasks = load_tasks(config.objectives, config.tasks, config.evaluation)
    resolved = []
    for position, objective in enumerate(config.objectives):
        task = tasks[objective.task]
        metrics = task.higher_is_better()
        if objective.metric not in metrics:
            raise InputError(
                f"objectives.{position}.metric is '{objective.metric}', which task '{objective.task}' does not report; "
                f"{choices(objective.metric, metrics)}."
            )
        filters = [ensemble.name for ensemble in task._filters]
        if objective.filter is not None and objective.filter not in filters:
            raise InputError(
                f"objectives.{position}.filter is '{objective.filter}', which task '{objective.task}' lacks; "
                f"{choices(objective.filter, filters)}."
            )
        goal = objective.goal or ("maximize" if metrics[objective.metric] else "minimize")
        resolved.append(objective.model_copy(update={"goal": goal}))
    for task in tasks.values():
        for split in ("search", "heldout"):
            _documents(task, config.items, split)
    return tuple(resolved)


def load_tasks(
    objectives: Iterable[ObjectiveConfig], tasks: TasksConfig, evaluation: EvaluationConfig
) -> dict[str, Any]:
    """lm-eval tasks by name."""
    names = list(dict.fromkeys(objective.task for objective in objectives))
    return {name: _load(file, evaluation) for name, file in find_tasks(names, tasks).items()}


def _load(file: TaskFile, evaluation: EvaluationConfig) -> Any:
    with quiet():
        from lm_eval.tasks import TaskManager
        from lm_eval.tasks._yaml_loader import load_yaml

        try:
            content = absolute_data_files(load_yaml(file.path), file.path.parent)
            content.pop("tag", None)
            if evaluation.num_fewshot is not None:
                content["num_fewshot"] = evaluation.num_fewshot
            task = TaskManager(include_defaults=False).load([content])["tasks"][file.name]
        except EvomergeError:
            raise
        except Exception as error:
            raise InputError(f"{file.path}: lm-eval cannot load task '{file.name}' ({_brief(error)}).") from None
    if task.OUTPUT_TYPE not in (*LIKELIHOODS, "generate_until"):
        raise InputError(f"{file.path}: output_type {task.OUTPUT_TYPE} of task '{file.name}' is not supported.")
    return task


def _documents(task: Any, items: ItemsConfig, split: str) -> list[int]:
    """The numbers of the documents that a split of a task holds."""
    name = task.config.task
    if task.has_validation_docs() and task.has_test_docs():
        documents = task.validation_docs() if split == "search" else task.test_docs()
        return choose(items, split, name, len(documents))
    search, heldout = divide(items, name, len(task.eval_docs))
    return search if split == "search" else heldout


class Harness:
    """The tasks of a search, prepared for one resident model. A split is built when it is first asked for."""

    def __init__(self, config: SearchConfig, model: Any, tokenizer: Any) -> None:
        self._config, self._model = config, model
        with quiet():
            from lm_eval.models.huggingface import HFLM

            self._lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=config.evaluation.batch_size)
        self._splits: dict[str, _PreparedSplit] = {}

    def evaluate(self, split: Split) -> Scores:
        """The resident model's scores on a split. Raises CandidateFailed where a metric is not finite."""
        with quiet():
            if split not in self._splits:
                self._splits[split] = _PreparedSplit(self._config, self._lm, split)
            return self._splits[split].run(self._model)


class _PreparedSplit:
    """Every task of a split with its instances, its frozen batches, and lm-eval's code to score them."""

    def __init__(self, config: SearchConfig, lm: Any, split: Split) -> None:
        self._config, self._lm = config, lm
        self._tasks = load_tasks(config.objectives, config.tasks, config.evaluation)
        for task in self._tasks.values():
            self._build(task, split)
        instances = [instance for task in self._tasks.values() for instance in task._instances]
        self._likelihoods = [instance for instance in instances if instance.request_type != "generate_until"]
        self._generations = [instance for instance in instances if instance.request_type == "generate_until"]
        encoded = [self._encode(instance) for instance in self._likelihoods]
        self._spans = [len(requests) for requests in encoded]
        self._prepared = PreparedRequests(
            [request for requests in encoded for request in requests],
            config.evaluation.batch_size,
            lm.max_length,
            torch.device(lm.device),
        )
        self._plan = _GenerationPlan(lm, self._generations, config.evaluation.batch_size)

    def _build(self, task: Any, split: Split) -> None:
        """Builds a task's instances on all documents (so that few-shot examples do not depend on the choice), then
        keeps those of the split."""
        documents = set(_documents(task, self._config.items, split))
        if split == "search" and task.has_validation_docs() and task.has_test_docs():
            task.set_config("test_split", None)
        task.set_fewshot_seed(FEWSHOT_SEED)
        evaluation = self._config.evaluation
        task.build_all_requests(
            system_instruction=evaluation.system_instruction,
            apply_chat_template=evaluation.apply_chat_template,
            chat_template=self._lm.apply_chat_template if evaluation.apply_chat_template else None,
            tokenizer_name=self._lm.tokenizer_name if evaluation.apply_chat_template else "",
        )
        task._instances = [instance for instance in task._instances if instance.doc_id in documents]

    def _encode(self, instance: Any) -> list[Request]:
        """The log-likelihoods that an instance needs: one, or one per window of a rolling one."""
        if instance.request_type == "loglikelihood_rolling":
            return self._windows(instance.args[0])
        context, continuation = instance.args
        if context:
            before, after = self._lm._encode_pair(context, continuation)
        else:
            after = self._lm.tok_encode(continuation, add_special_tokens=False)
            prefix = self._lm.prefix_token_id
            before, after = ([prefix], after) if prefix != after[0] else (after[:1], after[1:])
        return [Request(tuple(before), tuple(after))]

    def _windows(self, text: str) -> list[Request]:
        from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

        windows = get_rolling_token_windows(
            token_list=self._lm.tok_encode(text),
            prefix_token=self._lm.prefix_token_id,
            max_seq_len=self._lm.max_length,
            context_len=1,
        )
        return [Request(tuple(before), tuple(after)) for before, after in map(make_disjoint_window, windows)]

    def run(self, model: Any) -> Scores:
        responses = iter(self._prepared.run(model))
        for instance, span in zip(self._likelihoods, self._spans, strict=True):
            _respond(instance, [next(responses) for _ in range(span)])
        for instance, text in zip(self._generations, self._plan.run(), strict=True):
            instance.resps, instance.filtered_resps = [text], {}
        metrics = {name: _task_metrics(task) for name, task in self._tasks.items()}
        return self._scores(metrics)

    def _scores(self, metrics: Mapping[str, Mapping[tuple[str, str], list[Any]]]) -> Scores:
        scores, outcomes = {}, {}
        for objective in self._config.objectives:
            task = self._tasks[objective.task]
            filter_name = objective.filter or task._filters[0].name
            values = metrics[objective.task][objective.metric, filter_name]
            score = float(task.aggregation()[objective.metric](values))
            if not math.isfinite(score):
                raise CandidateFailed(f"{objective.name} is {score}")
            scores[objective.name] = score
            if all(isinstance(value, int | float) for value in values):
                outcomes[objective.name] = tuple(float(value) for value in values)
        items = sum(len({instance.doc_id for instance in task._instances}) for task in self._tasks.values())
        return Scores(scores, outcomes, items)


def _respond(instance: Any, responses: Sequence[Response]) -> None:
    """Puts responses where lm-eval's filters look for them."""
    if instance.request_type == "loglikelihood_rolling":
        value: Any = sum(response.log_likelihood for response in responses)
    else:
        value = (responses[0].log_likelihood, responses[0].greedy)
    instance.resps, instance.filtered_resps = [value], {}


def _task_metrics(task: Any) -> dict[tuple[str, str], list[Any]]:
    """(metric, filter) to one value per document, in the order of the documents, by lm-eval's own code."""
    task.apply_filters()
    documents: dict[int, list[Any]] = defaultdict(list)
    for instance in task._instances:
        documents[instance.doc_id].append(instance)
    values: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for filter_name in task._instances[0].filtered_resps:
        for document in sorted(documents):
            instances = sorted(documents[document], key=lambda instance: instance.idx)
            responses = [instance.filtered_resps[filter_name] for instance in instances]
            for metric, value in task.process_results(instances[0].doc, responses).items():
                values[metric, filter_name].append(value)
    return values


class _GenerationPlan:
    """generate_until requests in fixed batches: same arguments together, sorted by length, padded on the left."""

    def __init__(self, lm: Any, instances: Sequence[Any], batch_size: int) -> None:
        from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

        self._lm, self._count = lm, len(instances)
        groups: dict[str, list[int]] = defaultdict(list)
        for number, instance in enumerate(instances):
            groups[repr(instance.args[1])].append(number)
        self._batches: list[tuple[list[int], Any, Any, list[str], dict[str, Any]]] = []
        end = lm.tok_decode(lm.eot_token_id, skip_special_tokens=False) if instances else ""
        for members in groups.values():
            arguments = dict(normalize_gen_kwargs(dict(instances[members[0]].args[1]), lm.max_gen_toks))
            stop = handle_stop_sequences(arguments.pop("until", None), eos=end)
            fresh = arguments.pop("max_gen_toks")
            members.sort(key=lambda number: (-len(lm.tok_encode(instances[number].args[0])), number))
            for start in range(0, len(members), batch_size):
                batch = members[start : start + batch_size]
                ids, mask = lm.tok_batch_encode(
                    [instances[number].args[0] for number in batch], left_truncate_len=lm.max_length - fresh
                )
                limit = {"max_length": ids.shape[1] + fresh, **arguments}
                self._batches.append((batch, ids.to(lm.device), mask.to(lm.device), stop, limit))

    def run(self) -> list[str]:
        from lm_eval.models.utils import postprocess_generated_text

        texts = [""] * self._count
        for batch, ids, mask, stop, arguments in self._batches:
            written = self._lm._model_generate(context=ids, attention_mask=mask, stop=stop, **arguments)
            for number, tokens in zip(batch, written[:, ids.shape[1] :].tolist(), strict=True):
                text = self._lm.tok_decode(tokens)
                texts[number] = postprocess_generated_text(generation=text, stop=stop, think_end_token=None)
        return texts


def _brief(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0].rstrip('.')}" if text else type(error).__name__
