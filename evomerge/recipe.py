"""Recipe: a merge in mergekit's dialect, with an `evomerge:` block that mergekit ignores.

A recipe has `models` or `slices`, with parameters at every level, name filters and layer gradients. Values are looked
up as in mergekit 0.1.5: source before slice before recipe, the first filter that matches, gradients interpolated over a
slice's layers. `evomerge.dialect` reads the other forms in which people write recipes.

One thing differs. mergekit rounds its inputs to `dtype`, computes in it, and rounds to `out_dtype` if there is one.
Here everything is computed in float32 from the stored weights and rounded once: to `out_dtype`, or else to `dtype`, or
else to the dtype of most of the base's tensors (where mergekit keeps every tensor's own).
"""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, Field, TypeAdapter, ValidationError, field_validator, model_validator

from evomerge.config.base import Settings
from evomerge.config.documents import read_yaml, validate
from evomerge.dialect import plain
from evomerge.errors import naming
from evomerge.seen import Digests, decoded

Scalar = bool | int | float | str
Kind = type[float] | type[int] | type[bool]
DTYPES = Literal["float32", "bfloat16", "float16"]
Blocks = tuple[tuple[int, int], ...]


class FilteredValue(Settings):
    """A value for some tensors.

    value: the value, or a gradient over the layers of a slice.
    filter: a part of the tensors' names; None or `*` for all tensors.
    """

    value: Scalar | list[Scalar]
    filter: str | None = None

    def matches(self, tensor: str) -> bool:
        """Whether the value is for the tensor of that name."""
        return self.filter is None or self.filter == "*" or self.filter in tensor


Setting = Scalar | list[Scalar] | FilteredValue | list[FilteredValue]
Parameters = dict[str, Setting]


class Source(Settings):
    """One model of a recipe.

    model: its reference.
    layer_range: in a slice, the first layer and the layer after the last one; otherwise None.
    parameters: the model's own parameters.
    """

    model: str
    layer_range: tuple[int, int] | None = None
    parameters: Parameters = Field(default_factory=dict)


class Slice(Settings):
    """A run of output layers, each merged from one layer of every source.

    A slice without layers gives the embeddings where it is the first, or the final norm and the head where it is the
    last.

    sources: the models, whose ranges are equally long.
    base_model: the base of this slice; None for that of the recipe.
    parameters: the slice's parameters.
    """

    sources: tuple[Source, ...] = Field(min_length=1)
    base_model: str | None = None
    parameters: Parameters = Field(default_factory=dict)

    @model_validator(mode="after")
    def _ranges(self) -> Self:
        ranges = [source.layer_range for source in self.sources]
        for layers in ranges:
            if layers is None:
                raise ValueError("every source of a slice needs a layer_range")
            if not 0 <= layers[0] <= layers[1]:
                raise ValueError(f"layer_range {list(layers)} is no range; write [first, last + 1], counted from 0")
        lengths = {end - start for start, end in filter(None, ranges)}
        if len(lengths) > 1:
            raise ValueError(
                "sources of one slice must have equally many layers, got "
                + " and ".join(str(list(layers)) for layers in ranges if layers)
            )
        return self

    @property
    def length(self) -> int:
        """How many output layers the slice makes."""
        start, end = self.sources[0].layer_range or (0, 0)
        return end - start


class ModelToken(Settings):
    """The embedding of one token of one model, by id or by text."""

    kind: Literal["model_token"]
    model: str
    token_id: int | None = Field(default=None, ge=0)
    token: str | None = None


class ZeroToken(Settings):
    """An embedding of zeros."""

    kind: Literal["zero"]


class TokenSettings(Settings):
    """Where a token's embedding comes from in models that lack it, or with `force` in all of them."""

    source: str | Annotated[ModelToken | ZeroToken, Field(discriminator="kind")] | None = None
    force: bool = False

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if isinstance(self.source, ModelToken) and (self.source.token_id is None) == (self.source.token is None):
            raise ValueError(".source: give exactly one of token_id and token")
        if self.force and self.source is None:
            raise ValueError("force needs a source to take the embedding from")
        return self


class TokenizerSettings(Settings):
    """The tokenizer of the output: `base`, `union`, or a model's, with more tokens and rows for padding."""

    source: str = "union"
    tokens: dict[str, TokenSettings] | None = None
    pad_to_multiple_of: int | None = Field(default=None, ge=1)


class HeldoutRow(Settings):
    """What a control or a merge scores on held-out items.

    title: what it is, in a phrase.
    mean: the weighted mean of its scores; None where it failed.
    scores: by objective.
    intervals: the 95 % intervals of the scores that are means over items.
    """

    title: str
    mean: float | None = None
    scores: dict[str, float | None] = Field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = Field(default_factory=dict)


class HeldoutTable(Settings):
    """A merge beside the controls of its search on held-out items.

    mean_name: what the mean is called.
    items: on how many items each score was measured, where it is a mean over items.
    rows: the controls, then the merge.
    """

    mean_name: str = "mean"
    items: dict[str, int] = Field(default_factory=dict)
    rows: tuple[HeldoutRow, ...] = ()


def _statistics_name(value: str) -> str:
    """A name that evomerge has given to a folder with statistics. Raises ValueError for any other, such as a path."""
    if not re.fullmatch(r"[a-z_]+-[0-9a-f]{16}-[0-9a-f]{16}", value):
        raise ValueError(f"'{value}' names no statistics; write KIND-SUBJECT-DIGEST, as `evomerge measure` names them")
    return value


class MeasuredOn(Settings):
    """The statistics that a recipe's merge was made with.

    folder: where they were.
    names: the names of their folders, by the model's reference and the kind.
    """

    folder: str | None = None
    names: dict[str, dict[str, Annotated[str, AfterValidator(_statistics_name)]]] = Field(default_factory=dict)


class Aligned(Settings):
    """A model that was brought next to another one before it was merged.

    model: its reference.
    to: the reference of the model that stayed.
    by: what was compared, `weights` or `activations`.
    distance: of the model from the one that stayed, as a share of that one's norm, before and after.
    barrier: by how much the average of both models is worse than the two, in nats per token, before and after; None
        where it was not measured.
    """

    model: str
    to: str
    by: str
    distance: tuple[float, float]
    barrier: tuple[float, float] | None = None

    @property
    def sentence(self) -> str:
        """What was done, and what it brought."""
        lost = "" if self.barrier is None else ", loss barrier {:.3f} to {:.3f} nats per token".format(*self.barrier)
        shares = "{:.3f} to {:.3f}".format(*self.distance)
        return f"{self.model}, aligned with {self.to} by {self.by}: distance {shares} norms{lost}"


class Provenance(Settings):
    """What mergekit has no keys for: the seed of the masks, layers side by side, and where the recipe comes from.

    seed: of the masks of random methods.
    rescale: what a sparsified task vector is divided by: `density` (Yu et al. 2024, eq. 4; in DELLA each element's own
        probability of being kept), or `l1`, the share of its L1 norm that is left (mergekit).
    candidate: the id of the candidate in its search.
    fingerprint: that of the merged weights.
    scores: the candidate's scores on search items, by objective.
    quantized: how its weights were quantized for these scores; None where they were not.
    heldout: its scores on held-out items, by objective.
    table: those of the controls beside them, with intervals.
    verdicts: sentences that compare it with the best parent and the best control on held-out items.
    aliases: the references that stand elsewhere for the paths in the recipe, by path.
    aligned: the aligned models among those of the recipe, by path.
    versions: the versions that made it, by package.
    seen: digests of the items that its search saw (`evomerge.seen`), which no report may show as held out.
    head_apart: whether the head is a tensor of its own though all models of the recipe tie it to their embedding,
        because other models of their search do not.
    statistics: what was measured of the models, where the method needs it.
    parallel: blocks of the output's layers, each as its first layer and the layer after its last one. All layers of a
        block read the same input, and the mean of their outputs goes on (Sun et al. 2024, arXiv:2407.09298).
    """

    seed: int = 0
    rescale: Literal["density", "l1"] = "l1"
    candidate: str | None = None
    fingerprint: str | None = None
    scores: dict[str, float | None] | None = None
    quantized: str | None = None
    heldout: dict[str, float | None] | None = None
    table: HeldoutTable | None = None
    verdicts: tuple[str, ...] = ()
    aliases: dict[str, str] = Field(default_factory=dict)
    aligned: dict[str, Aligned] = Field(default_factory=dict)
    versions: dict[str, str] = Field(default_factory=dict)
    seen: str | None = None
    head_apart: bool = False
    statistics: MeasuredOn | None = None
    parallel: Blocks = ()

    @property
    def digests(self) -> Digests:
        """The digests of the items that the recipe's search saw."""
        return decoded(self.seen) if self.seen else frozenset()

    @field_validator("parallel")
    @classmethod
    def _in_order(cls, blocks: Blocks) -> Blocks:
        free = 0
        for start, end in blocks:
            if start < free or end < start + 2:
                raise ValueError(
                    f"[{start}, {end}] is no block here; write [first, last + 1] of at least 2 layers for each block, "
                    "counted from 0, in the order of the layers and without overlaps"
                )
            free = end
        return blocks

    @field_validator("seen")
    @classmethod
    def _readable(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                decoded(value)
            except ValueError as error:
                raise ValueError(f"cannot be read ({error}); copy the recipe again") from None
        return value


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
    tokenizer: TokenizerSettings | None = None
    chat_template: str | None = None
    evomerge: Provenance = Provenance()

    @model_validator(mode="after")
    def _one_form(self) -> Self:
        if bool(self.models) == bool(self.slices):
            raise ValueError("give exactly one of models and slices")
        if any(source.layer_range for source in self.models or ()):
            raise ValueError("models are merged whole and take no layer_range; write slices instead")
        if self.tokenizer_source is not None and self.tokenizer is not None:
            raise ValueError("give at most one of tokenizer_source and tokenizer")
        return self

    @property
    def vocabulary(self) -> TokenizerSettings | None:
        """How the output's tokenizer is built; None where it is the base's, unchanged."""
        return TokenizerSettings(source=self.tokenizer_source) if self.tokenizer_source else self.tokenizer

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
        for slice_ in self.slices or ():
            yield from slice_.sources

    def renamed(self, names: Mapping[str, str]) -> "Recipe":
        """A copy of the recipe with other model references.

        names: the new references, by the old ones; references that are not in it stay.
        """

        def rename(source: Source) -> Source:
            return source.model_copy(update={"model": names.get(source.model, source.model)})

        def rename_slice(slice_: Slice) -> Slice:
            sources = tuple(map(rename, slice_.sources))
            return slice_.model_copy(update={"sources": sources, "base_model": _renamed(slice_.base_model, names)})

        return self.model_copy(
            update={
                "base_model": _renamed(self.base_model, names),
                "tokenizer_source": _renamed_tokenizer(self.tokenizer_source, names),
                "tokenizer": self.tokenizer and _renamed_tokens(self.tokenizer, names),
                "chat_template": _renamed(self.chat_template, names),
                "models": tuple(map(rename, self.models)) if self.models else None,
                "slices": tuple(map(rename_slice, self.slices)) if self.slices else None,
                "evomerge": self.evomerge.model_copy(
                    update={
                        "statistics": _renamed_names(self.evomerge, names),
                        "aligned": {names.get(path, path): own for path, own in self.evomerge.aligned.items()},
                    }
                ),
            }
        )

    def without_step(self, step: str) -> "Recipe":
        """This recipe with a method that leaves out a step.

        step: such as `rows`, of `dare_ties+rows`.
        """
        plain, *steps = self.merge_method.split("+")
        return self.model_copy(update={"merge_method": "+".join([plain, *(s for s in steps if s != step)])})

    def content_id(self) -> str:
        """A hash of what decides the model: everything but scores and provenance."""
        content = self.model_dump(mode="json", exclude={"evomerge"})
        content["evomerge"] = {"seed": self.evomerge.seed, "rescale": self.evomerge.rescale}
        if self.evomerge.statistics is not None:
            content["evomerge"]["statistics"] = self.evomerge.statistics.names
        if self.evomerge.parallel:
            content["evomerge"]["parallel"] = self.evomerge.parallel
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        """The recipe as a file in mergekit's dialect."""
        content = self.model_dump(mode="json", exclude_defaults=True)
        content["evomerge"] = {
            "seed": self.evomerge.seed,
            "rescale": self.evomerge.rescale,
            **content.get("evomerge", {}),
        }
        return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _renamed(reference: str | None, names: Mapping[str, str]) -> str | None:
    return None if reference is None else names.get(reference, reference)


def _renamed_names(provenance: Provenance, names: Mapping[str, str]) -> MeasuredOn | None:
    measured = provenance.statistics
    if measured is None:
        return None
    return measured.model_copy(update={"names": {names.get(own, own): kinds for own, kinds in measured.names.items()}})


def _renamed_tokenizer(source: str | None, names: Mapping[str, str]) -> str | None:
    """`base` and `union` are mergekit's words, not models."""
    return source if source in ("base", "union") else _renamed(source, names)


def _renamed_tokens(settings: TokenizerSettings, names: Mapping[str, str]) -> TokenizerSettings:
    def rename(token: TokenSettings) -> TokenSettings:
        if isinstance(token.source, ModelToken):
            model = names.get(token.source.model, token.source.model)
            return token.model_copy(update={"source": token.source.model_copy(update={"model": model})})
        source = _renamed(token.source, names) if isinstance(token.source, str) else token.source
        return token.model_copy(update={"source": source})

    tokens = settings.tokens and {text: rename(token) for text, token in settings.tokens.items()}
    return settings.model_copy(update={"source": _renamed_tokenizer(settings.source, names), "tokens": tokens})


class _Dumper(yaml.SafeDumper):
    """Lists of plain numbers on one line, as people write them."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_list(dumper: yaml.SafeDumper, data: list[Any]) -> yaml.Node:
    flow = all(isinstance(item, int | float) for item in data)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=flow)


_Dumper.add_representer(list, _represent_list)


def load(path: Path, warn: Callable[[str], None] = lambda _: None) -> Recipe:
    """The recipe in a file. Relative model paths are relative to the working directory, as in mergekit.

    path: the YAML file.
    warn: called with a sentence for each key that is ignored.
    Raises InputError for a file that is missing or no recipe.
    """
    document = read_yaml(path)
    with naming(path):
        document = plain(document, lambda warning: warn(f"{path}: {warning}"))
    return validate(Recipe, document, path)


def single(model: str) -> Recipe:
    """The recipe whose merge is one model unchanged."""
    return linear({model: 1.0})


def linear(weights: Mapping[str, float]) -> Recipe:
    """A weighted average of models (Wortsman et al. 2022)."""
    sources = tuple(Source(model=model, parameters={"weight": weight}) for model, weight in weights.items())
    return Recipe(merge_method="linear", models=sources)


def resolve_setting(setting: Setting | None, tensor: str, t: float, kind: Kind) -> float | bool | None:
    """The value of a setting for one tensor; None where no filter matches.

    setting: a value, a gradient, or values with filters.
    tensor: the tensor's name.
    t: where the tensor's layer lies in its slice, from 0 to 1.
    kind: the type of the parameter.
    Raises ValueError for a value of another type.
    """
    if setting is None:
        return None
    items = setting if isinstance(setting, list) else [setting]
    if items and isinstance(items[0], FilteredValue):  # then all of them are
        match = next((item for item in items if isinstance(item, FilteredValue) and item.matches(tensor)), None)
        return resolve_setting(match.value, tensor, t, kind) if match else None
    values = [_typed(item, kind) for item in items if not isinstance(item, FilteredValue)]
    return _typed(_gradient(values, t, kind), kind) if values else None


def _gradient(values: list[float | bool], t: float, kind: Kind) -> float | bool:
    """The value of a gradient at t: numbers are interpolated linearly, and truth values change in steps."""
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
    if type(value) is kind is float and math.isfinite(value):
        return value
    try:
        typed: float | bool = _TYPES[kind].validate_python(value)
    except ValidationError:
        raise ValueError(f"is '{value}'; expected {_EXPECTED[kind]}") from None
    return typed
