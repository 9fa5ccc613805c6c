"""lm-eval's tasks on the resident model: the only module that imports lm_eval.

Requests are built and tokenized once; for each candidate only the model runs, and lm-eval's own filters, metrics and
aggregations turn its responses into scores. Its exceptions become ours here.
"""

import contextlib
import functools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from evomerge.candidate import SPLITS, Split
from evomerge.config import EvaluationConfig, ItemsConfig, ObjectiveConfig, SearchConfig, TasksConfig
from evomerge.errors import CandidateFailed, EvomergeError, InputError, choices
from evomerge.evaluation.prepared import PreparedRequests, Request, Response
from evomerge.evaluation.tasks import TaskFile, absolute_data_files, choose, divide, find_tasks
from evomerge.quiet import quiet

LIKELIHOODS = ("loglikelihood", "multiple_choice", "loglikelihood_rolling")
FEWSHOT_SEED = 1234
SAMPLING_SEED = 1234


@dataclass(frozen=True, slots=True)
class Scores:
    """scores: objective name to metric value. outcomes: objective name to one value per item, where the score is their
    mean. items: how many in all.
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
                f"objectives[{position}].metric is '{objective.metric}', which task '{objective.task}' does not "
                f"report; {choices(objective.metric, metrics)}."
            )
        if not callable(task.aggregation().get(objective.metric)):
            raise InputError(
                f"objectives[{position}].metric is '{objective.metric}', to which task '{objective.task}' gives no "
                "aggregation that lm-eval knows; correct metric_list in the task's file."
            )
        filters = [ensemble.name for ensemble in task._filters]
        if objective.filter is not None and objective.filter not in filters:
            raise InputError(
                f"objectives[{position}].filter is '{objective.filter}', which task '{objective.task}' lacks; "
                f"{choices(objective.filter, filters)}."
            )
        goal = objective.goal or ("maximize" if metrics[objective.metric] else "minimize")
        resolved.append(objective.model_copy(update={"goal": goal}))
    for task in tasks.values():
        for split in SPLITS:
            _documents(task, config.items, split)
    return tuple(resolved)


def load_tasks(
    objectives: Iterable[ObjectiveConfig], tasks: TasksConfig, evaluation: EvaluationConfig
) -> dict[str, Any]:
    """lm-eval tasks by name."""
    names = [objective.task for objective in objectives]
    return {name: _load(file, tasks, evaluation) for name, file in find_tasks(names, tasks).items()}


def _load(file: TaskFile, tasks: TasksConfig, evaluation: EvaluationConfig) -> Any:
    with quiet():
        from lm_eval.tasks import TaskManager
        from lm_eval.tasks._yaml_loader import load_yaml

        _prepare_templates()
        try:
            content = absolute_data_files(load_yaml(file.path), file.path.parent)
            _refuse_downloaded_metrics(content, file, tasks)
            content.pop("tag", None)
            if evaluation.num_fewshot is not None:
                content["num_fewshot"] = evaluation.num_fewshot
            task = TaskManager(include_defaults=False).load([content])["tasks"][file.name]
        except EvomergeError:
            raise
        except Exception as error:
            raise InputError(
                f"{file.path}: lm-eval cannot load task '{file.name}' ({_cause(error)}); correct the file."
            ) from None
    if task.OUTPUT_TYPE not in (*LIKELIHOODS, "generate_until"):
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

    if file.builtin or file.name in tasks.allow_code or content.get("process_results") is not None:
        return
    for entry in content.get("metric_list") or ():
        metric = entry.get("metric")
        if isinstance(metric, str) and (entry.get("hf_evaluate") or metric not in METRIC_REGISTRY):
            raise InputError(
                f"{file.path}: metric '{metric}' is none of lm-eval's own, so it would be fetched and run as code; "
                f"if you trust it add '{file.name}' to tasks.allow_code, else {choices(metric, METRIC_REGISTRY)}."
            )


def _both_splits(task: Any) -> bool:
    return bool(task.has_validation_docs() and task.has_test_docs())


def _documents(task: Any, items: ItemsConfig, split: str) -> list[int]:
    """The numbers of the documents that a split of a task holds."""
    name = task.config.task
    if _both_splits(task):
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

    def prepare(self, split: Split) -> None:
        """Builds and tokenizes a split's requests. Raises InputError for a task whose requests cannot be built."""
        if split not in self._splits:
            with quiet():
                self._splits[split] = _PreparedSplit(self._config, self._lm, split)

    def evaluate(self, split: Split) -> Scores:
        """The resident model's scores on a split. Raises CandidateFailed where a metric is not finite."""
        self.prepare(split)
        with quiet():
            return self._splits[split].run(self._model)


class _PreparedSplit:
    """Every task of a split with its instances, its frozen batches, and lm-eval's code to score them."""

    def __init__(self, config: SearchConfig, lm: Any, split: Split) -> None:
        self._config, self._lm = config, lm
        self._tasks = load_tasks(config.objectives, config.tasks, config.evaluation)
        for task in self._tasks.values():
            self._build_or_explain(task, split)
        self._documents = {name: _by_document(task._instances) for name, task in self._tasks.items()}
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

    def _build_or_explain(self, task: Any, split: Split) -> None:
        try:
            self._build(task, split)
        except EvomergeError:
            raise
        except Exception as error:
            raise InputError(
                f"task '{task.config.task}': lm-eval cannot build its requests ({_cause(error)}); correct its file, or "
                "evaluation.num_fewshot where that is set."
            ) from None

    def _build(self, task: Any, split: Split) -> None:
        """Builds a task's instances on all documents (so that few-shot examples do not depend on the choice), then
        keeps those of the split."""
        documents = set(_documents(task, self._config.items, split))
        _leave_own_answer_out(task, split)
        if split == "search" and _both_splits(task):
            task.test_docs = task.validation_docs
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
            prefix = self._lm.prefix_token_id
            after = self._lm.tok_encode(continuation, add_special_tokens=False)
            before, after = (after[:1], after[1:]) if after[:1] == [prefix] else ([prefix], after)
        if not before or not after:
            part, text = ("answer", continuation) if before else ("question", context)
            raise InputError(
                f"task '{instance.task_name}': the {part} of item {instance.doc_id} ({text!r}) has no tokens of its "
                "own; it must not be empty, and an answer that follows a word begins with a space."
            )
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
        for instance, texts in zip(self._generations, self._plan.run(), strict=True):
            instance.resps, instance.filtered_resps = texts, {}
        metrics = {name: _task_metrics(task, self._documents[name]) for name, task in self._tasks.items()}
        return self._scores(metrics)

    def _scores(self, metrics: Mapping[str, Mapping[tuple[str, str], list[Any]]]) -> Scores:
        from lm_eval.api.metrics import mean

        scores, outcomes = {}, {}
        for objective in self._config.objectives:
            task = self._tasks[objective.task]
            filter_name = objective.filter or task._filters[0].name
            values = metrics[objective.task][objective.metric, filter_name]
            aggregate = task.aggregation()[objective.metric]
            score = _finite(objective.name, aggregate, values)
            scores[objective.name] = score
            if aggregate is mean:
                outcomes[objective.name] = tuple(float(value) for value in values)
        return Scores(scores, outcomes, items=sum(map(len, self._documents.values())))


def _leave_own_answer_out(task: Any, split: str) -> None:
    """Where an item's few-shot examples come from its own split, makes lm-eval leave the item itself out of them.

    lm-eval does so where the two names that it compares are equal, and elsewhere would show the answer.
    """
    config, fewshot = task.config, getattr(task, "fewshot_cfg", None)
    if fewshot is None or fewshot.samples is not None:
        return
    splits = [config.validation_split, config.test_split]
    evaluated = next(filter(None, splits if split == "search" else splits[::-1]), None)
    if evaluated == next(filter(None, [fewshot.split, config.training_split, *splits]), None):
        fewshot.split = config.test_split


def _finite(name: str, aggregate: Callable[[list[Any]], float], values: list[Any]) -> float:
    """An objective's score; CandidateFailed for one that is none."""
    try:
        score = float(aggregate(values))
    except OverflowError:
        score = math.inf
    if not math.isfinite(score):
        raise CandidateFailed(f"{name} is {score}")
    return score


def _respond(instance: Any, responses: Sequence[Response]) -> None:
    """Puts responses where lm-eval's filters look for them."""
    likelihood = sum(response.log_likelihood for response in responses)
    if math.isnan(likelihood):  # compared with anything it is false, so that a metric would hide it
        raise CandidateFailed(f"a log-likelihood of task {instance.task_name} is not a number")
    rolling = instance.request_type == "loglikelihood_rolling"
    value: Any = likelihood if rolling else (likelihood, responses[0].greedy)
    instance.resps, instance.filtered_resps = [value] * instance.repeats, {}


def _by_document(instances: Sequence[Any]) -> list[list[Any]]:
    """Instances in the order of the documents, each document's in the order of its options."""
    documents: dict[int, list[Any]] = defaultdict(list)
    for instance in sorted(instances, key=lambda instance: (instance.doc_id, instance.idx)):
        documents[instance.doc_id].append(instance)
    return list(documents.values())


def _task_metrics(task: Any, documents: Sequence[Sequence[Any]]) -> dict[tuple[str, str], list[Any]]:
    """(metric, filter) to one value per document, in the order of the documents, by lm-eval's own code."""
    task.apply_filters()
    values: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for filter_name in task._instances[0].filtered_resps:
        for instances in documents:
            responses = [instance.filtered_resps[filter_name] for instance in instances]
            for metric, value in task.process_results(instances[0].doc, responses).items():
                values[metric, filter_name].append(value)
    return values


@dataclass(frozen=True, slots=True)
class _GenerationBatch:
    """members: instance numbers. ids and mask (members, length), padded on the left."""

    members: tuple[int, ...]
    ids: torch.Tensor
    mask: torch.Tensor
    stop: list[str]
    arguments: Mapping[str, Any]


class _GenerationPlan:
    """generate_until requests in fixed batches: same arguments together, sorted by length."""

    def __init__(self, lm: Any, instances: Sequence[Any], batch_size: int) -> None:
        self._lm, self._instances, self._batch_size = lm, instances, batch_size
        groups: dict[str, list[int]] = defaultdict(list)
        for number, instance in enumerate(instances):
            groups[repr(instance.args[1])].append(number)
        self._batches = [batch for members in groups.values() for batch in self._group(members)]

    def _group(self, members: Sequence[int]) -> Iterator[_GenerationBatch]:
        """The batches of instances that have the same arguments."""
        from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs

        first = self._instances[members[0]]
        arguments = dict(normalize_gen_kwargs(dict(first.args[1]), self._lm.max_gen_toks))
        end = self._lm.tok_decode(self._lm.eot_token_id, skip_special_tokens=False)
        stop = handle_stop_sequences(arguments.pop("until", None), eos=end)
        fresh = arguments.pop("max_gen_toks")
        room = self._lm.max_length - fresh
        if room <= 0:
            raise InputError(
                f"task '{first.task_name}' asks for {fresh} new tokens, but the model's context holds only "
                f"{self._lm.max_length}; set generation_kwargs.max_gen_toks below that in the task's file."
            )
        lengths = {number: len(self._lm.tok_encode(self._instances[number].args[0])) for number in members}
        # Greedy answers to one question are all alike; sampled ones are drawn as often as the task asks.
        copies = {number: self._instances[number].repeats if arguments.get("do_sample") else 1 for number in members}
        queue = [n for n in sorted(members, key=lambda n: (-lengths[n], n)) for _ in range(copies[n])]
        for start in range(0, len(queue), self._batch_size):
            batch = tuple(queue[start : start + self._batch_size])
            prompts = [self._instances[number].args[0] for number in batch]
            ids, mask = self._lm.tok_batch_encode(prompts, left_truncate_len=room)
            limits = {"max_length": ids.shape[1] + fresh, **arguments}
            yield _GenerationBatch(batch, ids.to(self._lm.device), mask.to(self._lm.device), stop, limits)

    def run(self) -> list[list[str]]:
        """As many texts per instance as its task asks for; the same ones each time."""
        from lm_eval.models.utils import postprocess_generated_text

        texts: list[list[str]] = [[] for _ in self._instances]
        with _seeded(self._lm.device):
            for batch in self._batches:
                written = self._lm._model_generate(
                    context=batch.ids, attention_mask=batch.mask, stop=batch.stop, **batch.arguments
                )
                for number, tokens in zip(batch.members, written[:, batch.ids.shape[1] :].tolist(), strict=True):
                    text = self._lm.tok_decode(tokens)
                    texts[number].append(
                        postprocess_generated_text(generation=text, stop=batch.stop, think_end_token=None)
                    )
        return [
            found * (instance.repeats // len(found)) for instance, found in zip(self._instances, texts, strict=True)
        ]


@contextlib.contextmanager
def _seeded(device: torch.device) -> Iterator[None]:
    """Within it, torch's global generators, which sampled texts are drawn from, start from one seed."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(SAMPLING_SEED)
        yield


def _cause(error: BaseException) -> str:
    """What went wrong in lm-eval, in a phrase; for a key of a task's file that it does not know, the closest one."""
    from lm_eval.api.task import TaskConfig

    error = error.__cause__ or error
    text = " ".join(str(error).split()).rstrip(".")
    unknown = re.search(r"unexpected keyword argument '(\w+)'", text)
    if unknown is not None:
        return f"{unknown[1]} is not a known key; {choices(unknown[1], (key.name for key in fields(TaskConfig)))}"
    return f"{type(error).__name__}: {text if len(text) <= 200 else text[:197] + '...'}".removesuffix(": ")
