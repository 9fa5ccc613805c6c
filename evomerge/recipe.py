"""Recipe: a merge in mergekit's dialect, with an `evomerge:` block that mergekit ignores.

Read and written are `models` and `slices` recipes with parameters at every level, name filters and layer gradients.
Values are found as mergekit 0.1.5 finds them: source before slice before recipe, the first filter that matches,
gradients interpolated over a slice's layers. Not here yet, and refused by name: `modules`, `tokenizer`, per-slice
bases.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, TypeAdapter, ValidationError, model_validator

from evomerge.config import Settings
from evomerge.documents import read_yaml, validate
from evomerge.errors import InputError

Scalar = bool | int | float | str
Kind = type[float] | type[int] | type[bool]
DTYPES = Literal["float32", "bfloat16", "float16"]
UNSUPPORTED = ("modules", "tokenizer", "chat_template")


class Condition(Settings):
    """A value for the tensors whose name contains `filter` (None or `*`: all of them)."""

    value: Scalar | list[Scalar]
    filter: str | None = None

    def matches(self, tensor: str) -> bool:
        return self.filter is None or self.filter == "*" or self.filter in tensor


Setting = Scalar | list[Scalar] | Condition | list[Condition]
Parameters = dict[str, Setting]


class Source(Settings):
    """One model of a recipe; `layer_range` is half-open and belongs to slices only."""

    model: str
    layer_range: tuple[int, int] | None = None
    parameters: Parameters = Field(default_factory=dict)


class Slice(Settings):
    """A run of layers merged from the same layers of its sources."""

    sources: tuple[Source, ...] = Field(min_length=1)
    parameters: Parameters = Field(default_factory=dict)

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        ranges = {source.layer_range for source in self.sources}
        if None in ranges:
            raise ValueError("every source of a slice needs a layer_range")
        if len(ranges) > 1:
            raise ValueError(f"sources of one slice must have the same layer_range, got {sorted(map(str, ranges))}")
        return self

    @property
    def layer_range(self) -> tuple[int, int]:
        layers = self.sources[0].layer_range
        assert layers is not None
        return layers


class Provenance(Settings):
    """What mergekit has no words for: the seed of the masks, and where the recipe comes from.

    `rescale` says what a sparsified delta is divided by: its density (Yu et al. 2024, eq. 4; in DELLA each element's
    own probability of being kept) or the share of its L1 norm that survived (mergekit). `aliases` maps the paths of a
    recipe to the references that stand for them elsewhere.
    """

    seed: int = 0
    rescale: Literal["density", "l1"] = "l1"
    candidate: str | None = None
    fingerprint: str | None = None
    scores: dict[str, float | None] | None = None
    heldout: dict[str, float | None] | None = None
    aliases: dict[str, str] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)


class Recipe(Settings):
    """A merge of models, complete enough to rebuild its exact weights."""

    merge_method: str
    base_model: str | None = None
    models: tuple[Source, ...] | None = None
    slices: tuple[Slice, ...] | None = None
    parameters: Parameters = Field(default_factory=dict)
    dtype: DTYPES | None = None
    out_dtype: DTYPES | None = None
    tokenizer_source: str | None = None
    evomerge: Provenance = Provenance()

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if bool(self.models) == bool(self.slices):
            raise ValueError("give exactly one of models and slices")
        if any(source.layer_range for source in self.models or ()):
            raise ValueError("models are merged whole and take no layer_range; write slices instead")
        if self.tokenizer_source not in (None, "base", self.base_model):
            raise ValueError(f"tokenizer_source is {self.tokenizer_source}; only the base's tokenizer is supported")
        return self

    @property
    def references(self) -> tuple[str, ...]:
        """Every model named, the base first, the others in order of appearance."""
        base = (self.base_model,) if self.base_model else ()
        return tuple(dict.fromkeys([*base, *(source.model for source in self._sources())]))

    @property
    def fine_tunes(self) -> tuple[str, ...]:
        """Every model but the base, in order of appearance; a model's position selects its mask."""
        return tuple(reference for reference in self.references if reference != self.base_model)

    def _sources(self) -> Iterator[Source]:
        yield from self.models or ()
        for part in self.slices or ():
            yield from part.sources

    def renamed(self, names: Mapping[str, str]) -> "Recipe":
        """The same recipe with its model references replaced."""

        def rename(source: Source) -> Source:
            return source.model_copy(update={"model": names.get(source.model, source.model)})

        def rename_slice(part: Slice) -> Slice:
            return part.model_copy(update={"sources": tuple(map(rename, part.sources))})

        return self.model_copy(
            update={
                "base_model": names.get(self.base_model, self.base_model) if self.base_model else None,
                "tokenizer_source": names.get(self.tokenizer_source, self.tokenizer_source)
                if self.tokenizer_source not in (None, "base")
                else self.tokenizer_source,
                "models": tuple(map(rename, self.models)) if self.models else None,
                "slices": tuple(map(rename_slice, self.slices)) if self.slices else None,
            }
        )

    def content_id(self) -> str:
        """A hash of what decides the weights: everything but scores and provenance."""
        content = self.model_dump(mode="json", exclude={"evomerge"})
        content["evomerge"] = {"seed": self.evomerge.seed, "rescale": self.evomerge.rescale}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        content = self.model_dump(mode="json", exclude_defaults=True)
        content["evomerge"] = {
            "seed": self.evomerge.seed,
            "rescale": self.evomerge.rescale,
            **content.get("evomerge", {}),
        }
        return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


class _Dumper(yaml.SafeDumper):
    """Lists of plain numbers on one line, as people write them."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_list(dumper: yaml.SafeDumper, data: list[Any]) -> yaml.Node:
    flow = all(isinstance(item, int | float) for item in data)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=flow)


_Dumper.add_representer(list, _represent_list)


def load(path: Path) -> Recipe:
    """Reads a recipe. Relative model paths that exist are taken relative to the working directory, as mergekit does."""
    document = read_yaml(path)
    for key in UNSUPPORTED:
        if document.get(key) is not None:
            raise InputError(f"{path}: {key} is not supported; remove it, or merge this recipe with mergekit.")
    return validate(Recipe, document, path)


def single(model: str) -> Recipe:
    """The recipe whose merge is one model unchanged."""
    return linear({model: 1.0})


def linear(weights: Mapping[str, float]) -> Recipe:
    """A weighted average of models (Wortsman et al. 2022)."""
    sources = tuple(Source(model=model, parameters={"weight": weight}) for model, weight in weights.items())
    return Recipe(merge_method="linear", models=sources)


def resolve_setting(setting: Setting | None, tensor: str, t: float, kind: Kind) -> float | bool | None:
    """The value of a setting for one tensor at `t` in [0, 1] of its slice; None where no filter matches.

    Raises ValueError for a value that is no `kind`.
    """
    if setting is None:
        return None
    items = setting if isinstance(setting, list) else [setting]
    conditions = [item for item in items if isinstance(item, Condition)]
    if conditions:
        found = next((condition for condition in conditions if condition.matches(tensor)), None)
        return resolve_setting(found.value, tensor, t, kind) if found else None
    values = [_typed(item, kind) for item in items if not isinstance(item, Condition)]
    return _typed(_gradient(values, t, kind), kind) if values else None


def _gradient(values: list[float | bool], t: float, kind: Kind) -> float | bool:
    """Numbers are interpolated linearly, truth values stepped through; a list of one is that one everywhere."""
    position = t * (len(values) - 1)
    left = int(position)
    if kind is bool:
        return values[left]
    right = values[min(left + 1, len(values) - 1)]
    return (1 - (position - left)) * values[left] + (position - left) * right


_TYPES: dict[type, TypeAdapter[Any]] = {
    float: TypeAdapter(Annotated[float, Field(allow_inf_nan=False)]),
    int: TypeAdapter(int),
    bool: TypeAdapter(bool),
}
_EXPECTED = {float: "a number", int: "a whole number", bool: "true or false"}


def _typed(value: Scalar, kind: Kind) -> float | bool:
    """YAML writes 1e-3 as text and true as 1 or yes; read like mergekit, as the parameter's own type."""
    try:
        typed: float | bool = _TYPES[kind].validate_python(value)
    except ValidationError:
        raise ValueError(f"is '{value}'; expected {_EXPECTED[kind]}") from None
    return typed
