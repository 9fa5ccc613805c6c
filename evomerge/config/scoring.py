"""What candidates are scored on: objectives, constraints, tasks, items, and everything that changes a score."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import (
    Field,
    PrivateAttr,
    field_validator,
    model_validator,
)

from evomerge.config.base import MetricName, Settings
from evomerge.config.documents import shown
from evomerge.config.tables import CostName


class ObjectiveConfig(Settings):
    """One score to be optimized: a metric of a task, or a cost of the model.

    task: the task's name; empty for a cost.
    metric: the task's metric.
    filter: the task's filter that the metric is taken after; by default its first.
    cost: the cost. `seconds` is the time of an evaluation: it is recorded and replayed, but another run measures
        another time.
    goal: the direction; by default what the task says of the metric. Costs are minimized.
    weight: the weight in means; 0 by default for a cost, which then takes no part in them.
    max: the limit of a cost; candidates above it never win.
    """

    task: str = ""
    metric: MetricName = "acc"
    filter: str | None = None
    cost: CostName | None = None
    goal: Literal["maximize", "minimize"] | None = None
    weight: float = Field(default=1.0, ge=0)
    max: float | None = Field(default=None, gt=0)
    _names_filter: bool = PrivateAttr(default=False)

    @model_validator(mode="before")
    @classmethod
    def _cost(cls, value: Any) -> Any:
        if isinstance(value, str):
            raise ValueError(f"{shown(value)} is only a name; write {{task: {value}}}")
        if isinstance(value, Mapping) and value.get("cost") is not None:
            return {"goal": "minimize", "weight": 0.0, **value}
        return value

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if self.cost is None and not self.task:
            raise ValueError(".task is required but missing; add it, or a cost")
        if self.cost is None and self.weight == 0:
            raise ValueError(".weight is 0; use a value greater than 0")
        if self.cost is None and self.max is not None:
            raise ValueError(f".max is {self.max:g}, but only a cost has a limit; remove it")
        if self.cost is not None and (self.task or self.filter is not None or self.metric != "acc"):
            raise ValueError(f".cost is {self.cost}, which belongs to no task; give either a cost or a task")
        return self

    @property
    def name(self) -> str:
        """The objective's name in scores: the cost or the task. The metric follows where it is not plain accuracy, and
        metric and filter follow where a search measures the metric after several filters."""
        if self.cost is not None:
            return self.cost
        if self._names_filter and self.filter is not None:
            return f"{self.task}:{self.metric}:{self.filter}"
        return self.task if self.metric == "acc" else f"{self.task}:{self.metric}"


class ConstraintConfig(Settings):
    """A score that a candidate must keep, compared with a parent's; the metric need not be an objective.

    task: the task's name.
    metric: the task's metric.
    filter: the task's filter that the metric is taken after; by default its first.
    goal: the direction; by default what the task says of the metric.
    retain: the share of the parent's score to keep. A score that is to be small, or that is below 0, may be worse by
        the share 1 - retain.
    of: the name of the parent, or `base`; by default the best parent on the metric.
    """

    task: str
    metric: MetricName = "acc"
    filter: str | None = None
    goal: Literal["maximize", "minimize"] | None = None
    retain: float = Field(gt=0, le=1)
    of: str | None = None
    _names_filter: bool = PrivateAttr(default=False)

    @property
    def guard(self) -> ObjectiveConfig:
        """The metric as an objective, which says how it is measured."""
        guard = ObjectiveConfig(task=self.task, metric=self.metric, filter=self.filter, goal=self.goal)
        guard._names_filter = self._names_filter
        return guard

    @property
    def name(self) -> str:
        """The name of the metric in scores, as an objective would have it."""
        return self.guard.name


class ReportConfig(Settings):
    """A score that is only reported: it is measured on held-out items, and decides nothing.

    task: the task's name.
    metric: the task's metric.
    filter: the task's filter that the metric is taken after; by default its first.
    """

    task: str
    metric: MetricName = "acc"
    filter: str | None = None
    _names_filter: bool = PrivateAttr(default=False)

    @property
    def measured(self) -> ObjectiveConfig:
        """The metric as an objective, which says how it is measured."""
        measured = ObjectiveConfig(task=self.task, metric=self.metric, filter=self.filter)
        measured._names_filter = self._names_filter
        return measured

    @property
    def name(self) -> str:
        """The name of the metric in scores, as an objective would have it."""
        return self.measured.name


class TasksConfig(Settings):
    """Where tasks are found, and which tasks may run code.

    paths: folders with tasks' YAML files, besides those of lm-eval.
    allow_code: the names of tasks that may run code that comes with their YAML.
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
    sources: where the models that are merged live, which changes no bit. `device` holds them where they are merged,
        once per worker. `host` maps them into memory that the workers of a node share, and copies chunks to the device.
        `disk` maps them, too, and gives the memory back behind the merge. `auto` is the first of these that fits.
    fields: whether the random numbers of DARE and DELLA, and what else is kept for each weight, are `kept` for all
        candidates or `made` again for each of them, which changes no bit. `auto` keeps them where they fit.
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
