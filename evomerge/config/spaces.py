"""What may vary: the parameter space, the data-flow space, and both at once."""

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import (
    Field,
    field_validator,
    model_validator,
)

from evomerge.config.base import GeneChange, GeneConfig, Settings


class SpaceSettings(Settings):
    """What every kind of search space has: its kind, by which the table `SPACES` knows it.

    changes_layers: whether its recipes have other layers than the base, or the same in another order.
    """

    kind: str = "parameter"
    changes_layers: ClassVar[bool] = False

    @property
    def merging(self) -> "ParameterSpaceConfig | None":
        """How models are merged in this space; None where no weights are merged."""
        return None


class ParameterSpaceConfig(SpaceSettings):
    """The parameter space: which numbers of a merge are searched, per model and per group of tensors.

    method: one, or a list, of which the search chooses (it starts with the first). participate: the search chooses
    which models take part. parameters: genes for the methods' own parameters, as METHOD: {PARAMETER: bounds}; those of
    methods without weights are searched anyway. normalize: `auto` leaves it to each method.
    """

    kind: Literal["parameter"] = "parameter"
    method: str | tuple[str, ...] = "dare_ties"
    participate: bool = False
    parameters: dict[str, dict[str, GeneChange]] = Field(default_factory=dict)
    layer_groups: tuple[str, ...] | None = Field(default=None, min_length=1)
    layer_granularity: int | None = Field(default=None, ge=1)
    filters: tuple[str, ...] = ()
    weight: GeneConfig = GeneConfig(low=0.0, high=1.5, step=0.3)
    density: GeneConfig = GeneConfig(low=0.1, high=1.0, start=1.0, step=0.03)
    lambda_: GeneConfig = Field(default=GeneConfig(low=0.5, high=1.5, start=1.0, step=0.1, fixed=1.0), alias="lambda")
    normalize: bool | Literal["auto"] = False
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

    @property
    def merging(self) -> "ParameterSpaceConfig | None":
        return self

    @property
    def methods(self) -> tuple[str, ...]:
        """The names of the methods that candidates may use."""
        return (self.method,) if isinstance(self.method, str) else self.method

    @field_validator("method")
    @classmethod
    def _each_once(cls, method: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not method:
            raise ValueError("the list is empty; name a method, or several")
        for index, name in enumerate(() if isinstance(method, str) else method):
            if name in method[:index]:
                raise ValueError(f"{name} is named twice; name each once")
        return method

    @field_validator("parameters", mode="before")
    @classmethod
    def _as_they_are(cls, value: Any) -> Any:
        """`t:` with nothing behind it asks for the gene with its own bounds."""
        if not isinstance(value, Mapping):
            return value
        return {
            method: {name: {} if change is None else change for name, change in changes.items()}
            if isinstance(changes, Mapping)
            else changes
            for method, changes in value.items()
        }

    @field_validator("density")
    @classmethod
    def _density(cls, gene: GeneConfig) -> GeneConfig:
        for key in ("low", "high", "fixed"):
            value = getattr(gene, key)
            if value is not None and not 0 < value <= 1:
                raise ValueError(f".{key} is {value:g}; use a value in (0, 1]")
        return gene

    @model_validator(mode="after")
    def _groups(self) -> Self:
        if self.layer_groups is not None and self.layer_granularity is not None:
            raise ValueError("give either layer_groups or layer_granularity, not both")
        return self


class PinnedConfig(Settings):
    """The first and last layers of a model, which every path keeps."""

    model: str
    first: int = Field(default=1, ge=0)
    last: int = Field(default=1, ge=0)


FormName = Literal["path", "slots", "skip", "repeat", "reorder", "graft", "upscale", "interleave"]
SCALED_FORMS = ("path", "slots")
FREE = "free"


class DataFlowConfig(SpaceSettings):
    """The data-flow space: which layers of which models, in what order.

    `sources` are names of models, or `base`; by default all of the models. `embeddings` and `head` name the model that
    gives them, or are `free`; by default the pinned one's, or the first source's. The limits count layers of the whole
    path, and how far a layer may lie from the one that would follow.
    """

    kind: Literal["data_flow"] = "data_flow"
    changes_layers = True
    form: FormName = "path"
    sources: tuple[str, ...] | None = Field(default=None, min_length=1)
    granularity: int = Field(default=1, ge=1)
    repeats: int = Field(default=2, ge=1)
    pinned: PinnedConfig | None = None
    embeddings: str | None = None
    head: str | None = None
    max_layers: int | None = Field(default=None, ge=1)
    max_repeats: int | None = Field(default=None, ge=1)
    max_distance: int | None = Field(default=None, ge=0)
    scale: GeneConfig = GeneConfig(low=0.5, high=1.5, start=1.0, step=0.1, fixed=1.0)
    scaling: Literal["mlp", "stream"] = "mlp"

    @field_validator("scale", mode="before")
    @classmethod
    def _partial(cls, value: Any) -> Any:
        """To write bounds for the scale is to ask for it."""
        if not isinstance(value, Mapping):
            return value
        default = cls.model_fields["scale"].default.model_dump()
        return {**default, "fixed": None, **value}

    @field_validator("scale")
    @classmethod
    def _positive(cls, gene: GeneConfig) -> GeneConfig:
        for key in ("low", "fixed"):
            value = getattr(gene, key)
            if value is not None and value <= 0:
                raise ValueError(f".{key} is {value:g}; use a value above 0")
        return gene

    @model_validator(mode="after")
    def _scaled(self) -> Self:
        if self.form not in SCALED_FORMS and self.scale.fixed != 1.0:
            raise ValueError(f".scale cannot be searched in form {self.form}; use form {' or '.join(SCALED_FORMS)}")
        return self


class PathConfig(Settings):
    """The path of a hybrid search: as in the data-flow space, of the merge (`merge`) and of the models named."""

    sources: tuple[str, ...] = ()
    granularity: int = Field(default=1, ge=1)
    first: int = Field(default=0, ge=0)
    last: int = Field(default=0, ge=0)
    max_layers: int | None = Field(default=None, ge=1)
    max_repeats: int | None = Field(default=None, ge=1)
    max_distance: int | None = Field(default=None, ge=0)


class HybridConfig(SpaceSettings):
    """Both at once: a merge with its parameters, and a path through the merge's layers and those of the models.

    With optimizer.stages the first can find the merge and the second the path (Akiba et al. 2025, section 3.3);
    without, both genomes are searched together.
    """

    kind: Literal["hybrid"] = "hybrid"
    changes_layers = True
    parameter: ParameterSpaceConfig = ParameterSpaceConfig()
    path: PathConfig = PathConfig()

    @property
    def merging(self) -> "ParameterSpaceConfig | None":
        return self.parameter
