"""SearchConfig: the content of a search file, checked key by key and frozen.

`files.load` reads YAML, applies `--set` overrides, and reports the first problem with its file and key path.
`preparation` fills in what the machine or the search space decides (device, population, covariance), so that the frozen
copy in a run directory says everything that the archive depends on. Paths are relative to the search file.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import (
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from evomerge.config.base import RESERVED_NAMES, SPLITS, Name, Settings, Split
from evomerge.config.running import ControlsConfig, LearningConfig, OptimizerConfig, WorkersConfig
from evomerge.config.scoring import (
    AlignConfig,
    ConstraintConfig,
    EvaluationConfig,
    ItemsConfig,
    ObjectiveConfig,
    ReportConfig,
    ScoreConfig,
    StatisticsConfig,
    TasksConfig,
)
from evomerge.config.spaces import ParameterSpaceConfig, PostConfig, RowsConfig
from evomerge.config.storage_url import refuse_password
from evomerge.config.tables import AnySpaceConfig, TrackerName
from evomerge.errors import choices


class SearchConfig(Settings):
    """One search.

    base: the reference of the base model.
    models: the references of the models to merge, by name.
    objectives: the scores to be optimized, at least one.
    constraints: the scores to be kept.
    report: the scores to be shown beside the others at the end; the search does not see them.
    tasks: where tasks are found.
    items: how many items the search and the report see.
    statistics: what is measured of models for methods that need it.
    align: the models that were trained apart from the base, and how each is brought next to it before the search. A way
        alone (`weights` or `activations`) stands for all models.
    space: what may vary.
    optimizer: how genomes are proposed.
    subsets: whether candidates are scored on a few search items first, and on all only where they may then become the
        best or join the front; `auto` does this where it saves work (`preparation`). Where a search is extended, a
        generation that the budget had cut short may have sent on other candidates than the whole one would.
    controls: what the search must beat.
    evaluation: what changes the results of a score.
    workers: where candidates are evaluated.
    seed: of all random numbers of the search, and of the masks in its recipes.
    storage: the URL of a shared storage; None for a database in the run directory.
    trackers: the programs that are told of the search while it runs, such as `tensorboard` or `wandb`.
    """

    base: str
    models: dict[Name, str]
    objectives: tuple[ObjectiveConfig, ...] = Field(min_length=1)
    constraints: tuple[ConstraintConfig, ...] = ()
    report: tuple[ReportConfig, ...] = ()
    tasks: TasksConfig = TasksConfig()
    items: ItemsConfig = ItemsConfig()
    statistics: StatisticsConfig = StatisticsConfig()
    align: dict[str, AlignConfig] = Field(default_factory=dict)
    space: AnySpaceConfig = ParameterSpaceConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    subsets: bool | Literal["auto"] = "auto"
    controls: ControlsConfig = ControlsConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    workers: WorkersConfig = WorkersConfig()
    seed: int = Field(default=0, ge=0, lt=2**63)
    storage: str | None = None
    trackers: tuple[TrackerName, ...] = ()

    @field_validator("models", mode="before")
    @classmethod
    def _named_models(cls, value: Any) -> Any:
        """Names the models of a plain list by the last part of their references; an adapter's name counts before the
        model's."""
        if not isinstance(value, list):
            return value
        if any(isinstance(item, Mapping) and "model" in item for item in value):
            raise ValueError("they are listed as in a merge recipe; write NAME: MODEL for each, without its parameters")
        if not all(isinstance(item, str) for item in value):
            return value
        paths = [item.rpartition("+")[2].partition("@")[0] for item in value]
        names = [Path(path.removeprefix("zoo:")).name for path in paths]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"two of them would be called {repeated[0]}; give them names (name: path)")
        return dict(zip(names, value, strict=True))

    @field_validator("align", mode="before")
    @classmethod
    def _ways(cls, value: Any, info: ValidationInfo) -> Any:
        """Reads a way alone as that of every model, and that of a model as its block."""
        if isinstance(value, str):
            value = dict.fromkeys(info.data.get("models", {}), value)
        if not isinstance(value, dict):
            return value
        return {name: {"by": own} if isinstance(own, str) else own for name, own in value.items()}

    @field_validator("storage")
    @classmethod
    def _no_password(cls, value: str | None) -> str | None:
        return refuse_password(value) if value is not None else None

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if not self.models and self.space.merging is not None:
            raise ValueError(".models is {}; give at least one")
        device, gpus = self.evaluation.device, self.workers.num_gpus or 0
        if gpus > 1 and ":" in device:
            raise ValueError(
                f".evaluation.device is {device}, but workers.num_gpus is {gpus:g}; use "
                f"{device.partition(':')[0]} for several"
            )
        if all(objective.weight == 0 for objective in self.objectives):
            raise ValueError(".objectives are all costs; add a task, or give a cost a weight")
        return self

    @model_validator(mode="after")
    def _aligned(self) -> Self:
        for name in self.align:
            if name not in self.models:
                raise ValueError(f".align.{name} is no model; {choices(name, self.models)}")
        return self

    @model_validator(mode="after")
    def _layers(self) -> Self:
        if self.evaluation.backend == "vllm" and self.space.changes_layers:
            raise ValueError(
                f".evaluation.backend is vllm, whose engine has the base's layers only, but space.kind is "
                f"{self.space.kind}; use backend: hf"
            )
        return self

    @model_validator(mode="after")
    def _named_by_filter(self) -> Self:
        """Puts the filter into the names of metrics that are measured after several filters."""
        measured: list[ObjectiveConfig | ConstraintConfig] = [*self.constraints]
        measured = [metric for metric in [*measured, *self.objectives] if metric.task]
        filters: dict[tuple[str, str], set[str | None]] = {}
        for metric in measured:
            filters.setdefault((metric.task, metric.metric), set()).add(metric.filter)
        for metric in measured:
            metric._names_filter = len(filters[metric.task, metric.metric]) > 1
        reported = [shown for shown in self.report if shown.task]
        for shown in reported:  # which must not change the names of the others
            filters.setdefault((shown.task, shown.metric), set()).add(shown.filter)
        for shown in reported:
            shown._names_filter = len(filters[shown.task, shown.metric]) > 1
        return self

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        names = [objective.name for objective in self.objectives]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise ValueError(f".objectives[{index}] is {name} again; name each objective once")
        names = [metric.name for metric in self.reported]
        for index, name in enumerate(names[len(self.measured) :]):
            if name in names[: len(self.measured) + index]:
                raise ValueError(f".report[{index}] is {name}, which is reported anyway; remove it")
        for name in sorted(RESERVED_NAMES & set(self.models)):
            raise ValueError(f".models.{name}: this name is kept for a control; choose another")
        return self

    @model_validator(mode="after")
    def _constrained(self) -> Self:
        for index, constraint in enumerate(self.constraints):
            names = ["base", *self.models]
            if constraint.of is not None and constraint.of not in names:
                raise ValueError(
                    f".constraints[{index}].of is {constraint.of}, which is no parent; {choices(constraint.of, names)}"
                )
        return self

    @model_validator(mode="after")
    def _allowed(self) -> Self:
        """Refuses scores of the user's own that may not run, and two of one name."""
        own: dict[str, ScoreConfig] = {}
        for key in ("objectives", "constraints", "report"):
            scores: Sequence[ScoreConfig] = getattr(self, key)
            for index, score in enumerate(scores):
                if score.python is None:
                    continue
                if score.name not in self.tasks.allow_code:
                    raise ValueError(
                        f".{key}[{index}].python is {score.python}, which runs code; read it, and if you trust it add "
                        f"'{score.name}' to tasks.allow_code"
                    )
                first = own.setdefault(score.name, score)
                if first._measurement != score._measurement:
                    raise ValueError(
                        f".{key}[{index}] is another score with the name {score.name}; give each a name of its own"
                    )
        for key in ("objectives", "report"):
            for index, score in enumerate(getattr(self, key)):
                if score.python is None and score.name in own:
                    raise ValueError(
                        f".{key}[{index}] is {score.name}, which is the name of a score of your own, too; give that "
                        "another name"
                    )
        return self

    @property
    def own(self) -> tuple[ObjectiveConfig, ...]:
        """The scores that functions of the user's own compute."""
        return tuple(metric for metric in self.reported if metric.python is not None)

    def with_own(self, change: Callable[[ScoreConfig], Mapping[str, Any]]) -> Self:
        """A copy with other values in all blocks of the user's own scores.

        change: the new values of a block, by field.
        """
        changed = {
            key: tuple(
                score if score.python is None else score.model_copy(update=dict(change(score)))
                for score in getattr(self, key)
            )
            for key in ("objectives", "constraints", "report")
        }
        return self.model_copy(update=changed)

    @model_validator(mode="after")
    def _measured_on(self) -> Self:
        names, tasks = ["base", *self.models], [metric.task for metric in self.measured if metric.task]
        texts = self.statistics.texts if isinstance(self.statistics.texts, dict) else {}
        for key, named in (("tasks", self.statistics.tasks), ("texts", texts)):
            for name in named:
                if name not in names:
                    raise ValueError(f".statistics.{key}.{name} is no model; {choices(name, names)}")
        for name, chosen in self.statistics.tasks.items():
            for task in chosen:
                if task not in tasks:
                    raise ValueError(
                        f".statistics.tasks.{name} names {task}, which is no objective; {choices(task, tasks)}"
                    )
        return self

    @property
    def measured(self) -> tuple[ObjectiveConfig, ...]:
        """Every metric that an evaluation measures: the objectives, then the metrics of constraints alone."""
        by_name = {objective.name: objective for objective in self.objectives}
        for constraint in self.constraints:
            by_name.setdefault(constraint.name, constraint.guard)
        return tuple(by_name.values())

    @property
    def reported(self) -> tuple[ObjectiveConfig, ...]:
        """Every metric that is measured on held-out items: those of `measured`, then those that are only reported."""
        return (*self.measured, *(metric.measured for metric in self.report))

    @property
    def places(self) -> tuple[str, ...]:
        """Where the search file names each metric of `reported`, such as `objectives[0]`."""
        measured: dict[str, str] = {}
        for key in ("objectives", "constraints"):
            for index, metric in enumerate(getattr(self, key)):
                measured.setdefault(metric.name, f"{key}[{index}]")
        return (*measured.values(), *(f"report[{index}]" for index in range(len(self.report))))

    @property
    def splits(self) -> tuple[Split, ...]:
        """The splits that items are divided into, in the order in which they are scored."""
        return SPLITS if self.items.selection else ("search", "heldout")

    @property
    def budget(self) -> int:
        """How many search candidates there can be, and how many random search has. Some optimizers end before
        `optimizer.evaluations`."""
        row = self.optimizer.row
        equivalents = self.optimizer.equivalents
        asked = self.optimizer.evaluations if equivalents is None else max(1, int(equivalents))
        return asked if row is None or row.most is None else min(asked, row.most(len(self.models)))

    @property
    def limit(self) -> float:
        """How much the search may cost: candidates, or forward passes over all search items."""
        return float(self.budget) if self.optimizer.equivalents is None else self.optimizer.equivalents

    @property
    def copies(self) -> dict[str, str]:
        """The folders of aligned models, by the model's reference."""
        folders = {self.models[name]: own.folder for name, own in self.align.items()}
        return {reference: folder for reference, folder in folders.items() if folder is not None}

    @property
    def rows(self) -> RowsConfig | None:
        """How weights of rows are learned; None where they are not."""
        space = self.space.merging
        return space.rows if space is not None else None

    @property
    def loss_weights(self) -> dict[str, float]:
        """The weight of each objective in the loss whose gradients are followed, by name; costs have none."""
        objectives = [objective for objective in self.objectives if objective.cost is None]
        total = sum(objective.weight for objective in objectives)
        return {objective.name: objective.weight / total for objective in objectives}

    def with_copies(self, folders: Mapping[str, str | None]) -> Self:
        """A copy with other folders of aligned models.

        folders: the new ones, by the model's name.
        """
        align = {name: own.model_copy(update={"folder": folders[name]}) for name, own in self.align.items()}
        return self.model_copy(update={"align": align})

    def digest(self) -> str:
        """A hash of everything that the archive's content depends on, 16 hexadecimal digits. It leaves out the workers,
        the budget, the storage, the trackers, what is kept where in memory, and the places of vLLM, of the tasks' data
        files, of the user's own scores and of aligned models, whose content counts."""
        content = self.model_dump(mode="json", by_alias=True, exclude={"workers", "storage", "trackers"})
        for key in ("objectives", "constraints", "report"):
            for score in content[key]:
                if score["digest"] is not None:  # which stands for what is in these files, wherever they are
                    del score["python"], score["items"]
        for budget in ("evaluations", "equivalents"):
            content["optimizer"].pop(budget)
        for aligned in content["align"].values():
            del aligned["folder"]
        learning = content["optimizer"]["learning"]
        learning["checkpointing"] = learning["checkpointing"] is True  # earlier versions knew no `auto`
        _drop_later_keys(content)
        content["tasks"].pop("data_root")
        content["evaluation"]["vllm"].pop("python")
        for placement in ("sources", "fields", "adapters"):
            content["evaluation"].pop(placement)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        """The config as a search file."""
        return yaml.safe_dump(self.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True)


_LATER: dict[str, Any] = {  # keys that earlier versions did not have, with what stands for their ways
    "report": [],
    "statistics": StatisticsConfig().model_dump(mode="json"),
    "align": {},
    "space.rows": None,
    "space.parameter.rows": None,
    "space.post": PostConfig().model_dump(mode="json"),
    "space.parameter.post": PostConfig().model_dump(mode="json"),
    "evaluation.quantize": None,
    "optimizer.stop_after": None,
    "optimizer.learning": LearningConfig(checkpointing=False).model_dump(mode="json"),
    "optimizer.stages.scaled": False,
    "space.tensor_weights": "auto",
    "space.parameter.tensor_weights": "auto",
    "space.tokenizer_source": None,
    "space.parameter.tokenizer_source": None,
    "space.models": {},
    "space.parameter.models": {},
    **{
        f"{key}.{name}": {} if name == "arguments" else None
        for key in ("objectives", "constraints", "report")
        for name in ("python", "name", "items", "arguments", "digest")
    },
}


def _drop_later_keys(content: dict[str, Any]) -> None:
    """Takes out keys that came later and are not used, so that a search has the digest that it had before."""
    for path, unused in _LATER.items():
        *parents, last = path.split(".")
        for place in _places(content, parents):
            if place.get(last, unused) == unused:
                place.pop(last, None)


def _places(content: Any, keys: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The blocks at a path of keys, in every entry of the lists on the way."""
    if isinstance(content, list):
        for entry in content:
            yield from _places(entry, keys)
    elif isinstance(content, dict):
        if keys:
            yield from _places(content.get(keys[0]), keys[1:])
        else:
            yield content
