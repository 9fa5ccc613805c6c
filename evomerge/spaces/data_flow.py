"""The data-flow space: which layers of which models, in what order (Akiba et al. 2025, section 3.2).

A form (see `forms`) writes the layers between the pinned ones as genes. Layers beyond the limits are left out, so that
every genome decodes to a path. Which model gives the embeddings, and which the final norm and the head, may be genes,
too.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from evomerge.config.search import SearchConfig
from evomerge.config.spaces import FREE, DataFlowConfig
from evomerge.errors import InputError, choices
from evomerge.layers import layer_count
from evomerge.recipe import Recipe
from evomerge.spaces import Gene, Genome, canonical, categorical
from evomerge.spaces.forms import FORMS, Form, Region, distances
from evomerge.spaces.layer_path import Hop, LayerPath, check_scaling

BASE = "base"


def make(config: SearchConfig, tensors: Sequence[str], model_type: str) -> "DataFlowSpace":
    """The space that a config asks for.

    config: a search config with a data-flow space.
    tensors: the names of the base's tensors.
    model_type: the type of the models, such as `llama`.
    Raises InputError where the space has no genes, or does not fit the models.
    """
    assert isinstance(config.space, DataFlowConfig)
    space = DataFlowSpace(config.space, config.base, config.models, layer_count(tensors), model_type)
    if not space.genes:
        raise InputError("space: there is nothing to search; allow more layers, sources or blocks.")
    return space


class DataFlowSpace:
    """Paths through the layers of models of one shape."""

    def __init__(
        self, config: DataFlowConfig, base: str, models: Mapping[str, str], layers: int, model_type: str
    ) -> None:
        """config: the `space` block of a search file.
        base: the base's reference.
        models: the models' references, by name.
        layers: how many layers each model has.
        model_type: the type of the models, such as `llama`.
        Raises InputError for unknown models, and for limits that leave nothing to search.
        """
        self._config, self._base, self._layers, self._model_type = config, base, layers, model_type
        self._references = {BASE: base, **models}
        self._sources = _known_sources(config, self._references, tuple(models) or (BASE,))
        self._first, self._last = self._pinned()
        if config.scale.fixed != 1.0:
            check_scaling(model_type, "space.scale")
        self._most = self._check_depth()
        self._form = self._make_form()
        self._donors = {"embeddings": self._donor("embeddings"), "head": self._donor("head")}
        self.genes: tuple[Gene, ...] = (*self._form.genes, *self._donor_genes())

    def _pinned(self) -> tuple[list[Hop], list[Hop]]:
        pinned = self._config.pinned
        if pinned is None:
            return [], []
        if pinned.model not in self._references:
            raise InputError(f"space.pinned.model is '{pinned.model}'; {choices(pinned.model, self._references)}.")
        if pinned.first + pinned.last >= self._layers:
            raise InputError(
                f"space.pinned keeps {pinned.first} + {pinned.last} layers, but the models have {self._layers}, so "
                "none are left to search; keep fewer."
            )
        hops = [Hop(pinned.model, layer) for layer in range(self._layers)]
        return hops[: pinned.first], hops[self._layers - pinned.last :]

    def _check_depth(self) -> int:
        """The largest number of layers that a path may have."""
        kept, most = len(self._first) + len(self._last), self._config.max_layers
        if most is not None and most <= kept:
            raise InputError(
                f"space.max_layers is {most}, but space.pinned alone keeps {kept}; allow at least {kept + 1}."
                if kept
                else f"space.max_layers is {most}; allow at least 1."
            )
        if most is not None:
            return most
        of_all = self._layers * len(self._sources) * (self._config.repeats + 1)
        return self._layers + self._layers // 2 if self._config.form == "path" else kept + of_all

    def _make_form(self) -> Form:
        first, last = len(self._first), len(self._last)
        region = Region(self._sources, first, self._layers - last, self._most - first - last)
        if self._config.granularity > region.end - region.start:
            raise InputError(
                f"space.granularity is {self._config.granularity}, but only {region.end - region.start} layers are "
                "searched; use a smaller one."
            )
        return FORMS[self._config.form](self._config, region)

    def _donor(self, key: str) -> str:
        """The model that gives the embeddings or the head, or `free`."""
        given: str | None = getattr(self._config, key)
        if given is None:
            return self._config.pinned.model if self._config.pinned is not None else self._sources[0]
        if given != FREE and given not in self._references:
            raise InputError(f"space.{key} is '{given}'; {choices(given, [*self._references, FREE])}.")
        return given

    def _donor_genes(self) -> list[Gene]:
        start = self._config.pinned.model if self._config.pinned is not None else self._sources[0]
        options = tuple(dict.fromkeys([*self._sources, start]))
        return [
            categorical(key, "donor", key, options, start)
            for key, given in self._donors.items()
            if given == FREE and len(options) > 1
        ]

    @property
    def embedding_models(self) -> list[str]:
        """The names of the models that may give the embeddings or the head."""
        fixed = [name for name in self._donors.values() if name != FREE]
        return list(dict.fromkeys([*fixed, *(choice for gene in self._donor_genes() for choice in gene.choices)]))

    def path(self, genome: Sequence[float] | Genome) -> LayerPath:
        """The path of a genome of shape (dimension,), with the models' names."""
        vector = np.asarray(genome, dtype=np.float64)
        if vector.shape != (len(self.genes),):
            raise ValueError(f"expected a genome of shape ({len(self.genes)},), got {vector.shape}")
        values = canonical(self.genes, vector)
        inside = len(self._form.genes)
        donors = {
            gene.name: gene.choices[int(value)]
            for gene, value in zip(self.genes[inside:], values[inside:], strict=True)
        }
        given = {key: self._sources[0] if name == FREE else name for key, name in self._donors.items()} | donors
        hops = self._limited(self._form.hops(values[:inside]))
        return LayerPath(tuple(hops), given["embeddings"], given["head"], self._config.scaling)

    def _limited(self, hops: Sequence[Hop]) -> list[Hop]:
        """The pinned layers, and between them the hops that the limits allow. Where nothing would be left, the path is
        the first source's first layer."""
        kept = limited(hops, self._first, self._last, self._most, self._config.max_repeats, self._config.max_distance)
        return kept or [Hop(self._sources[0], 0)]

    def decode(self, genome: Sequence[float] | Genome) -> Recipe:
        """The recipe of a genome. Values outside the box are clipped to it."""
        path = self.path(genome)
        named = LayerPath(
            hops=tuple(replace(hop, model=self._references[hop.model]) for hop in path.hops),
            embeddings=self._references[path.embeddings],
            head=self._references[path.head],
            scaling=path.scaling,
        )
        return named.recipe(self._model_type, self._base)

    def encode(self, weights: Mapping[str, float]) -> Genome:
        """The genome of the source with the largest weight, unchanged; of equal weights the first one counts.

        weights: the weight of each model, by name. Without weights it is the genome of the base where the base is a
            source, else that of the first source.
        """
        weighty = {name: weight for name, weight in weights.items() if name in self._sources and weight > 0}
        default = BASE if BASE in self._sources and not weights else self._sources[0]
        model = max(weighty, key=lambda name: weighty[name]) if weighty else default
        donors = [gene.choices.index(model) if model in gene.choices else gene.start for gene in self._donor_genes()]
        return np.array([*self._form.parent(model), *donors], dtype=np.float64)

    def draw(self, random: np.random.Generator) -> Genome:
        """A random path that goes forward more often than not."""
        donors = [float(random.integers(len(gene.choices))) for gene in self._donor_genes()]
        return np.array([*self._form.draw(random), *donors], dtype=np.float64)


def limited(
    hops: Sequence[Hop],
    first: Sequence[Hop],
    last: Sequence[Hop],
    most: int,
    repeats: int | None,
    distance: int | None,
) -> list[Hop]:
    """The hops of a path, without those that break a limit. Pinned hops always stay.

    hops: the hops between the pinned ones.
    first: the pinned hops at the beginning.
    last: the pinned hops at the end.
    most: the largest number of hops in all.
    repeats: how often a layer may occur; None for any number.
    distance: how far a hop may lie from the layer that would follow the one before; None for any distance.
    """
    used = Counter((hop.model, hop.layer) for hop in (*first, *last))
    kept: list[Hop] = []
    for hop in hops:
        if len(first) + len(kept) + len(last) >= most:
            break
        if repeats is not None and used[hop.model, hop.layer] >= repeats:
            continue
        before = [*first, *kept][-1:]
        if distance is not None and any(gap > distance for gap in distances([*before, hop])):
            continue
        used[hop.model, hop.layer] += 1
        kept.append(hop)
    while kept and last and distance is not None and distances([kept[-1], last[0]])[0] > distance:
        kept.pop()
    return [*first, *kept, *last]


def _known_sources(config: DataFlowConfig, references: Mapping[str, str], default: tuple[str, ...]) -> tuple[str, ...]:
    for index, name in enumerate(config.sources or ()):
        if name not in references:
            raise InputError(f"space.sources[{index}] is '{name}'; {choices(name, references)}.")
        if name in (config.sources or ())[:index]:
            raise InputError(f"space.sources[{index}] is {name} again; name each model once.")
    return config.sources or default
