"""Weights: the tensors of a model, read from safetensors only.

`Weights` reads names, shapes and dtypes from the file headers when it is made, and then one tensor at a time. Pickled
weights are never opened.

Tensors have the names that transformers would write for the whole model (`naming`), whatever a checkpoint calls them.
Buffers of old checkpoints are left out, and so are heads that are stored though the config ties them to the embedding.
"""

import copy
import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evomerge.errors import InputError, choices
from evomerge.merging.sources.adapters import CONFIG as ADAPTER_CONFIG
from evomerge.merging.sources.adapters import WEIGHTS as ADAPTER_WEIGHTS
from evomerge.merging.sources.adapters import Adapter, LowRank, load_adapter
from evomerge.merging.sources.references import ModelSource
from evomerge.merging.sources.tensor_files import FLOATS as FLOATS
from evomerge.merging.sources.tensor_files import MappedFiles, MappedTensor, TensorFiles, read_header
from evomerge.merging.sources.tensor_files import TensorInfo as TensorInfo
from evomerge.recipe import load as load_recipe
from evomerge.seen import Digests

if TYPE_CHECKING:
    import torch

    from evomerge.merging.naming import Naming
    from evomerge.merging.sources.tensor_files import Piece

INDEX = "model.safetensors.index.json"
WEIGHTS = "model.safetensors"
RECIPE = "evomerge_recipe.yaml"  # beside the weights of a merge
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
CONV1D = ("gpt2", "openai-gpt")  # architectures whose layers store their weights as (in, out)
HEAD_NAMES = ("lm_head.weight", "embed_out.weight")
_EMBEDDING = re.compile(r"(?:^|\.)(?:embed_tokens|wte|embed_in|word_embeddings)\.weight$")
_SAMPLE = 1 << 20
_BUFFER = re.compile(r"\.(?:attn|attention)\.(?:bias|masked_bias)$|\.rotary_emb\.\w+$")


def seen_by(source: ModelSource) -> Digests:
    """The items that the search saw that made a model, as the recipe beside its weights says; empty where there is no
    recipe."""
    folders = [source.folder] if source.adapter is None else [source.folder, source.adapter]
    recipes = [load_recipe(folder / RECIPE) for folder in folders if (folder / RECIPE).is_file()]
    return frozenset().union(*(recipe.evomerge.digests for recipe in recipes))


def model_config(folder: Path) -> dict[str, Any]:
    """The config.json of a model folder. Raises InputError where it is missing, no JSON, or lacks a model type."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder}: config.json is missing; a model folder holds config.json and weights.") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable as JSON ({error}); repair or download it again.") from None
    if not isinstance(config, dict) or "model_type" not in config:
        raise InputError(f"{path}: model_type is missing; expected the config.json of a Hugging Face model.")
    return config


def tensor_table(source: ModelSource | Path) -> dict[str, TensorInfo]:
    """Every tensor of a source by name, from the safetensors headers."""
    return Weights(source).table


class Weights:
    """The tensors of a source, read one at a time, adapters merged in.

    source: where the files are.
    table: by name, every tensor with the dtype and shape that `read` gives it.
    plain: the model without its adapter; the same object where there is none.
    """

    def __init__(self, source: ModelSource | Path, exact: bool = True) -> None:
        """Reads the headers, but no values.

        source: a model folder, or one with an adapter.
        exact: see `Adapter.adapt`.
        Raises InputError for files that cannot be read or merged.
        """
        self.source = source if isinstance(source, ModelSource) else ModelSource(source)
        self._exact = exact
        self._files, self._mapped = TensorFiles(), MappedFiles()
        self._stored = self.table = _model_table(self.source.folder)
        self._adapter: Adapter | None = None
        self.plain = self
        if self.source.adapter is not None:
            kind = model_config(self.source.folder)["model_type"]
            self.plain = copy.copy(self)
            self.plain.source, self.plain.plain = ModelSource(self.source.folder), self.plain
            naming = _naming(self.source.folder)
            renamed = {held: name for name, held in naming.whole.items() if held != name} if naming else {}
            tied = self._tied(renamed.get(HEAD_NAMES[0], HEAD_NAMES[0]))
            self._adapter = load_adapter(self.source.adapter, self._stored, renamed, kind in CONV1D, tied)
            if self._adapter.head is not None and tied is not None:
                self._stored = {**self._stored, tied[0]: self._stored[tied[1]]}
            self.table = self._adapter.adapt_table(self._stored)

    @property
    def replaced(self) -> tuple[str, ...]:
        """The names of the tensors that an adapter stores whole."""
        return () if self._adapter is None else tuple(self._adapter.replaced)

    def find(self, name: str) -> TensorInfo | None:
        """A tensor's entry in the table; None where there is none. The head of a model that ties it has the entry of
        the embedding."""
        return self.table.get(self._name(name))

    def read(self, name: str, device: "torch.device | str" = "cpu") -> "torch.Tensor":
        """One tensor that `find` finds, in its storage dtype. Nothing may be written into it.

        On the CPU it is memory-mapped where no adapter changes it.

        name: the tensor's name.
        device: where it is to be, and where an adapter is merged into it.
        Raises InputError where there is no such tensor.
        """
        own = self._name(name)
        if own not in self._stored:
            raise InputError(f"{self.source}: the weights lack {name}; {choices(name, self._stored)}.")
        tensor = self._files.read(self._stored[own]).to(device)
        if self._adapter is None:
            return tensor
        return self._adapter.adapt(own, tensor, lambda info: self._files.read(info).to(device), self._exact)

    def read_stored(self, info: TensorInfo) -> "torch.Tensor":
        """One tensor as a file holds it."""
        return self._files.read(info)

    def changes(self, name: str) -> bool:
        """Whether an adapter changes a tensor that `find` finds."""
        return self._adapter is not None and self._adapter.changes(self._name(name))

    def products(self, name: str) -> tuple[LowRank, ...]:
        """What an adapter adds to a tensor that `find` finds, if that is all that it does to it; otherwise nothing."""
        return self._adapter.products(self._name(name)) if self._adapter is not None else ()

    def mapped(self, name: str) -> MappedTensor | None:
        """A tensor that `find` finds as it lies in its file; None where what `read` gives lies in no file."""
        own = self._name(name)
        if self._adapter is None or not self._adapter.changes(own):
            return self._mapped.find(self._stored[own])
        stored = self._adapter.stored(own)
        return None if stored is None else self._mapped.find(stored)

    def close(self) -> None:
        """Gives back the memory that reading has mapped, once no tensor needs it."""
        self._files.close()

    def _name(self, name: str) -> str:
        if name in self.table or name not in HEAD_NAMES:
            return name
        embeddings = [tensor for tensor in self.table if _EMBEDDING.search(tensor)]
        return embeddings[0] if len(embeddings) == 1 and _ties(self.source.folder) else name

    def _tied(self, head: str) -> tuple[str, str] | None:
        """The names of the head and of the embedding that it is tied to; None where the model does not tie them."""
        embedding = self._name(head)
        return (head, embedding) if embedding != head else None

    @property
    def own_head(self) -> str | None:
        """The name of the head; None where it is not a tensor of its own."""
        return next((name for name in HEAD_NAMES if name in self.table), None)


def _ties(folder: Path) -> bool:
    """Whether a model ties its head to its embedding: as transformers builds the model, or as the config says where
    transformers cannot build it."""
    naming = _naming(folder)
    if naming is not None:
        return any(head in naming.tied for head in HEAD_NAMES)
    return bool(model_config(folder).get("tie_word_embeddings"))


def untied_head(sources: Iterable[Weights]) -> str | None:
    """The name of the head in a merge of sources; None where all sources tie it to their embedding.

    Where one source has a head of its own, the merge has one, too. The embedding then serves as the head of the sources
    that tie it.
    """
    return next((source.own_head for source in sources if source.own_head is not None), None)


def _model_table(folder: Path) -> dict[str, TensorInfo]:
    """A model's tensors by the names that transformers would write, whatever its files call them."""
    table: dict[str, TensorInfo] = {}
    for file in _weight_files(folder):
        table |= read_header(file)
    table = {name: info for name, info in table.items() if not _BUFFER.search(name)}
    if not (folder / "config.json").exists():
        return table
    naming = _naming(folder)
    if naming is not None:
        read = naming.read_from({name: info.shape for name, info in table.items()})
        table = {name: _cut(table[stored], piece) for name, (stored, piece) in read.items()}
    if any(head in table for head in HEAD_NAMES) and _ties(folder):
        table = {name: info for name, info in table.items() if name not in HEAD_NAMES}
    return table


def _cut(info: TensorInfo, piece: "Piece | None") -> TensorInfo:
    return info if piece is None else replace(info, shape=piece.shape, piece=piece)


def _naming(folder: Path) -> "Naming | None":
    """The naming of a folder's model. None where transformers cannot build the model, which is reported when the model
    is needed."""
    from evomerge.merging.naming import naming_in

    try:
        return naming_in(folder)
    except InputError:
        return None


def _weight_files(folder: Path) -> list[Path]:
    index = folder / INDEX
    if index.exists():
        try:
            names = sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise InputError(f"{index}: not a readable safetensors index ({error}); download it again.") from None
        for name in names:
            if Path(name).name != name or name in ("", ".."):
                raise InputError(f"{index}: shard '{name}' lies outside the model folder; refused.")
            if not (folder / name).exists():
                raise InputError(f"{folder}: shard {name} named by {INDEX} is missing; download it again.")
        return [folder / name for name in names]
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise InputError(
            f"{folder}: weights are pickled ({pickles[0]}), and a pickle can run code when it is opened; "
            "convert them to safetensors (model.save_pretrained) first."
        )
    raise InputError(f"{folder}: holds no {WEIGHTS}; expected a Hugging Face model in safetensors.")


def with_head(weights: Weights, head: str | None) -> dict[str, TensorInfo]:
    """A model's table, with an entry for the head of a merge.

    weights: the model's tensors.
    head: the name of the head in the merge (`untied_head`); None where it has none of its own. A model that ties its
        head has the embedding's entry under this name.
    """
    info = weights.find(head) if head is not None else None
    return weights.table | ({head: info} if head is not None and info is not None else {})


def load_tensors(source: ModelSource | Path, names: Iterable[str] | None = None) -> "dict[str, torch.Tensor]":
    """Tensors of a source by name, in their storage dtypes.

    source: a model folder, or one with an adapter.
    names: which tensors; all of them by default.
    Raises InputError for files that cannot be read, and for unknown names.
    """
    weights = Weights(source)
    return {name: weights.read(name) for name in (weights.table if names is None else names)}


def identity(source: ModelSource) -> str:
    """16 hexadecimal digits that change when a source's files do.

    They are a hash of the config and of each file's size, header, first MiB and last MiB. So little of each file is
    read that terabytes take seconds.
    """
    digest = hashlib.sha256()
    files = [source.folder / "config.json", *_weight_files(source.folder)]
    if source.adapter is not None:
        files += [source.adapter / ADAPTER_CONFIG, source.adapter / ADAPTER_WEIGHTS]
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as stream:
            if file.suffix == ".safetensors":
                digest.update(stream.read(int.from_bytes(stream.read(8), "little")))
            for start in (stream.tell(), max(stream.tell(), size - _SAMPLE)):
                stream.seek(start)
                digest.update(stream.read(_SAMPLE))
    return digest.hexdigest()[:16]
