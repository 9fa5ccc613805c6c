"""Turns a search file into a search that can start: everything is checked, and all automatic settings are decided.

All mistakes of a user should show here, within seconds, before anything is written and before any weight is read.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.alignment.align import common_structure
from evomerge.config.files import load
from evomerge.config.running import OptimizerConfig
from evomerge.config.scoring import EvaluationConfig
from evomerge.config.search import SearchConfig
from evomerge.config.spaces import DataFlowConfig, ParameterSpaceConfig
from evomerge.config.tables import COSTS, OPTIMIZERS, TRACKERS, imported
from evomerge.devices import dtype_notes, resolve_compile, resolve_device, resolve_dtype
from evomerge.errors import InputError, choices, naming
from evomerge.merging import vocabulary
from evomerge.merging.sources.models import Models, models_of
from evomerge.merging.sources.preflight import preflight
from evomerge.merging.sources.tensor_files import parameter_count, size_in_bytes, torch_dtypes
from evomerge.optimizers.make import following_gradients, learns, passes_before, passes_for_rows, resolve
from evomerge.search.controls import check_controls, count_controls, start_of_weights
from evomerge.seen import encoded
from evomerge.spaces import SearchSpace
from evomerge.spaces.data_flow import DataFlowSpace
from evomerge.spaces.make import make_space
from evomerge.spaces.sensitivity import sensitivity

if TYPE_CHECKING:
    from evomerge.evaluation.items import Division
    from evomerge.evaluation.loading import Target
    from evomerge.workers.memory import MemoryPlan, SearchPlan

_WORTH_A_SUBSET = 100  # search items
_WORTH_A_SHARD = 4e9  # parameters times search items; an estimate, which only decides how evenly workers are used
_MOST_SHARDS = 32
_FEW_GENERATIONS = 4
_CHECKPOINTED_FROM = 10**9  # parameters, from which on layers are computed again unless the search file says otherwise


@dataclass(frozen=True, slots=True)
class Prepared:
    """A resolved config with all that it names.

    config: the search's, in which all automatic settings are decided.
    space: what genomes are decoded by.
    models: the base and the models that recipes may name, with their headers read.
    warnings: what the user should know before the search starts.
    targets: the tasks that are measured, loaded; None for a config that was resolved before.
    seen: the items that the search will see (`evomerge.seen.encoded`); None for a config that was resolved before.
    """

    config: SearchConfig
    space: SearchSpace
    models: Models
    warnings: tuple[str, ...] = ()
    targets: "Mapping[str, Target] | None" = None
    seen: str | None = None


def prepare_file(search_file: Path, overrides: Sequence[str] = (), address: str | None = None) -> Prepared:
    """The prepared search of a search file.

    search_file: the file.
    overrides: settings that replace those of the file, as KEY=VALUE.
    address: of the Ray cluster that the search will run on; None for this machine.
    Raises InputError, opened by the name of the file, for every mistake in it.
    """
    config = load(search_file, overrides)
    with naming(search_file):
        return prepare(config, address)


def prepare(config: SearchConfig, address: str | None = None) -> Prepared:
    """The prepared search of a config: models, space, tasks and device are checked, and automatic settings decided.

    config: as the user wrote it.
    address: of the Ray cluster that the search will run on; None for this machine.
    Raises InputError for every mistake in the config.
    """
    from evomerge.evaluation import few_shots, own_files, soundness
    from evomerge.evaluation.items import Division
    from evomerge.evaluation.loading import (
        check_greedy,
        check_metrics,
        distinct_tasks,
        exam_warnings,
        forked,
        load_targets,
        of_metrics,
        only_reported,
    )
    from evomerge.evaluation.own_scores import OwnItems
    from evomerge.workers.worker import base_tokenizer

    _check_trackers(config)
    config, own = own_files.checked(config)
    config, models = _pinned(config)
    _check_aligned(config, models)
    config = _with_tokens(config, models)
    prepared = _with_models(config, models)
    check_controls(config)
    base, space = prepared.models.base, prepared.space
    base_tokenizer(config, base)
    loaded = load_targets(config.reported, config.tasks, config.evaluation, config.places)
    targets = forked(loaded)
    config = check_metrics(config, targets)
    _check_quantized(config)
    if config.evaluation.backend == "vllm":
        check_greedy(targets, base.folder)
        _check_engine(config)
    tasks = distinct_tasks(targets)
    searched = of_metrics(config.measured, targets)
    doubt = None
    _check_rows(config, prepared, searched)
    if learns(config.optimizer, config.limit, passes_before(config, follows=True)):
        config, prepared, doubt = _learning(config, prepared, searched)
        space = prepared.space
    own_items = OwnItems.of(config, own)
    searched_tasks = [*distinct_tasks(searched), *own_items.searched.values()]
    reported = [*only_reported(config, targets), *own_items.reported.values()]
    _check_texts(config, distinct_tasks(searched))
    division = Division(searched_tasks, config.items, prepared.models.seen, reported)
    doubts = tuple(soundness.check(tasks, division, config.splits))
    resolved = _resolved(config, prepared, targets, division, address)
    warnings = (
        *prepared.warnings,
        *_left_out_tokens(config, prepared.models),
        *filter(None, [doubt]),
        *dtype_notes(resolved.evaluation.device, resolved.evaluation.dtype, torch_dtypes(prepared.models.table)),
        *exam_warnings(searched),
        *_passed_over(division.left_out),
        *doubts,
    )
    seen = division.digests("search", "selection").union(*(few_shots.shown(task, division) for task in tasks))
    return Prepared(resolved, space, prepared.models, warnings, loaded, encoded(seen))


def _resolved(
    config: SearchConfig,
    prepared: Prepared,
    targets: "Mapping[str, Target]",
    division: "Division",
    address: str | None,
) -> SearchConfig:
    """The config with all automatic settings decided.

    prepared: the search's space and models.
    targets: the tasks.
    division: how their items are divided.
    The other parameters are those of `prepare`.
    Raises InputError for settings that contradict each other.
    """
    from evomerge.evaluation.loading import distinct_tasks, fewest_items, of_metrics, without_items

    genes = prepared.space.genes
    resolved = config.model_copy(
        update={
            "optimizer": with_checkpointing(
                resolve(config.optimizer, len(genes), len(config.objectives), genes), prepared.models
            ),
            "evaluation": _evaluation(config, prepared.models, address),
        }
    )
    _check_optimizer(resolved, prepared.space)
    _check_named_once(resolved)
    whole, fewest = without_items(config, targets, division), fewest_items(config, targets, division)
    searched = distinct_tasks(of_metrics(config.measured, targets))
    items = sum(len(division.of(task, "search")) for task in searched)  # shards do not divide those of own scores
    shards = resolve_shards(config, parameter_count(prepared.models.table), items)
    return resolved.model_copy(
        update={
            "subsets": resolve_subsets(resolved, fewest, whole),
            "workers": config.workers.model_copy(update={"shards": shards}),
        }
    )


def _check_texts(config: SearchConfig, tasks: Sequence[Any]) -> None:
    """Raises InputError for a cost of texts in a search whose tasks have none written."""
    for index, objective in enumerate(config.objectives):
        of_texts = objective.cost is not None and COSTS[objective.cost].of_texts
        if of_texts and not any(task.OUTPUT_TYPE == "generate_until" for task in tasks):
            raise InputError(
                f"objectives[{index}].cost is {objective.cost}, but no task of the search has texts written "
                "(generate_until); add one, or remove the cost."
            )


def _check_trackers(config: SearchConfig) -> None:
    """Raises InputError for a tracker that is not installed."""
    for index, name in enumerate(config.trackers):
        row = TRACKERS[name]
        if find_spec(row.package) is None:
            raise InputError(
                f"trackers[{index}] is {name}, which is not installed; pip install 'evomerge[{row.extra}]', or remove "
                "it."
            )


def _evaluation(config: SearchConfig, models: Models, address: str | None) -> EvaluationConfig:
    """The evaluation settings of a search, in which everything that this machine and the base decide is decided."""
    from evomerge.evaluation.packing_probe import takes_packed_rows

    settings, device = config.evaluation, _device(config, address)
    sharing = settings.prefix_sharing
    if sharing == "auto":
        sharing = "mask" if takes_packed_rows(models.base.folder) else "none"
    return settings.model_copy(
        update={
            "device": device,
            "dtype": resolve_dtype(settings.dtype, torch_dtypes(models.table), device),
            "compile": resolve_compile(settings.compile, device, parameter_count(models.table)),
            "prefix_sharing": sharing,
            "fewshot_as_multiturn": settings.multiturn,
        }
    )


def with_checkpointing(optimizer: OptimizerConfig, models: Models) -> OptimizerConfig:
    """The settings of an optimizer that say whether layers are computed again on the way back.

    models: the search's.
    """
    learning = optimizer.learning
    if learning.checkpointing != "auto":
        return optimizer
    large = optimizer.follows_gradients and parameter_count(models.table) >= _CHECKPOINTED_FROM
    return optimizer.model_copy(update={"learning": learning.model_copy(update={"checkpointing": large})})


def _learning(
    config: SearchConfig, prepared: Prepared, targets: "Mapping[str, Target]"
) -> tuple[SearchConfig, Prepared, str | None]:
    """The config of a search that follows gradients first, prepared anew, as far as its tasks and its method allow; and
    a sentence about why they do not.

    Raises InputError where the config asks for gradients that there are not.
    """
    from evomerge.evaluation.items import Division, spare_for_selection
    from evomerge.evaluation.loading import distinct_tasks

    explicit = config.optimizer.follows_gradients
    if not explicit and not isinstance(config.space, ParameterSpaceConfig):
        return config, prepared, None
    tasks = distinct_tasks(targets)
    unchanged = config, prepared
    config = _with_tensor_weights(config)
    prepared = replace(prepared, config=config, space=make_space(config, prepared.models))
    moved = _smooth_kinds(config, prepared)
    reason = None if moved else "none of its genes has a derivative by the first method"
    if config.optimizer.learning.loss == "activations":
        reason = reason or _incomparable(config)
    reason = reason or without_gradient(config, prepared.models, targets)
    if reason is not None and explicit:
        raise InputError(f"optimizer asks for learned, but {reason}; use another optimizer, or auto.")
    if reason is not None:
        return *unchanged, f"gradients cannot be followed, since {reason}; evolution works alone." if moved else None
    items = config.items
    if items.selection is None:
        items = items.model_copy(update={"selection": spare_for_selection(tasks, items)})
        try:
            Division(tasks, items, prepared.models.seen)
        except InputError:  # too many items are alike
            items = config.items
    before = passes_before(config, follows=True)
    optimizer = following_gradients(
        config.optimizer, moved, prepared.space.genes, config.limit, bool(items.selection), before
    )
    unsteered = None
    if config.constraints and optimizer.learning.loss != "likelihood":
        loss = optimizer.learning.loss
        unsteered = f"constraints do not steer steps along gradients, since optimizer.learning.loss is {loss}."
    config = config.model_copy(update={"items": items, "optimizer": optimizer})
    return config, replace(prepared, config=config), unsteered


def without_gradient(config: SearchConfig, models: Models, targets: "Mapping[str, Target]") -> str | None:
    """Why no gradient of a loss can be taken; None where one can.

    config: the search's.
    models: its models.
    targets: the tasks that it searches on.
    """
    from evomerge.evaluation.items import Division
    from evomerge.evaluation.loading import distinct_tasks
    from evomerge.evaluation.references import without_references

    if config.evaluation.quantize is not None:
        return f"evaluation.quantize is {config.evaluation.quantize}, through which no gradient passes"
    own = next((metric.name for metric in config.measured if metric.python is not None), None)
    if own is not None:
        return f"{own} is a function of your own, which has no derivative"
    if config.optimizer.learning.loss != "likelihood":
        return None
    division = Division(distinct_tasks(targets), config.items, models.seen)
    chat = config.evaluation.apply_chat_template
    return without_references(config.measured, targets, division.searched_documents, chat)


def _check_rows(config: SearchConfig, prepared: Prepared, targets: "Mapping[str, Target]") -> None:
    """Raises InputError where weights of rows are asked for and cannot be learned."""
    if config.rows is None:
        return
    key = "space.rows" if config.space.merging is config.space else "space.parameter.rows"
    reason = without_gradient(config, prepared.models, targets)
    if config.optimizer.learning.loss == "activations":
        reason = "optimizer.learning.loss is activations, which compares whole models"
    before = passes_for_rows(config)
    if reason is None and before + 1 > config.limit:
        raise InputError(
            f"{key} costs {before:g} forward passes over the search items, and a candidate costs 1 more, but the "
            f"search may cost {config.limit:g}; give it more, or lower {key}.steps."
        )
    if reason is not None:
        raise InputError(f"{key} asks for weights that follow gradients, but {reason}; leave it out.")


def _incomparable(config: SearchConfig) -> str | None:
    """Why a merge's layers cannot be compared with those of its sources; None where they can."""
    if config.space.changes_layers:
        return (
            f"optimizer.learning.loss is activations, and with space.kind {config.space.kind} a merge has other layers "
            "than its sources"
        )
    if not any(objective.task for objective in config.objectives):
        return "optimizer.learning.loss is activations, and no objective has items that could be read"
    return None


def _with_tensor_weights(config: SearchConfig) -> SearchConfig:
    """The config with weights for every tensor, unless it says otherwise or merges no weights."""
    space = config.space.merging
    if space is None or space.tensor_weights != "auto":
        return config
    own = space.model_copy(update={"tensor_weights": True})
    whole = own if space is config.space else config.space.model_copy(update={"parameter": own})
    return config.model_copy(update={"space": whole})


def _smooth_kinds(config: SearchConfig, prepared: Prepared) -> list[str]:
    """The kinds of genes by which a loss can be differentiated where the search starts."""
    space = prepared.space
    start = space.encode(dict.fromkeys(config.models, 1.0 / max(1, len(config.models))))
    moves = sensitivity(space, start, tuple(prepared.models.table)).moves
    return list(dict.fromkeys(gene.kind for gene, moves_it in zip(space.genes, moves, strict=True) if moves_it))


def _passed_over(left_out: Mapping[Any, int]) -> Iterator[str]:
    """A sentence for every task with items that are not held out because a search has seen them."""
    for task, count in left_out.items():
        if count:
            yield (
                f"task '{task.config.task}': {count} of its items are not held out, since they are the same as items "
                "or few-shot examples of this search, or of a search that made one of its models."
            )


def _pinned(config: SearchConfig) -> tuple[SearchConfig, Models]:
    """The config with every Hugging Face id at its commit, and its models."""
    models = models_of(config)
    named = {name: models[reference].pinned for name, reference in config.models.items()}
    return config.model_copy(update={"base": models.base.pinned, "models": named}), models.pinned()


def _with_tokens(config: SearchConfig, models: Models) -> SearchConfig:
    """The config in which all merges have the base's tokens, if it asks for that, or if a model that may give some of
    their rows has them in other ones.

    Raises InputError where a tokenizer cannot be read, and for a base with tokens that have no row.
    """
    base, space = models.base, config.space
    others = {name: models[reference] for name, reference in config.models.items()}
    others = {name: model for name, model in others.items() if model.kind == base.kind}
    if space.tokenizer_source is None:
        made = make_space(config, models) if isinstance(space, DataFlowConfig) else None
        giving = made.embedding_models if isinstance(made, DataFlowSpace) else list(others)
        for name, model in others.items():
            with naming(f"models.{name}"):
                if vocabulary.other_size(model, base) or (name in giving and vocabulary.other_rows(model, base)):
                    break
        else:
            return config
    with naming("base"):
        vocabulary.tokens_of(base.folder, config.base)
    return config.model_copy(update={"space": space.model_copy(update={"tokenizer_source": "base"})})


def _check_aligned(config: SearchConfig, models: Models) -> None:
    """Raises InputError for a model that cannot be aligned with the base."""
    for name, own in config.align.items():
        if own.folder is None:
            with naming(f"align.{name}"):
                common_structure(models.base, models[config.models[name]])


def _left_out_tokens(config: SearchConfig, models: Models) -> Iterator[str]:
    """A sentence for every model with tokens that the base lacks, where all merges have the base's tokens."""
    found = vocabulary.of_search(config, models)
    if found is None:
        return
    for name, reference in config.models.items():
        extra = sorted(found.own[reference].keys() - found.tokenizer.get_vocab().keys())
        if extra:
            several = f"{len(extra)} tokens" if len(extra) > 1 else "a token"
            yield (
                f"models.{name} has {several} that the base lacks, such as {extra[0]!r}; merges have the base's tokens."
            )


def _device(config: SearchConfig, address: str | None) -> str:
    """The device that the workers will have. Workers of a Ray cluster may run on machines with GPUs though this one has
    none, so the search file is believed, or the cluster is asked. A Ray that is started here has what this machine has.

    Raises InputError where the workers would not have the device.
    """
    name, workers = config.evaluation.device, config.workers
    if workers.pool == "ray" and address is not None and name in ("auto", "cuda", "xpu"):
        if name != "auto":
            return name
        if workers.num_gpus is None:
            from evomerge.workers.ray_pool import cluster_device

            return cluster_device(address)
        return "cuda" if workers.num_gpus and resolve_device(name) == "cpu" else resolve_device(name)
    device = resolve_device(name)
    if workers.pool == "ray" and name == "auto" and device == "cpu" and workers.num_gpus:
        raise InputError(
            f"workers.num_gpus is {workers.num_gpus:g}, but torch sees no GPU here; give the --address of a Ray "
            "cluster that has some, or leave it out."
        )
    return device


def _check_engine(config: SearchConfig) -> None:
    """Raises InputError where vLLM cannot be started."""
    from evomerge.evaluation.engine import check_interpreter

    if config.evaluation.device.startswith("cuda:"):
        raise InputError(
            f"evaluation.device is {config.evaluation.device}, but vLLM takes the first device that it sees; use cuda, "
            "and CUDA_VISIBLE_DEVICES to choose."
        )
    assert config.evaluation.vllm.python is not None  # as the config has been checked
    check_interpreter(config.evaluation.vllm.python)


def _check_quantized(config: SearchConfig) -> None:
    """Raises InputError where the config asks for quantized candidates that there cannot be."""
    hindrance = None
    if config.space.changes_layers:
        hindrance = f"space.kind is {config.space.kind}, whose candidates share most weights with the models in memory"
    elif config.evaluation.backend == "vllm":
        hindrance = "evaluation.backend is vllm, whose engine reads unquantized weights"
    elif config.optimizer.stop_after is not None:
        hindrance = "optimizer.stop_after asks for selection scores all along, which are never quantized"
    if config.evaluation.quantize is not None and hindrance is not None:
        raise InputError(f"evaluation.quantize is {config.evaluation.quantize}, but {hindrance}; remove one of them.")


def reopen(config: SearchConfig) -> Prepared:
    """The prepared search of a config that was resolved before.

    Raises InputError where models are missing or do not fit together. Tasks and settings are not checked again.
    """
    return _with_models(config, models_of(config))


def _with_models(config: SearchConfig, models: Models) -> Prepared:
    labels = {reference: f"models.{name} ({reference})" for name, reference in config.models.items()}
    one_vocabulary = config.space.tokenizer_source is None
    warnings = tuple(preflight(models, labels, same_vocabulary=one_vocabulary))
    return Prepared(config, make_space(config, models), models, warnings)


def identities(prepared: Prepared) -> dict[str, str]:
    """The identity of each model's files (`Model.identity`), by the model's key in the config."""
    keys = {"base": prepared.config.base}
    keys |= {f"models.{name}": reference for name, reference in prepared.config.models.items()}
    return {key: prepared.models[reference].identity for key, reference in keys.items()}


def resolve_shards(config: SearchConfig, parameters: int, items: int) -> int:
    """Into how many shards an evaluation is divided. `auto` makes as many as are worth sending to a worker: small
    models and few items stay whole.

    config: the search's.
    parameters: how many the base has.
    items: how many search items all tasks have together.
    """
    if config.workers.shards != "auto":
        return config.workers.shards
    return min(max(1, round(parameters * items / _WORTH_A_SHARD)), _MOST_SHARDS)


def resolve_subsets(config: SearchConfig, items: int, whole: str | None) -> bool:
    """Whether candidates are scored on subsets first.

    `auto` chooses subsets where there are enough items and the optimizer learns from the ranks within a generation
    (measured with cma_es by scripts/bench/subsets).

    config: the search's.
    items: how many search items the metric with the fewest has.
    whole: the name of a metric that is not a mean over items, if there is one.
    Raises InputError where the config asks for subsets that the search cannot use.
    """
    if config.subsets is False:
        return False
    hindrance = None
    costs = [objective.cost for objective in config.objectives if objective.cost is not None]
    of_items = [cost for cost in costs if COSTS[cost].of_items]
    own = [metric.name for metric in config.measured if metric.python is not None]
    if whole is not None:
        hindrance = f"{whole} is no mean over items"
    elif own:
        hindrance = f"{own[0]} is a function of your own, which sees all items"
    elif items == 0:
        hindrance = "there are only costs"
    elif of_items:
        hindrance = f"the cost '{of_items[0]}' depends on how many items there are"
    elif config.optimizer.schedule != "pipelined":
        hindrance = f"optimizer.schedule is {config.optimizer.schedule}, which has no generations"
    elif OPTIMIZERS[config.optimizer.name].sequential:
        hindrance = f"{config.optimizer.name} compares its few candidates on all items"
    if config.subsets is True and hindrance is not None:
        raise InputError(f"subsets is true, but {hindrance}; set it to false or auto.")
    if config.subsets is True:
        return True
    names = {config.optimizer.name, *(stage.name for stage in config.optimizer.stages if stage.name)}
    learn = all(OPTIMIZERS[name].learns_ranks for name in names)
    return hindrance is None and learn and items >= _WORTH_A_SUBSET


def _check_named_once(config: SearchConfig) -> None:
    """Raises InputError where the config names a model twice, since mergekit cannot read such a recipe."""
    seen = {config.base: "base"}
    for name, reference in config.models.items():
        if reference in seen:
            raise InputError(f"models.{name} is {reference}, which is {seen[reference]} too; name each model once.")
        seen[reference] = f"models.{name}"


def _check_vocabularies(config: SearchConfig, prepared: Prepared) -> None:
    """Raises InputError where a model that may give the embeddings or the head numbers its tokens unlike the base."""
    from evomerge.merging.sources.tokenizers import read_tokenizer

    space, models = prepared.space, prepared.models
    if not isinstance(space, DataFlowSpace):
        return
    base_vocabulary = read_tokenizer(models.base.folder).get_vocab()
    for name in space.embedding_models:
        if name not in config.models:
            continue
        with naming(f"models.{name}"):
            vocabulary = read_tokenizer(models[config.models[name]].folder).get_vocab()
        different = sorted(token for token, number in vocabulary.items() if base_vocabulary.get(token) != number)
        if different:
            token = different[0]
            raise InputError(
                f"models.{name} may give the embeddings or the head, but its tokenizer is not the base's (token "
                f"{token!r} is {vocabulary[token]} there and {base_vocabulary.get(token)} here); let another "
                "model give them."
            )


def _check_optimizer(config: SearchConfig, space: SearchSpace) -> None:
    kinds = {gene.kind for gene in space.genes}
    used = dict.fromkeys([config.optimizer.name, *(stage.name for stage in config.optimizer.stages if stage.name)])
    for check in (OPTIMIZERS[name].check for name in used):
        if check is not None:
            imported(check)(kinds)
    for index, stage in enumerate(config.optimizer.stages):
        missing = sorted(set(stage.genes) - kinds)
        if missing:
            raise InputError(
                f"optimizer.stages[{index}].genes names {missing[0]}, but the space has no such free gene; "
                f"{choices(missing[0], kinds)}."
            )


def plan_of(prepared: Prepared) -> "SearchPlan":
    """What a search takes of memory, disk and tokens, where candidates are not quantized."""
    from evomerge.workers.memory import plan_placements, unquantized

    return plan_placements(unquantized(prepared.config), prepared.space, prepared.models, prepared.targets)


def summarize(prepared: Prepared, plan: "SearchPlan | None" = None) -> dict[str, Any]:
    """What a search will take, for JSON and tables: genes, candidates, items, tokens, and memory in GiB.

    prepared: the search.
    plan: its plan, where it is there already.
    """
    from evomerge.workers.memory import plan_memory, shortage

    config, plan = prepared.config, plan or plan_of(prepared)
    loaded = prepared.models, prepared.targets
    quantized = {}
    if config.evaluation.quantize is not None:
        quantized = {"gib_per_worker_quantized": _in_gib(plan_memory(config, prepared.space, *loaded))}
    warnings = [*prepared.warnings, *filter(None, [shortage(plan.chosen), _few_generations(config)])]
    return {
        "models": {"base": config.base, **config.models},
        "parameters": sum(math.prod(info.shape) for info in prepared.models.table.values()),
        "align": {name: own.by for name, own in config.align.items()},
        "gib_of_aligned_copies": {
            name: _gib(size_in_bytes(prepared.models[config.models[name]].table))
            for name, own in config.align.items()
            if own.folder is None
        },
        "genes": dict(Counter(gene.kind for gene in prepared.space.genes)),
        "groups": dict(Counter(gene.group for gene in prepared.space.genes)),
        "starts": _starts(config, prepared.space),
        "optimizer": ", then ".join(config.optimizer.names),
        "population": config.optimizer.population,
        "candidates": config.budget,
        "generations": _generations(config),
        "equivalents": config.optimizer.equivalents,
        "rows": {"steps": config.rows.steps, "forward passes": passes_for_rows(config)}
        if config.rows is not None
        else {},
        "steps": config.optimizer.learning.steps if config.optimizer.follows_gradients else 0,
        "controls": count_controls(config),
        "objectives": {objective.name: objective.goal for objective in config.objectives},
        "metrics": {metric.name: metric.metric for metric in config.reported if metric.cost is None},
        "constraints": {
            f"{constraint.name} of {constraint.of or 'the best parent'}": constraint.retain
            for constraint in config.constraints
        },
        "report": [metric.name for metric in config.report],
        "items_per_task": {split: getattr(config.items, split) for split in config.splits},
        "device": config.evaluation.device,
        "dtype": config.evaluation.dtype,
        "prefix_sharing": config.evaluation.prefix_sharing,
        "subsets": config.subsets,
        "gib_per_worker": _in_gib(plan.chosen.worker),
        **quantized,
        "placements": [
            {
                "sources": placement.sources,
                "fields": placement.fields,
                "adapters": placement.adapters,
                "chosen": placement.chosen,
                "gib_per_worker": _gib(placement.worker.total),
                "gib_host": _gib(placement.host),
                "gib_from_disk": _gib(placement.disk),
                "gib_copied": _gib(placement.copied),
                "gib_merged": _gib(placement.moved),
                "lacking": placement.lacking,
            }
            for placement in plan.placements
        ],
        "tokens_read": plan.tokens.read,
        "tokens_written": plan.tokens.written,
        "warnings": warnings,
    }


def _generations(config: SearchConfig) -> int:
    """How many generations the budget is at most."""
    return math.ceil(config.budget / (config.optimizer.population or 1))


def _few_generations(config: SearchConfig) -> str | None:
    """A sentence where an optimizer that learns from generations sees too few of them; None elsewhere."""
    row, generations = OPTIMIZERS[config.optimizer.name], _generations(config)
    if not row.learns_ranks or generations >= _FEW_GENERATIONS:
        return None
    return (
        f"the budget of {config.budget} candidates is {generations} generation{'s' * (generations > 1)} of "
        f"{config.optimizer.population}, from which {config.optimizer.name} learns little; ask for more, or for a "
        "smaller optimizer.population."
    )


def _starts(config: SearchConfig, space: SearchSpace) -> dict[str, Any]:
    """Where a search starts, by the kind of gene: a value, the least and the largest of several, or in words."""
    if config.space.merging is None:
        return {"path": "the best of base and parents"}
    starts: dict[str, Any] = {}
    for kind in dict.fromkeys(gene.kind for gene in space.genes):
        values = [
            gene.choices[int(gene.start)] if gene.choices else gene.start for gene in space.genes if gene.kind == kind
        ]
        if kind == "weight" and start_of_weights(config) is None:
            starts[kind] = "the best of base, parents and uniform merge"
        elif len(set(values)) == 1 or isinstance(values[0], str):
            starts[kind] = values[0]
        else:
            starts[kind] = f"{min(values):g} to {max(values):g}"
    return starts


def _in_gib(plan: "MemoryPlan") -> dict[str, float]:
    return {name: _gib(size) for name, size in plan.parts().items()}


def _gib(size: float) -> float:
    return round(size / 2**30, 3)
