"""What candidates are scored on: objectives, constraints, tasks, items, and everything that changes a score."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import (
    Field,
    JsonValue,
    PrivateAttr,
    field_validator,
    model_validator,
)

from evomerge.config.base import MetricName, Name, PythonFunction, Settings
from evomerge.config.documents import shown
from evomerge.config.tables import CostName


class ScoreConfig(Settings):
    """What can be measured of a candidate: a metric of a task, or a score that a function of the user's own computes.

    task: the task's name; empty where no task is measured.
    metric: the task's metric.
    filter: the task's filter that the metric is taken after; by default its first.
    python: the function of a score of the user's own, as `MODULE:FUNCTION`. The module is a file beside the search
        file, or a path that ends in .py. `tasks.allow_code` must name the score.
    name: what such a score is called; by default as its function.
    items: the file with the items of such a score, one JSON object a line. They are divided as those of tasks are.
    arguments: further arguments of the function, by name.
    digest: a hash of the function, its file and its items, which is filled in when a search begins. Where it is given,
        other content is refused.
    """

    task: str = ""
    metric: MetricName = "acc"
    filter: str | None = None
    python: PythonFunction | None = None
    label: Name | None = Field(default=None, alias="name")
    items: str | None = None
    arguments: dict[str, JsonValue] = Field(default_factory=dict)
    digest: str | None = None
    _names_filter: bool = PrivateAttr(default=False)

    def __hash__(self) -> int:
        return hash(self.name)  # arguments cannot be hashed

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        written = [info.alias or name for name, info in _OF_OWN.items() if getattr(self, name)]
        if self.python is None and written:
            raise ValueError(f".{written[0]} is given, but only a score of your own has it; add python, or remove it")
        if self.python is not None and (self.task or self.filter is not None or self.metric != "acc"):
            raise ValueError(f".python is {self.python}, which belongs to no task; give either python or a task")
        return self

    @property
    def name(self) -> str:
        """Its name in scores: the task, or that of the user's own score. The metric follows where it is not plain
        accuracy, and metric and filter follow where a search measures the metric after several filters."""
        if self.python is not None:
            return self.label or self.function
        if self._names_filter and self.filter is not None:
            return f"{self.task}:{self.metric}:{self.filter}"
        return self.task if self.metric == "acc" else f"{self.task}:{self.metric}"

    @property
    def function(self) -> str:
        """The name of the user's own function; empty where there is none."""
        return (self.python or "").rpartition(":")[2]

    @property
    def _measurement(self) -> dict[str, Any]:
        """What says how it is measured, as fields of a score in another role."""
        return {name: getattr(self, name) for name in ScoreConfig.model_fields}


_OF_OWN = {name: ScoreConfig.model_fields[name] for name in ("label", "items", "arguments", "digest")}


def _required(score: ScoreConfig, more: str = "") -> None:
    if not score.task and score.python is None:
        raise ValueError(f".task is required but missing; add it{more}")


def _larger_is_better(value: Any) -> Any:
    """A block with the goal that a score of the user's own has by default."""
    own = isinstance(value, Mapping) and value.get("python") is not None
    return {**value, "goal": value.get("goal") or "maximize"} if own else value


class ObjectiveConfig(ScoreConfig):
    """One score to be optimized: a metric of a task, a score of the user's own, or a cost of the model.

    cost: the cost. `seconds` is the time of an evaluation: it is recorded and replayed, but another run measures
        another time. `tokens` is the mean length of the texts that the model writes in generate_until tasks.
    goal: the direction; by default what the task says of the metric. Costs are minimized, and scores of the user's own
        are maximized unless a goal is given.
    weight: the weight in means; 0 by default for a cost, which then takes no part in them.
    max: the limit of a cost; candidates above it never win.
    """

    cost: CostName | None = None
    goal: Literal["maximize", "minimize"] | None = None
    weight: float = Field(default=1.0, ge=0)
    max: float | None = Field(default=None, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError(f"{shown(value)} is only a name; write {{task: {value}}}")
        if isinstance(value, Mapping) and value.get("cost") is not None:
            return {"goal": "minimize", "weight": 0.0, **value}
        return _larger_is_better(value)

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if self.cost is None:
            _required(self, ", or a cost")
        if self.cost is None and self.weight == 0:
            raise ValueError(".weight is 0; use a value greater than 0")
        if self.cost is None and self.max is not None:
            raise ValueError(f".max is {self.max:g}, but only a cost has a limit; remove it")
        if self.cost is not None and (self.task or self.filter is not None or self.metric != "acc"):
            raise ValueError(f".cost is {self.cost}, which belongs to no task; give either a cost or a task")
        if self.cost is not None and self.python is not None:
            raise ValueError(f".cost is {self.cost}, and python is {self.python}; give either of them")
        return self

    @property
    def name(self) -> str:
        """The objective's name in scores: the cost, or as `ScoreConfig.name` says."""
        return self.cost if self.cost is not None else super().name


class ConstraintConfig(ScoreConfig):
    """A score that a candidate must keep, compared with a parent's; it need not be an objective. In the place of a task
    there may be the name of an objective of the user's own.

    goal: the direction; by default what the task says of the metric.
    retain: the share of the parent's score to keep. A score that is to be small, or that is below 0, may be worse by
        the share 1 - retain.
    of: the name of the parent, or `base`; by default the best parent on the metric.
    """

    goal: Literal["maximize", "minimize"] | None = None
    retain: float = Field(gt=0, le=1)
    of: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, value: Any) -> Any:
        return _larger_is_better(value)

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        _required(self)
        return self

    @property
    def guard(self) -> ObjectiveConfig:
        """The score as an objective, which says how it is measured."""
        guard = ObjectiveConfig(**self._measurement, goal=self.goal)
        guard._names_filter = self._names_filter
        return guard


class ReportConfig(ScoreConfig):
    """A score that is only reported: it is measured on held-out items, and decides nothing."""

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        _required(self)
        return self

    @property
    def measured(self) -> ObjectiveConfig:
        """The score as an objective, which says how it is measured."""
        measured = ObjectiveConfig(**self._measurement)
        measured._names_filter = self._names_filter
        return measured


class TasksConfig(Settings):
    """Where tasks are found, and which tasks may run code.

    paths: folders with tasks' YAML files, besides those of lm-eval.
    allow_code: the names of tasks that may run code that comes with their YAML, and of scores of the user's own.
    data_root: where data files are that do not lie beside a task's YAML file; by default the directory in which the
        search is started, as in lm-eval.
    """

    paths: tuple[str, ...] = ()
    allow_code: tuple[str, ...] = ()
    data_root: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _folders(cls, value: Any) -> Any:
        if isinstance(value, list):
            raise ValueError("it is a list, but holds where tasks are found (paths); list the tasks in objectives")
        return value


class ItemsConfig(Settings):
    """How many items the search and the report see; they never see the same items.

    A task with a validation and a test split is searched on the first and reported on the second. The items of any
    other task are divided at random.

    search: how many items of a task the search sees; None for all of its side.
    selection: how many items of a task decide which candidate of the front is the best; false where the search items
        decide. They are those that the search leaves, or come from the split that the task keeps for them. By default a
        search that follows gradients takes some, and any other search none.
    heldout: how many items of a task the report sees; None for all of its side.
    search_fraction: the share of a divided task's items that is for the search.
    seed: of the division.
    """

    search: int | None = Field(default=None, ge=1)
    selection: int | Literal[False] | None = None
    heldout: int | None = Field(default=None, ge=1)
    search_fraction: float = Field(default=0.5, gt=0, lt=1)
    seed: int = Field(default=0, ge=0)

    @field_validator("selection", mode="before")
    @classmethod
    def _some_or_false(cls, value: Any) -> Any:
        """Tells false from 0, and true from 1."""
        if value is None or value is False or (isinstance(value, int) and value is not True and value > 0):
            return value
        raise ValueError(f"it is {shown(value)}; use a whole number of at least 1, or false")


class StatisticsConfig(Settings):
    """What is measured of models for the methods that need it: on which items, and how.

    By default every model is measured on the reference answers to the search items of all tasks.

    tasks: the tasks whose search items a model is measured on, by the model's name.
    texts: a file of texts to measure on instead, or such a file for each model by its name: one text on a line, or JSON
        lines with a `text`. Models that are not named are measured on items.
    items: at most how many items of a task, or texts of a file, are used.
    length: how many tokens of a text are used.
    labels: of what Fisher information is taken: the likelihood of `reference` answers, or of answers that are `drawn`
        from the model's own predictions.
    """

    tasks: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    texts: str | dict[str, str] | None = None
    items: int = Field(default=128, ge=1)
    length: int = Field(default=512, ge=2)
    labels: Literal["reference", "drawn"] = "reference"

    def file_of(self, model: str) -> str | None:
        """The file of texts that a model is measured on; None where it is measured on items.

        model: its name in the search file, or `base`.
        """
        return self.texts.get(model) if isinstance(self.texts, dict) else self.texts


class AlignConfig(Settings):
    """How a model that was trained apart from the base is brought next to it: its places are put into the base's order,
    and it computes what it computed before.

    by: what is compared: `weights`, or the `activations` on what statistics of the model are measured on.
    folder: where the aligned model is; by default a run writes it into its directory before the search begins.
    """

    by: Literal["weights", "activations"]
    folder: str | None = None


class VllmConfig(Settings):
    """vLLM, which runs in an environment of its own.

    python: the interpreter of the environment.
    cache_gib: memory for keys and values, in GiB.
    eager: whether nothing is compiled, so that vLLM starts sooner and writes more slowly.
    """

    python: str | None = None
    cache_gib: float = Field(default=4, gt=0)
    eager: bool = False


class EvaluationConfig(Settings):
    """Everything that changes the floating-point results of a score, frozen with the search, and where models live,
    which may change.

    What is not set here is as in lm-eval 0.4.13, with two exceptions: log-probabilities are taken in float32 whatever
    the model's dtype, and sampled texts start from the same seed for every candidate.

    device: `auto`, `cpu`, or an accelerator that torch knows, such as `cuda`, `cuda:N`, `mps` or `xpu`; `auto` is the
        accelerator where there is one, and under Ray what the cluster has.
    dtype: the dtype of models in memory; `auto` is the one that most of the base's tensors are stored in.
    batch_size: how many rows a model reads at a time.
    threads: CPU threads of a worker.
    quantize: `int8` keeps the linear layers of candidates in 8 bits while the search goes on, for cards with little
        memory. The best of them are then scored again unquantized, and only such scores choose among them.
    compile: whether merges run as compiled code; `auto` compiles those of large models on CPUs that have a compiler,
        where the bits are those of uncompiled code.
    sources: where the models that are merged live, which changes no bit: on the `device` where they are merged, once
        per worker; in memory of the `host` that the workers of a node share, from which chunks are copied to the
        device; or on the `disk`, from which every merge reads them again. `auto` is the first of these that fits.
    fields: whether the random numbers of DARE and DELLA, and what else is kept for each weight, are `kept` for all
        candidates or `made` again for each of them, which changes no bit. `auto` keeps them where they fit.
    adapters: whether a LoRA is kept as its `factors`, of which weights are made in every merge, or `expanded` to a
        model of its own, which changes no bit. `auto` expands adapters where they fit, since merges then take less
        time, and keeps factors where sources are copied to a device.
    num_fewshot: how many examples precede a question; None for what a task says.
    apply_chat_template: whether prompts are put into the model's chat template.
    fewshot_as_multiturn: whether few-shot examples are turns of their own; by default they are where a chat template is
        applied, as in lm-eval.
    system_instruction: a text that precedes every prompt.
    generation_kwargs: settings of generate_until tasks, which take precedence over those in the tasks' files.
    prefix_sharing: whether the options of a document share one row, separated by a mask; `auto` is `mask` where the
        base's architecture takes such masks.
    backend: what writes the texts of generate_until tasks; log-likelihoods always come from transformers.
    vllm: the settings of vLLM.
    """

    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    batch_size: int = Field(default=128, ge=1)
    threads: int = Field(default=1, ge=1)
    quantize: Literal["int8"] | None = None
    compile: bool | Literal["auto"] = "auto"
    sources: Literal["auto", "device", "host", "disk"] = "auto"
    fields: Literal["auto", "kept", "made"] = "auto"
    adapters: Literal["auto", "factors", "expanded"] = "auto"
    num_fewshot: int | None = Field(default=None, ge=0)
    apply_chat_template: bool = False
    fewshot_as_multiturn: bool | None = None
    system_instruction: str | None = None
    generation_kwargs: dict[str, bool | int | float | str | list[str] | None] = Field(default_factory=dict)
    prefix_sharing: Literal["auto", "mask", "none"] = "auto"
    backend: Literal["hf", "vllm"] = "hf"
    vllm: VllmConfig = VllmConfig()

    @property
    def multiturn(self) -> bool:
        """Whether few-shot examples are turns of their own."""
        return self.apply_chat_template if self.fewshot_as_multiturn is None else self.fewshot_as_multiturn

    @model_validator(mode="after")
    def _interpreter(self) -> Self:
        if self.backend == "vllm" and self.vllm.python is None:
            raise ValueError(
                ".vllm.python is missing, but backend is vllm; name the interpreter of an environment that has vLLM"
            )
        return self
