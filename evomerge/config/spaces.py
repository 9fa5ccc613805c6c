"""What may vary: the parameter space, the data-flow space, and both at once."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from evomerge.config.base import GeneChange, GeneConfig, Settings


def _block(value: Any) -> Any:
    """Takes `true` for a block with its defaults, and `false` for none."""
    if isinstance(value, bool):
        return {} if value else None
    if value is None or isinstance(value, Mapping | BaseModel):
        return value
    raise PydanticCustomError("block", "use true or false, or write keys and values below it")


class SpaceSettings(Settings):
    """What every kind of search space has.

    kind: its name in the table `SPACES`.
    changes_layers: whether its recipes have other layers than the base, or the same layers in another order.
    tokenizer_source: whose tokens all merges have: `base`. It is the default where models have other vocabularies than
        the base. Where they do not, their rows are merged as they are.
    """

    kind: str = "parameter"
    changes_layers: ClassVar[bool] = False
    tokenizer_source: str | None = None

    @field_validator("tokenizer_source")
    @classmethod
    def _of_the_base(cls, source: str | None) -> str | None:
        if source == "union":
            raise ValueError(
                "candidates have the base's tokens, not everyone's; write the base with everyone's tokens first "
                "(`evomerge merge` of a recipe with tokenizer_source: union, and weight 1 for the base alone), and "
                "name that as base"
            )
        if source not in (None, "base"):
            raise ValueError(f"is '{source}'; use base, and name the model whose tokens you want as base")
        return source

    @property
    def merging(self) -> "ParameterSpaceConfig | None":
        """How models are merged in this space; None where no weights are merged."""
        return None


class ModelGenes(Settings):
    """What differs for the genes of one model.

    weight: changes of the bounds of its weights.
    density: changes of the bounds of its densities.
    """

    weight: GeneChange | None = None
    density: GeneChange | None = None


class AimConfig(Settings):
    """AIM, which keeps the base where it works most.

    omega: changes of the bounds of its genes, one for each group of tensors: how much of a merge's change is kept in
        the channels that are the most active in the base.
    """

    omega: GeneChange = GeneChange()


class PostConfig(Settings):
    """What is done to a merge before it is rounded.

    aim: activation-informed merging; None where it is not done.
    """

    aim: Annotated[AimConfig | None, BeforeValidator(_block)] = None


class RowsConfig(Settings):
    """How weights of rows are learned before the first candidate, by gradients on search items.

    steps: how many steps are taken.
    share: the share of the search items that a step reads; each step draws new ones.
    rate: how far a weight moves in the first steps; it falls to a tenth.
    pull: how strongly the rows of a tensor are drawn to their mean: what is added to the loss, in nats, where they are
        1 away from it.
    """

    steps: int = Field(default=60, ge=1)
    share: float = Field(default=0.25, gt=0, le=1)
    rate: float = Field(default=0.15, gt=0)
    pull: float = Field(default=1.0, ge=0)


class ParameterSpaceConfig(SpaceSettings):
    """The parameter space: which numbers of a merge are searched, for each model and each group of tensors.

    method: the merge method, or a list that the search chooses from; it starts with the first.
    participate: whether the search chooses which models take part.
    parameters: genes for the methods' own parameters, as METHOD: {PARAMETER: bounds}. Those of methods without weights
        are searched in any case.
    layer_groups: runs of layers that share genes, such as `0-3`, which cover all layers in order.
    layer_granularity: how many layers share genes; by default all layers do. `tensor` stands for 1 layer, and
        `tensor_weights`.
    filters: parts of tensor names that divide the tensors of a run of layers into groups.
    tensor_weights: whether every tensor has weights of its own. They start equal within a group, and random search
        draws them equal. `auto` gives tensors their own weights where a search follows gradients.
    weight: the genes of models' weights.
    density: the genes of models' densities.
    models: other bounds for single models, by name.
    lambda_: the gene of the method's lambda; fixed at 1 by default.
    rows: how the rows of every model's weight matrices are weighted before models are merged; None where they are not.
        Weights of models then start at 1.
    post: what is done to every merge.
    normalize: the method's `normalize`; `auto` leaves it to each method.
    rescale: how sparsified task vectors are rescaled.
    """

    kind: Literal["parameter"] = "parameter"
    method: str | tuple[str, ...] = "dare_ties"
    participate: bool = False
    parameters: dict[str, dict[str, GeneChange]] = Field(default_factory=dict)
    layer_groups: tuple[str, ...] | None = Field(default=None, min_length=1)
    layer_granularity: Annotated[int, Field(ge=1)] | Literal["tensor"] | None = None
    filters: tuple[str, ...] = ()
    tensor_weights: bool | Literal["auto"] = "auto"
    weight: GeneConfig = GeneConfig(low=0.0, high=1.5, step=0.3)
    density: GeneConfig = GeneConfig(low=0.1, high=1.0, start=1.0, step=0.03)
    models: dict[str, ModelGenes] = Field(default_factory=dict)
    lambda_: GeneConfig = Field(default=GeneConfig(low=0.5, high=1.5, start=1.0, step=0.1, fixed=1.0), alias="lambda")
    rows: Annotated[RowsConfig | None, BeforeValidator(_block)] = None
    post: PostConfig = PostConfig()
    normalize: bool | Literal["auto"] = False
    rescale: Literal["density", "l1"] = "density"

    @field_validator("weight", "density", "lambda_", mode="before")
    @classmethod
    def _partial(cls, value: Any, info: Any) -> Any:
        """Fills in the defaults of keys that a user leaves out, such as the bounds of a gene with only a `step`."""
        if not isinstance(value, Mapping) or info.field_name is None:
            return value
        default = cls.model_fields[info.field_name].default.model_dump()
        if info.field_name == "lambda_" and "fixed" not in value:
            default["fixed"] = None  # who writes bounds for lambda wants it searched
        return {**default, **value}

    @property
    def merging(self) -> "ParameterSpaceConfig | None":
        return self

    @property
    def methods(self) -> tuple[str, ...]:
        """The names of the methods that candidates may use."""
        named = (self.method,) if isinstance(self.method, str) else self.method
        steps = "+rows" * (self.rows is not None) + "+aim" * (self.post.aim is not None)
        return tuple(f"{name}{steps}" for name in named)

    @property
    def start_of_weights(self) -> float | None:
        """The weight at which a search starts all weights; None where it starts at a control."""
        if self.weight.start is not None or self.rows is None:
            return self.weight.start
        return min(max(1.0, self.weight.low), self.weight.high)

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
        """Turns a key without a value, such as `t:`, into a gene with its own bounds."""
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
        if self.layer_granularity == "tensor" and self.tensor_weights is False:
            raise ValueError(
                "layer_granularity is tensor, but tensor_weights is false; set it to true, or leave it out"
            )
        return self

    @property
    def by_tensor(self) -> bool:
        """Whether every tensor has weights of its own; `auto` must have been resolved before."""
        return self.tensor_weights is True or self.layer_granularity == "tensor"


class PinnedConfig(Settings):
    """The first and the last layers of a model, which every path keeps.

    model: the model's name.
    first: how many of its first layers are kept.
    last: how many of its last layers are kept.
    """

    model: str
    first: int = Field(default=1, ge=0)
    last: int = Field(default=1, ge=0)


FormName = Literal["path", "slots", "skip", "repeat", "parallel", "looped", "reorder", "graft", "upscale", "interleave"]
SCALED_FORMS = ("path", "slots")
FREE = "free"


class DataFlowConfig(SpaceSettings):
    """The data-flow space: which layers of which models, in what order.

    form: how a path is written as genes (`spaces.forms`).
    sources: the names of the models whose layers are used, or `base`; by default all models.
    granularity: how many layers a block has.
    repeats: how often form `slots` repeats all blocks, form `repeat` at most repeats a run, and form `looped` at most
        runs its block.
    pinned: layers that every path keeps.
    embeddings: the name of the model that gives the embeddings, or `free`; by default the pinned model, or else the
        first source.
    head: the name of the model that gives the final norm and the head, or `free`; the default is the same.
    max_layers: the largest number of layers in a path.
    max_repeats: how often a layer may occur in a path.
    max_distance: how many layers a hop may lie away from the layer that would follow the hop before.
    scale: the genes of hops' scales; fixed at 1 by default.
    scaling: what the scales multiply.
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
        """Fills in the defaults of keys that a user leaves out; who writes bounds for the scale wants it searched."""
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
    """The path of a hybrid search, through the layers of the merge and of models.

    sources: the names of models whose layers are used besides those of the merge (`merge`).
    granularity: how many layers a block has.
    first: how many of the merge's first layers every path keeps.
    last: how many of the merge's last layers every path keeps.
    max_layers: the largest number of layers in a path.
    max_repeats: how often a layer may occur in a path.
    max_distance: how many layers a hop may lie away from the layer that would follow the hop before.
    """

    sources: tuple[str, ...] = ()
    granularity: int = Field(default=1, ge=1)
    first: int = Field(default=0, ge=0)
    last: int = Field(default=0, ge=0)
    max_layers: int | None = Field(default=None, ge=1)
    max_repeats: int | None = Field(default=None, ge=1)
    max_distance: int | None = Field(default=None, ge=0)


class HybridConfig(SpaceSettings):
    """The hybrid space: a merge with its parameters, and a path through the merge's layers and those of the models.

    With optimizer.stages, the first stage can search for the merge and the second for the path (Akiba et al. 2025,
    section 3.3). Without stages, both are searched together.

    parameter: the merge.
    path: the path.
    """

    kind: Literal["hybrid"] = "hybrid"
    changes_layers = True
    parameter: ParameterSpaceConfig = ParameterSpaceConfig()
    path: PathConfig = PathConfig()

    @field_validator("parameter")
    @classmethod
    def _once(cls, parameter: ParameterSpaceConfig) -> ParameterSpaceConfig:
        if parameter.tokenizer_source is not None:
            raise ValueError(".tokenizer_source belongs to the space; write space.tokenizer_source")
        return parameter

    @property
    def merging(self) -> "ParameterSpaceConfig | None":
        return self.parameter
