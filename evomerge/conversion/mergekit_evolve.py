"""Configs of mergekit-evolve as search files.

What mergekit-evolve does is stated where it decides something: weights start at 1 divided by the number of models,
densities at 1, and both are unbounded there, with absolute values of densities cut at 1.
"""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from evomerge.config.base import Settings
from evomerge.config.documents import shown, validate
from evomerge.conversion.draft import Draft, Folder, named
from evomerge.conversion.options import FEVALS, SIGMA, Options
from evomerge.dialect import Warn, as_it_is, block, each, reference
from evomerge.errors import InputError, choices, naming

METHODS = ("linear", "task_arithmetic", "ties", "dare_ties", "slerp")
SPARSE = ("ties", "dare_ties")
_NEED_A_BASE = ("task_arithmetic", *SPARSE)
_NORMALIZED = ("linear", *SPARSE)  # unless the file says otherwise
_WIDEST = 1.5
_LEAST_DENSITY = 0.01  # a search has no density of 0
_FIRST_FILTER = "none"  # lm-eval's name for the only filter of a task without any


class Genome(Settings):
    """What may vary, as mergekit-evolve has it."""

    models: tuple[str, ...] = Field(min_length=1)
    merge_method: str
    base_model: str | None = None
    tokenizer_source: str | None = None
    layer_granularity: int = 0
    normalize: bool | None = None
    allow_negative_weights: bool = False
    filters: tuple[str, ...] = ()
    smooth: bool = False

    @field_validator("merge_method")
    @classmethod
    def _known(cls, method: str) -> str:
        if method not in METHODS:
            raise ValueError(f"is '{method}', which mergekit-evolve does not search; {choices(method, METHODS)}")
        return method

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.merge_method in _NEED_A_BASE and self.base_model is None:
            raise ValueError(f".base_model is missing, but merge_method is {self.merge_method}; add it")
        return self


class Task(Settings):
    """A task of the sum that mergekit-evolve maximizes."""

    name: str = Field(min_length=1)
    weight: float = 1.0
    metric: str = "acc,none"

    @property
    def measured(self) -> tuple[str, str | None]:
        """The metric, and the filter if it is not the first."""
        metric, _, named_filter = self.metric.partition(",")
        return metric, named_filter if named_filter not in ("", _FIRST_FILTER) else None


class EvolveConfig(Settings):
    """A config of mergekit-evolve."""

    genome: Genome
    tasks: tuple[Task, ...] = Field(min_length=1)
    limit: int | None = None
    num_fewshot: int | None = None
    shuffle: bool = False
    random_init: bool = False
    apply_chat_template: bool = True
    fewshot_as_multiturn: bool = True


def _task(value: Any, key: str, warn: Warn) -> Any:
    """A task by its name alone, or as a mapping."""
    return {"name": value} if isinstance(value, str) else _TASK(value, key, warn)


_TASK = block(dict.fromkeys(Task.model_fields, as_it_is))
_GENOME = block(
    dict.fromkeys(Genome.model_fields, as_it_is) | {"models": each(reference), "base_model": reference},
)
_CONFIG = block(dict.fromkeys(EvolveConfig.model_fields, as_it_is) | {"genome": _GENOME, "tasks": each(_task)})


def draft_of(document: Mapping[str, Any], where: str, options: Options, folder: Folder) -> Draft:
    """The search file that searches what a config of mergekit-evolve does.

    document: the content of the config.
    where: its file, for messages.
    options: what stood on the command line.
    folder: where the search file will lie.
    Raises InputError for a config that mergekit-evolve does not take either, and for one that names no base where a
    search needs one.
    """
    draft = Draft()
    ignored: list[str] = []
    with naming(where):
        content = _CONFIG(document, "", ignored.append)
    config = validate(EvolveConfig, content, where)
    if options.tasks:
        raise InputError(
            f"--task {options.tasks[0]}: {where} names its own tasks; add it there, or to the search file."
        )
    for sentence in ignored:
        draft.lose("", sentence)
    method = _models(draft, config.genome, options, folder, where)
    _tasks(draft, config, options, folder, where)
    _items(draft, config)
    _space(draft, config.genome, method, options)
    _optimizer(draft, config, options, method)
    _evaluation(draft, config, options)
    running(draft, options)
    return draft


def _models(draft: Draft, genome: Genome, options: Options, folder: Folder, where: str) -> str:
    """Writes the base and the models. Returns the merge method, which without a base is another one."""
    listed = list(dict.fromkeys(genome.models))
    if len(listed) < len(genome.models):
        draft.lose("models", "A model is listed more than once in genome.models; here it counts once.")
    given = options.base or genome.base_model
    base = given or listed[0]
    others = [model for model in listed if model != base]
    if not others:
        raise InputError(f"{where}: genome.models has no model but the base, {base}; add the models to merge.")
    draft.settings["base"] = folder.relocated(base)
    draft.settings["models"] = {name: folder.relocated(model) for name, model in named(others).items()}
    if given is None:
        draft.say(
            "base",
            f"genome.base_model is not set, but a search needs a base. The first of genome.models was taken, {base}; "
            "`evomerge convert --base MODEL` takes another.",
        )
    if genome.merge_method == "linear" and base in listed:
        _averaged(draft, genome)
        return "task_arithmetic"
    if base in listed and genome.merge_method != "slerp":
        draft.say(
            "models", f"genome.models also lists the base, {base}, which has no task vector: it changes no merge."
        )
    return genome.merge_method


def _averaged(draft: Draft, genome: Genome) -> None:
    """Says why an average in which the base takes part becomes task arithmetic."""
    draft.say(
        "space",
        "The base is one of the averaged models, and a search names each model once. The average with weights that "
        "sum to 1 is the base plus weighted task vectors of the others, so the method is task_arithmetic instead of "
        "linear; the base has the rest of the weight.",
    )
    if genome.normalize is False:
        draft.lose("space", "normalize is false: sums of weights other than 1 cannot be searched in this form.")


def _tasks(draft: Draft, config: EvolveConfig, options: Options, folder: Folder, where: str) -> None:
    """Writes tasks' folders, objectives, and what has no weight as reported."""
    if options.task_paths:
        draft.settings["tasks"] = {"paths": [folder.place(path, is_path=True) for path in options.task_paths]}
    else:
        draft.say(
            "objectives",
            "Tasks that do not come with lm-eval need their folder: tasks: {paths: [FOLDER]}. On the command line of "
            "mergekit-evolve it is --task-search-path.",
        )
    weights: dict[tuple[str, str, str | None], float] = {}
    for task in config.tasks:
        key = (task.name, *task.measured)
        weights[key] = weights.get(key, 0.0) + task.weight
    if len(weights) < len(config.tasks):
        draft.say("objectives", "A metric that tasks lists more than once has the sum of its weights.")
    objectives = [_objective(*key, weight) for key, weight in weights.items() if weight]
    if not objectives:
        raise InputError(f"{where}: tasks have no weight but 0; give at least one another weight.")
    draft.settings["objectives"] = objectives
    draft.say(
        "objectives",
        "mergekit-evolve maximizes the sum of weighted scores. A negative weight there is goal: minimize here.",
    )
    unweighted = [_metric(*key) for key, weight in weights.items() if not weight]
    if unweighted:
        draft.settings["report"] = unweighted
        draft.say("report", "Tasks with weight 0 decide nothing; they are reported on held-out items.")


def _metric(task: str, metric: str, named_filter: str | None) -> dict[str, Any]:
    written = {"task": task} | ({"metric": metric} if metric != "acc" else {})
    return written | ({"filter": named_filter} if named_filter else {})


def _objective(task: str, metric: str, named_filter: str | None, weight: float) -> dict[str, Any]:
    goal = "minimize" if weight < 0 else "maximize"
    written = {**_metric(task, metric, named_filter), "goal": goal}
    return written | ({"weight": abs(weight)} if abs(weight) != 1 else {})


def _items(draft: Draft, config: EvolveConfig) -> None:
    if config.limit is not None and config.limit > 0:
        draft.settings["items"] = {"search": config.limit}
        draft.say(
            "items",
            f"limit is {config.limit}: so many items of each task are searched on, drawn with a seed (there: the first "
            "ones). The others are held out for the report.",
        )
    elif config.limit is not None:
        draft.lose("items", f"limit is {config.limit}, which limits nothing.")
    if config.limit is None:
        draft.say(
            "",
            "limit is not set: mergekit-evolve searches on all items of a task. A search keeps items for its report: "
            "where a task has only one split, half of it, unless items says otherwise.",
        )
    if config.shuffle:
        draft.say("items", "shuffle: the items of a search are always drawn at random, the same for every candidate.")


def _space(draft: Draft, genome: Genome, method: str, options: Options) -> None:
    space: dict[str, Any] = {"method": method}
    draft.settings["space"] = space
    if genome.layer_granularity > 0:
        space["layer_granularity"] = genome.layer_granularity
    if method == "slerp":
        _slerp(draft, genome)
    else:
        space |= _filters(draft, genome) | _numbers(draft, genome, method, options)
    draft.say("space", "The embeddings, and the final norm with the head, have genes of their own here, unlike there.")
    if genome.smooth and genome.layer_granularity > 0 and method != "slerp":
        draft.lose("space", "smooth: numbers are the same in a run of layers here, and not interpolated between them.")
    if genome.tokenizer_source not in (None, "base"):
        draft.lose(
            "space",
            f"tokenizer_source is {shown(genome.tokenizer_source)}: candidates of a search have the base's tokenizer. "
            "The exported recipe may get another one.",
        )


def _filters(draft: Draft, genome: Genome) -> dict[str, Any]:
    """The filters, if any, up to the one that matches every tensor, without repetitions."""
    filters = list(dict.fromkeys(genome.filters))
    every = next((index for index, text in enumerate(filters) if text in ("", "*")), len(filters))
    if every < len(genome.filters):
        draft.say("space", "filters that no tensor would reach are left out: the first one that matches counts.")
    return {"filters": filters[:every]} if every else {}


def _numbers(draft: Draft, genome: Genome, method: str, options: Options) -> dict[str, Any]:
    """Weights, densities and what goes with them."""
    step = _rounded(options.sigma or SIGMA)
    start = _rounded(1 / len(genome.models))
    high = _rounded(max(_WIDEST, start + 3 * step))
    numbers: dict[str, Any] = {
        "weight": {"low": -high if genome.allow_negative_weights else 0.0, "high": high, "start": start, "step": step}
    }
    draft.say(
        "space",
        f"Weights start at 1/{len(genome.models)} as there, but have bounds here; widen them where the best candidates "
        "touch them.",
    )
    if method in SPARSE:
        numbers["density"] = {"low": _LEAST_DENSITY, "high": 1.0, "start": 1.0, "step": step}
    normalize = genome.merge_method in _NORMALIZED if genome.normalize is None else genome.normalize
    if method == genome.merge_method:
        numbers["normalize"] = normalize
    if method == "dare_ties":
        numbers["rescale"] = "l1"
        draft.say("space", "rescale: l1 is how mergekit rescales sparsified task vectors.")
    return numbers


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _slerp(draft: Draft, genome: Genome) -> None:
    """Between which models slerp goes is a gene here where there are more than two."""
    for key in ("smooth", "filters"):
        if getattr(genome, key):
            draft.lose("space", f"{key}: mergekit-evolve refuses it with slerp, so it is left out.")
    draft.settings["space"]["parameters"] = {"slerp": {"t": {"start": 0.5}}}
    if len(draft.settings["models"]) > 1:
        draft.lose(
            "space",
            "mergekit-evolve chooses two of the models anew for each run of layers. Here genes choose them once for "
            "the whole merge, and t varies by run of layers.",
        )
    if genome.base_model is not None and genome.base_model not in genome.models:
        draft.say("space", "A merge may also start from the base here, which takes no part there.")


def _optimizer(draft: Draft, config: EvolveConfig, options: Options, method: str) -> None:
    chosen = method == "slerp" and len(draft.settings["models"]) > 1
    optimizer: dict[str, Any] = {
        "name": "cat_cma" if chosen else "cma_es",
        "evaluations": options.max_fevals or FEVALS,
        "ranking": "weighted_sum",
    }
    if options.population is not None:
        optimizer["population"] = max(4, options.population)
    draft.settings["optimizer"] = optimizer
    draft.say(
        "optimizer",
        "CMA-ES on the weighted sum, as there. `name: auto` without ranking is what evomerge would choose itself.",
    )
    if options.max_fevals is None:
        draft.say("optimizer", f"evaluations: {FEVALS} is the default of --max-fevals.")
    if options.population is not None and options.population < 4:
        draft.lose("optimizer", f"--force-population-size is {options.population}; the smallest generation here has 4.")
    if config.random_init:
        draft.lose("optimizer", "random_init: a search starts at space.weight.start and the like, never at random.")


def _evaluation(draft: Draft, config: EvolveConfig, options: Options) -> None:
    evaluation: dict[str, Any] = {"dtype": "bfloat16", "apply_chat_template": config.apply_chat_template}
    draft.settings["evaluation"] = evaluation
    draft.say("evaluation", "mergekit-evolve merges and evaluates in bfloat16.")
    if config.apply_chat_template:
        evaluation["fewshot_as_multiturn"] = config.fewshot_as_multiturn
        draft.say(
            "evaluation",
            "apply_chat_template is on there by default; the base's tokenizer needs a template, so set it to false for "
            "a base without one.",
        )
    if config.num_fewshot is not None and config.num_fewshot >= 0:
        evaluation["num_fewshot"] = config.num_fewshot
    elif config.num_fewshot is not None:
        draft.lose("evaluation", f"num_fewshot is {config.num_fewshot}; a search takes the tasks' own number.")
    if options.batch_size is not None:
        evaluation["batch_size"] = options.batch_size


def running(draft: Draft, options: Options) -> None:
    """Writes workers and seed, and says what options have no counterpart."""
    workers: dict[str, Any] = {"pool": "local" if options.strategy == "serial" else "ray"}
    if options.num_gpus and options.strategy != "serial":
        workers |= {"count": options.num_gpus, "num_gpus": 1}
    draft.settings["workers"] = workers
    if options.strategy is not None:
        draft.say("workers", f"--strategy {options.strategy}: {_STRATEGIES[options.strategy]}")
    if options.num_gpus and options.strategy == "serial":
        draft.lose("workers", "--num-gpus: a search in one process uses one device, evaluation.device.")
    if options.in_memory:
        draft.say("workers", "--in-memory: candidates are always merged in memory.")
    draft.settings["seed"] = options.seed or 0
    for asked, sentence in (
        (options.timeout is not None, "--timeout: stop a search with Ctrl-C, and go on with `evomerge resume`."),
        (
            options.vllm,
            "--vllm: vLLM needs the interpreter of its own environment. Add backend: vllm and vllm: {python: PATH} to "
            "evaluation.",
        ),
        (options.load_in_4bit, "--load-in-4bit: candidates are scored at evaluation.dtype, never quantized."),
        (options.load_in_8bit, "--load-in-8bit: candidates are scored at evaluation.dtype, never quantized."),
        (options.trust_remote_code, "--trust-remote-code: code that comes with a model never runs."),
        (options.allow_crimes, "--allow-crimes: models of different architectures are refused."),
    ):
        if asked:
            draft.lose("", sentence)
    if options.unneeded:
        draft.say("", f"A search needs nothing of {', '.join(options.unneeded)}.")


_STRATEGIES = {
    "pool": "a pool of Ray's workers, in generations that overlap.",
    "buffered": "a pool of Ray's workers, in generations that overlap; nothing is buffered on disk.",
    "serial": "one candidate after another, in the process itself.",
}
