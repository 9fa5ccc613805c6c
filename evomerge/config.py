"""SearchConfig: what a search file says, checked key by key and frozen.

`load` reads YAML, applies `--set` overrides, and reports the first problem with its file and key path. `resolve` fills
in everything that the machine or the search space decides (device, population, covariance), so that the frozen copy in
a run directory says all that the archive depends on. Paths are relative to the file they stand in.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from evomerge.errors import InputError, choices

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
RESERVED_NAMES = {"base", "uniform"}
Model = TypeVar("Model", bound=BaseModel)


class Settings(BaseModel):
    """A frozen block of settings that rejects keys it does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, populate_by_name=True)


class GeneConfig(Settings):
    """Bounds, start and initial step of one kind of gene, in its own units; `fixed` takes it out of the search."""

    low: float
    high: float
    start: float | None = None
    step: float = Field(gt=0)
    fixed: float | None = None

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low:g}) must be below high ({self.high:g})")
        if self.start is not None and not self.low <= self.start <= self.high:
            raise ValueError(f"start ({self.start:g}) must lie between low ({self.low:g}) and high ({self.high:g})")
        return self


class SpaceConfig(Settings):
    """The parameter space: which numbers of a merge are searched, per model and per group of tensors."""

    kind: Literal["parameter"] = "parameter"
    method: str = "dare_ties"
    layer_groups: tuple[str, ...] | None = None
    layer_granularity: int | None = Field(default=None, ge=1)
    filters: tuple[str, ...] = ()
    weight: GeneConfig = GeneConfig(low=0.0, high=1.5, step=0.3)
    density: GeneConfig = GeneConfig(low=0.1, high=1.0, start=1.0, step=0.03)
    lambda_: GeneConfig = Field(default=GeneConfig(low=0.5, high=1.5, start=1.0, step=0.1, fixed=1.0), alias="lambda")
    normalize: bool = False
    rescale: Literal["density", "l1"] = "density"

    @field_validator("weight", "density", "lambda_", mode="before")
    @classmethod
    def _partial(cls, value: Any, info: Any) -> Any:
        """A user who writes only `step` keeps the defaults of the rest."""
        if not isinstance(value, Mapping) or info.field_name is None:
            return value
        default = cls.model_fields[info.field_name].default.model_dump()
        if info.field_name == "lambda_" and "fixed" not in value:
            default["fixed"] = None  # to write bounds for lambda is to ask for it
        return {**default, **value}

    @field_validator("density")
    @classmethod
    def _density(cls, gene: GeneConfig) -> GeneConfig:
        for key in ("low", "high", "fixed"):
            value = getattr(gene, key)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f"{key} is {value:g}; a density lies in (0, 1]")
        return gene

    @model_validator(mode="after")
    def _groups(self) -> Self:
        if self.layer_groups is not None and self.layer_granularity is not None:
            raise ValueError("give layer_groups or layer_granularity, not both")
        return self


class ObjectiveConfig(Settings):
    """One score to be optimized: a metric of a task. `goal` defaults to what the task says of the metric."""

    task: str
    metric: str = "acc"
    filter: str | None = None
    goal: Literal["maximize", "minimize"] | None = None
    weight: float = Field(default=1.0, gt=0)

    @property
    def name(self) -> str:
        """The objective's name in scores: the task, with the metric where it is not plain accuracy."""
        return self.task if self.metric == "acc" else f"{self.task}:{self.metric}"


class TasksConfig(Settings):
    """Where tasks are found, and which of them may run code that comes with their YAML."""

    paths: tuple[str, ...] = ()
    allow_code: tuple[str, ...] = ()


class ItemsConfig(Settings):
    """How many items the search and the report each see (None: all there are). Never the same ones.

    A task with a validation and a test split is searched on the first and reported on the second. The items of any
    other task are divided by `seed`, `search_fraction` of them for the search.
    """

    search: int | None = Field(default=None, ge=1)
    heldout: int | None = Field(default=None, ge=1)
    search_fraction: float = Field(default=0.5, gt=0, lt=1)
    seed: int = Field(default=0, ge=0)


class EvaluationConfig(Settings):
    """Everything that changes the floating-point results of a score, so all of it is frozen with the search."""

    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    batch_size: int = Field(default=128, ge=1)
    threads: int = Field(default=1, ge=1)
    num_fewshot: int | None = Field(default=None, ge=0)
    apply_chat_template: bool = False
    system_instruction: str | None = None


class StageConfig(Settings):
    """A part of the search that moves only some kinds of genes; the last stage takes what is left of the budget."""

    genes: tuple[Literal["weight", "density", "lambda"], ...] = Field(min_length=1)
    evaluations: int | None = Field(default=None, ge=1)


class OptimizerConfig(Settings):
    """How genomes are proposed. `evaluations` counts search candidates; controls come on top."""

    name: Literal["cma_es", "group_evolution", "random_search"] = "cma_es"
    evaluations: int = Field(default=300, ge=1)
    population: int | None = Field(default=None, ge=1)
    lag: int = Field(default=1, ge=0, le=16)
    ranking: Literal["auto", "elite", "weighted_sum"] = "auto"
    covariance: Literal["auto", "full", "diagonal"] = "auto"
    restarts: bool = True
    stages: tuple[StageConfig, ...] = ()

    @model_validator(mode="after")
    def _stages(self) -> Self:
        if any(stage.evaluations is None for stage in self.stages[:-1]):
            raise ValueError("every stage but the last needs a number of evaluations")
        return self

    @model_validator(mode="after")
    def _population(self) -> Self:
        if self.name == "cma_es" and self.population is not None and self.population < 4:
            raise ValueError(f"population is {self.population}; cma_es needs at least 4")
        return self


class ControlsConfig(Settings):
    """What the search must beat. Base, parents and the uniform merge are always there."""

    one_knob: bool = False
    per_model: bool = False
    random_search: bool = False


class WorkersConfig(Settings):
    """Where candidates are evaluated. Nothing here may change a result."""

    pool: Literal["ray", "local"] = "ray"
    count: int | None = Field(default=None, ge=1)
    num_cpus: float = Field(default=1, ge=0)
    num_gpus: float | None = Field(default=None, ge=0)
    placement_timeout: float = Field(default=45, gt=0)
    attempts: int = Field(default=3, ge=1)


class SearchConfig(Settings):
    """One search: models, objectives, space, optimizer, and where it runs."""

    base: str
    models: dict[Name, str] = Field(min_length=1)
    objectives: tuple[ObjectiveConfig, ...] = Field(min_length=1)
    tasks: TasksConfig = TasksConfig()
    items: ItemsConfig = ItemsConfig()
    space: SpaceConfig = SpaceConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    controls: ControlsConfig = ControlsConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    workers: WorkersConfig = WorkersConfig()
    seed: int = Field(default=0, ge=0, lt=2**63)
    storage: str | None = None

    @field_validator("models", mode="before")
    @classmethod
    def _named_models(cls, value: Any) -> Any:
        """A plain list of models is named by the last part of each reference."""
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            return value
        names = [Path(item.removeprefix("zoo:")).name for item in value]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"two models are called {repeated[0]}; give them names (name: path)")
        return dict(zip(names, value, strict=True))

    @model_validator(mode="after")
    def _distinct(self) -> Self:
        names = [objective.name for objective in self.objectives]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"objectives name {repeated[0]} twice")
        reserved = sorted(RESERVED_NAMES & set(self.models))
        if reserved:
            raise ValueError(f"models.{reserved[0]}: this name is kept for a control; choose another")
        return self

    @property
    def model_names(self) -> tuple[str, ...]:
        return tuple(self.models)

    def digest(self) -> str:
        """A hash of all that the archive's content depends on: not the workers, not the budget, not the storage."""
        content = self.model_dump(mode="json", by_alias=True, exclude={"workers", "storage"})
        content["optimizer"].pop("evaluations")
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json", by_alias=True), sort_keys=False, allow_unicode=True)


def load(path: Path, overrides: Sequence[str] = ()) -> SearchConfig:
    """Reads a search file. Raises InputError naming the file and the key path of the first problem."""
    document = read_yaml(path)
    for override in overrides:
        _apply(document, override)
    config = validate(SearchConfig, document, path)
    return _anchored(config, path.parent)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping at the top of a YAML file (safe loader only)."""
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; check the path.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); give a readable YAML file.") from None
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f" at line {where.line + 1}, column {where.column + 1}" if where else ""
        problem = getattr(error, "problem", None) or "invalid YAML"
        raise InputError(f"{path}: not valid YAML{line} ({problem}); correct the file.") from None
    if not isinstance(document, dict):
        raise InputError(f"{path}: expected a mapping of keys at the top, got {type(document).__name__}.")
    return document


def validate(model: type[Model], document: Mapping[str, Any], path: Path | str) -> Model:
    """`document` as `model`, or an InputError of one sentence about the first problem."""
    try:
        return model.model_validate(document)
    except ValidationError as error:
        raise InputError(f"{path}: {_sentence(model, error.errors()[0])}") from None


def _sentence(model: type[BaseModel], error: Any) -> str:
    location = [str(part) for part in error["loc"] if part != "function-after"]
    key = ".".join(location) or "the file"
    given = error.get("input")
    if error["type"] == "extra_forbidden":
        return f"{key} is not a known key; {choices(location[-1], _keys_at(model, location[:-1]))}."
    if error["type"] == "missing":
        return f"{key} is required but missing; add it."
    if error["type"] == "value_error":
        message = str(error["ctx"]["error"])
        return f"{key}: {message}." if location else f"{message}."
    shown = json.dumps(given, default=str)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return f"{key} is {shown}; {error['msg'][0].lower()}{error['msg'][1:]}."


def _keys_at(model: type[BaseModel], location: Sequence[str]) -> list[str]:
    """The keys that the model at a location knows; lists and dictionaries on the way are stepped over."""
    for part in location:
        fields = {field.alias or name: field for name, field in model.model_fields.items()}
        if part in fields:
            model = next(iter(_models_in(fields[part].annotation)), model)
    return [field.alias or name for name, field in model.model_fields.items()]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for argument in getattr(annotation, "__args__", ()) for found in _models_in(argument)]


def _apply(document: dict[str, Any], override: str) -> None:
    """Sets KEY.PATH=VALUE in a document; VALUE is read as YAML."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise InputError(f"--set {override}: expected KEY.PATH=VALUE, for example optimizer.evaluations=100.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise InputError(f"--set {override}: the value is not valid YAML.") from None
    *parents, last = key.split(".")
    node: Any = document
    for index, parent in enumerate(parents):
        node = _child(node, parent, override)
        if node is None:
            raise InputError(f"--set {override}: {'.'.join(parents[: index + 1])} holds no keys to set.")
    if isinstance(node, list):
        node[_position(node, last, override)] = value
    elif isinstance(node, dict):
        node[last] = value
    else:
        raise InputError(f"--set {override}: {'.'.join(parents)} holds no keys to set.")


def _child(node: Any, key: str, override: str) -> Any:
    if isinstance(node, list):
        return node[_position(node, key, override)]
    if isinstance(node, dict):
        if node.get(key) is None:
            node[key] = {}
        return node[key]
    return None


def _position(node: list[Any], key: str, override: str) -> int:
    if not key.isdigit() or int(key) >= len(node):
        raise InputError(f"--set {override}: '{key}' is not an index into a list of {len(node)}.")
    return int(key)


def _anchored(config: SearchConfig, folder: Path) -> SearchConfig:
    """The same config with its relative local paths made absolute."""

    def anchor(reference: str) -> str:
        candidate = folder / Path(reference).expanduser()
        local = reference.startswith((".", "/", "~")) or candidate.exists()
        return reference if reference.startswith("zoo:") or not local else str(candidate.resolve())

    paths = tuple(str((folder / Path(path).expanduser()).resolve()) for path in config.tasks.paths)
    return config.model_copy(
        update={
            "base": anchor(config.base),
            "models": {name: anchor(reference) for name, reference in config.models.items()},
            "tasks": config.tasks.model_copy(update={"paths": paths}),
        }
    )
