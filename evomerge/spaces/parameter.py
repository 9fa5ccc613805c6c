"""The parameter space: numbers of merge methods per model and per group of tensors (Akiba et al. 2025, section 3.1).

Groups are the embeddings, runs of layers (each optionally split by name filters), and the final norm with the head.
The method may be a gene, and so may the models that take part. A gene that the chosen method does not use does not
count. A genome decodes to a recipe of slices, one for each run of layers, which mergekit reads as it is.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from evomerge.config.base import GeneConfig
from evomerge.config.search import SearchConfig
from evomerge.config.spaces import ParameterSpaceConfig
from evomerge.errors import InputError
from evomerge.layers import EMBEDDINGS, HEAD, embedding_names, head_names, layer_count, layer_index
from evomerge.merging import methods
from evomerge.merging.methods.base import Method
from evomerge.merging.methods.sparsify import largest_epsilon
from evomerge.recipe import FilteredValue, Parameters, Provenance, Recipe, Setting, Slice, Source
from evomerge.spaces import TAKE, Gene, Genome, at, canonical, categorical, model_of
from evomerge.spaces.model_bounds import KINDS, model_bounds
from evomerge.spaces.own_parameters import own_parameters
from evomerge.spaces.participants import BASE, FROM, TO, Participants, takes_pair

REST = "rest"
Values = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """A run of layers.

    start: the first layer.
    end: the layer after the last one.
    """

    start: int
    end: int

    @property
    def label(self) -> str:
        """The group's name in genes."""
        return f"layers_{self.start}-{self.end - 1}" if self.end - self.start > 1 else f"layer_{self.start}"


def make(config: SearchConfig, tensors: Sequence[str], _model_type: str) -> "ParameterSpace":
    """The space that a config asks for.

    config: a search config with a parameter space.
    tensors: the names of the base's tensors.
    Raises InputError where the space has no genes, or does not fit the models.
    """
    assert isinstance(config.space, ParameterSpaceConfig)
    return ParameterSpace(config.space, config.base, config.models, tensors, config.seed)


class ParameterSpace:
    """Numbers of merge methods over groups of tensors, which method it is, and which models it merges."""

    def __init__(
        self, config: ParameterSpaceConfig, base: str, models: Mapping[str, str], tensors: Sequence[str], seed: int
    ) -> None:
        """config: the `space` block of a search file.
        base: the base's reference.
        models: the models' references, by name.
        tensors: the names of the base's tensors.
        seed: the seed of the masks in every recipe.
        Raises InputError where the space has no genes, or does not fit the models.
        """
        self._config, self._models, self._seed = config, tuple(models), seed
        self._references = {BASE: base, **models}
        self._methods = _searchable(config, len(models))
        self._participants = Participants(self._models, self._methods, config.participate)
        self._own = own_parameters(config, self._methods)
        self._bounds = model_bounds(config, self._models)
        self._layers = layer_groups(config, layer_count(tensors))
        self._embeddings, self._head = embedding_names(tensors), head_names(tensors)
        _check_filters(config.filters, tensors)
        self._tensors = self._by_group(tensors)
        choices = (*self._method_gene(), *self._participants.genes())
        self.genes = (*choices, *self._numbers(), *self._lambda(), *self._own_genes())
        if config.participate and all(gene.kind != TAKE for gene in choices):
            raise InputError(
                f"space.participate is true, but of {len(models)} model{'s' * (len(models) > 1)} "
                f"{', '.join(config.methods)} leaves none out; set it to false."
            )
        if not self.genes:
            raise InputError(self._nothing())
        drawn = [
            _name(gene.kind, model_of(gene), gene.group) if gene.kind == "weight" else gene.name for gene in self.genes
        ]
        self._drawn = list(dict.fromkeys(drawn))
        self._draws = [self._drawn.index(name) for name in drawn]

    def _method_gene(self) -> list[Gene]:
        names = [method.name for method in self._methods]
        return [categorical("method", "method", "method", names, names[0])] if len(names) > 1 else []

    def _numbers(self) -> list[Gene]:
        """Weights and densities, by group and model."""
        genes = []
        for kind in KINDS:
            users = [method for method in self._methods if method.takes(kind)]
            if users:
                when = {model: self._participants.part(model, users) for model in self._models}
                genes += [
                    Gene(name, kind, group, bounds.low, bounds.high, start, bounds.step, when=when[model])
                    for group in self.groups
                    for unit in self._units(kind, group)
                    for model in self._models
                    for name, bounds in [(_name(kind, model, unit), self._bounds[kind, model])]
                    if bounds.fixed is None
                    for start in [self._start(bounds, kind)]
                ]
        return genes

    def _start(self, bounds: GeneConfig, kind: str) -> float:
        given = self._config.start_of_weights if bounds.start is None and kind == "weight" else bounds.start
        if given is not None:
            return min(max(given, bounds.low), bounds.high)
        return min(max(1.0 / len(self._models), bounds.low), bounds.high)

    def _units(self, kind: str, group: str) -> list[str]:
        """What has numbers of its own in a group: its tensors, or the group itself."""
        return self._tensors[group] if kind == "weight" and self._config.by_tensor else [group]

    def _by_group(self, tensors: Sequence[str]) -> dict[str, list[str]]:
        """The names of the tensors by group, sorted by layer."""
        by_group: dict[str, list[str]] = {group: [] for group in self.groups}
        for name in sorted(tensors, key=lambda name: (layer_index(name) or 0, name)):
            by_group[self._group_of(name)].append(name)
        return by_group

    def _group_of(self, tensor: str) -> str:
        layer = layer_index(tensor)
        if layer is None:
            return EMBEDDINGS if tensor in self._embeddings else HEAD
        run = next(run for run in self._layers if run.start <= layer < run.end)
        if not self._config.filters:
            return run.label
        return f"{run.label}.{next((text for text in self._config.filters if text in tensor), REST)}"

    def _lambda(self) -> list[Gene]:
        gene = self._config.lambda_
        users = [method for method in self._methods if method.shares("lambda")]
        if gene.fixed is not None or not users:
            return []
        start = 1.0 if gene.start is None else gene.start
        when = self._participants.under(users)
        return [Gene("lambda", "lambda", "lambda", gene.low, gene.high, start, gene.step, when=when)]

    def _own_genes(self) -> list[Gene]:
        genes = []
        for own in self._own:
            if own.bounds.fixed is None:
                for group in self.groups if own.by_tensor else [""]:
                    for model in self._models if own.by_model else [None]:
                        users = [own.method]
                        when = self._participants.part(model, users) if model else self._participants.under(users)
                        genes.append(own.gene(group, model, when))
        return genes

    def _nothing(self) -> str:
        if any(method.takes("weight") for method in self._methods) or self._own:
            return "space: every kind of gene is fixed, so there is nothing to search; free one of them."
        return (
            f"space.method is {self._methods[0].name}, which has no parameters, so with {len(self._models)} model"
            f"{'s' * (len(self._models) > 1)} there is nothing to search; list it with other methods, or set "
            "space.participate to true with several models."
        )

    @property
    def groups(self) -> list[str]:
        """The names of the groups of tensors, in the model's order."""
        filters = [*self._config.filters, REST]
        layers = [
            f"{run.label}.{name}" if self._config.filters else run.label
            for run in self._layers
            for name in filters
            if self._config.filters or name == REST
        ]
        return [EMBEDDINGS] * bool(self._embeddings) + layers + [HEAD] * bool(self._head)

    def decode(self, genome: Sequence[float] | Genome) -> Recipe:
        """The recipe of a genome of shape (dimension,). Values outside the box are clipped to it."""
        values = self._values(genome)
        choices = {gene.name: gene.choices[int(values[gene.name])] for gene in self.genes if gene.choices}
        chosen = choices.get("method", self._methods[0].name)
        method = next(method for method in self._methods if method.name == chosen)
        base, models = self._participants.chosen(method, choices)
        return Recipe(
            merge_method=method.name,
            base_model=self._references[base] if method.uses_base else None,
            slices=tuple(self._slice(values, method, base, models, run) for run in self._layers),
            parameters=self._shared(values, method),
            evomerge=Provenance(seed=self._seed, rescale=self._config.rescale),
        )

    def _values(self, genome: Sequence[float] | Genome) -> Values:
        vector = np.asarray(genome, dtype=np.float64)
        if vector.shape != (len(self.genes),):
            raise ValueError(f"expected a genome of shape ({len(self.genes)},), got {vector.shape}")
        written = canonical(self.genes, vector).tolist()
        return {gene.name: value for gene, value in zip(self.genes, written, strict=True)}

    def _slice(self, values: Values, method: Method, base: str, models: Sequence[str], run: LayerGroup) -> Slice:
        def source(model: str, parameters: Parameters) -> Source:
            layer_range = (run.start, run.end)
            return Source(model=self._references[model], layer_range=layer_range, parameters=parameters)

        sources = [source(model, self._per_model(values, method, model, run)) for model in models]
        if method.uses_base:
            sources = [source(base, {}), *sources]
        return Slice(sources=tuple(sources), parameters=self._own_settings(values, method, None, run))

    def _per_model(self, values: Values, method: Method, model: str, run: LayerGroup) -> Parameters:
        settings = {
            own.name: self._setting(
                lambda unit, own=own: own.written(self._number(values, own.name, model, unit)),  # type: ignore[misc]
                run,
                by_tensor=own.name == "weight" and self._config.by_tensor,
            )
            for own in method.per_model
            if own.name in KINDS
        }
        settings |= self._own_settings(values, method, model, run)
        if method.takes("epsilon"):
            settings["epsilon"] = self._setting(lambda group: self._epsilon(values, method, model, group), run)
        return settings

    def _number(self, values: Values, kind: str, model: str, unit: str) -> float:
        name = _name(kind, model, unit)
        if name in values:
            return values[name]
        fixed = self._bounds[kind, model].fixed
        assert fixed is not None
        return fixed

    def _own_settings(self, values: Values, method: Method, model: str | None, run: LayerGroup) -> Parameters:
        """The method's own numbers that vary by group of tensors: those of a model, or without a model those that
        models share."""
        return {
            own.parameter.name: self._setting(lambda group, own=own: own.value(values, group, model), run)  # type: ignore[misc]
            for own in self._own
            if own.method is method and own.by_tensor and own.by_model == (model is not None)
        }

    def _epsilon(self, values: Values, method: Method, model: str, group: str) -> float:
        """DELLA's epsilon: that of the gene or mergekit's default, made smaller where density ± epsilon would leave
        (0, 1)."""
        epsilons = [own.value(values, group, model) for own in self._own if own.kind == f"{method.plain}.epsilon"]
        return largest_epsilon(self._number(values, "density", model, group), wanted=epsilons[0] if epsilons else 0.15)

    def _setting(self, value: Callable[[str], float], run: LayerGroup, by_tensor: bool = False) -> Setting:
        """The setting of a parameter in a slice: a plain number, or numbers with filters. The embeddings' numbers are
        in the first slice, those of the final norm and the head in the last.

        value: a group, or with `by_tensor` a tensor's name -> the number.
        run: the layers of the slice.
        by_tensor: whether tensors have numbers of their own.
        """
        if by_tensor:
            return [FilteredValue(filter=name, value=value(name)) for name in self._tensors_in(run)]
        prefix = f"{run.label}." if self._config.filters else run.label
        conditions = []
        for group, names, owner in (
            (EMBEDDINGS, self._embeddings, self._layers[0]),
            (HEAD, self._head, self._layers[-1]),
        ):
            if run == owner:
                conditions += [FilteredValue(filter=name, value=value(group)) for name in names]
        for name in self._config.filters:
            conditions.append(FilteredValue(filter=name, value=value(prefix + name)))
        rest = value(prefix + REST if self._config.filters else prefix)
        return [*conditions, FilteredValue(value=rest)] if conditions else rest

    def _tensors_in(self, run: LayerGroup) -> list[str]:
        """The names of the tensors that read the slice of a run of layers, the longest first. A filter takes every
        tensor whose name holds it, and the first filter that does so counts."""
        before = self._tensors.get(EMBEDDINGS, []) if run == self._layers[0] else []
        after = self._tensors.get(HEAD, []) if run == self._layers[-1] else []
        inside = [names for group, names in self._tensors.items() if group.partition(".")[0] == run.label]
        return sorted([*before, *after, *(name for names in inside for name in names)], key=len, reverse=True)

    def _shared(self, values: Values, method: Method) -> dict[str, Any]:
        shared: dict[str, Any] = {}
        if method.shares("normalize") and self._config.normalize != "auto":
            shared["normalize"] = self._config.normalize
        if method.shares("lambda"):
            fixed = self._config.lambda_.fixed
            shared["lambda"] = values["lambda"] if fixed is None else fixed
        if method.random:
            shared["rescale"] = True
        for own in self._own:
            if own.method is method and not own.by_tensor:
                shared[own.parameter.name] = own.parameter.kind(own.value(values, "", None))
        return shared

    def encode(self, weights: Mapping[str, float]) -> Genome:
        """The genome that gives every group of tensors the same weights, by the first method. Models with a weight
        above 0 take part. Genes that weights do not decide have their start.

        weights: the weight of each model, by name.
        """
        choices = self._participants.standing_for(weights)
        ends = [weights.get(choices.get(end, ""), 0.0) for end in (FROM, TO)]
        along = max(ends[1], 0.0) / (max(ends[0], 0.0) + max(ends[1], 0.0)) if ends[1] > 0 else 0.0
        genome = []
        for gene in self.genes:
            if gene.kind == "weight":
                genome.append(weights.get(model_of(gene), 0.0))
            elif gene.kind == "slerp.t":
                genome.append(along)
            elif gene.name in choices:
                genome.append(float(gene.choices.index(choices[gene.name])))
            else:
                genome.append(gene.start)
        return canonical(self.genes, np.array(genome))

    def draw(self, random: np.random.Generator) -> Genome:
        """A uniform point of the box, with equal weights for the tensors of a group."""
        drawn = random.random(len(self._drawn))
        return canonical(self.genes, at(self.genes, drawn[self._draws]))


def _searchable(config: ParameterSpaceConfig, models: int) -> tuple[Method, ...]:
    """The methods to search. Raises InputError where one does not take so many models and cannot choose among them."""
    listed = tuple(methods.get(name, "space.method") for name in config.methods)
    for method in listed:
        choosable = method.most == 1 or (takes_pair(method) and models > 2)
        if not method.accepts(models) and not choosable:
            raise InputError(
                f"space.method is {method.name}, which takes {method.count} besides the base, but models lists "
                f"{models}; change either."
            )
        if config.participate and takes_pair(method) and models == 2:
            raise InputError(
                f"space.participate is true, but {method.name} in space.method takes {method.count}, so all of them "
                "take part; set it to false, or leave the method out."
            )
    return listed


def _name(kind: str, model: str, unit: str) -> str:
    return f"{kind}:{model}:{unit}"


def layer_groups(config: ParameterSpaceConfig, layers: int) -> list[LayerGroup]:
    """The runs of layers that share genes: as the config lists them, or of `layer_granularity` layers each, or all
    layers in one.

    config: the `space` block of a search file.
    layers: how many layers the model has.
    Raises InputError where the runs do not cover the layers once, in order.
    """
    if config.layer_groups is not None:
        return _listed_groups(config.layer_groups, layers)
    size = 1 if config.layer_granularity == "tensor" else config.layer_granularity or layers
    if layers % size:
        raise InputError(
            f"space.layer_granularity is {size}, which does not divide the model's {layers} layers; "
            "use a divisor, or list space.layer_groups."
        )
    return [LayerGroup(start, start + size) for start in range(0, layers, size)]


def _listed_groups(listed: Sequence[str], layers: int) -> list[LayerGroup]:
    groups, expected = [], 0
    for index, text in enumerate(listed):
        first, _, last = text.partition("-")
        last = last or first
        if not (first.isdigit() and last.isdigit()):
            raise InputError(f"space.layer_groups[{index}] is '{text}'; write one layer ('3') or a range ('0-3').")
        if int(first) != expected or int(last) < int(first) or int(last) >= layers:
            raise InputError(
                f"space.layer_groups[{index}] is '{text}'; expected a range that starts at layer {expected} and ends "
                f"by {layers - 1}, since groups cover the model's {layers} layers once, in order."
            )
        groups.append(LayerGroup(int(first), int(last) + 1))
        expected = int(last) + 1
    if expected != layers:
        raise InputError(
            f"space.layer_groups end at layer {expected - 1}, but the model's last layer is {layers - 1}; "
            "cover all of them."
        )
    return groups


def _check_filters(filters: Sequence[str], tensors: Sequence[str]) -> None:
    inside = [name for name in tensors if layer_index(name) is not None]
    for index, text in enumerate(filters):
        if text == REST or not any(text in name for name in inside):
            raise InputError(
                f"space.filters[{index}] is '{text}', which no tensor name in the layers contains; "
                f"names look like {inside[0] if inside else '(none)'}."
            )
