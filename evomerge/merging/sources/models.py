"""Models: those of a search or of a merge, with every reference resolved once."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evomerge.config.search import SearchConfig
from evomerge.errors import naming
from evomerge.merging.sources.references import ModelSource, find_source, locate, pinned
from evomerge.merging.sources.tensor_files import TensorInfo
from evomerge.merging.sources.weights import Weights, identity, model_config, seen_by, untied_head, with_head
from evomerge.seen import Digests


@dataclass(frozen=True, slots=True)
class Model:
    """A model whose files have been located and whose headers have been read.

    reference: what it is called in a search file or a recipe.
    source: its folder, and that of an adapter.
    config: its config.json.
    weights: its tensors by name, which are read when they are asked for.
    """

    reference: str
    source: ModelSource
    config: Mapping[str, Any]
    weights: Weights

    @property
    def folder(self) -> Path:
        return self.source.folder

    @property
    def folders(self) -> list[Path]:
        """The model's folder, and its adapter's where there is one."""
        return [self.source.folder] if self.source.adapter is None else [self.source.folder, self.source.adapter]

    @property
    def kind(self) -> str:
        """The model type, as in `llama`."""
        return str(self.config["model_type"])

    @property
    def table(self) -> dict[str, TensorInfo]:
        """Every tensor's dtype and shape, by name."""
        return self.weights.table

    @property
    def seen(self) -> Digests:
        """The items that the search saw that made it; empty for a model that no search made."""
        return seen_by(self.source)

    @property
    def pinned(self) -> str:
        """The reference, with the commits that its Hugging Face ids stand for now."""
        return pinned(self.reference, self.source)

    @property
    def identity(self) -> str:
        """16 hexadecimal digits that change when the model's files do."""
        return identity(self.source)


@dataclass(frozen=True, slots=True)
class Models(Mapping[str, Model]):
    """Models by reference, in the order of a file.

    base: the model whose config and tensors the merge has. It need not be one of the others.
    by_reference: the models that recipes may name.
    """

    base: Model
    by_reference: Mapping[str, Model]

    def __getitem__(self, reference: str) -> Model:
        return self.by_reference[reference]

    def __iter__(self) -> Iterator[str]:
        return iter(self.by_reference)

    def __len__(self) -> int:
        return len(self.by_reference)

    def pinned(self) -> "Models":
        """The same models by references that name commits, so that a resumed search finds the same weights."""
        base = replace(self.base, reference=self.base.pinned)
        models = [base if model is self.base else replace(model, reference=model.pinned) for model in self.values()]
        return Models(base, {model.reference: model for model in models})

    @property
    def head(self) -> str | None:
        """The name of the head where a model has one of its own; None where all of them tie it to the embedding."""
        return untied_head([self.base.weights, *(model.weights for model in self.values())])

    @property
    def head_apart(self) -> bool:
        """Whether some models tie their head and others do not. Then the head in memory is a tensor of its own, even
        for a recipe whose models all tie it."""
        return self.head is not None and any(model.weights.own_head is None for model in self.values())

    @property
    def table(self) -> dict[str, TensorInfo]:
        """The tensors of a merge: the base's, and a head where only others have one."""
        return with_head(self.base.weights, self.head)

    def readings(self) -> "Iterator[Models]":
        """The models; and where some have adapters, also the models as versions up to 0.2.0 read them
        (`Adapter.adapt`), which fingerprints of those versions need."""
        yield self
        if any(model.source.adapter is not None for model in self.values()):
            earlier = {key: replace(model, weights=Weights(model.source, exact=False)) for key, model in self.items()}
            yield Models(earlier.get(self.base.reference, self.base), earlier)

    @property
    def seen(self) -> Digests:
        """The items that the searches saw that made these models."""
        return self.base.seen.union(*(model.seen for model in self.values()))


def find_models(
    base: str,
    references: Iterable[str],
    keys: Mapping[str, str] | None = None,
    copies: Mapping[str, str] | None = None,
) -> Models:
    """A base and the models that recipes may name, located and with their headers read.

    base: a reference; an adapter that is named by itself is taken to change this model.
    references: the models that recipes may name. The base is one of them only if recipes may name it.
    keys: the key in a file that holds a reference, by reference; it opens an error's message.
    copies: the folders of aligned models, which stand for models, by reference.
    Raises InputError for a model that is missing, is no model, or has weights that are not read.
    """

    def find(reference: str) -> Model:
        with naming(keys[reference]) if keys and reference in keys else nullcontext():
            aligned = (copies or {}).get(reference)
            source = find_source(reference, base) if aligned is None else ModelSource(locate(aligned))
            return Model(reference, source, model_config(source.folder), Weights(source))

    first = find(base)
    others = {reference: first if reference == base else find(reference) for reference in dict.fromkeys(references)}
    return Models(first, others)


def models_of(config: SearchConfig) -> Models:
    """The base and the models of a search. Raises InputError, with the key in the file, for one that cannot be read."""
    copies = config.copies
    keys = {
        reference: f"align.{name}.folder" if reference in copies else f"models.{name}"
        for name, reference in config.models.items()
    }
    return find_models(config.base, (config.base, *config.models.values()), keys | {config.base: "base"}, copies)
